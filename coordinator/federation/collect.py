"""One question to every node, and each reply a file the moment it arrives.

Two halves, because flwr ends its own process when a run is stopped or a token refused:
 * `collect` (parent, no flwr): starts the child, reads its lines, ends it at the deadline, whatever it is doing.
 * `python -m coordinator.federation.collect` (child): opens the Flower run, asks every node that is or comes online, writes what arrives.

A reply is two files in the round's folder: NAME-DIGEST.npy, then NAME-DIGEST.json, whose presence says the first is whole. They are
written before the reply is told to anyone, so a round that dies loses nothing that had arrived; what had not is still on the node.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coordinator.federation.superlink import environment
from protocol import codec
from protocol.adapters import AdapterHeader, AdapterQuestion, AdapterReceipt, AdapterReply, Flat
from protocol.blobs import write_atomically
from protocol.digests import digest_bytes
from protocol.errors import BadInput, MalformedMessage, MilpaError, TooLarge, Unavailable
from protocol.flower import authorities
from protocol.lines import child_lines, first_line
from protocol.names import checked_name

REPLY_LIMIT = 256 * 1024  # bytes of a reply's JSON; 200 modules are about 20 kB
POLL_S = 0.5  # the SuperLink spends 6 ms a request
QUIET_S = 5.0  # without a list of expected sites: done when all asked have answered and nobody new came for this long
RECEIPT_S = 3.0  # for nodes to take their receipt before the run closes; without it they stay until their window ends
GRACE_S = RECEIPT_S + 5.0  # past the deadline, for the child to close its run
DIGEST_CHARACTERS = 16  # of a digest in a file's name


class Reply(msgspec.Struct, frozen=True):
    """One thing that came back, or did not."""

    node: str  # the site's own name; "" when Flower lost the node before it told
    code: str  # an AdapterCode; "malformed"; "lost" (Flower's error)
    digest: str = ""
    file: str = ""  # of the adapter, in the round's folder
    header: AdapterHeader | None = None
    detail: str = ""  # ours, never the node's words


class Told(msgspec.Struct, frozen=True):
    """A line from the child."""

    kind: str  # "open", "asked", "reply", "done", "error"
    reply: Reply | None = None
    count: int = 0
    error: str = ""
    unavailable: bool = False


class Job(msgspec.Struct, frozen=True):
    """What the child is to do; its first line on stdin, so that no key shows in a process list."""

    address: str
    token: str
    secret: str
    ca: str  # who signed the SuperLink's certificate; empty: plain HTTP
    question: AdapterQuestion
    folder: str
    seconds: float
    expected: tuple[str, ...] = ()
    minimum: int = 1


def collect(
    address: str,
    question: AdapterQuestion,
    folder: Path,
    *,
    token: str,
    secret: str,
    ca: str = "",
    seconds: float,
    expected: Collection[str] = (),
    minimum: int = 1,
    flower_home: Path,
    on_reply: Callable[[Reply], None],
    on_progress: Callable[[str], None] = lambda text: None,
) -> int:
    """Ask, and hand every reply to `on_reply` as it comes. Returns how many nodes were asked.

    Ends when all `expected` sites have answered; without a list, when `minimum` and all who were asked have and nobody new came for
    QUIET_S; in any case after `seconds`. If the child dies early it is started again for the time that is left.

    Args:
        ca: who signed the SuperLink's certificate: a PEM file; "" is plain HTTP.

    Raises:
        BadInput: the SuperLink refused the token, or `ca` is of no use.
        Unavailable: no SuperLink answered until the deadline.
    """
    authorities(ca)
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    asked, answered = 0, {name for name in expected if has_reply(folder, name)}
    opened, failure = False, ""
    while (left := end - time.monotonic()) > 0:
        missing = tuple(sorted(set(expected) - answered))
        if expected and not missing:
            return asked
        job = Job(address, token, secret, ca, question, str(folder.resolve()), left, missing, minimum)
        finished = False
        for told in child_lines(
            "coordinator.federation.collect", job, Told, environment=environment(flower_home.resolve()),
            over=lambda: time.monotonic() >= end + GRACE_S,
        ):  # fmt: skip
            if told.kind == "open":
                opened = True
                on_progress("the round is open")
            elif told.kind == "asked":
                asked += told.count
                on_progress(f"asked {told.count} more node(s)")
            elif told.kind == "reply" and told.reply is not None:
                answered.add(told.reply.node)
                on_reply(told.reply)
            elif told.kind == "error":
                if not told.unavailable:
                    raise BadInput(told.error)
                failure = told.error
            elif told.kind == "done":
                finished = True
        if finished:
            return asked
        time.sleep(min(1.0, max(0.0, end - time.monotonic())))  # the SuperLink may be starting, or starting again
    if not opened:
        raise Unavailable(failure or f"no SuperLink answered at {address} within {seconds:g} s")
    return asked


def has_reply(folder: Path, node: str) -> bool:
    """Whether an adapter of that very site is in the folder ("esteli" is not "esteli-norte")."""
    return any(folder.glob(f"{node}-{DIGEST_CHARACTERS * '[0-9a-f]'}.json"))


def load(folder: Path) -> list[tuple[Reply, Flat | None]]:
    """Everything that arrived in a round, in order of arrival. A file that does not fit its digest comes without numbers."""
    found: list[tuple[Reply, Flat | None]] = []
    for path in sorted(folder.glob("*-*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        reply = codec.decode_as(path.read_bytes(), Reply, limit=REPLY_LIMIT * 2, what=str(path))
        found.append((reply, read_adapter(folder, reply)))
    return found


def read_adapter(folder: Path, reply: Reply) -> Flat | None:
    """The numbers of one reply, or None if they are not what arrived."""
    if not reply.file:
        return None
    try:
        flat: Any = np.load(folder / reply.file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return flat if digest_bytes(flat.tobytes()) == reply.digest else None


# ------------------------------------------------------------------------------------------------------------------ the child


def _work(job: Job, tell: Callable[[Told], None]) -> None:
    from coordinator.federation import flower

    end = time.monotonic() + job.seconds
    run = flower.Run(job.address, token=job.token, secret=job.secret.encode(), ca=job.ca)
    tell(Told("open"))
    folder, payload = Path(job.folder), codec.encode(job.question)
    waiting: dict[str, int] = {}
    receipts: dict[str, int] = {}
    asked: set[int] = set()
    answered: set[str] = set()
    quiet_since = time.monotonic()
    while (left := end - time.monotonic()) > 0:
        if new := run.nodes() - asked:
            waiting.update(run.ask(new, payload, ttl_s=left))
            asked |= new
            quiet_since = time.monotonic()
            tell(Told("asked", count=len(new)))
        for arrival in run.arrivals(waiting):
            node = waiting.pop(arrival.question)
            reply = keep(folder, arrival.payload, arrival.flat, arrival.error)
            if reply.code != "lost":  # a node that was lost may come back under another id and be asked again
                answered.add(reply.node)
            if reply.node:  # with nothing to send, too: its window may end, there is nothing more to ask
                receipts.update(run.ask([node], codec.encode(AdapterReceipt(reply.digest)), ttl_s=RECEIPT_S + left))
            quiet_since = time.monotonic()
            tell(Told("reply", reply=reply))
        for arrival in run.arrivals(receipts):
            receipts.pop(arrival.question)
        if job.expected and answered >= set(job.expected):
            break
        if not job.expected and not waiting and len(answered) >= job.minimum and time.monotonic() - quiet_since > QUIET_S:
            break
        time.sleep(min(POLL_S, max(0.0, end - time.monotonic())))
    tell(Told("done"))
    end = time.monotonic() + RECEIPT_S
    while receipts and time.monotonic() < end:
        for arrival in run.arrivals(receipts):
            receipts.pop(arrival.question)
        time.sleep(POLL_S)
    run.close()


def keep(folder: Path, payload: bytes | None, flat: Flat | None, error: int) -> Reply:
    """Write what arrived into the round's folder and say what it is. Nothing a node sent is ever an exception here."""
    if payload is None:
        return Reply("", "lost", detail=f"Flower lost the node before it answered (code {error})")
    try:
        said = codec.decode_as(payload, AdapterReply, limit=REPLY_LIMIT, what="reply")
        node = checked_name(said.node, what="node")
    except (MalformedMessage, TooLarge, BadInput):
        return Reply("", "malformed", detail="a reply that is not of the round's form")
    if said.code != "adapter":
        return Reply(node, said.code)
    if said.header is None or flat is None:
        return Reply(node, "malformed", header=said.header, detail="an adapter without its header or without one float32 array")
    digest = digest_bytes(flat.tobytes())
    if digest != said.digest:
        return Reply(node, "damaged", header=said.header, detail="the array is not the one its digest names")
    if said.header.site != node:
        return Reply(node, "malformed", header=said.header, detail="the header names another site than the reply")
    stem = f"{node}-{digest[:DIGEST_CHARACTERS]}"
    held = BytesIO()
    np.save(held, flat, allow_pickle=False)
    reply = Reply(node, "adapter", digest, f"{stem}.npy", said.header)
    write_atomically(folder / f"{stem}.npy", held.getvalue())
    write_atomically(folder / f"{stem}.json", codec.encode(reply))
    return reply


def _main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever flwr prints goes to stderr, our lines to the real stdout

    def tell(told: Told) -> None:
        out.write(msgspec.json.encode(told) + b"\n")
        out.flush()

    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    job = msgspec.json.decode(first_line(), type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _work(job, tell)
    except MilpaError as error:
        tell(Told("error", error=str(error), unavailable=isinstance(error, Unavailable)))
        os._exit(error.exit_code)
    os._exit(0)  # flwr leaves threads behind


def _end_with_parent() -> None:
    while os.read(0, 4096):  # nothing comes; it ends when the parent closed its side or died
        pass
    os._exit(143)


if __name__ == "__main__":
    _main()
