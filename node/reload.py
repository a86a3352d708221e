"""What of the settings may change while the node runs. No I/O: two settings in, a decision out.

Everything that is not listed needs a restart, and is named to the operator rather than taken half. Nothing is taken from settings that do
not pass `node.settings.check`: a broken file changes nothing.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from node.settings import NodeSettings

LIVE = frozenset({"model.budget", "peers.deadline_s", "update.poll_s"})  # single keys
LIVE_SECTIONS = frozenset(
    {"confidence", "limits", "learn", "spool"}
)  # whole sections; a new part adds its own here and takes them in `Part.reload`
NEVER = frozenset({"spool.folder", "confidence.agree"})  # in a live section, and yet fixed


class Change(msgspec.Struct, frozen=True):
    """One setting that differs."""

    name: str  # "model.budget"
    before: Any
    after: Any
    live: bool


def changes(old: NodeSettings, new: NodeSettings) -> tuple[Change, ...]:
    """What differs, by name."""
    found = []
    for section, keys in _values(old).items():
        for key, before in keys.items():
            after = getattr(getattr(new, section), key)
            if after != before:
                name = f"{section}.{key}"
                found.append(Change(name, before, after, is_live(name)))
    return tuple(found)


def is_live(name: str) -> bool:
    """Whether that setting can change without a restart."""
    return name in LIVE or (name.partition(".")[0] in LIVE_SECTIONS and name not in NEVER)


def merged(old: NodeSettings, found: tuple[Change, ...]) -> NodeSettings:
    """`old` with those changes that are live."""
    sections: dict[str, Any] = {}
    for change in found:
        section, _, key = change.name.partition(".")
        if change.live:
            sections[section] = msgspec.structs.replace(sections.get(section, getattr(old, section)), **{key: change.after})
    return msgspec.structs.replace(old, **sections)


def _values(settings: NodeSettings) -> Mapping[str, Mapping[str, Any]]:
    return {name: msgspec.structs.asdict(getattr(settings, name)) for name in settings.__struct_fields__}
