"""Events for the coordinator's ledger: they leave by the outbox and are forgotten at the coordinator's Ack, never at the broker's."""

import math
import time
import uuid
from collections.abc import Callable, Mapping

import sqlalchemy as sa

from protocol import topics
from protocol.codec import decode_message, encode
from protocol.errors import BadInput, MalformedMessage
from protocol.messages import Ack, Event
from protocol.mqtt import Incoming
from protocol.outbox import Executes, Outbox


class Reporter:
    """Writes events into the outbox of `node`, and takes the coordinator's Acks."""

    def __init__(self, node: str, outbox: Outbox, *, engine: sa.Engine, clock: Callable[[], float] = time.time) -> None:
        self.node, self.outbox, self.engine, self.clock = node, outbox, engine, clock

    def report(
        self, session: Executes, kind: str, figures: Mapping[str, float] | None = None, detail: Mapping[str, str] | None = None
    ) -> str:
        """Queue an event inside the caller's transaction; returns its id. Figures and names only, never a record's text.

        Raises:
            TooLarge: the event does not fit a message.
            BadInput: a figure that is not a number.
        """
        if not all(math.isfinite(value) for value in (figures or {}).values()):
            raise BadInput(f"a figure of the event {kind!r} is not a finite number")
        event = Event(
            id=uuid.uuid4().hex,
            node=self.node,
            kind=kind,
            at=max(0, int(self.clock())),
            figures=dict(figures or {}),
            detail=dict(detail or {}),
        )
        self.outbox.put(session, topics.event(self.node), encode(event), id=event.id, kind="event")
        return event.id

    def acknowledged(self, message: Incoming) -> None:
        """Handle one message of this node's ack topic: forget the events it names. A second delivery finds nothing to forget.

        Raises:
            MalformedMessage: not an Ack.
        """
        ack = decode_message(message.payload)
        if not isinstance(ack, Ack):
            raise MalformedMessage(f"{message.topic} carries a {type(ack).__name__}, not an Ack")
        with self.engine.begin() as connection:
            self.outbox.settle(connection, *ack.events)
