"""What must still be said: a durable outbox in the caller's own database.

A message enters the outbox in the same transaction as the fact it reports, so after any kill there are both or neither. `drain` hands it
to the broker and hands it over again until it is settled. The class of a message (`CLASSES`) decides the rest:

kind       settled by                               resent after                    leaves   dropped for space   waits at most
reply      the broker's PUBACK                      -                               first    third               a day
question   `settle`, when its reply was applied     60 s, doubling to an hour       second   second              30 days
event      the coordinator's Ack (`settle`)         60 s, doubling to an hour       third    last                for ever
bulk       its receiver's Ack (`settle`)            60 s, doubling to an hour       last     first               30 days

A PUBACK is the broker's word that it has the message, not the receiver's: so we repeat, and receivers are idempotent by id.
Oldest first inside a class; a message past `expires` leaves unsent.
Size: `put` refuses what no packet can carry, by our own limit and by the broker's once a CONNACK has told it (`connected`).
Poison: when a connection ends, what was in flight is suspect and travels alone from then on; STRIKES ended connections and the message is
set aside, and the next one leaves; but not two in a row without a success between them, for then it is the broker that is sick. What is
set aside is tried again every hour, alone, for it may be innocent: on a bad link connections end by themselves. After CHANCES more ends it
is parked for good, with the reason. Full: the oldest of the class that matters least goes, and a line stays in `parked`.
`put` fails for a single message that is too large and never for fullness: a node must go on answering when nobody listens for a month.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, Literal, Protocol

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from protocol.codec import CONTENT_TYPE
from protocol.errors import BadInput, TooLarge
from protocol.names import known

MESSAGE_LIMIT = 64 * 1024  # bytes of one payload, as in codec
ROW_LIMIT = 20_000  # messages waiting; two weeks at one a minute
SIZE_LIMIT = 32 * 1024 * 1024  # bytes of payload waiting
PARKED_LIMIT = 500  # rows kept for the operator
STRIKES = 3  # ended connections until a message is set aside
CHANCES = 8  # further ones until it is parked; a real poison costs a connection each
RESEND_S, RESEND_CAP_S = 60.0, 3_600.0
TLS_BYTES = 22  # of one record
ACKNOWLEDGED_BYTES = 27 + 2 * 52  # what a PUBACK and both packets' headers cost on top of a message, TLS included

Kind = Literal["reply", "question", "event", "bulk"]


class Class(msgspec.Struct, frozen=True):
    """How messages of one kind are treated."""

    drops: int  # the lower, the sooner it goes when there is no room
    longest_s: float  # seconds it waits at most; 0: for ever
    by_puback: bool = False  # done when the broker has it


CLASSES: dict[Kind, Class] = {  # in the order of leaving
    "reply": Class(drops=3, longest_s=86_400.0, by_puback=True),
    "question": Class(drops=2, longest_s=30 * 86_400.0),
    "event": Class(drops=4, longest_s=0.0),
    "bulk": Class(drops=1, longest_s=30 * 86_400.0),
}
DROP_ORDER = tuple(sorted(CLASSES, key=lambda kind: CLASSES[kind].drops))

log = logging.getLogger(__name__)
metadata = sa.MetaData()

outbox = sa.Table(
    "outbox", metadata,
    sa.Column("position", sa.Integer, primary_key=True),  # order of entry
    sa.Column("id", sa.String(128), nullable=False, unique=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("topic", sa.String(255), nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),  # seconds since 1970 on this machine's clock; 0: never
    sa.Column("response_topic", sa.String(255), nullable=False),
    sa.Column("correlation", sa.LargeBinary, nullable=False),
    sa.Column("sent", sa.Integer, nullable=False, default=0),  # times the broker acknowledged it
    sa.Column("strikes", sa.Integer, nullable=False, default=0),  # connections that ended with it in flight
    sa.Column("due", sa.Float, nullable=False, default=0.0),  # not to be handed over before
    sa.Index("outbox_size", "kind", "size"),  # count and sum are read from the index alone
    sa.Index("outbox_next", "kind", "position"),
    sqlite_autoincrement=True,
)  # fmt: skip

parked = sa.Table(
    "outbox_parked", metadata,
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(128), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("topic", sa.String(255), nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),  # empty when it was dropped for space
    sa.Column("reason", sa.String(300), nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sqlite_autoincrement=True,
)  # fmt: skip

learned = sa.Table(
    "outbox_learned", metadata,
    sa.Column("row", sa.Integer, primary_key=True),  # always 1
    sa.Column("packet_limit", sa.Integer, nullable=False),  # bytes of one packet, as the last CONNACK told
)  # fmt: skip


class Executes(Protocol):
    """A SQLAlchemy Connection or ORM Session inside the caller's transaction."""

    def execute(self, statement: Any, /) -> Any:
        """Run one statement."""


class Waiting(msgspec.Struct, frozen=True):
    """One message in the outbox."""

    id: str
    kind: Kind
    topic: str
    payload: bytes
    expires: float
    response_topic: str
    correlation: bytes
    sent: int
    strikes: int

    @property
    def cost(self) -> int:
        """Bytes on the wire, about, the acknowledgement included."""
        size = packet_size(self.topic, self.payload, response_topic=self.response_topic, correlation=self.correlation)
        return size + TLS_BYTES + ACKNOWLEDGED_BYTES


class Parked(msgspec.Struct, frozen=True):
    """One message that will not leave, and why."""

    id: str
    kind: str
    topic: str
    payload: bytes
    reason: str
    at: float


class Outbox:
    """The outbox in `engine`'s database. Makes its tables. `packet_limit` is 0 until a broker has told one.

    Args:
        clock: seconds since 1970. Only differences matter, so a board that woke in 1970 works; `expires` is read on this clock.
        resend, aside: seconds until a message leaves again that nobody answered, and one that was set aside; at most RESEND_CAP_S.
        on_dropped: told (id, kind, reason) of every message that left undelivered, after the transaction that removed it.
    """

    def __init__(
        self,
        engine: sa.Engine,
        *,
        row_limit: int = ROW_LIMIT,
        size_limit: int = SIZE_LIMIT,
        clock: Callable[[], float] = time.time,
        resend: float = RESEND_S,
        aside: float = RESEND_CAP_S,
        on_dropped: Callable[[str, str, str], None] | None = None,
    ) -> None:
        self.engine, self.row_limit, self.size_limit, self.clock = engine, row_limit, size_limit, clock
        self.resend, self.aside = resend, min(aside, RESEND_CAP_S)
        self._on_dropped = on_dropped
        self.woken = threading.Event()
        self._something_left = True  # since a message was set aside
        self._last_look = 0.0  # on our clock
        metadata.create_all(engine)
        with engine.begin() as connection:
            self.packet_limit = int(connection.execute(sa.select(learned.c.packet_limit)).scalar() or 0)

    def connected(self, packet_limit: int) -> None:
        """A broker took us: remember the largest packet it takes, over restarts too, and let the drain look."""
        if packet_limit != self.packet_limit:
            with self.engine.begin() as connection:
                row = insert(learned).values(row=1, packet_limit=packet_limit)
                connection.execute(row.on_conflict_do_update(index_elements=["row"], set_={"packet_limit": packet_limit}))
            self.packet_limit = packet_limit
        self.wake()

    def put(
        self,
        session: Executes,
        topic: str,
        payload: bytes,
        *,
        id: str,
        kind: Kind,
        expires: float = 0.0,
        response_topic: str = "",
        correlation: bytes = b"",
    ) -> bool:
        """Queue a message inside the caller's transaction. Returns False, changing nothing, when `id` waits already.

        Args:
            expires: seconds since 1970; 0 for never. The broker is told the same span. No later than the class allows.

        Raises:
            TooLarge: over MESSAGE_LIMIT, or over what the broker takes in one packet.
            BadInput: an unknown kind, no topic or no id.
        """
        if len(payload) > MESSAGE_LIMIT:
            raise TooLarge(f"a message of {len(payload)} bytes does not go into the outbox, the limit is {MESSAGE_LIMIT}")
        if not id or not topic:
            raise BadInput("a message needs an id and a topic")
        known(kind, CLASSES, what="kind of message")
        packet = packet_size(topic, payload, response_topic=response_topic, correlation=correlation)
        if 0 < self.packet_limit < packet:
            raise TooLarge(f"a message to {topic} needs a packet of {packet} bytes, the broker takes {self.packet_limit}")
        if longest := CLASSES[kind].longest_s:
            expires = min(expires or float("inf"), self.clock() + longest)
        done = session.execute(
            insert(outbox)
            .values(
                id=id, kind=kind, topic=topic, payload=payload, size=len(payload), expires=expires,
                response_topic=response_topic, correlation=correlation, sent=0, strikes=0, due=0.0,
            )
            .on_conflict_do_nothing(index_elements=["id"])
        )  # fmt: skip
        if done.rowcount == 0:
            return False
        self._make_room(session)
        return True

    def settle(self, session: Executes, *ids: str) -> int:
        """Forget messages whose receiver has answered, inside the caller's transaction. Returns how many were still waiting."""
        return int(session.execute(sa.delete(outbox).where(outbox.c.id.in_(ids))).rowcount)

    def taken(self, session: Executes, id: str) -> bool:
        """Whether the broker has had a message, or it waits here no more."""
        row = session.execute(sa.select(outbox.c.sent).where(outbox.c.id == id)).one_or_none()
        return row is None or row.sent > 0

    def lost(self, session: Executes, id: str) -> bool:
        """Whether a message neither waits here nor was parked: it was settled, or its time was over, by this clock, for a moment."""
        waits, kept = (session.execute(sa.select(table.c.id).where(table.c.id == id)).first() for table in (outbox, parked))
        return waits is None and kept is None

    def wake(self) -> None:
        """Tell the drain to look now; call it after a commit."""
        self.woken.set()

    def depth(self, session: Executes | None = None) -> int:
        """How many messages wait; what was set aside waits too."""
        count = sa.select(sa.func.count()).select_from(outbox)
        if session is not None:
            return int(session.execute(count).scalar_one())
        with self.engine.begin() as connection:
            return int(connection.execute(count).scalar_one())

    def waiting(self) -> list[Waiting]:
        """All messages in order of entry."""
        with self.engine.begin() as connection:
            return [_waiting(row) for row in connection.execute(sa.select(outbox).order_by(outbox.c.position))]

    def set_aside(self) -> list[Waiting]:
        """What ended STRIKES connections and is tried now and then, in order of entry."""
        aside = sa.select(outbox).where(outbox.c.strikes >= STRIKES).order_by(outbox.c.position)
        with self.engine.begin() as connection:
            return [_waiting(row) for row in connection.execute(aside)]

    def parked(self) -> list[Parked]:
        """What will not leave, oldest first."""
        with self.engine.begin() as connection:
            rows = connection.execute(sa.select(parked).order_by(parked.c.position)).all()
        return [Parked(row.id, row.kind, row.topic, row.payload, row.reason, row.at) for row in rows]

    def _notice_a_clock_set_back(self, now: float) -> None:
        """What waits for an hour that has been already leaves now: an hour's step back would else be an hour's silence."""
        if now < self._last_look:
            with self.engine.begin() as connection:
                connection.execute(sa.update(outbox).where(outbox.c.due > now).values(due=now))
        self._last_look = now

    # ---- the drain's own steps; each is one transaction

    def due(self, limit: int, *, without: frozenset[str] = frozenset(), kinds: Collection[Kind] = tuple(CLASSES)) -> list[Waiting]:
        """The messages that may leave now: by class, oldest first. A suspect one comes alone, and only when nothing is in flight."""
        now = self.clock()
        self._notice_a_clock_set_back(now)
        may_leave = sa.and_(
            sa.or_(outbox.c.due <= now, outbox.c.due > now + RESEND_CAP_S),  # the second: the clock was set back
            sa.or_(outbox.c.expires == 0, outbox.c.expires > now),
        )
        rows: list[Waiting] = []
        with self.engine.begin() as connection:
            for kind in CLASSES:
                if kind in kinds and len(rows) < limit + len(without):
                    query = sa.select(outbox).where(outbox.c.kind == kind, may_leave).order_by(outbox.c.position)
                    rows += [_waiting(row) for row in connection.execute(query.limit(limit + len(without) - len(rows)))]
        rows = [row for row in rows if row.id not in without][:limit]
        suspect = next((index for index, row in enumerate(rows) if row.strikes), None)
        if suspect is None:
            return rows
        if suspect > 0:
            return rows[:suspect]
        return [] if without else rows[:1]

    def handed_over(self, *ids: str) -> None:
        """The broker has them: replies are done, the others wait for their receiver's word and leave again when it does not come."""
        self._something_left = True
        with self.engine.begin() as connection:
            for row in connection.execute(sa.select(outbox.c.id, outbox.c.kind, outbox.c.sent).where(outbox.c.id.in_(ids))).all():
                if CLASSES[row.kind].by_puback:
                    connection.execute(sa.delete(outbox).where(outbox.c.id == row.id))
                else:
                    wait = min(RESEND_CAP_S, self.resend * 2.0 ** min(row.sent, 30))
                    values = {"sent": row.sent + 1, "strikes": 0, "due": self.clock() + wait}
                    connection.execute(sa.update(outbox).where(outbox.c.id == row.id).values(**values))

    def postpone(self, id: str, seconds: float) -> None:
        """Not before `seconds` from now."""
        with self.engine.begin() as connection:
            connection.execute(sa.update(outbox).where(outbox.c.id == id).values(due=self.clock() + seconds))

    def strike(self, id: str, *, why: str) -> None:
        """A connection ended with this message in flight: from now on it travels alone, then it is set aside, then parked."""
        reason = ""
        with self.engine.begin() as connection:
            row = connection.execute(sa.select(outbox).where(outbox.c.id == id)).one_or_none()
            if row is None:
                return
            strikes, due = row.strikes + 1, row.due
            if strikes == STRIKES and not self._something_left:  # a second in a row: rather a sick broker than a second poison
                strikes, due = STRIKES - 1, self.clock() + self.resend
            elif strikes >= STRIKES + CHANCES:
                reason = f"{strikes} connections ended while it was in flight; the last: {why}"
                self._park(connection, row, reason, keep=True)
            elif strikes >= STRIKES:
                due = self.clock() + self.aside
                self._something_left = False
                log.warning("outbox: %s %s is set aside, %d connections ended while it was in flight: %s", row.kind, id, strikes, why)
            if not reason:
                connection.execute(sa.update(outbox).where(outbox.c.id == id).values(strikes=strikes, due=due))
        if reason:
            self._tell(row.id, row.kind, reason)

    def park(self, id: str, reason: str) -> None:
        """Take a message out for good, keeping it for the operator."""
        with self.engine.begin() as connection:
            row = connection.execute(sa.select(outbox).where(outbox.c.id == id)).one_or_none()
            if row is None:
                return
            self._park(connection, row, reason, keep=True)
        self._tell(row.id, row.kind, reason)

    def sweep(self) -> int:
        """Remove what expired; how many."""
        now = self.clock()
        expired = sa.and_(outbox.c.expires > 0, outbox.c.expires <= now)
        with self.engine.begin() as connection:
            rows = connection.execute(sa.select(outbox.c.id, outbox.c.kind).where(expired)).all()
            if rows:
                connection.execute(sa.delete(outbox).where(expired))
        for row in rows:
            self._tell(row.id, row.kind, "expired")
        return len(rows)

    def _make_room(self, session: Executes) -> None:
        rows, size = session.execute(sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(outbox.c.size), 0)).select_from(outbox)).one()
        for kind in DROP_ORDER:
            while rows > self.row_limit or size > self.size_limit:
                oldest = session.execute(sa.select(outbox).where(outbox.c.kind == kind).order_by(outbox.c.position).limit(1)).one_or_none()
                if oldest is None:
                    break
                reason = f"outbox full ({rows} messages, {size} bytes); the oldest {kind} went"
                self._park(session, oldest, reason, keep=False)
                rows, size = rows - 1, size - oldest.size

    def _park(self, session: Executes, row: Any, reason: str, *, keep: bool) -> None:
        session.execute(sa.delete(outbox).where(outbox.c.position == row.position))
        session.execute(
            sa.insert(parked).values(
                id=row.id, kind=row.kind, topic=row.topic, payload=row.payload if keep else b"", reason=reason[:300], at=self.clock()
            )
        )
        newest = sa.select(sa.func.max(parked.c.position)).scalar_subquery()
        session.execute(sa.delete(parked).where(parked.c.position <= newest - PARKED_LIMIT))

    def _tell(self, id: str, kind: str, reason: str) -> None:
        log.info("outbox: %s %s left undelivered: %s", kind, id, reason)
        if self._on_dropped is not None:
            try:
                self._on_dropped(id, kind, reason)
            except Exception:
                log.exception("outbox: the listener for dropped messages failed")


def packet_size(topic: str, payload: bytes, *, response_topic: str = "", correlation: bytes = b"") -> int:
    """Bytes of the MQTT 5 packet that carries a message at most: fixed header 5, packet id 2, properties of what is set."""
    properties = 4 + 3 + len(CONTENT_TYPE) + 5  # their length, the content type, the expiry
    properties += 3 + len(response_topic.encode()) if response_topic else 0
    properties += 3 + len(correlation) if correlation else 0
    return 5 + 2 + len(topic.encode()) + 2 + properties + len(payload)


def _waiting(row: Any) -> Waiting:
    return Waiting(row.id, row.kind, row.topic, row.payload, row.expires, row.response_topic, row.correlation, row.sent, row.strikes)
