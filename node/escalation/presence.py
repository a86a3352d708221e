"""Who is there: a node's word about itself, and what it hears of the others. Nothing waits for presence: it only orders whom to ask first.

* Birth at every connection, a heartbeat now and then, a word at every change of state; all retained, so a newcomer knows at once.
* The broker speaks our death ("lost", the will). It carries the boot it belongs to: a death that comes after the next birth is ignored.
* A planned absence is "sleeping" with a time, or "stopped": no alarm for a panel at night.
"""

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence

import msgspec

from protocol import topics
from protocol.codec import decode_message, encode
from protocol.errors import MalformedMessage, MilpaError
from protocol.messages import State, Status
from protocol.mqtt import Incoming, Session

SILENT_S = 1_000.0  # seconds without a word; three heartbeats of five minutes and a little
GOODBYE_S = 2.0  # seconds for the last word
ROUGHLY = 0.1  # heartbeats come up to a tenth early, so that nodes that booted together drift apart

log = logging.getLogger(__name__)


def new_boot() -> str:
    """A fresh id for this process start."""
    return uuid.uuid4().hex[:16]


def will(node: str, boot: str, *, role: str = "student") -> tuple[str, bytes]:
    """What the broker shall say when we vanish: topic and payload, for `mqtt.Session(will=...)`."""
    return topics.status(node), encode(Status(node=node, boot=boot, sequence=0, state="lost", role=role))


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
        session: Session,
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
        self._soon = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        session.on_connected(lambda _: self.announce())

    def start(self) -> None:
        """Start the heartbeat."""
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
        self._thread.start()

    def announce(self) -> None:
        """Say it soon, from the heartbeat's thread; for births and changes of state. Any thread may call it."""
        self._soon.set()

    def stop(self, state: State = "stopped", *, sleeping_until: int = 0) -> None:
        """Say goodbye, within a deadline, and end the heartbeat. Stop the session after it: a clean end keeps the will unsaid."""
        self._stopping.set()
        self._soon.set()
        if self._thread is not None:
            self._thread.join(GOODBYE_S)
        if self.session.connected:
            try:
                self._say(msgspec.structs.replace(self.describe(), state=state, sleeping_until=sleeping_until), timeout=GOODBYE_S)
            except Exception:  # a locked database must not keep the node from stopping
                log.exception("presence: could not describe this node")

    def _run(self) -> None:
        while True:
            self._soon.wait(self.heartbeat * (1.0 - ROUGHLY * self._rng.random()))
            self._soon.clear()
            if self._stopping.is_set():
                return
            if self.session.connected:
                try:
                    self._say(self.describe(), timeout=GOODBYE_S)
                except Exception:  # a locked database must not end the heartbeat
                    log.exception("presence: could not describe this node")

    def _say(self, status: Status, *, timeout: float) -> None:
        with self._saying:
            self._sequence += 1
            word = msgspec.structs.replace(status, node=self.node, boot=self.boot, sequence=self._sequence, at=max(0, int(self.clock())))
            try:
                self.session.publish(topics.status(self.node), encode(word), retain=True, timeout=timeout)
            except MilpaError as error:  # the next connection brings the next birth
                log.info("presence: %s", error)


class Presence:
    """What is known of the others, from their retained words. In memory: the broker tells it again at every start."""

    def __init__(self, *, silent: float = SILENT_S, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.silent, self._monotonic = silent, monotonic
        self._heard: dict[str, tuple[Status, float]] = {}  # node -> its last word, when it came (monotonic seconds)
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
        self.note(status)

    def note(self, status: Status) -> bool:
        """Take a word in. False: it is older than what is known (a late death of an earlier boot, a lower number of the same)."""
        with self._lock:
            known = self._heard.get(status.node)
            if known is not None:
                last = known[0]
                other_boot = status.boot != last.boot
                if other_boot and status.state == "lost":
                    return False
                if not other_boot and status.state != "lost" and status.sequence <= last.sequence:
                    return False
                if not other_boot and status.state == "lost":  # it carries the number of the connection's start
                    status = msgspec.structs.replace(status, sequence=last.sequence)
            self._heard[status.node] = (status, self._monotonic())
            return True

    def last(self, node: str) -> Status | None:
        """The node's last word."""
        with self._lock:
            known = self._heard.get(node)
        return known[0] if known else None

    def likely(self, node: str) -> bool:
        """Whether the node would probably answer now."""
        with self._lock:
            known = self._heard.get(node)
        return known is not None and known[0].state in ("answering", "updating") and self._monotonic() - known[1] < self.silent

    def order(self, peers: Sequence[str]) -> list[str]:
        """The peers to ask, the likely ones first, otherwise as configured. None is left out: a question waits at the broker."""
        return sorted(peers, key=lambda peer: not self.likely(peer))
