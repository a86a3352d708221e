"""Handing an outbox over to the broker, in a thread of its own.

At most IN_FLIGHT messages are out at once, in the outbox's order; a suspect one travels alone. What the link does not carry, or what
today's bytes do not reach for, waits (`links`, `meter`); nothing overtakes it. Killed anywhere, the next drain starts where the table says.
"""

import logging
import threading
import time
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from protocol import links
from protocol.errors import BadInput, ConnectionLost, TooLarge, Unavailable
from protocol.links import LinkRules, Traffic, Verdict
from protocol.outbox import CLASSES, Outbox, Waiting

IN_FLIGHT = 10  # handed to the broker and not acknowledged; half of what a session allows, the rest is for status and replies
RETRY_S = 2.0  # seconds until a message is tried again that the broker could not take
REFUSED_S = 300.0  # seconds until one that it did not want to take
BEYOND_S = 3_600.0  # seconds until one that is larger than all of a day's bytes; the operator may allow more meanwhile
SWEEP_S = 5.0  # seconds between two looks for what expired
POLL_S = 1.0  # how long a put may wait for a drain that nobody woke
PUBACK_DEADLINE_S = 30.0  # then the message is handed over again
STUCK_S = 300.0  # seconds; a round on a slow, locked card takes a tenth of that

log = logging.getLogger(__name__)


class Link(Protocol):
    """What the drain needs of `protocol.mqtt.Session`."""

    @property
    def connected(self) -> bool:
        """Whether a message could leave now."""

    def send(
        self,
        topic: str,
        payload: bytes,
        *,
        response_topic: str | None = None,
        correlation: bytes | None = None,
        expiry: int | None = None,
        timeout: float = 0.0,
    ) -> "Future[None]":
        """Hand over; the future ends with None at the PUBACK, or with an error."""


class Spends(Protocol):
    """What the drain needs of `protocol.meter.Meter`."""

    rules: LinkRules

    def may_spend(self, cost: int, what: Traffic = "event") -> Verdict:
        """Whether `cost` bytes may be spent today on `what`."""


class Drain:
    """The thread. Owns nothing durable.

    Args:
        meter: what the link may carry and spend; None: everything.
    """

    def __init__(
        self, box: Outbox, link: Link, *, meter: Spends | None = None, in_flight: int = IN_FLIGHT, poll: float = POLL_S
    ) -> None:  # fmt: skip
        self.outbox, self.link, self.meter, self.in_flight, self.poll = box, link, meter, in_flight, poll
        self.held = ""  # why the next message waits although the broker has us; for the operator
        self._flying: dict[str, _Flight] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._next_sweep = 0.0
        self._round_at = 0.0  # monotonic seconds, when the last round began

    def start(self) -> None:
        """Start the thread."""
        self._round_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread within `timeout` seconds. What is in flight stays in the table."""
        self._stopping.set()
        self.outbox.wake()
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether the thread runs, and began a round within STUCK_S; for a watchdog."""
        return self._thread is not None and self._thread.is_alive() and time.monotonic() - self._round_at < STUCK_S

    def step(self) -> int:
        """One round: book what ended, sweep, hand over what may leave. Returns how many are in flight."""
        self._book_what_ended()
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_S
            self.outbox.sweep()
        if self.link.connected and not any(flight.suspect for flight in self._flying.values()):
            self._hand_over()
        return len(self._flying)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.outbox.woken.clear()
            self._round_at = time.monotonic()
            try:
                self.step()
            except Exception:  # a locked or full disk: the rows are safe, the next round tries again
                log.exception("outbox: a round failed")
                self._stopping.wait(self.poll)
            self.outbox.woken.wait(self.poll)

    def _book_what_ended(self) -> None:
        """All that the broker acknowledged in one transaction, which on an SD card is one wait; the others one by one."""
        ended = [(id, self._flying.pop(id)) for id, flight in list(self._flying.items()) if flight.ended]
        taken = [id for id, flight in ended if flight.future.done() and flight.future.exception() is None]
        if taken:
            self.outbox.handed_over(*taken)
        for id, flight in ended:
            if id not in taken:
                self._book(id, flight.future.exception() if flight.future.done() else Unavailable("no PUBACK in time"))

    def _book(self, id: str, error: BaseException | None) -> None:
        match error:
            case TooLarge():
                self.outbox.park(id, str(error))
            case ConnectionLost():
                self.outbox.strike(id, why=str(error))
            case BadInput():  # an operator can repair the broker's access list, so the message waits
                log.error("outbox: %s waits: %s", id, error)
                self.outbox.postpone(id, REFUSED_S)
            case _:
                self.outbox.postpone(id, RETRY_S)

    def _hand_over(self) -> None:
        kinds = [kind for kind in CLASSES if self.meter is None or kind in self.meter.rules.travels]
        self.held = ""
        for row in self.outbox.due(self.in_flight - len(self._flying), without=frozenset(self._flying), kinds=kinds):
            if not self._affordable(row):
                return  # nothing overtakes it
            expiry = None if row.expires == 0 else max(1, int(row.expires - self.outbox.clock()))
            try:
                future = self.link.send(
                    row.topic,
                    row.payload,
                    response_topic=row.response_topic or None,
                    correlation=row.correlation or None,
                    expiry=expiry,
                    timeout=1.0,
                )
            except TooLarge as error:
                self.outbox.park(row.id, str(error))
                continue
            except Unavailable:
                return  # no room in the session: the next round
            self._flying[row.id] = _Flight(future, time.monotonic() + PUBACK_DEADLINE_S, row.strikes > 0, row.cost)
            future.add_done_callback(lambda _: self.outbox.wake())

    def _affordable(self, row: Waiting) -> bool:
        """Whether today's bytes reach for the message, and for what is in flight and not counted yet."""
        if self.meter is None:
            return True
        under_way = sum(flight.cost for flight in self._flying.values())
        verdict = self.meter.may_spend(under_way + row.cost, row.kind)
        if not verdict.ok:
            self.held = verdict.reason
            if not links.may_spend(self.meter.rules, 0, row.cost, row.kind).ok:  # on no day: it must not hold up the others
                log.warning("outbox: %s %s needs more than all of a day's bytes: %s", row.kind, row.id, verdict.reason)
                self.outbox.postpone(row.id, BEYOND_S)
        return verdict.ok


class _Flight(NamedTuple):
    future: "Future[None]"
    deadline: float  # monotonic seconds
    suspect: bool  # nothing else is handed over meanwhile
    cost: int  # bytes on the wire, about

    @property
    def ended(self) -> bool:
        return self.future.done() or time.monotonic() > self.deadline
