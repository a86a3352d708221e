"""`milpa-coordinator round`: ask the fleet what it learned, and release it if it is better."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from protocol.console import print_json, progress_bar, stderr
from protocol.errors import BadInput
from protocol.names import checked_name


def round(
    heldout: list[str] = typer.Option(..., help="NAME=FILE.jsonl, once a set: 'general' and the sites. Judges the merged model."),
    dev: list[str] = typer.Option([], help="NAME=FILE.jsonl: other records, to choose eta and to fit the calibration."),
    store: Path | None = typer.Option(None, help="The coordinator's folder."),
    config: Path | None = typer.Option(None, help="The coordinator's TOML file."),
    superlink: str | None = typer.Option(None, help="HOST:PORT; by default what the key folder says."),
    superlink_keys: Path | None = typer.Option(None, help="State folder of the SuperLink, with its keys; by default STORE/superlink."),
    superlink_ca_file: Path | None = typer.Option(
        None, help="With --superlink: who signs its certificate (PEM); without it no TLS. By default what the key folder says."
    ),
    site: list[str] = typer.Option([], help="Sites to wait for; by default those with a held-out set."),
    deadline: float = typer.Option(120.0, min=1.0, help="Seconds for collecting; who has not answered then is left out."),
    eta: str = typer.Option("1", help="Server scales to try on the dev sets, with commas: 1 averages, N adds up."),
    max_rank: int = typer.Option(64, min=1, help="Rank of the merged adapter at most."),
    clip: float = typer.Option(0.0, min=0.0, help="Clip adapters at this many times the median norm; 0: no."),
    min_examples: int = typer.Option(16, min=1, help="Confirmed examples an adapter must have seen."),
    norm_share: float = typer.Option(0.5, min=0.0, help="Refuse adapters that change the weights by more than this share of their norm."),
    margin: float = typer.Option(0.03, min=0.0, help="What may be lost on the general set, of 1."),
    threads: int = typer.Option(2, min=1, max=256, help="Engines side by side."),
    seed: int = typer.Option(12345, help="Of the bootstrap intervals."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Everything but the release."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object to stdout and nothing else there."),
) -> None:
    """Collect adapters, admit, merge, compare with the active release, and publish release n+1 only if it is better.

    Nodes answer in their sync windows (`milpa-node sync`). A round that was interrupted is taken up by the same command.

    Examples:

        milpa-coordinator round --store ./store --heldout general=general.jsonl --heldout esteli=esteli.jsonl --dev esteli=dev.jsonl

        milpa-coordinator round --store ./store --heldout esteli=esteli.jsonl --deadline 3600 --eta 1,2 --dry-run --json
    """
    from coordinator.federation.round import GENERAL, Options, run_round
    from coordinator.federation.superlink import Keys, Place, place_in, read_key
    from coordinator.fleet.ledger import Ledger
    from coordinator.fleet.publishing import Publisher
    from coordinator.forge.pairs import read_records
    from coordinator.settings import load_settings
    from protocol.tasks import task_named

    settings, _ = load_settings(config, flags={"store.dir": str(store) if store else None})
    folder = settings.store_dir
    latest = Publisher(folder / "repository").latest()
    if latest is None:
        raise BadInput(f"{folder} has no release yet; publish one before a round")
    task = task_named(latest.task)
    files = named(heldout, "--heldout")
    judged = {name: read_records(file, task) for name, file in files.items()}
    chosen = {name: read_records(file, task) for name, file in named(dev, "--dev").items()}
    etas = read_etas(eta)
    key_folder = superlink_keys or folder / "superlink"
    place = Place(superlink) if superlink else place_in(key_folder)
    if place is None:
        raise BadInput(f"no SuperLink is known: {key_folder} has no superlink.json; give --superlink HOST:PORT and --superlink-keys")
    keys = Keys(control=read_key(key_folder / "control.token"), fleet="", secret=read_key(key_folder / "superexec.secret"))
    sites = tuple(site) or tuple(name for name in judged if name != GENERAL)
    options = Options(
        expected=sites, deadline_s=deadline, etas=etas, max_rank=max_rank, clip_factor=clip, minimum_examples=min_examples,
        norm_share=norm_share, margin=margin, dry_run=dry_run, threads=threads, seed=seed,
    )  # fmt: skip
    ledger = Ledger(settings.ledger_url)
    ledger.migrate()
    try:
        with progress_bar() as bar:
            line = bar.add_task("round", total=None)
            result = run_round(
                folder, ledger=ledger, superlink=place.address, superlink_ca=str(superlink_ca_file or place.ca), keys=keys,
                heldout=judged, dev=chosen, files=files, options=options,
                progress=lambda what, done, total: bar.update(line, description=what, completed=done, total=total or None),
            )  # fmt: skip
    finally:
        ledger.close()
    if as_json:
        print_json(result)
    else:
        show(result)


def named(given: Sequence[str], option: str) -> dict[str, Path]:
    """NAME=FILE -> files by name.

    Raises:
        BadInput: not of that form, or a name twice.
    """
    found: dict[str, Path] = {}
    for one in given:
        name, sign, file = one.partition("=")
        if not sign or not file:
            raise BadInput(f"{option} {one!r}: write NAME=FILE.jsonl, such as esteli=held-out.jsonl")
        if checked_name(name, what="set") in found:
            raise BadInput(f"{option}: {name!r} is given twice")
        found[name] = Path(file)
    return found


def read_etas(text: str) -> tuple[float, ...]:
    """ "1,2" -> (1.0, 2.0).

    Raises:
        BadInput: not positive numbers with commas.
    """
    try:
        etas = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BadInput(f"--eta {text!r}: write positive numbers with commas, such as 1,2") from error
    if not all(0 < eta < 1000 for eta in etas):
        raise BadInput(f"--eta {text!r}: each must be above 0 and below 1000")
    return etas


def show(result: dict[str, Any]) -> None:
    """The result for people."""
    for one in result["accepted"]:
        typer.echo(f"  {one['site']}: accepted, {one['examples']} examples, norm {one['norm']:.3g}")
    for one in result["refused"]:
        typer.echo(f"  {one['site'] or 'a node'}: {one['reason']} ({one['detail']})")
    typer.echo(f"round {result['round']}: {result['decision']}" + (f", release {result['release']}" if result["release"] else ""))
    for reason in result["reasons"]:
        typer.echo(f"  {reason}")
    stderr.print(f"{result['seconds']:.0f} s", highlight=False)
