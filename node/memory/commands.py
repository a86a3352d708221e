"""`milpa-node memory`: what this site remembers. Through the running node's API; on its folder when none runs.

A file made here by root would be closed to the node's own user, so the folder is only touched when nobody answers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from protocol.console import print_json

app = typer.Typer(no_args_is_help=True, help="What this site remembers: confirmed answers, and your own patterns.")

Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file; default: MILPA_NODE_CONFIG, else /etc/milpa/node.toml.", metavar="FILE")
]
StateDir = Annotated[str | None, typer.Option("--state-dir", help="The node's folder (node.state_dir).")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Key = Annotated[str, typer.Argument(help="The entry's key, or how it begins.", metavar="KEY")]

KEY_SHOWN = 12  # digits


@app.command("list")
def list_entries(
    kind: Annotated[str, typer.Option(help="Only this kind: answer or pattern.")] = "",
    shareable: Annotated[bool, typer.Option("--shareable", help="Only patterns that may leave the site, and whether they have.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 100,
    config: Config = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """What is remembered, patterns first.

    Examples:

        milpa-node memory list --kind pattern

        milpa-node memory list --shareable --json
    """
    query = f"kind={kind}&shareable={str(shareable).lower()}&limit={limit}"
    found = _told(
        config, state_dir, "GET", f"/v1/memory?{query}", None,
        lambda memory, _: {"object": "list", "data": memory.listed(kind=kind, shareable=shareable, limit=limit)},
    )  # fmt: skip
    if json:
        print_json(found)
        return
    for one in found["data"]:
        left = " [has left]" if one["shared"] else " [may leave]" if one["shareable"] else ""
        typer.echo(_plain(f"{one['key'][:KEY_SHOWN]}  {one['kind']:<7} {one['lang']}  {one['when']}  ->  {one['text']}{left}"))
    if not found["data"]:
        typer.echo("nothing")


@app.command("add")
def add(
    when: Annotated[str, typer.Argument(help="What you see: words that stand in a record.", metavar="WHEN")],
    verdict: Annotated[str, typer.Option(help="What it means: a verdict of the task.")] = "",
    text: Annotated[str, typer.Option(help="The sentence after the verdict; for free text, the answer.")] = "",
    lang: Annotated[str, typer.Option(help="Language of the records it is for.")] = "en",
    task: Annotated[str, typer.Option(help="Task, if not the node's own.")] = "",
    shareable: Annotated[bool, typer.Option("--shareable", help="This text may leave the site, to the coordinator.")] = False,
    config: Config = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Remember "when you see this, it means that". It answers from the next record on, without the model.

    Examples:

        milpa-node memory add "chuco el espejo" --lang es --verdict panel-soiled --text "Panel sucio"
    """
    from protocol.tasks import task_named

    body = {"when": when, "verdict": verdict, "text": text, "lang": lang, "task": task, "shareable": shareable}
    told = _told(
        config, state_dir, "POST", "/v1/memory", body,
        lambda memory, settings: memory.add(
            task_named(task or settings.model.task), lang=lang, when=when, verdict=verdict, text=text, shareable=shareable
        ),
    )  # fmt: skip
    if json:
        print_json(told)
        return
    typer.echo(_plain(f"{told['key'][:KEY_SHOWN]}  {told['when']}  ->  {told['text']}"))
    if told["against"]:
        typer.echo(f"look again: of {told['fits']} remembered records it fits, {told['against']} mean something else")


@app.command("share")
def share(
    key: Key,
    stop: Annotated[bool, typer.Option("--stop", help="Do not let it leave any more. What has left has left.")] = False,
    config: Config = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Let one pattern leave the site: its text goes to the coordinator once the link is rich enough.

    Examples:

        milpa-node memory share 5f0c1a2b

        milpa-node memory share 5f0c1a2b --stop
    """
    told = _told(
        config, state_dir, "POST", f"/v1/memory/{key}", {"shareable": not stop}, lambda memory, _: memory.share(key, shareable=not stop)
    )
    if json:
        print_json(told)
    else:
        typer.echo(
            _plain(f"{'may leave' if told['shareable'] else 'stays here'}{', has left before' if told['shared'] else ''}: {told['when']}")
        )


@app.command("forget")
def forget(key: Key, config: Config = None, state_dir: StateDir = None, json: AsJson = False) -> None:
    """Forget an entry at once; an answer is not learned from any more either.

    Examples:

        milpa-node memory forget 5f0c1a2b
    """
    told = _told(config, state_dir, "DELETE", f"/v1/memory/{key}", None, lambda memory, _: memory.forget(key))
    if json:
        print_json(told)
    else:
        typer.echo(_plain(f"forgotten: {told['when']}  ->  {told['text']}"))


def _told(
    config: Path | None,
    state_dir: str | None,
    method: str,
    path: str,
    body: dict[str, Any] | None,
    here: Callable[[Any, Any], dict[str, Any]],
) -> dict[str, Any]:
    """The running node's answer, or what `here` does with the memory on disk."""
    from node.client import call
    from node.settings import read

    settings, _ = read(config, flags={"node.state_dir": state_dir})
    told = call(settings, method, path, body)
    if told is not None:
        return told
    with _on_disk(settings) as memory:
        return here(memory, settings)


@contextmanager
def _on_disk(settings: Any) -> Iterator[Any]:
    from node.memory.recall import Memory
    from node.store import Store
    from protocol.errors import Unavailable

    file = settings.state_dir / "node.db"
    if not file.is_file():
        raise Unavailable(f"no node runs here and {settings.state_dir} remembers nothing yet; start `milpa-node run`")
    store = Store(file)
    try:
        yield Memory(store, None, settings.state_dir, settings.memory)
    finally:
        store.close()


def _plain(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)  # a record may hold anything, terminal codes too
