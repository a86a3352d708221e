"""Which signed release may follow which, and on which machine. No I/O: values come in, a decision comes out.

Signatures, versions and expiry are TUF's (`trust.py`); these rules are ours beyond it:
 * numbers only rise, whatever is signed: an old release in new metadata is still an old release;
 * the machine has a file for its role, the memory and the disk;
 * a board without a clock judges expiry by the newest time that the coordinator ever signed.
"""

import msgspec

from protocol.errors import DoesNotFit, NumberAlreadySeen
from protocol.releases import Release, Role

BUILT_AT = 1_793_491_200  # 2026-11-01: no honest clock shows less while this code runs


class Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What this node has verified so far; survives restarts."""

    number: int = 0
    digest: str = ""  # of that release's manifest
    floor: int = BUILT_AT  # seconds since 1970: the newest time signed by the coordinator


class Machine(msgspec.Struct, frozen=True):
    """What the node runs on."""

    memory_mb: int  # all there is, or the container's limit


def judged_time(now: float, floor: int) -> float:
    """The time to judge expiry by. A clock behind the floor is not set (no battery, 1970), so the floor stands in for it.

    A frozen repository is then noticed only once the floor has moved or the clock is set; the data sheet of boards without a clock says so.
    """
    return max(now, float(floor))


def checked_number(number: int, digest: str, seen: Seen) -> None:
    """Refuse a release that does not follow what was seen.

    Raises:
        NumberAlreadySeen: a lower number, or the same number with another manifest.
    """
    if number < seen.number:
        raise NumberAlreadySeen(f"release {number} follows {seen.number}: an older one is replayed")
    if number == seen.number and digest != seen.digest:
        raise NumberAlreadySeen(f"release {number} was already seen with other content")


def checked_fit(release: Release, role: Role, machine: Machine, *, task: str = "") -> None:
    """Refuse a release this machine cannot serve.

    Args:
        task: what this node answers; "" takes any.

    Raises:
        DoesNotFit: no model for the role, another task, or too little memory.
    """
    if release.file(role, "model") is None:
        raise DoesNotFit(f"release {release.number} has no model for the role {role!r}")
    if task and release.task != task:
        raise DoesNotFit(f"release {release.number} is for task {release.task!r}, this node answers {task!r}")
    if role == "student" and release.min_memory_mb > machine.memory_mb:  # the figure is the student's
        raise DoesNotFit(f"release {release.number} needs {release.min_memory_mb} MiB of memory, this machine has {machine.memory_mb}")
