"""What of the settings may change while the node runs. No I/O: two settings in, a decision out.

Everything that is not listed needs a restart, and is named to the operator rather than taken half. Nothing is taken from settings that do
not pass `node.settings.check`: a broken file changes nothing.
"""

from typing import Any

import msgspec

from node.settings import NodeSettings

LIVE = frozenset({"link.bytes_a_day", "model.budget", "peers.deadline_s", "update.poll_s"})  # single keys
# whole sections; a new part adds its own here and takes them in `Part.reload`
LIVE_SECTIONS = frozenset({"confidence", "learn", "limits", "power", "spool"})
# in a live section, and yet fixed: what is built, or opened, at start by them
NEVER = frozenset({"confidence.agree", "power.battery", "power.source", "spool.enabled", "spool.folder"})


class Change(msgspec.Struct, frozen=True):
    """One setting that differs."""

    name: str  # "model.budget"
    field: str  # "budget", as the structure calls it
    before: Any
    after: Any
    live: bool


def changes(old: NodeSettings, new: NodeSettings) -> tuple[Change, ...]:
    """What differs, by name."""
    found = []
    for section in old.__struct_fields__:
        ours, theirs = getattr(old, section), getattr(new, section)
        for field in msgspec.structs.fields(ours):
            before, after = getattr(ours, field.name), getattr(theirs, field.name)
            if after != before:
                name = f"{section}.{field.encode_name}"  # as it is written in the file
                found.append(Change(name, field.name, before, after, is_live(name)))
    return tuple(found)


def is_live(name: str) -> bool:
    """Whether that setting can change without a restart."""
    return name in LIVE or (name.partition(".")[0] in LIVE_SECTIONS and name not in NEVER)


def merged(old: NodeSettings, found: tuple[Change, ...]) -> NodeSettings:
    """`old` with those changes that are live."""
    sections: dict[str, Any] = {}
    for change in found:
        section = change.name.partition(".")[0]
        if change.live:
            sections[section] = msgspec.structs.replace(sections.get(section, getattr(old, section)), **{change.field: change.after})
    return msgspec.structs.replace(old, **sections)
