"""Writes docs/settings.md: every setting of a node and of a coordinator, from the declarations and the comments beside them.

`python -m deploy.settings_page` writes the page anew; tests/test_documents.py holds it to the declarations.
"""

import ast
import inspect
import io
import tokenize
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from coordinator.settings import CoordinatorSettings
from node.reload import is_live
from node.settings import NodeSettings
from protocol.blobs import write_atomically

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# Settings

Written by `python -m deploy.settings_page` from `node/settings.py` and `coordinator/settings.py`: change it there.

A setting comes from, the later wins: its default; the TOML file; the environment; a flag of the command. `[api] port = 9000` in the file
is `MILPA_NODE_API_PORT=9000` in the environment (the coordinator's begin with `MILPA_COORDINATOR_`; lists with commas:
`MILPA_NODE_PEERS_ASK=base,ridge`). Names nobody knows are refused, in both. Secrets are never written into a setting: a key that ends in
`_file` names the file that holds one, for the node's service as `credential:FILE` in /etc/milpa/secrets.

    milpa-node config show             # every setting, its value, and who set it
    sudo milpa-node config check       # names, types, ranges and files; changes nothing
    milpa-coordinator config show

"""


def page() -> str:
    """The whole page."""
    node = "A key whose last column says *now* changes with `sudo milpa-node reload`; the others wait for a restart."
    parts = [HEAD, "## Node\n\n", node + "\n\n", *_sections(NodeSettings, live=True)]
    return "".join([*parts, "## Coordinator\n\n", *_sections(CoordinatorSettings, live=False)]).rstrip() + "\n"


def _sections(kind: type[msgspec.Struct], *, live: bool) -> list[str]:
    return [_section(field.name, field.type, live=live) for field in msgspec.structs.fields(kind)]


def _section(name: str, kind: Any, *, live: bool) -> str:
    told, defaults = _comments(kind), kind()
    lines = [f"### [{name}]\n", "", inspect.cleandoc(kind.__doc__ or ""), "", "| key | default | |", "|---|---|---|"]
    if live:
        lines[-2:] = ["| key | default | | changes |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(kind):
        key, meaning = field.encode_name, told.get(field.name, "")
        choices = " \\| ".join(f"`{choice}`" for choice in _choices(field.type))
        cells = [f"`{key}`", f"`{_toml(getattr(defaults, field.name))}`", "; ".join(part for part in (choices, meaning) if part)]
        cells += [("now" if is_live(f"{name}.{key}") else "restart")] if live else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(line.rstrip("\n") for line in lines) + "\n\n"


def _comments(kind: Any) -> dict[str, str]:
    """Field -> the comment on its line; those of a base class first."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not (issubclass(base, msgspec.Struct) and base is not msgspec.Struct):
            continue
        source = inspect.getsource(base)
        comments = {
            token.start[0]: token.string.removeprefix("#").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (declared,) = ast.parse(source).body
        assert isinstance(declared, ast.ClassDef)
        for part in declared.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.end_lineno in comments:
                found[part.target.id] = comments[part.end_lineno].replace("|", "\\|")
    return found


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return "[" + ", ".join(map(_toml, value)) + "]" if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    write_atomically(PAGE, page().encode())
