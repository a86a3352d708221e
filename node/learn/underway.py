"""A training under way on disk: what it learns from is fixed when it begins, so that it can go on after days without sun.

    learn/<release>/plan.json     the examples, rate and epochs; there as long as the training is not finished
    learn/<release>/training.pt   factors and optimiser, written by the training itself
    learn/<release>/last.json     how the last training on this release ended

All are replaced whole; one that does not decode is thrown away and the training begins anew. Nothing of it leaves the site.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from node.learn import stored
from node.learn.examples import Parts
from protocol import codec
from protocol.blobs import write_atomically
from protocol.errors import BadInput, Unavailable

PLAN_LIMIT = 64 << 20  # bytes; ten thousand examples are about 10 MB
LAST_LIMIT = 64 * 1024
STALE_S = 14 * 86_400.0  # seconds; older examples are not worth finishing with: newer corrections exist
STATE = "training.pt"

T = TypeVar("T")


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a training learns from and how."""

    parts: Parts
    own: int  # of the training part, the site's own
    rate: float
    epochs: float
    seed: int
    began: float  # seconds since 1970


class Last(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a training ended."""

    at: float  # seconds since 1970
    examples: int  # the site's own that it learned from
    stored: bool
    reason: str
    loss_before: float
    loss_after: float


@contextmanager
def alone(state_dir: Path) -> Iterator[None]:
    """One training a node at a time.

    Raises:
        Unavailable: another one runs.
    """
    (state_dir / "learn").mkdir(parents=True, exist_ok=True)
    with (state_dir / "learn" / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Unavailable(f"another training runs on {state_dir}; wait for its end, or set learn.auto = false") from error
        yield


def begun(state_dir: Path, release: int, *, now: float) -> Plan | None:
    """The training under way on `release`, unless it is too old to be worth an end."""
    plan = _read(stored.folder(state_dir, release) / "plan.json", Plan, PLAN_LIMIT)
    if plan is not None and now - plan.began > STALE_S:
        finish(state_dir, release)
        return None
    return plan


def begin(state_dir: Path, release: int, plan: Plan) -> None:
    """Fix what the training learns from."""
    write_atomically(stored.folder(state_dir, release) / "plan.json", codec.encode(plan))


def finish(state_dir: Path, release: int, last: Last | None = None) -> None:
    """The training is over: nothing is left to go on with. `last` None: it was given up."""
    folder = stored.folder(state_dir, release)
    if last is not None:
        write_atomically(folder / "last.json", codec.encode(last))
    for name in (STATE, "plan.json"):
        (folder / name).unlink(missing_ok=True)


def last(state_dir: Path, release: int) -> Last | None:
    """How the last training on `release` ended."""
    return _read(stored.folder(state_dir, release) / "last.json", Last, LAST_LIMIT)


def unfinished(state_dir: Path, release: int) -> bool:
    """Whether a training was interrupted."""
    return (stored.folder(state_dir, release) / "plan.json").is_file()


def _read(path: Path, kind: type[T], limit: int) -> T | None:
    if not path.is_file():
        return None
    try:
        return codec.decode_as(path.read_bytes(), kind, limit=limit, what=str(path))
    except BadInput:
        path.unlink()
        return None
