"""A round's life on disk and in the ledger: opened, decided, published, closed; and taken up again where it died.

* `rounds/open.json` says which round is open; `rounds/<n>/result.json`, written before anything is published, how it was decided.
* Publishing and closing may be repeated, so a round that died in between ends the same way at the next call.
* One round at a time in a store: `locked`.
"""

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from coordinator.fleet.ledger import Ledger
from coordinator.fleet.publishing import Publisher
from protocol import codec
from protocol.blobs import write_atomically
from protocol.errors import BadInput, MalformedMessage, Unavailable
from protocol.names import checked_name
from protocol.releases import Release


class Opened(msgspec.Struct, frozen=True):
    """`rounds/open.json`: the round that has not been closed."""

    number: int  # in the ledger
    release: int
    opened: int


class Result(msgspec.Struct, frozen=True):
    """How a round ended. `release` and `manifest` are of the new release, or 0 and None."""

    round: int
    base_release: int
    decision: str  # "released", "would release", "not better", "no adapters"
    reasons: tuple[str, ...]
    release: int = 0
    accepted: tuple[dict[str, Any], ...] = ()  # site, examples, norm, from_round
    refused: tuple[dict[str, Any], ...] = ()  # site, reason, detail
    eta: float = 0.0
    etas: dict[str, float] = {}  # eta -> mean quality on the dev sets
    rank: int = 0
    relative_error: float = 0.0  # of the truncation
    sets: dict[str, dict[str, Any]] = {}  # name, n, before, after, low, high, p: verdict accuracy or sentence chrF, in [0, 1]
    figures: dict[str, dict[str, Any]] = {}  # set -> before and after in full
    seconds: float = 0.0
    manifest: Release | None = None
    evidence: dict[str, Any] | None = None


def told(result: Result) -> dict[str, Any]:
    """A result as plain values for programs."""
    plain: dict[str, Any] = msgspec.to_builtins(result)
    del plain["manifest"], plain["evidence"]
    return plain | {"release": result.release or None}


def open_round(rounds: Path, ledger: Ledger, base: Release, *, expected: Sequence[str], deadline_s: float, now: int) -> Opened:
    """The open round for this release, or a new one. One that was left open for another release is closed.

    Args:
        expected: sites to wait for.
        deadline_s: seconds for collecting.
        now: seconds since 1970.
    """
    path = rounds / "open.json"
    if path.is_file():
        try:
            left: Opened = codec.decode_as(path.read_bytes(), Opened, what=str(path))
        except MalformedMessage:
            path.unlink()  # written whole, so only a failing disk does this; the replies are still in their folder
        else:
            if left.release == base.number:
                return left
            _close(ledger, Result(left.number, left.release, "superseded", (f"release {base.number} came meanwhile",)))
            path.unlink()
    names = [checked_name(name, what="site") for name in expected]
    number = ledger.open_round(base.number, names, now + int(deadline_s), opened=now)
    opened = Opened(number, base.number, now)
    (rounds / str(number)).mkdir(exist_ok=True)
    write_atomically(path, msgspec.json.encode(opened))
    return opened


def finish_what_was_decided(store: Path, publisher: Publisher, ledger: Ledger) -> Result | None:
    """A round that died after its decision: publish and close it now, and that is all for this call."""
    path = store / "rounds" / "open.json"
    if not path.is_file():
        return None
    with contextlib.suppress(MalformedMessage, msgspec.DecodeError):
        left: Opened = codec.decode_as(path.read_bytes(), Opened, what=str(path))
        decided = store / "rounds" / str(left.number) / "result.json"
        if decided.is_file():
            result = msgspec.json.decode(decided.read_bytes(), type=Result)
            _finish(store, publisher, ledger, result)
            return result
    return None


def decide(store: Path, publisher: Publisher, ledger: Ledger, result: Result) -> None:
    """Write the result down, then publish and close."""
    write_atomically(store / "rounds" / str(result.round) / "result.json", msgspec.json.encode(result))
    _finish(store, publisher, ledger, result)


def _finish(store: Path, publisher: Publisher, ledger: Ledger, result: Result) -> None:
    """Publish what was decided, write it down, close the round. Each step may be repeated."""
    if result.manifest is not None:
        publisher.publish(result.manifest, {})  # every file is in the store already
        ledger.add_release(result.manifest, result.evidence, result.manifest.created, actor=f"round-{result.round}")
    _close(ledger, result)
    (store / "rounds" / "open.json").unlink(missing_ok=True)


def _close(ledger: Ledger, result: Result) -> None:
    row = told(result)
    try:
        ledger.close_round(result.round, row)
    except BadInput as error:
        if "closed already" not in str(error):
            raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the store's lock.

    Raises:
        Unavailable: another round runs there.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Unavailable(f"another round is running in {path.parents[1]}; wait for its end") from error
        yield
