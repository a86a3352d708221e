"""The commonest words in at most 51 bytes, for links where every byte is air time (LoRa), and for heartbeats on any link.

frame       says                                                        bytes
alive       a node is there, and its counts; nothing else is new        20
state       a node's Status, digests by their first 6 bytes             51
question    a Question whose prompt the other side has: by its digest   39
verdict     a Reply of a task with codes, without the sentence          41
release     the number of the newest release                            5

Rules:
 * The first byte is version (4 bits) and kind (4 bits); the rest are fixed fields, big-endian: every frame of a kind has one size.
 * Who speaks is not in a frame: the radio's address says it, or the topic. A peer, a task, a boot is named by its mark: the first 4 bytes
   of the SHA-256 of its name.
 * Counts that do not fit stay at the largest value. Shares keep 16 bits (an error below 0.00001).
 * Bytes that are not a frame of this version raise, whatever they are.

51 bytes is the payload of LoRaWAN at its slowest rate (EU868, DR0-DR2). Nothing here is signed: the radio's own integrity code and the
broker's access list say who spoke, and a release still needs its signatures. No I/O.
"""

import hashlib
import struct
from collections.abc import Iterable
from typing import Any

import msgspec

from protocol.errors import BadInput, MalformedMessage
from protocol.messages import Question, Reply, State, Status
from protocol.names import checked_digest

VERSION = 1
FRAME_LIMIT = 51  # bytes
DIGEST_BYTES, MARK_BYTES, PROMPT_BYTES = 6, 4, 8  # kept of a model's digest, a name's, a prompt's

STATES: tuple[State, ...] = ("answering", "updating", "sleeping", "stopped", "lost", "no-model")
ROLES = ("student", "teacher")
REFUSALS = ("", "busy", "expired", "no model", "not known here", "refused")  # the last for any other reason
NO_CODE = 255

_ALIVE = struct.Struct(">B4sIIIHB")
_STATE = struct.Struct(">B8sIHBI6s6sIIIIHB")
_QUESTION = struct.Struct(">B16s4s8sHI4s")
_VERDICT = struct.Struct(">B16s8sBH6s4sHB")
_RELEASE = struct.Struct(">BI")


class Alive(msgspec.Struct, frozen=True):
    """Still there. Everything else is as in the last state."""

    boot: bytes  # mark of Status.boot
    sequence: int
    answered: int = 0
    escalated: int = 0
    waiting: int = 0
    queue: int = 0


class Reference(msgspec.Struct, frozen=True):
    """A question whose prompt stays where it is: whoever has it can answer."""

    id: str  # Question.id, 32 hexadecimal digits
    task: bytes  # mark of the task's name
    prompt: bytes  # the first PROMPT_BYTES of the prompt's SHA-256
    confidence: float
    expires_s: int  # seconds from now: neither end of a radio trusts the other's clock
    peer: bytes  # mark of the peer that is asked


class Verdict(msgspec.Struct, frozen=True):
    """A reply's code. The sentence stays behind."""

    question: str
    prompt: bytes
    code: int  # place in the task's codes; NO_CODE: none
    confidence: float
    model: bytes  # the first DIGEST_BYTES of the digest of the model that spoke
    peer: bytes  # mark of the peer
    seconds: float  # to a tenth
    refused: str = ""


class Release(msgspec.Struct, frozen=True):
    """The newest release's number."""

    number: int


Frame = Alive | Status | Reference | Verdict | Release
KINDS: tuple[tuple[type[Frame], struct.Struct], ...] = (
    (Alive, _ALIVE), (Status, _STATE), (Reference, _QUESTION), (Verdict, _VERDICT), (Release, _RELEASE),
)  # fmt: skip


def mark(name: str) -> bytes:
    """The short name of a name."""
    return hashlib.sha256(name.encode()).digest()[:MARK_BYTES]


def named(short: bytes, among: Iterable[str]) -> str:
    """Which of the names has that mark.

    Raises:
        MalformedMessage: none.
    """
    for name in among:
        if mark(name) == short:
            return name
    raise MalformedMessage(f"a frame names {short.hex()}, which is the mark of nobody known here")


def alive(status: Status) -> Alive:
    """What is left of a status when nothing but its counts is new."""
    return Alive(mark(status.boot), status.sequence, status.answered, status.escalated, status.waiting, status.queue)


def heard_alive(topic: str, payload: bytes) -> tuple[str, Alive]:
    """The node and its frame, of one message of `topics.ALL_ALIVE`.

    Raises:
        MalformedMessage: another frame, or none.
    """
    node, frame = topic.split("/")[-2], decode(payload)
    if not isinstance(frame, Alive):
        raise MalformedMessage(f"{topic} carries a {type(frame).__name__.lower()} frame, not an alive one")
    return node, frame


def woken(last: Status, said: Alive, *, at: int) -> Status | None:
    """The status after an alive frame: the last one with new counts. None: the frame is of another boot than the last status."""
    if mark(last.boot) != said.boot:
        return None
    return msgspec.structs.replace(
        last, sequence=said.sequence, answered=said.answered, escalated=said.escalated, waiting=said.waiting, queue=said.queue, at=at
    )  # fmt: skip


def reference(question: Question, peer: str, *, now: float) -> Reference:
    """A question by reference.

    Raises:
        BadInput: it was handed on, or its id is not 32 hexadecimal digits: neither fits.
    """
    if question.path:
        raise BadInput("a question that was handed on does not fit a frame: its path would be lost")
    _bytes_of(question.id, 16, "question id")
    prompt = hashlib.sha256(question.prompt.encode()).digest()[:PROMPT_BYTES]
    return Reference(question.id, mark(question.task), prompt, question.confidence, max(0, int(question.expires - now)), mark(peer))


def verdict(reply: Reply, code: str, codes: tuple[str, ...]) -> Verdict:
    """A reply's verdict: `code` of the task's `codes`, "" when it has none."""
    refused = reply.refused if reply.refused in REFUSALS else REFUSALS[-1]
    prompt = bytes.fromhex(checked_digest(reply.question_digest))[:PROMPT_BYTES]
    return Verdict(
        reply.question, prompt, codes.index(code) if code else NO_CODE, reply.confidence,
        _digest(reply.model_digest), mark(reply.peer), reply.seconds, refused,
    )  # fmt: skip


def encode(frame: Frame) -> bytes:
    """The bytes of a frame.

    Raises:
        BadInput: an id, boot, digest or name of another form than its field.
    """
    match frame:
        case Alive():
            return _ALIVE.pack(
                _head(Alive), frame.boot, _cap(frame.sequence, 32), _cap(frame.answered, 32), _cap(frame.escalated, 32),
                _cap(frame.waiting, 16), _cap(frame.queue, 8),
            )  # fmt: skip
        case Status():
            if frame.role not in ROLES:
                raise BadInput(f"role {frame.role!r} does not fit a frame; known: {', '.join(ROLES)}")
            bits = STATES.index(frame.state) | ROLES.index(frame.role) << 3 | frame.serves << 4
            return _STATE.pack(
                _head(Status), _bytes_of(frame.boot, 8, "boot"), _cap(frame.sequence, 32), _cap(frame.connection, 16), bits,
                _cap(frame.release, 32), _digest(frame.model_digest), _digest(frame.adapter_digest), _cap(frame.at, 32),
                _cap(frame.sleeping_until, 32), _cap(frame.answered, 32), _cap(frame.escalated, 32), _cap(frame.waiting, 16),
                _cap(frame.queue, 8),
            )  # fmt: skip
        case Reference():
            return _QUESTION.pack(
                _head(Reference), _bytes_of(frame.id, 16, "question id"), frame.task, frame.prompt, _share(frame.confidence),
                _cap(frame.expires_s, 32), frame.peer,
            )  # fmt: skip
        case Verdict():
            return _VERDICT.pack(
                _head(Verdict), _bytes_of(frame.question, 16, "question id"), frame.prompt, _cap(frame.code, 8), _share(frame.confidence),
                frame.model, frame.peer, _cap(round(frame.seconds * 10), 16), REFUSALS.index(frame.refused),
            )  # fmt: skip
        case Release():
            return _RELEASE.pack(_head(Release), _cap(frame.number, 32))


def decode(data: bytes, *, node: str = "") -> Frame:
    """A frame from the air. `node`: who spoke, for a status.

    Raises:
        MalformedMessage: not a frame of this version.
    """
    if not data or len(data) > FRAME_LIMIT:
        raise MalformedMessage(f"{len(data)} bytes are not a frame; a frame has 1 to {FRAME_LIMIT}")
    version, number = data[0] >> 4, data[0] & 0x0F
    if version != VERSION or number >= len(KINDS):
        raise MalformedMessage(
            f"a frame of version {version}, kind {number}; this program reads version {VERSION}, kinds 0 to {len(KINDS) - 1}"
        )
    kind, layout = KINDS[number]
    if len(data) != layout.size:
        raise MalformedMessage(f"a frame of kind {number} has {layout.size} bytes, not {len(data)}")
    fields = layout.unpack(data)[1:]
    if kind is Status:
        return _status(node, fields)
    if kind is Alive:
        return Alive(*fields)
    if kind is Reference:
        id, task, prompt, confidence, expires_s, peer = fields
        return Reference(id.hex(), task, prompt, confidence / 0xFFFF, expires_s, peer)
    if kind is Verdict:
        question, prompt, code, confidence, model, peer, tenths, refused = fields
        if refused >= len(REFUSALS):
            raise MalformedMessage(f"a verdict with refusal {refused}; known are 0 to {len(REFUSALS) - 1}")
        return Verdict(question.hex(), prompt, code, confidence / 0xFFFF, model, peer, tenths / 10, REFUSALS[refused])
    return Release(*fields)


def _status(node: str, fields: tuple[Any, ...]) -> Status:
    boot, sequence, connection, bits, release, model, adapter, at, until, answered, escalated, waiting, queue = fields
    state, role, serves = bits & 0x07, bits >> 3 & 0x01, bool(bits >> 4 & 0x01)
    if state >= len(STATES) or bits >> 5:
        raise MalformedMessage(f"a state with bits {bits:#04x}; this program knows {len(STATES)} states, two roles and serving")
    return Status(
        node=node, boot=boot.hex(), sequence=sequence, state=STATES[state], connection=connection, role=ROLES[role], release=release,
        model_digest=_undigest(model), adapter_digest=_undigest(adapter), at=at, sleeping_until=until, answered=answered,
        escalated=escalated, waiting=waiting, serves=serves, queue=queue, link="lora",
    )  # fmt: skip


def _head(kind: type[Frame]) -> int:
    return VERSION << 4 | next(number for number, (one, _) in enumerate(KINDS) if one is kind)


def _cap(value: int, bits: int) -> int:
    return min(max(0, value), (1 << bits) - 1)


def _share(value: float) -> int:
    return round(min(max(0.0, value), 1.0) * 0xFFFF)


def _bytes_of(text: str, count: int, what: str) -> bytes:
    """The bytes of a hexadecimal name of exactly that length."""
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != count or data.hex() != text:
        raise BadInput(f"{what} {text!r} does not fit a frame: it needs {2 * count} lower-case hexadecimal digits")
    return data


def _digest(digest: str) -> bytes:
    """The first bytes of a digest (or of the first digits of one); zeros for none."""
    short = digest[: 2 * DIGEST_BYTES]
    return _bytes_of(short, DIGEST_BYTES, "digest") if short else bytes(DIGEST_BYTES)


def _undigest(short: bytes) -> str:
    return short.hex() if any(short) else ""
