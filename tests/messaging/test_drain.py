"""The outbox's drain on a real session and a real mosquitto."""

import pytest

from deploy.broker import PACKET_LIMIT
from protocol import topics
from protocol.drain import Drain
from protocol.mqtt import Session
from protocol.outbox import STRIKES, Outbox
from tests.faults import FaultProxy, Flap
from tests.messaging.conftest import PASSWORDS

pytestmark = pytest.mark.broker


class NeverListens(Session):
    """A session that does not believe the broker's limit, so that what is too large goes out."""

    maximum_packet = property(lambda self: 10**9, lambda self, told: None)


def test_what_the_broker_ends_the_connection_for_is_set_aside_after_three_times_and_the_rest_arrives(
    broker, database, join, eventually, monkeypatch
):
    monkeypatch.setattr("protocol.outbox.MESSAGE_LIMIT", 10**9)
    got = []
    coordinator = join("coordinator", start=False)
    coordinator.subscribe(topics.ALL_EVENTS, lambda message: got.append(message.payload))
    coordinator.start()
    assert coordinator.wait_connected(10)
    box = Outbox(database)
    with database.begin() as connection:
        for id, payload in (("before", b"before"), ("poison", b"x" * 300_000), ("after", b"after"), ("last", b"last")):
            box.put(connection, topics.event("esteli"), payload, id=id, kind="reply")
    session = NeverListens("esteli", broker.host, broker.port, username="esteli", password=PASSWORDS["esteli"], backoff_base=0.02)
    drain = Drain(box, session, poll=0.05)
    session.start()
    drain.start()
    try:
        eventually(lambda: box.depth() == 1 and {b"before", b"after", b"last"} <= set(got), lambda: (box.depth(), session.problem))
    finally:
        drain.stop()
        session.stop()

    [aside] = box.set_aside()
    assert (aside.id, aside.strikes) == ("poison", STRIKES)


def test_a_link_that_flaps_all_the_time_loses_no_message_and_parks_none(broker, database, join, eventually):
    """Connections end by themselves while this or that is in flight: nothing of it is the messages' fault."""
    got = []
    coordinator = join("coordinator", start=False)
    coordinator.subscribe(topics.ALL_EVENTS, lambda message: got.append(message.payload))
    coordinator.start()
    assert coordinator.wait_connected(10), coordinator.problem
    box = Outbox(database, aside=0.3)
    wanted = {b"%d" % number for number in range(60)}
    with database.begin() as connection:
        for payload in sorted(wanted):
            box.put(connection, topics.event("esteli"), payload, id=payload.decode(), kind="reply")
    with FaultProxy((broker.host, broker.port), seed=7, flap=Flap(up_s=0.15, down_s=0.05)) as proxy:
        session = Session(
            "esteli", "127.0.0.1", proxy.port, username="esteli", password=PASSWORDS["esteli"], backoff_base=0.01, backoff_cap=0.05
        )  # fmt: skip
        session.on_connected(lambda _: box.connected(session.maximum_packet))
        drain = Drain(box, session, in_flight=3, poll=0.02)
        session.start()
        drain.start()
        try:
            eventually(lambda: box.depth() == 0, lambda: (box.depth(), session.problem, session.connects))
        finally:
            drain.stop()
            session.stop()

    eventually(lambda: set(got) == wanted, lambda: wanted - set(got))
    assert box.parked() == []


def test_the_limit_that_a_real_broker_tells_is_learned(broker, database, join, eventually):
    box = Outbox(database)
    esteli = join("esteli", start=False)
    esteli.on_connected(lambda _: box.connected(esteli.maximum_packet))
    esteli.start()

    eventually(lambda: box.packet_limit)

    assert Outbox(database).packet_limit == PACKET_LIMIT


def test_messages_put_while_the_broker_is_down_leave_in_order_when_it_is_back(broker, database, join, eventually):
    got = []
    coordinator = join("coordinator", start=False)
    coordinator.subscribe(topics.ALL_EVENTS, lambda message: got.append(message.payload))
    coordinator.start()
    assert coordinator.wait_connected(10), coordinator.problem
    esteli = join("esteli")
    box = Outbox(database)
    drain = Drain(box, esteli, poll=0.05)
    drain.start()
    broker.kill()
    eventually(lambda: not esteli.connected)
    for number in range(40):
        with database.begin() as connection:
            box.put(connection, topics.event("esteli"), b"%d" % number, id=str(number), kind="event")
    broker.start()
    try:
        eventually(lambda: len(set(got)) == 40, lambda: got)
    finally:
        drain.stop()

    assert list(dict.fromkeys(got)) == [b"%d" % number for number in range(40)]
    assert box.depth() == 40  # nobody said Ack: the broker's word is not enough
