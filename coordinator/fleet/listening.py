"""Listening to the fleet: every status and event goes into the ledger, and only then does the node hear "we have it".

Rules:
 * An event is acknowledged after its transaction, a second delivery as well: the first Ack may have been lost.
 * A message that cannot be used is kept with the reason. One that names its id and its own node is acknowledged all the same: the
   node would repeat it for ever, and it will not get better.
 * A node speaks only for itself: topic and message must name the same node. The broker's access list makes the topic true.
 * The newest release is announced as a retained notice at every connection, so that a broker that forgot learns it again.
When the ledger does not open, nothing is acknowledged and the node repeats: that is all the retrying there is.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Protocol, TypeVar

from protocol import frames, topics
from protocol.codec import decode_message, encode
from protocol.errors import BadInput, MalformedMessage, MilpaError
from protocol.messages import Ack, Event, ReleaseNotice, Status
from protocol.mqtt import Incoming, Session

M = TypeVar("M", Status, Event)

log = logging.getLogger(__name__)


class Keeps(Protocol):
    """What listening needs of `coordinator.fleet.ledger.Ledger`."""

    def seen_status(self, status: Status, received: int) -> bool:
        """Apply a node's word about itself."""

    def add_event(self, event: Event, received: int) -> bool:
        """Keep what happened on a node; False when it was there already."""

    def add_refused(self, topic: str, payload: bytes, reason: str, received: int) -> None:
        """Keep a message that could not be used."""


class Listener:
    """Subscribes `session` to the fleet. Make it before `session.start`.

    Args:
        heard: told after every change of the ledger, for whoever shows it.
    """

    def __init__(
        self, session: Session, ledger: Keeps, *, clock: Callable[[], float] = time.time, heard: Callable[[], None] | None = None
    ) -> None:
        self.session, self.ledger, self.clock, self._heard = session, ledger, clock, heard
        self._notice: ReleaseNotice | None = None
        self._last: dict[str, Status] = {}  # by node; every retained status comes again when this process subscribes
        self._lock = threading.Lock()  # notices leave in order of their numbers
        session.subscribe(topics.ALL_STATUS, self.status)
        session.subscribe(topics.ALL_ALIVE, self.alive)
        session.subscribe(topics.ALL_EVENTS, self.event)
        session.on_connected(lambda _: self._announce())

    def status(self, message: Incoming) -> None:
        """Handle one message of ALL_STATUS."""
        if not message.payload:
            return  # a retained word was cleared
        try:
            status = _own(message, Status)
            if topics.status(status.node) != message.topic:
                raise MalformedMessage(f"node {status.node!r} is not the node of this topic")
            self.ledger.seen_status(status, int(self.clock()))
            self._last[status.node] = status
        except BadInput as error:
            self._refuse(message, error)
        self._tell()

    def alive(self, message: Incoming) -> None:
        """Handle one message of ALL_ALIVE: the node's last status with new counts. Before that status came it says nothing."""
        try:
            node, said = frames.heard_alive(message.topic, message.payload)
            status = frames.woken(self._last[node], said, at=int(self.clock())) if node in self._last else None
            if status is not None and status.state != "lost":
                self.ledger.seen_status(status, int(self.clock()))
        except BadInput as error:
            self._refuse(message, error)
        self._tell()

    def event(self, message: Incoming) -> None:
        """Handle one message of ALL_EVENTS, and acknowledge it once it is in the ledger."""
        event: Event | None = None
        try:
            event = _own(message, Event)
            if topics.event(event.node) != message.topic:
                event = None
                raise MalformedMessage("the event is another node's than its topic's")
            self.ledger.add_event(event, int(self.clock()))
        except BadInput as error:
            self._refuse(message, error)
        self._tell()
        if event is not None and event.id:
            self.session.send(topics.ack(event.node), encode(Ack(id=uuid.uuid4().hex, events=(event.id,))))

    def publish_notice(self, notice: ReleaseNotice) -> None:
        """Announce a release, retained; again at every connection. An older number than the last is ignored."""
        with self._lock:
            if self._notice is not None and notice.number < self._notice.number:
                return
            self._notice = notice
        if self.session.connected:
            self._announce()

    def _announce(self) -> None:
        with self._lock:
            if self._notice is None:
                return
            try:
                self.session.publish(topics.RELEASE, encode(self._notice), retain=True)
            except MilpaError as error:
                log.warning("the notice of release %d is not out yet: %s", self._notice.number, error)

    def _refuse(self, message: Incoming, error: BadInput) -> None:
        log.warning("refused a message on %s: %s", message.topic, error)
        self.ledger.add_refused(message.topic, message.payload, str(error), int(self.clock()))

    def _tell(self) -> None:
        if self._heard is not None:
            self._heard()


def _own(message: Incoming, kind: type[M]) -> M:
    value = decode_message(message.payload)
    if not isinstance(value, kind):
        raise MalformedMessage(f"{message.topic} carries a {type(value).__name__}, not a {kind.__name__}")
    return value
