"""`milpa-node`: the command line of a node. Heavy imports happen inside the commands; `learn` and `sync` live in node/learn/commands.py."""

import functools
import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from node.memory.commands import app as memory
from protocol.console import print_json, print_origins, run, stderr
from protocol.errors import BadInput

LEARNING = ("learn", "sync")  # commands of the training process

app = typer.Typer(
    pretty_exceptions_enable=False,  # a traceback with local values would show secrets in a log
    no_args_is_help=True,
    help="A site node: answers alone, learns at home, asks a peer when unsure.",
    rich_markup_mode="markdown",
)
config = typer.Typer(no_args_is_help=True, help="Settings and where each comes from.")
app.add_typer(config, name="config")
app.add_typer(memory, name="memory")

Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file; default: MILPA_NODE_CONFIG, else /etc/milpa/node.toml.", metavar="FILE")
]
StateDir = Annotated[str | None, typer.Option("--state-dir", help="The node's folder (node.state_dir).")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("run")
def run_node(
    config: Config = None,
    state_dir: StateDir = None,
    name: Annotated[str | None, typer.Option(help="Name of this node (node.name).")] = None,
    model: Annotated[str | None, typer.Option(help="A fixed GGUF instead of releases (model.path).")] = None,
    task: Annotated[str | None, typer.Option(help="Task of the fixed GGUF (model.task).")] = None,
    host: Annotated[str | None, typer.Option(help="Address of the API (api.host).")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API, 0 for any (api.port).")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the model (model.threads).")] = None,
    broker: Annotated[str | None, typer.Option(help="Host of the MQTT broker (broker.host).")] = None,
) -> None:
    """Run the node until SIGTERM or Ctrl-C. It answers from its active release, with no network at all.

    Examples:

        milpa-node run --config /etc/milpa/node.toml

        milpa-node run --model student.gguf --task ranch --port 8642
    """
    from node import service
    from node.client import refuse_root
    from node.settings import read
    from protocol import logs

    flags = {
        "node.state_dir": state_dir, "node.name": name, "model.path": model, "model.task": task, "api.host": host, "api.port": port,
        "model.threads": threads, "broker.host": broker,
    }  # fmt: skip
    settings, _ = read(config, flags=flags)
    refuse_root(settings, instead="use: systemctl start milpa-node, or another --state-dir")
    logs.set_up(settings.logs.form, settings.logs.level)
    service.run(settings, read_again=lambda: read(config, flags=flags)[0])


@app.command("reload")
def reload_node(config: Config = None, state_dir: StateDir = None, json: AsJson = False) -> None:
    """Have the running node read its settings again, and say what changed. A broken file changes nothing.

    Exit code 0: all is taken; 1: some settings wait for a restart, and are named.

    Examples:

        milpa-node reload --config /etc/milpa/node.toml
    """
    from node.client import reload_daemon
    from node.settings import read

    settings, _ = read(config, flags={"node.state_dir": state_dir})
    told = reload_daemon(settings)
    waits = told["restart"]
    if json:
        print_json(told)
    else:
        typer.echo(f"taken; a restart is needed for: {', '.join(waits)}" if waits else "taken")
    if waits:
        raise typer.Exit(1)


@app.command("ask")
def ask(
    text: Annotated[str, typer.Argument(help="The record: sensor window and note, or the sentence to translate.")],
    lang: Annotated[str, typer.Option(help="Language of the answer.")] = "en",
    task: Annotated[str | None, typer.Option(help="Task, if not the node's own.")] = None,
    model: Annotated[str | None, typer.Option(help="A GGUF to ask instead of the node's, with --task.")] = None,
    config: Config = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Ask the node on this machine. If none runs, the active model is loaded here, and nothing is stored.

    Examples:

        milpa-node ask "soil 12% 11% 9%, pump off, note: la hoja se dobla" --lang es

        milpa-node ask "Where is the well?" --task translate-english-spanish --json
    """
    from node.client import ask_daemon, ask_here
    from node.settings import read

    settings, _ = read(config, flags={"node.state_dir": state_dir, "model.path": model, "model.task": task})
    answer = None if model else ask_daemon(settings, text, lang=lang, task=task or "")
    if answer is None:
        if not model:
            stderr.print("no node runs here: loading the active model for this one answer; it is not stored", style="dim")
        answer = ask_here(settings, text, lang=lang)
    if json:
        print_json(answer)
        return
    typer.echo("".join(sign if sign.isprintable() else " " for sign in answer["text"]))  # a model may say anything, terminal codes too
    note = ", provisional: a peer is being asked" if answer["provisional"] else ""
    stderr.print(f"{answer['reason']}{note}", style="dim", markup=False, highlight=False)


@app.command("status")
def status(config: Config = None, state_dir: StateDir = None, json: AsJson = False) -> None:
    """How the node is: model, answers, broker, updates.

    Examples:

        milpa-node status

        milpa-node status --json
    """
    from node.client import daemon_status, status_on_disk
    from node.settings import read

    settings, _ = read(config, flags={"node.state_dir": state_dir})
    found = daemon_status(settings) or status_on_disk(settings)
    if json:
        print_json(found)
        return
    for key, value in found.items():
        typer.echo(f"{key:<10} {_plain(value)}")


@app.command("doctor")
def doctor(config: Config = None, state_dir: StateDir = None, json: AsJson = False) -> None:
    """Look for what keeps a node from working, and say what to do. Exit code 1 when something must be done.

    Examples:

        milpa-node doctor --config /etc/milpa/node.toml

        milpa-node doctor --json
    """
    from node.doctor import examine
    from node.settings import read

    settings, _ = read(config, flags={"node.state_dir": state_dir})
    findings = examine(settings)
    if json:
        print_json({"ok": all(finding.state != "bad" for finding in findings), "findings": findings})
    else:
        for finding in findings:
            typer.echo(f"{finding.state:<5} {finding.what}: {finding.found}{'; ' + finding.advice if finding.advice else ''}")
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


@app.command("feedback")
def feedback(
    answer: Annotated[str, typer.Argument(help="Id of the answer.", metavar="ID")],
    verdict: Annotated[str, typer.Option(help="The right verdict.")] = "",
    text: Annotated[str, typer.Option(help="The right text, or the sentence after the verdict.")] = "",
    config: Config = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Correct or confirm an answer; the node learns from it.

    Examples:

        milpa-node feedback 5f0c... --verdict leak --text "the pipe at the north tank lost pressure overnight"
    """
    from node.client import send_feedback
    from node.settings import read

    settings, _ = read(config, flags={"node.state_dir": state_dir})
    changed = send_feedback(settings, answer, verdict=verdict, text=text)
    if json:
        print_json(changed)
    else:
        typer.echo(f"{changed['state']}: {changed['text']}")


@config.command("check")
def config_check(config: Config = None, state_dir: StateDir = None, json: AsJson = False) -> None:
    """Whether the settings can work: names, types, ranges, and the files they name. Touches nothing that runs.

    Examples:

        milpa-node config check --config /etc/milpa/node.toml && milpa-node reload
    """
    from node.settings import missing_files, read

    settings, origins = read(config, flags={"node.state_dir": state_dir})
    missing = missing_files(settings)
    if json:
        print_json({"ok": not missing, "missing": missing, "set": {o.name: o.value for o in origins if o.origin != "default"}})
    elif not missing:
        typer.echo(f"the settings can work; {sum(o.origin != 'default' for o in origins)} of {len(origins)} are set")
    if missing:
        raise BadInput("; ".join(f"{name} names {file}, which cannot be read" for name, file in missing.items()))


@config.command("show")
def config_show(config: Config = None, state_dir: StateDir = None, json: AsJson = False) -> None:
    """Every setting, its value and who set it.

    Examples:

        milpa-node config show --config /etc/milpa/node.toml

        MILPA_NODE_API_PORT=9000 milpa-node config show --json
    """
    from node.settings import read

    _, origins = read(config, flags={"node.state_dir": state_dir})
    print_origins(origins, as_json=json)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner not in ("", None)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if value not in ("", None) else "-"


@functools.cache
def complete() -> typer.Typer:
    """The program with all its commands."""
    module = importlib.import_module("node.learn.commands")
    for name in LEARNING:
        app.command(name)(getattr(module, name))
    return app


def main() -> None:
    """Entry point: one clear line and an exit code for every error that a person can act on."""
    run(complete())


if __name__ == "__main__":
    main()
