"""The two ends of a radio link: a node that says only frames, and the gateway that says the same in the fleet's own messages.

    node  --frame-->  milpa/v1/radio/NODE/up    --> gateway --> NODE's status, alive frames, questions to peers
    node  <--frame--  milpa/v1/radio/NODE/down  <-- gateway <-- replies to NODE, the newest release's number

LoRa is not IP. A radio's own software (a LoRaWAN network server, a modem on a serial line) carries what is published on `up` and `down`; a
broker on either side is all it needs to know of us. `protocol/frames.py` says what a frame can and cannot carry.

Rules:
 * The node's outbox holds the same questions as on any link; they become frames as they leave (`Radio.send`), and a verdict that comes
   back becomes the reply it stands for, held to the question's own digest and to a peer that was asked.
 * The gateway answers for the prompts it has: a reference to one that is not known there is declined at once, and the local answer stands.
 * The gateway speaks for the nodes it was given, and the broker's access list names it: nobody else can.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import sqlalchemy as sa

from protocol import frames, topics
from protocol.codec import decode_message, encode
from protocol.errors import BadInput, MalformedMessage, MilpaError, TooLarge
from protocol.frames import NO_CODE, Alive, Reference, Release, Verdict
from protocol.messages import Question, ReleaseNotice, Reply, Status
from protocol.mqtt import Incoming, Session
from protocol.outbox import Outbox
from protocol.tasks import task_named

ANSWERED_LIMIT = 20_000  # answers of the gateway's own store that a reference is looked up in, newest first

log = logging.getLogger(__name__)


class Radio:
    """A node's side: takes what the outbox and the heartbeat say and sends frames instead. What it needs of a session it passes on.

    Args:
        peers: whom this node may ask; a frame names them by their marks.
        digest_of: the digest of an open question's prompt, or None; a reply must name it whole.
        task: the task of this node's questions; its codes are what a verdict counts by.
        vouch: told peer and model of a verdict: nobody announces a model over a radio, so the gateway's word stands for it.
    """

    def __init__(
        self,
        node: str,
        session: Session,
        *,
        peers: Sequence[str],
        digest_of: Callable[[str], str | None],
        task: Callable[[], str],
        vouch: Callable[[str, str], None] = lambda peer, model: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.node, self.session, self.peers = node, session, tuple(peers)
        self._digest_of, self._task, self._vouch, self._clock = digest_of, task, vouch, clock
        self.newest_release = 0  # as the gateway said

    @property
    def connected(self) -> bool:
        """Whether the radio's software takes frames."""
        return self.session.connected

    @property
    def connection(self) -> int:
        """As `Session.connection`."""
        return self.session.connection

    def on_connected(self, listener: Callable[[bool], None]) -> None:
        """As `Session.on_connected`."""
        self.session.on_connected(listener)

    def publish(self, topic: str, payload: bytes, *, timeout: float = 10.0, **_: object) -> None:
        """Say a status, or an alive frame, in a frame."""
        frame = payload if topic == topics.alive(self.node) else self._framed(topic, payload)
        self.session.publish(topics.radio_up(self.node), frame, timeout=timeout, content_type="")

    def send(self, topic: str, payload: bytes, *, expiry: int | None = None, timeout: float = 0.0, **_: object) -> "Future[None]":
        """Hand a question over by reference.

        Raises:
            TooLarge: no frame stands for this message.
        """
        return self.session.send(topics.radio_up(self.node), self._framed(topic, payload), expiry=expiry, timeout=timeout, content_type="")

    def heard(self, message: Incoming) -> Incoming | None:
        """What a frame from the gateway stands for, as the message it would be on another link; None when it only informs.

        Raises:
            MalformedMessage: not a frame for a node, or of a peer that is none of ours.
        """
        frame = frames.decode(message.payload)
        if isinstance(frame, Release):
            self.newest_release = frame.number
            return None
        if not isinstance(frame, Verdict):
            raise MalformedMessage(f"{message.topic} carries a {type(frame).__name__.lower()} frame; a node hears verdicts and releases")
        digest = self._digest_of(frame.question)
        if digest is None:
            return None  # settled or given up
        if bytes.fromhex(digest)[: len(frame.prompt)] != frame.prompt:
            raise BadInput(f"a verdict on {frame.question!r} is about another prompt")
        reply = self._reply(frame, digest)
        self._vouch(reply.peer, reply.model_digest)
        return Incoming(topics.reply(self.node, reply.peer), encode(reply), correlation=frame.question.encode())

    def _reply(self, frame: Verdict, digest: str) -> Reply:
        codes, text = task_named(self._task()).codes, ""
        if not frame.refused:
            if frame.code >= len(codes):
                raise MalformedMessage(f"a verdict with code {frame.code}; this node's task has {len(codes)}")
            text = f"{codes[frame.code]}:"
        return Reply(
            id=uuid.uuid4().hex, question=frame.question, question_digest=digest, peer=frames.named(frame.peer, self.peers),
            model_digest=frame.model.hex(), text=text, confidence=frame.confidence, seconds=frame.seconds, refused=frame.refused,
        )  # fmt: skip

    def _framed(self, topic: str, payload: bytes) -> bytes:
        message = decode_message(payload)
        if isinstance(message, Status):
            return frames.encode(message)
        if isinstance(message, Question):
            try:
                return frames.encode(frames.reference(message, topic.split("/")[-3], now=self._clock()))
            except BadInput as error:
                raise TooLarge(f"no frame stands for this question: {error}") from error
        raise TooLarge(f"no frame stands for a {type(message).__name__.lower()}; it needs a richer link")


class Gateway:
    """The other end: speaks for `nodes`. Subscribes `session`; make it before `session.start`.

    Args:
        peers: whose marks a reference may name; this gateway itself is one of them.
        prompt_of: the prompt whose SHA-256 begins with these bytes, or None.
        tasks: whose marks a reference may name.
    """

    def __init__(
        self,
        session: Session,
        outbox: Outbox,
        nodes: Sequence[str],
        *,
        peers: Sequence[str],
        prompt_of: Callable[[bytes], str | None],
        tasks: Callable[[], Iterable[str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.session, self.outbox, self.peers = session, outbox, tuple(peers)
        self._prompt_of, self._tasks, self._clock = prompt_of, tasks, clock
        self.nodes = tuple(nodes)
        for node in nodes:
            session.subscribe(topics.radio_up(node), self.up)
            session.subscribe(topics.replies_to(node), self.reply)

    def up(self, message: Incoming) -> None:
        """Handle one frame of a node.

        Raises:
            MalformedMessage: not a frame of a node, or it names a peer or task that nobody here has.
        """
        node = message.topic.split("/")[-2]
        match frames.decode(message.payload, node=node):
            case Status() as status:
                self.session.send(topics.status(node), encode(status), retain=True)
            case Alive():
                self.session.send(topics.alive(node), message.payload, content_type="")
            case Reference() as asked:
                self._ask(node, asked)
            case frame:
                raise MalformedMessage(f"{message.topic} carries a {type(frame).__name__.lower()} frame; nodes send none")

    def reply(self, message: Incoming) -> None:
        """Handle one reply to a node: its verdict goes down, and its question is settled.

        Raises:
            MalformedMessage: not a reply.
        """
        reply = decode_message(message.payload)
        if not isinstance(reply, Reply):
            raise MalformedMessage(f"{message.topic} carries a {type(reply).__name__}, not a Reply")
        node = message.topic.split("/")[-3]
        tasks = [task_named(name) for name in self._tasks()]
        found = next((answer.verdict for task in tasks if (answer := task.parse(reply.text)).verdict), "")
        codes = next((task.codes for task in tasks if found in task.codes), ())
        if not found and not reply.refused:
            log.info("radio: a reply to %s has no verdict; a sentence does not fit a frame", node)
            return
        self._down(node, frames.encode(frames.verdict(reply, found, codes)))
        with self.outbox.engine.begin() as connection:
            self.outbox.settle(connection, _row_id(reply.question, reply.peer))

    def announce(self, notice: ReleaseNotice) -> None:
        """Tell every node the newest release's number."""
        for node in self.nodes:
            self._down(node, frames.encode(Release(notice.number)))

    def _ask(self, node: str, asked: Reference) -> None:
        peer, task = frames.named(asked.peer, self.peers), frames.named(asked.task, self._tasks())
        prompt = self._prompt_of(asked.prompt)
        if prompt is None:
            self._down(node, frames.encode(Verdict(asked.id, asked.prompt, NO_CODE, 0.0, bytes(6), asked.peer, 0.0, "not known here")))
            return
        expires = self._clock() + asked.expires_s
        question = Question(asked.id, node, task, prompt, asked.confidence, int(expires))
        with self.outbox.engine.begin() as connection:
            self.outbox.put(
                connection, topics.question(peer, node), encode(question), id=_row_id(asked.id, peer), kind="question", expires=expires,
                response_topic=topics.reply(node, peer), correlation=asked.id.encode(),
            )  # fmt: skip
        self.outbox.wake()

    def _down(self, node: str, frame: bytes) -> None:
        try:
            self.session.send(topics.radio_down(node), frame, content_type="")
        except MilpaError as error:  # the node asks again
            log.info("radio: a frame for %s did not leave: %s", node, error)


def stored_prompt(engine: sa.Engine, prompts: "sa.Select[Any]") -> Callable[[bytes], str | None]:
    """A lookup in the prompts that are stored here: `prompts` selects one column of text, newest first. Hashes as it goes: few ask."""
    import hashlib

    def find(short: bytes) -> str | None:
        with engine.begin() as connection:
            for (prompt,) in connection.execute(prompts.limit(ANSWERED_LIMIT)):
                if hashlib.sha256(prompt.encode()).digest().startswith(short):
                    return str(prompt)
        return None

    return find


def _row_id(question: str, peer: str) -> str:
    return f"radio:{question}:{peer}"
