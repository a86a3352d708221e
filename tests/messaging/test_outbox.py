"""protocol/outbox.py: bookkeeping, without a broker."""

from concurrent.futures import Future

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from sqlalchemy.orm import Session as Transaction

from protocol import links
from protocol.drain import BEYOND_S, IN_FLIGHT, Drain
from protocol.errors import BadInput, ConnectionLost, TooLarge, Unavailable
from protocol.outbox import CHANCES, CLASSES, MESSAGE_LIMIT, PARKED_LIMIT, RESEND_CAP_S, STRIKES, Outbox


class Clock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeLink:
    """What a session does with a message, decided by the test: `answer` is None (PUBACK), an error, or "wait"."""

    def __init__(self) -> None:
        self.connected = True
        self.answer = lambda topic: None
        self.sent: list[str] = []
        self.flying: dict[str, Future[None]] = {}

    def send(self, topic, payload, *, response_topic=None, correlation=None, expiry=None, timeout=0.0):
        id = payload.decode().rstrip(".")
        self.sent.append(id)
        future: Future[None] = Future()
        answer = self.answer(id)
        if isinstance(answer, Exception):
            future.set_exception(answer)
        elif answer is None:
            future.set_result(None)
        else:
            self.flying[id] = future
        return future

    def lose_connection(self) -> None:
        for future in self.flying.values():
            future.set_exception(ConnectionLost("gone"))
        self.flying.clear()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def box(database, clock):
    return Outbox(database, clock=clock)


@pytest.fixture
def link():
    return FakeLink()


def put(box, id, kind="event", *, size=0, **options):
    """A message whose payload is its id, filled up to `size` bytes."""
    with box.engine.begin() as connection:
        return box.put(connection, "t", id.encode().ljust(size, b"."), id=id, kind=kind, **options)


def ids(box):
    return [row.id for row in box.waiting()]


def test_a_message_shares_the_fate_of_the_transaction_it_was_put_in(box):
    with pytest.raises(ZeroDivisionError), Transaction(box.engine) as session, session.begin():
        box.put(session, "t", b"x", id="a", kind="event")
        raise ZeroDivisionError

    assert ids(box) == []


def test_the_same_id_waits_once(box):
    assert put(box, "a") is True
    assert put(box, "a") is False
    assert ids(box) == ["a"]


def test_an_event_leaves_oldest_first_and_stays_until_the_coordinator_has_it(box, link):
    for id in ("a", "b", "c"):
        put(box, id)
    drain = Drain(box, link)

    drain.step()
    drain.step()

    assert link.sent == ["a", "b", "c"]
    assert ids(box) == ["a", "b", "c"]
    with box.engine.begin() as connection:
        assert box.settle(connection, "a", "c", "never seen") == 2
    assert ids(box) == ["b"]


def test_a_reply_is_done_when_the_broker_has_it(box, link):
    put(box, "r", "reply")
    drain = Drain(box, link)

    drain.step()
    drain.step()

    assert ids(box) == []


def test_an_event_nobody_acknowledged_leaves_again_later_and_later(box, link, clock):
    put(box, "a")
    drain = Drain(box, link)
    gaps = []
    for _ in range(10):
        waited = 0.0
        before = len(link.sent)
        while len(link.sent) == before:
            drain.step()
            drain.step()
            clock.now += 30
            waited += 30
        gaps.append(waited)

    assert gaps[1:4] == [60, 120, 240]
    assert max(gaps) <= RESEND_CAP_S + 60


def test_a_clock_set_back_holds_nothing_up(box, link, clock):
    put(box, "a")
    drain = Drain(box, link)
    drain.step()
    drain.step()

    clock.now = 0.0
    drain.step()

    assert link.sent == ["a", "a"]


def test_a_clock_set_back_by_less_than_the_longest_wait_holds_nothing_up_either(box, link, clock):
    put(box, "a")
    drain = Drain(box, link)
    drain.step()
    drain.step()

    clock.now -= 1_800
    drain.step()

    assert link.sent == ["a", "a"]


def test_while_the_broker_is_away_messages_wait_and_then_leave(box, link):
    link.connected = False
    put(box, "a")
    drain = Drain(box, link)
    drain.step()
    assert link.sent == []

    link.connected = True
    drain.step()

    assert link.sent == ["a"]


def test_no_more_than_the_limit_is_in_flight(box, link):
    link.answer = lambda id: "wait"
    for number in range(3 * IN_FLIGHT):
        put(box, f"{number:02d}")
    drain = Drain(box, link)

    assert drain.step() == IN_FLIGHT
    assert drain.step() == IN_FLIGHT
    link.flying.pop("03").set_result(None)
    drain.step()

    assert link.sent == [f"{number:02d}" for number in range(IN_FLIGHT + 1)]


def test_what_expired_leaves_unsent_and_is_told(database, clock, link):
    told = []
    box = Outbox(database, clock=clock, on_dropped=lambda *what: told.append(what))
    put(box, "short", "question", expires=clock.now + 10)
    put(box, "long", "question", expires=clock.now + 1_000)
    clock.now += 11
    drain = Drain(box, link)

    drain.step()

    assert link.sent == ["long"]
    assert told == [("short", "question", "expired")]


def until_only_poison_waits(box, link):
    """The broker ends the connection whenever it sees the poison, and acknowledges the rest; the coordinator as well."""
    drain = Drain(box, link)
    for _ in range(40):
        drain.step()
        if "poison" in link.flying:
            link.lose_connection()
        for id in list(link.flying):
            link.flying.pop(id).set_result(None)
        received = [row.id for row in box.waiting() if row.sent]
        with box.engine.begin() as connection:
            box.settle(connection, *received)


def test_a_poison_message_is_set_aside_after_three_ended_connections_and_the_others_leave(box, link):
    """Whatever was in flight with it must not be set aside along."""
    link.answer = lambda id: "wait"
    for id in ("a", "poison", "c", "d"):
        put(box, id)

    until_only_poison_waits(box, link)

    assert ids(box) == [row.id for row in box.set_aside()] == ["poison"]
    assert link.sent.count("poison") == STRIKES
    assert {"a", "c", "d"} <= set(link.sent)


def test_a_message_that_was_set_aside_is_tried_every_hour_and_parked_in_the_end(box, link, clock):
    link.answer = lambda id: "wait"
    put(box, "poison")
    until_only_poison_waits(box, link)

    for hour in range(1, CHANCES + 1):
        clock.now += RESEND_CAP_S
        put(box, f"healthy-{hour}")
        until_only_poison_waits(box, link)
        assert link.sent.count("poison") == STRIKES + hour

    assert ids(box) == []
    [parked] = box.parked()
    assert (parked.id, parked.payload) == ("poison", b"poison")
    assert parked.reason.startswith(f"{STRIKES + CHANCES} connections ended")


def test_an_innocent_message_that_was_set_aside_on_a_bad_link_leaves_an_hour_later(box, link, clock):
    link.answer = lambda id: "wait"
    put(box, "innocent")
    drain = Drain(box, link)
    for _ in range(STRIKES):
        drain.step()
        link.lose_connection()
    drain.step()
    assert [row.id for row in box.set_aside()] == ["innocent"]

    link.answer = lambda id: None
    clock.now += RESEND_CAP_S
    drain.step()
    drain.step()

    assert [(row.id, row.sent, row.strikes) for row in box.waiting()] == [("innocent", 1, 0)]


def test_a_broker_that_ends_every_connection_gets_no_more_than_one_message_set_aside(box, link, clock):
    link.answer = lambda id: "wait"
    for number in range(5):
        put(box, str(number))
    drain = Drain(box, link)
    for _ in range(100):
        drain.step()
        link.lose_connection()
        clock.now += 10
    assert [row.id for row in box.set_aside()] == ["0"]
    assert box.parked() == []

    link.answer = lambda id: None
    for _ in range(100):
        drain.step()
        clock.now += 10

    assert {row.id for row in box.waiting() if row.sent} == {"1", "2", "3", "4"}


def test_a_message_the_broker_finds_too_large_is_parked_at_once(box, link):
    link.answer = lambda id: TooLarge("over 10 bytes") if id == "big" else None
    put(box, "big")
    put(box, "small")
    drain = Drain(box, link)
    drain.step()
    drain.step()

    assert [(row.id, row.reason) for row in box.parked()] == [("big", "over 10 bytes")]
    assert link.sent == ["big", "small"]


def test_a_message_the_broker_may_not_take_waits_for_the_operator_and_holds_nobody_up(box, link):
    link.answer = lambda id: BadInput("access list") if id == "not-mine" else None
    put(box, "not-mine")
    put(box, "mine", "reply")
    drain = Drain(box, link)
    drain.step()
    drain.step()

    assert link.sent == ["mine", "not-mine"]
    assert ids(box) == ["not-mine"]
    assert box.parked() == []


def test_an_oversized_message_is_refused_before_it_waits(box):
    with pytest.raises(TooLarge), box.engine.begin() as connection:
        box.put(connection, "t", b"x" * (MESSAGE_LIMIT + 1), id="a", kind="event")


@pytest.mark.parametrize(("id", "topic", "kind"), [("", "t", "event"), ("a", "", "event"), ("a", "t", "gossip")])
def test_a_message_without_id_topic_or_known_kind_is_refused(box, id, topic, kind):
    with pytest.raises(BadInput), box.engine.begin() as connection:
        box.put(connection, topic, b"x", id=id, kind=kind)


def test_classes_leave_in_their_order_and_the_oldest_first_inside_each(box, link):
    for id, kind in (
        ("b", "bulk"),
        ("e1", "event"),
        ("q1", "question"),
        ("r1", "reply"),
        ("e2", "event"),
        ("q2", "question"),
        ("r2", "reply"),
    ):
        put(box, id, kind)

    Drain(box, link).step()

    assert link.sent == ["r1", "r2", "q1", "q2", "e1", "e2", "b"]


@pytest.mark.parametrize("kind", [kind for kind, rules in CLASSES.items() if rules.longest_s])
def test_a_class_has_a_longest_wait_whatever_its_sender_wishes(box, clock, kind):
    longest = CLASSES[kind].longest_s
    put(box, "no end named", kind)
    put(box, "too long", kind, expires=clock.now + 10 * longest)
    put(box, "shorter", kind, expires=clock.now + 5)

    assert [row.expires for row in box.waiting()] == [clock.now + longest, clock.now + longest, clock.now + 5]


def test_an_event_waits_for_ever(box, clock):
    put(box, "e", "event")
    clock.now += 10 * 365 * 86_400

    assert (box.sweep(), ids(box)) == (0, ["e"])


def test_what_the_broker_told_it_takes_is_refused_at_once_and_after_a_restart(box, clock):
    put(box, "before anybody told", size=2_000)
    box.connected(1_024)

    with pytest.raises(TooLarge, match="takes 1024"):
        put(box, "big", size=1_000)
    with pytest.raises(TooLarge, match="takes 1024"):
        put(Outbox(box.engine, clock=clock), "big", size=1_000)

    assert put(box, "fits", size=900) is True


class Purse:
    """A meter with so many bytes a day, that nobody spends but by asking."""

    def __init__(self, name: str = "cellular", bytes_a_day: int = 0) -> None:
        self.rules, self.spent = links.link(name, bytes_a_day=bytes_a_day), 0

    def may_spend(self, cost, what="event"):
        return links.may_spend(self.rules, self.spent, cost, what)


def test_what_todays_bytes_do_not_reach_for_waits_by_class_and_leaves_tomorrow(box, link):
    for id, kind in (("e1", "event"), ("q1", "question"), ("r1", "reply")):
        put(box, id, kind)
    purse = Purse(bytes_a_day=10_000)
    drain = Drain(box, link, meter=purse)

    purse.spent = 9_000  # 500 are kept from questions and 1,500 from events: one reply and one question find room
    drain.step()
    drain.step()
    assert link.sent == ["r1", "q1"]
    assert "are kept for what matters more" in drain.held

    purse.spent = 0
    drain.step()

    assert link.sent == ["r1", "q1", "e1"]
    assert drain.held == ""
    assert "e1" in ids(box) and box.parked() == []


def test_what_is_in_flight_counts_as_spent(box, link):
    link.answer = lambda id: "wait"
    for number in range(10):
        put(box, f"r{number}", "reply")
    cost = box.waiting()[0].cost
    purse = Purse(bytes_a_day=100 * cost)
    purse.spent = 100 * cost - 2 * cost - 3 * cost - cost // 2  # two are kept for what matters more, three and a half are left

    Drain(box, link, meter=purse).step()

    assert link.sent == ["r0", "r1", "r2"]


def test_a_message_larger_than_all_of_a_days_bytes_holds_nobody_up(box, link, clock):
    put(box, "big", "reply", size=9_000)
    put(box, "small", "reply")
    drain = Drain(box, link, meter=Purse(bytes_a_day=5_000))

    drain.step()
    drain.step()

    assert link.sent == ["small"]
    drain.meter = Purse(bytes_a_day=50_000)  # the operator allows more
    clock.now += BEYOND_S
    drain.step()
    assert link.sent == ["small", "big"]


def test_what_a_link_does_not_carry_waits_for_a_richer_one(box, link):
    for id, kind in (("e", "event"), ("q", "question"), ("b", "bulk")):
        put(box, id, kind)

    Drain(box, link, meter=Purse("lora")).step()

    assert link.sent == ["q"]
    assert ids(box) == ["e", "q", "b"]


def test_a_full_outbox_drops_bulk_first_and_events_last_and_keeps_the_reason(database, clock):
    box = Outbox(database, row_limit=3, clock=clock)
    for id, kind in (
        ("e1", "event"), ("b1", "bulk"), ("q1", "question"), ("r1", "reply"), ("e2", "event"), ("e3", "event"), ("e4", "event"),
    ):  # fmt: skip
        put(box, id, kind)

    assert ids(box) == ["e2", "e3", "e4"]
    assert [(row.id, row.payload) for row in box.parked()] == [("b1", b""), ("q1", b""), ("r1", b""), ("e1", b"")]
    assert "oldest bulk went" in box.parked()[0].reason


def test_parked_messages_are_bounded(database, clock):
    box = Outbox(database, row_limit=1, clock=clock)
    with box.engine.begin() as connection:
        for number in range(PARKED_LIMIT + 20):
            box.put(connection, "t", b"x", id=str(number), kind="event")

    assert len(box.parked()) == PARKED_LIMIT


def test_a_round_that_fails_on_the_database_loses_no_message(box, link, monkeypatch):
    put(box, "a", "reply")
    drain = Drain(box, link)
    drain.step()
    with monkeypatch.context() as broken:
        broken.setattr(box, "handed_over", lambda *ids: (_ for _ in ()).throw(sa.exc.OperationalError("", {}, Exception("disk is full"))))
        with pytest.raises(sa.exc.OperationalError):
            drain.step()

    drain.step()
    drain.step()

    assert link.sent == ["a", "a"]
    assert ids(box) == []


class Bookkeeping(RuleBasedStateMachine):
    """Whatever the broker, the coordinator and the power do: every event is waiting, parked or acknowledged, and nothing else is."""

    messages = Bundle("messages")

    def __init__(self) -> None:
        super().__init__()
        self.engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
        self.clock = Clock()
        self.box = Outbox(self.engine, row_limit=6, clock=self.clock)
        self.link = FakeLink()
        self.link.answer = lambda id: "wait"
        self.drain = Drain(self.box, self.link)
        self.put: dict[str, str] = {}
        self.settled: set[str] = set()
        self.delivered: set[str] = set()

    def teardown(self) -> None:
        self.engine.dispose()

    @rule(target=messages, kind=st.sampled_from(list(CLASSES)))
    def put_one(self, kind):
        id = f"{len(self.put):03d}"
        put(self.box, id, kind)
        self.put[id] = kind
        return id

    @rule(id=messages)
    def put_again(self, id):
        if id in ids(self.box):
            assert put(self.box, id, self.put[id]) is False

    @rule()
    def drain_once(self):
        self.drain.step()

    @rule()
    def broker_acknowledges(self):
        for id in list(self.link.flying):
            self.link.flying.pop(id).set_result(None)
            if self.put[id] == "reply":
                self.delivered.add(id)
        self.drain.step()

    @rule()
    def connection_ends(self):
        self.link.lose_connection()
        self.drain.step()

    @rule()
    def broker_is_short_of_room(self):
        for id in list(self.link.flying):
            self.link.flying.pop(id).set_exception(Unavailable("quota exceeded"))
        self.drain.step()

    @rule()
    def killed_and_started_again(self):
        self.link.flying.clear()
        self.drain = Drain(Outbox(self.engine, row_limit=6, clock=self.clock), self.link)

    @rule(seconds=st.sampled_from([1, 70, 4_000]))
    def time_passes(self, seconds):
        self.clock.now += seconds

    @rule(id=consumes(messages))
    def receiver_answers(self, id):
        with self.engine.begin() as connection:
            self.box.settle(connection, id)
        self.settled.add(id)

    @invariant()
    def every_message_is_accounted_for(self):
        waiting = ids(self.box)
        parked = {row.id for row in self.box.parked()}
        assert len(waiting) <= 6
        assert sorted(waiting) == waiting
        assert len(set(waiting)) == len(waiting)
        assert set(self.put) == set(waiting) | parked | self.settled | self.delivered
        assert not set(waiting) & self.settled
        assert not set(waiting) & parked

    @invariant()
    def a_suspect_flies_alone(self):
        suspects = [row.id for row in self.box.waiting() if row.strikes and row.id in self.link.flying]
        assert not suspects or len(self.link.flying) == 1


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
