"""Settings from TOML, environment and flags, each value with its origin. No global state.

Order, the later wins: default, TOML file, environment (MILPA_<SIDE>_<SECTION>_<KEY>), command-line flag.
A settings class is a frozen msgspec.Struct whose fields are sections, themselves frozen structs with defaults:

    class Broker(msgspec.Struct, frozen=True):
        host: str = "127.0.0.1"
    class NodeSettings(msgspec.Struct, frozen=True):
        broker: Broker = Broker()

A key that Python keeps for itself is named by its field: `class_: str = msgspec.field(name="class")`. Unknown sections and keys are
errors with a suggestion, because a setting that is silently ignored is a trap. A key whose name ends in `_file` is the way to name a
secret: secrets are never inline.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from protocol.errors import BadInput
from protocol.names import known

S = TypeVar("S", bound=msgspec.Struct)


class Origin(msgspec.Struct, frozen=True):
    """One setting, its value and who set it."""

    name: str  # "broker.host"
    value: Any
    origin: str  # "default", "file /etc/milpa/node.toml", "environment MILPA_NODE_BROKER_HOST", "flag"


def load(
    kind: type[S],
    *,
    side: str,
    file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
) -> tuple[S, tuple[Origin, ...]]:
    """Read settings of `kind`.

    Args:
        side: "node", "coordinator" or "fleet": the middle of the environment variables' names.
        flags: {"broker.host": value}; None values are flags not given.

    Raises:
        BadInput: the file is missing or not TOML, or a value has the wrong type.
        UnknownName: a section or key nobody reads.
    """
    sections = {field.name: field.type for field in msgspec.structs.fields(kind)}
    values = {name: _defaults(section) for name, section in sections.items()}
    origins = {(section, key): "default" for section, keys in values.items() for key in keys}

    def put(section: str, key: str, value: Any, origin: str) -> None:
        known(section, sections, what="section")
        known(key, values[section], what=f"setting in [{section}]")
        field = next(f for f in msgspec.structs.fields(sections[section]) if f.encode_name == key)
        try:
            values[section][key] = msgspec.convert(value, field.type, strict=not isinstance(value, str))
        except msgspec.ValidationError as error:
            raise BadInput(f"{section}.{key} ({origin}): {error}") from error
        origins[section, key] = origin

    if file is not None:
        for section, keys in _read_toml(file).items():
            known(section, sections, what=f"section in {file}")
            if not isinstance(keys, dict):
                raise BadInput(f"{file}: {section!r} must be a section, written [{section}]")
            for key, value in keys.items():
                put(section, key, value, f"file {file}")
    prefix = f"MILPA_{side.upper()}_"
    for name, value in sorted(environment.items()):
        if name.startswith(prefix) and name != prefix + "CONFIG":
            section, _, key = name[len(prefix) :].lower().partition("_")
            put(section, key, value.split(",") if _is_list(sections, section, key) else value, f"environment {name}")
    for name, value in (flags or {}).items():
        if value is not None:
            section, _, key = name.partition(".")
            put(section, key, value, "flag")
    settings = kind(**{name: _made(sections[name], values[name]) for name in sections})
    listed = tuple(Origin(f"{s}.{k}", values[s][k], origin) for (s, k), origin in sorted(origins.items()))
    return settings, listed


def _defaults(section: Any) -> dict[str, Any]:
    instance = section()
    return {field.encode_name: getattr(instance, field.name) for field in msgspec.structs.fields(section)}


def _made(section: Any, values: Mapping[str, Any]) -> Any:
    return section(**{field.name: values[field.encode_name] for field in msgspec.structs.fields(section)})


def _is_list(sections: Mapping[str, Any], section: str, key: str) -> bool:
    if section not in sections:
        return False
    return isinstance(_defaults(sections[section]).get(key), tuple)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror}; give another with --config") from error
    except (ValueError, RecursionError) as error:  # ValueError: of its form, its encoding, a number of over 4,300 digits
        raise BadInput(f"{file} is not TOML: {error}") from error
