"""`milpa-fleet`: a whole fleet on this machine, for trying, showing and measuring."""

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import typer

from protocol.console import print_json, print_origins, run, stderr
from protocol.errors import BadInput
from protocol.settings import Origin, load

app = typer.Typer(
    pretty_exceptions_enable=False,  # a traceback with local values would show secrets in a log
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="A whole Milpa fleet on this machine: real processes, loopback only.",
)
config_app = typer.Typer(no_args_is_help=True, help="Settings and where each comes from.")
app.add_typer(config_app, name="config")


class DemoSection(msgspec.Struct, frozen=True):
    """`milpa-fleet demo`."""

    seed: int = 1
    size: str = "default"
    runs: str = "runs"  # each run gets a folder of its own in it
    work: str = "var/models"  # what is kept between runs: models by the digest of what made them


class FleetSection(msgspec.Struct, frozen=True):
    """`milpa-fleet up`."""

    folder: str = "var/fleet"
    sites: tuple[str, ...] = ("esteli", "malacatoya")
    budget: float = 0.25  # share of a site's answers that may be handed on
    web_port: int = 0  # of the dashboard; 0: a free one, kept from then on


class FleetSettings(msgspec.Struct, frozen=True):
    """All sections."""

    demo: DemoSection = DemoSection()
    fleet: FleetSection = FleetSection()


CONFIG = typer.Option(None, "--config", help="TOML file; MILPA_FLEET_CONFIG names one too.")


def settings(file: Path | None, **flags: Any) -> tuple[FleetSettings, tuple[Origin, ...]]:
    """The settings: default, TOML, MILPA_FLEET_<SECTION>_<KEY>, flag."""
    named = os.environ.get("MILPA_FLEET_CONFIG")
    return load(
        FleetSettings,
        side="fleet",
        file=file or (Path(named) if named else None),
        flags={k.replace("__", "."): v for k, v in flags.items()},
    )


@app.command()
def demo(
    seed: int = typer.Option(None, help="Of the simulation, the training and the intervals. Default 1."),
    keep: bool = typer.Option(False, "--keep", help="Leave the fleet and its dashboard up; end it with `milpa-fleet down`."),
    as_json: bool = typer.Option(False, "--json", help="Print the figures as one JSON object."),
    size: str = typer.Option(None, help="default (15 minutes on two cores) or tiny (the same path in a few minutes; shows nothing)."),
    runs: Path = typer.Option(None, help="Folder for the runs. Default runs/."),
    work: Path = typer.Option(None, help="Folder for models kept between runs. Default var/models/."),
    config: Path = CONFIG,
) -> None:
    """Run the whole loop once: distil, prove, release, answer, escalate, learn, merge, release again.

    Everything is real: mosquitto, a Flower SuperLink, the coordinator, a base station and two site nodes, each a process of its own.
    The models are kept, so a second run skips what is already true. Ctrl-C stops every process it started.

    Examples:

        milpa-fleet demo

        milpa-fleet demo --seed 7 --keep

        milpa-fleet demo --json > figures.json
    """
    from deploy.demo import SIZES, Demo, new_run_dir, show
    from protocol.names import known

    chosen, _ = settings(
        config, demo__seed=seed, demo__size=size, demo__runs=str(runs) if runs else None, demo__work=str(work) if work else None
    )
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    run_dir = new_run_dir(Path(chosen.demo.runs))
    loop = Demo(
        run_dir, work=Path(chosen.demo.work), seed=chosen.demo.seed, size=SIZES[known(chosen.demo.size, SIZES, what="size")], keep=keep,
        web_port=chosen.fleet.web_port,
    )  # fmt: skip
    result = loop.run()
    if keep:
        latest_fleet().parent.mkdir(parents=True, exist_ok=True)
        latest_fleet().write_text(str(loop.fleet.folder))
    if as_json:
        print_json(result)
    else:
        show(result, keep=keep)


@app.command()
def up(
    folder: Path = typer.Option(None, help="The fleet's folder. Default var/fleet/."),
    sites: str = typer.Option(None, help="Site nodes by name, with commas."),
    student: Path = typer.Option(None, help="GGUF to publish as the first release's student."),
    teacher: Path = typer.Option(None, help="GGUF for the base station that answers what sites are unsure of."),
    task: str = typer.Option("ranch", help="What the models do: ranch, translate-english-spanish, ..."),
    as_json: bool = typer.Option(False, "--json", help="Print addresses as JSON."),
    config: Path = CONFIG,
) -> None:
    """Start a fleet in the background: broker, SuperLink, coordinator, a base station and the sites.

    Without a release the nodes wait for one: give --student and --teacher, or publish with `milpa-coordinator publish`.

    Examples:

        milpa-fleet up --student student.gguf --teacher teacher.gguf

        milpa-fleet up --folder /srv/milpa --sites north,south
    """
    from deploy.fleet import PEER, LocalFleet
    from deploy.processes import Processes

    chosen, _ = settings(config, fleet__folder=str(folder) if folder else None, fleet__sites=sites)
    names = tuple(chosen.fleet.sites) if sites is None else tuple(name.strip() for name in sites.split(","))
    if (student is None) != (teacher is None):
        raise BadInput("give --student and --teacher together: a base station without a larger model has nothing to add")
    place = Path(chosen.fleet.folder)
    fleet = LocalFleet(place, Processes(place, outlive=True))
    fleet.prepare(sites=names, peer=PEER, task=task, budget=chosen.fleet.budget, web_port=chosen.fleet.web_port)
    if student and teacher:
        fleet.publish_first(task, student=student, teacher=teacher)
    try:
        fleet.start()
    except BaseException:
        fleet.stop()
        raise
    latest_fleet().parent.mkdir(parents=True, exist_ok=True)
    latest_fleet().write_text(str(fleet.folder))
    if as_json:
        print_json(fleet.describe())
    else:
        stderr.print(f"the fleet is up; dashboard: {fleet.dashboard}; set-up token: {fleet.setup_token_file()}", highlight=False)


@app.command()
def down(folder: Path = typer.Option(None, help="The fleet's folder. Default: the one started last.")) -> None:
    """Stop every process of a fleet. What it knows stays in its folder.

    Examples:

        milpa-fleet down

        milpa-fleet down --folder /srv/milpa
    """
    from deploy.fleet import LocalFleet
    from deploy.processes import Processes

    place = folder or remembered_fleet()
    processes = Processes(place, outlive=True)
    count = len(processes.children)
    LocalFleet(place, processes).stop()
    stderr.print(f"stopped {count} processes of {place}", highlight=False)


@app.command()
def status(
    folder: Path = typer.Option(None, help="The fleet's folder. Default: the one started last."),
    as_json: bool = typer.Option(False, "--json", help="Print as one JSON object."),
) -> None:
    """What runs, and what each node says of itself. Exit code 1 when a part is down.

    Examples:

        milpa-fleet status

        milpa-fleet status --json
    """
    from deploy.fleet import LocalFleet
    from deploy.processes import Processes

    place = folder or remembered_fleet()
    found = LocalFleet(place, Processes(place, outlive=True)).describe()
    if as_json:
        print_json(found)
    else:
        for name, part in found["parts"].items():
            node = part.get("node", {})
            told = f"release {node.get('release', 0)}" if node else ""
            typer.echo(f"{name:<16} {'running' if part['running'] else 'down':<8} {part['url']:<28} {told}")
    if not all(part["running"] for part in found["parts"].values()):
        raise typer.Exit(1)


@app.command()
def secrets(
    inside: Path = typer.Option(None, help="Fill this folder's service folders instead (what the `init` service does, in its container)."),
    nodes: str = typer.Option("base-station,esteli,malacatoya", help="With --inside: node names, with commas."),
    groups: str = typer.Option("", envvar="MILPA_GROUPS", help="With --inside: base stations that share questions, hills=NODE+NODE,..."),
    gateways: str = typer.Option("", envvar="MILPA_GATEWAYS", help="With --inside: radio gateways, each with whom it speaks for"),
) -> None:
    """Make the secrets of a fleet in containers: once, on this machine, never in git. What exists stays.

    Examples:

        milpa-fleet secrets && docker compose up -d
    """
    from deploy.secrets import fill, named, write_env

    if inside is not None:
        names = [name.strip() for name in nodes.split(",")]
        fill(
            inside, names, database_password=os.environ.get("POSTGRES_PASSWORD", ""),
            groups=named(groups, names, what="group"), gateways=named(gateways, names, what="gateway"),
        )  # fmt: skip
        return
    if not Path("docker-compose.yml").exists():
        raise BadInput("there is no docker-compose.yml here; run this in the folder that has it")
    stderr.print("wrote .env" if write_env(Path()) else ".env is there already; nothing was changed", highlight=False)


@config_app.command("show")
def config_show(config: Path = CONFIG, as_json: bool = typer.Option(False, "--json", help="Print as JSON.")) -> None:
    """Every setting, its value and who set it.

    Examples:

        milpa-fleet config show

        MILPA_FLEET_DEMO_SEED=7 milpa-fleet config show --json
    """
    print_origins(settings(config)[1], as_json=as_json)


def latest_fleet() -> Path:
    """The file that names the fleet started last from this folder."""
    return Path("var/latest-fleet")


def remembered_fleet() -> Path:
    """The fleet started last.

    Raises:
        BadInput: none was.
    """
    try:
        return Path(latest_fleet().read_text().strip())
    except FileNotFoundError as error:
        raise BadInput("no fleet was started from this folder; name one with --folder, or start one with `milpa-fleet up`") from error


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
