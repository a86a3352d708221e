"""Who is there: a node's word about itself, and what it hears of the others. No answer waits for presence: it says whom to ask, and when.

* Birth at every connection and a word at every change of state; both retained, so a newcomer knows at once. Between them a heartbeat: an
  "alive" frame of 20 bytes with the counts (`protocol/frames.py`), for the status itself costs ten times as much and says nothing new.
* The broker speaks our death ("lost", the will). It carries boot and connection it belongs to: one that comes late changes nothing.
* A planned absence is "sleeping" with a time, or "stopped": no alarm for a panel at night, and a death after it says nothing new.
  How long a sleep still lasts is the broker's to say: the word expires KEPT_S after it, and MQTT 5 tells every reader what is left.
* What a node announced as its model is what its replies are held to (`Presence.announced`).
"""

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from protocol import frames, topics
from protocol.codec import decode_message, encode
from protocol.errors import MalformedMessage, MilpaError
from protocol.messages import State, Status
from protocol.mqtt import Incoming

SILENT_S = 1_000.0  # seconds without a word; three heartbeats of five minutes and a little
GOODBYE_S = 2.0  # seconds for the last word
ROUGHLY = 0.1  # heartbeats come up to a tenth early, so that nodes that booted together drift apart
KEPT_S = 30 * 86_400  # seconds the broker keeps a sleeper's last word after the time it wanted to wake
NODES_LIMIT = 1_000  # nodes whose words are kept; the one not heard of for longest goes
MODELS_LIMIT = 4  # models of a node that its replies may name: a reply may have left before the last exchange

Spoken = tuple[str, str]  # digests of model and adapter

log = logging.getLogger(__name__)


def new_boot() -> str:
    """A fresh id for this process start."""
    return uuid.uuid4().hex[:16]


def will(node: str, boot: str, connection: int, *, role: str = "student") -> tuple[str, bytes]:
    """What the broker shall say when this connection breaks: topic and payload, for `mqtt.Session(will=...)`."""
    return topics.status(node), encode(Status(node=node, boot=boot, sequence=0, state="lost", connection=connection, role=role))


class Says(Protocol):
    """What a voice needs of `protocol.mqtt.Session`, or of a radio."""

    @property
    def connected(self) -> bool:
        """Whether it could be heard now."""

    @property
    def connection(self) -> int:
        """Number of the connection."""

    def on_connected(self, listener: Callable[[bool], None], /) -> None:
        """Have `listener` called at every connection."""

    def publish(
        self, topic: str, payload: bytes, /, *, retain: bool = ..., expiry: int | None = ..., timeout: float = ..., content_type: str = ...
    ) -> None:
        """Say it, and wait until the broker has it."""


class Voice:
    """Says how this node is.

    Args:
        describe: the node's state now; node, boot, sequence and time are filled in here.
        heartbeat: seconds between two words when nothing changes.
    """

    def __init__(
        self,
        node: str,
        boot: str,
        session: Says,
        describe: Callable[[], Status],
        *,
        heartbeat: float = 300.0,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self.node, self.boot, self.session, self.describe = node, boot, session, describe
        self.heartbeat, self.clock, self._rng = heartbeat, clock, rng or random.Random()
        self._sequence = 0
        self._saying = threading.Lock()  # numbers leave in order
        self._told: Status | None = None  # the last status the broker took
        self._soon = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        session.on_connected(lambda _: self.announce())

    def start(self) -> None:
        """Start the heartbeat."""
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the heartbeat's thread runs; for a watchdog."""
        return self._thread is not None and self._thread.is_alive()

    def announce(self) -> None:
        """Say it soon, from the heartbeat's thread; for births and changes of state. Any thread may call it."""
        self._soon.set()

    def stop(self, *, sleeping_until: int = 0) -> None:
        """Say goodbye, within a deadline, and end the heartbeat. Stop the session after it: a clean end keeps the will unsaid.

        Args:
            sleeping_until: seconds since 1970, when this node means to be back; 0: nobody knows.
        """
        self._stopping.set()
        self._soon.set()
        if self._thread is not None:
            self._thread.join(GOODBYE_S)
        if self.session.connected:
            try:
                state: State = "sleeping" if sleeping_until else "stopped"
                self._say(msgspec.structs.replace(self.describe(), state=state, sleeping_until=sleeping_until), timeout=GOODBYE_S)
            except Exception:  # a locked database must not keep the node from stopping
                log.exception("presence: could not describe this node")

    def _run(self) -> None:
        while True:
            news = self._soon.wait(self.heartbeat * (1.0 - ROUGHLY * self._rng.random()))
            self._soon.clear()
            if self._stopping.is_set():
                return
            if self.session.connected:
                try:
                    self._say(self.describe(), timeout=GOODBYE_S, news=news)
                except Exception:  # a locked database must not end the heartbeat
                    log.exception("presence: could not describe this node")

    def _say(self, status: Status, *, timeout: float, news: bool = True) -> None:
        with self._saying:
            self._sequence += 1
            now = max(0, int(self.clock()))
            word = msgspec.structs.replace(
                status, node=self.node, boot=self.boot, sequence=self._sequence, connection=self.session.connection, at=now
            )  # fmt: skip
            if not news and self._told is not None and same_but_counts(self._told, word):
                self._publish(topics.alive(self.node), frames.encode(frames.alive(word)), timeout=timeout, content_type="")
                return
            expiry = KEPT_S + max(0, word.sleeping_until - now) if word.state == "sleeping" else None
            if self._publish(topics.status(self.node), encode(word), retain=True, expiry=expiry, timeout=timeout):
                self._told = word

    def _publish(self, topic: str, payload: bytes, **options: Any) -> bool:
        try:
            self.session.publish(topic, payload, **options)
        except MilpaError as error:  # the next connection brings the next birth
            log.info("presence: %s", error)
            return False
        return True


class _Heard(msgspec.Struct):
    """What is known of one node. Times are monotonic seconds."""

    last: Status
    at: float  # when its last word came
    wakes: float = 0.0  # when it means to be back
    models: tuple[Spoken, ...] = ()  # announced, newest first


class Presence:
    """What is known of the others, from their retained words. In memory: the broker tells it again at every start."""

    def __init__(self, *, silent: float = SILENT_S, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.silent, self._monotonic = silent, monotonic
        self._heard: dict[str, _Heard] = {}
        self._lock = threading.Lock()

    def hear(self, message: Incoming) -> None:
        """Handle one message of ALL_STATUS.

        Raises:
            MalformedMessage: not a status, or somebody else's under this node's topic.
        """
        if not message.payload:
            return  # a retained word was cleared
        status = decode_message(message.payload)
        if not isinstance(status, Status) or topics.status(status.node) != message.topic:
            raise MalformedMessage(f"{message.topic} carries something other than that node's status")
        asleep = status.sleeping_until - status.at if message.expiry is None else message.expiry - KEPT_S
        self.note(status, asleep_s=max(0, asleep))

    def hear_alive(self, message: Incoming) -> None:
        """Handle one message of ALL_ALIVE: the node's last status with new counts. Before any status of that boot it says nothing.

        Raises:
            MalformedMessage: not an alive frame.
        """
        node, said = frames.heard_alive(message.topic, message.payload)
        last = self.last(node)
        status = frames.woken(last, said, at=last.at) if last else None
        if status is not None:
            self.note(status)

    def note(self, status: Status, *, asleep_s: float = 0.0) -> bool:
        """Take a word in. False: it changes nothing (see `follows`).

        Args:
            asleep_s: seconds until a sleeping node means to be back, by the broker's count.
        """
        now = self._monotonic()
        with self._lock:
            known = self._heard.pop(status.node, None)
            if known is not None and not follows(known.last, status):
                self._heard[status.node] = known
                return False
            if known is not None and status.state == "lost":  # it carries nothing but where it belongs: what the node last said stays
                status = msgspec.structs.replace(known.last, state="lost")
            models = known.models if known else ()
            if status.model_digest:
                spoken = (status.model_digest, status.adapter_digest)
                models = (spoken, *(one for one in models if one != spoken))[:MODELS_LIMIT]
            self._heard[status.node] = _Heard(status, now, now + asleep_s if status.state == "sleeping" else 0.0, models)
            while len(self._heard) > NODES_LIMIT:  # in order of their last words
                del self._heard[next(iter(self._heard))]
            return True

    def last(self, node: str) -> Status | None:
        """The node's last word."""
        with self._lock:
            known = self._heard.get(node)
        return known.last if known else None

    def likely(self, node: str) -> bool:
        """Whether the node would probably answer now."""
        with self._lock:
            known = self._heard.get(node)
        return known is not None and known.last.state in ("answering", "updating") and self._monotonic() - known.at < self.silent

    def asleep_s(self, node: str) -> float:
        """Seconds until a sleeping node means to be back; 0 when it is not asleep, or overdue."""
        with self._lock:
            known = self._heard.get(node)
        return max(0.0, known.wakes - self._monotonic()) if known else 0.0

    def announced(self, node: str) -> tuple[Spoken, ...]:
        """Digests of model and adapter the node said it speaks with, newest first; empty when it was never heard."""
        with self._lock:
            known = self._heard.get(node)
        return known.models if known else ()

    def members(self, group: str) -> list[str]:
        """The nodes that say they serve a group's questions."""
        with self._lock:
            return sorted(name for name, known in self._heard.items() if group in known.last.groups and known.last.serves)


def same_but_counts(told: Status, word: Status) -> bool:
    """Whether `word` says nothing that an alive frame does not say as well. An answer's seconds count when they have doubled or halved."""
    woken = frames.woken(told, frames.alive(word), at=word.at)
    steady = 0.5 * told.answer_s <= word.answer_s <= 2.0 * told.answer_s
    return steady and woken == msgspec.structs.replace(word, answer_s=told.answer_s)


def follows(last: Status, word: Status) -> bool:
    """Whether a word of a node says something new after the last one taken in.

    A death counts for its own boot and connection only: not after a later connection's birth, not after another boot's, and not after
    the node has said goodbye itself. Any other word of the same boot must carry a higher number; a new boot begins anew.
    """
    if word.boot != last.boot:
        return word.state != "lost"
    if word.state == "lost":
        return word.connection >= last.connection and last.state not in ("sleeping", "stopped", "lost")
    return word.sequence > last.sequence
