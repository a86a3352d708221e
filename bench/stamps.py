"""Who made the parts of a measurement, when, and in how many seconds.

A measure that takes hours is killed and gone on with, by a later commit perhaps, and then reads most of its parts from the disk. So beside
each part is NAME.made.json. A part without it was kept before there were such files, or its maker was killed at the very end: its commit is
unknown. What a killed process spent on a part that it did not finish is not in the seconds.
"""

import datetime
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from coordinator.forge.judging.evidence import commit
from protocol.blobs import write_atomically

UNKNOWN = "unknown"


class Run(msgspec.Struct, frozen=True):
    """A process that worked on a part."""

    commit: str
    at: str  # when it began to, ISO 8601 of UTC


class Stamp(msgspec.Struct, frozen=True):
    """All that is known of how a part was made."""

    runs: tuple[Run, ...] = ()  # the oldest first
    seconds: float | None = None  # that it took; None: not finished, or not known
    here: float = 0.0  # of these, spent by this process

    @property
    def known(self) -> bool:
        """Nothing is missing."""
        return self.seconds is not None and bool(self.runs) and all(run.commit != UNKNOWN for run in self.runs)


def run() -> Run:
    """This process, from now on."""
    return Run(_commit(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))


def read(part: Path) -> Stamp:
    """What is known of a part."""
    file = _beside(part)
    return msgspec.structs.replace(msgspec.json.decode(file.read_bytes(), type=Stamp), here=0.0) if file.is_file() else Stamp()


def begun(part: Path) -> Stamp:
    """Note that this process works on a part from now on, after those that worked on it before."""
    before = read(part)
    if not part.exists():
        before = Stamp(before.runs if before.seconds is None else ())  # finished, and removed since: this one is another
    elif not before.runs:
        before = Stamp((Run(UNKNOWN, ""),))
    stamp = Stamp((*before.runs, run()))
    write(part, stamp)
    return stamp


def write(part: Path, stamp: Stamp) -> None:
    """Keep it beside the part."""
    write_atomically(_beside(part), msgspec.json.encode(stamp))


def summary(parts: Mapping[str, Stamp], last: Run, *, seconds: float) -> dict[str, Any]:
    """What an entry says of a measurement whose `last` run took so many seconds.

    `seconds` with those of the parts it found; `day` and `commit`, "OLDEST to NEWEST" where they differ; the parts of an `unknown` commit.
    """
    lost = sorted(name for name, stamp in parts.items() if not stamp.known)
    runs = {one for stamp in parts.values() for one in stamp.runs if one.commit != UNKNOWN} | {last}
    ordered = sorted(runs, key=lambda one: one.at)
    found = sum(max(0.0, stamp.seconds - stamp.here) for stamp in parts.values() if stamp.seconds is not None)
    about = {
        "seconds": round(seconds + found, 1),
        "day": _span([UNKNOWN] * bool(lost) + [one.at[:10] for one in ordered]),
        "commit": _span([UNKNOWN] * bool(lost) + [one.commit for one in ordered]),
    }
    return about | ({"unknown": lost} if lost else {})


def _span(values: Iterable[str]) -> str:
    found = list(values)
    return found[0] if len(set(found)) == 1 else f"{found[0]} to {found[-1]}"


def _beside(part: Path) -> Path:
    return part.with_name(f"{part.name}.made.json")


@functools.cache
def _commit() -> str:
    """Of the code that this process runs, not of what the tree becomes meanwhile."""
    return commit()
