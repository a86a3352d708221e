"""The outbox's drain on a real session and a real mosquitto."""

import pytest

from protocol import topics
from protocol.mqtt import Session
from protocol.outbox import STRIKES, Drain, Outbox
from tests.messaging.conftest import PASSWORDS

pytestmark = pytest.mark.broker


class NeverListens(Session):
    """A session that does not believe the broker's limit, so that what is too large goes out."""

    maximum_packet = property(lambda self: 10**9, lambda self, told: None)


def test_what_the_broker_ends_the_connection_for_is_parked_after_three_times_and_the_rest_arrives(
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
        eventually(lambda: box.depth() == 0 and {b"before", b"after", b"last"} <= set(got), lambda: (box.waiting(), session.problem))
    finally:
        drain.stop()
        session.stop()

    [parked] = box.parked()
    assert parked.id == "poison"
    assert parked.reason.startswith(f"{STRIKES} connections ended")


def test_messages_put_while_the_broker_is_down_leave_in_order_when_it_is_back(broker, database, join, eventually):
    got = []
    coordinator = join("coordinator", start=False)
    coordinator.subscribe(topics.ALL_EVENTS, lambda message: got.append(message.payload))
    coordinator.start()
    eventually(lambda: topics.ALL_EVENTS in coordinator._subscribed)
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
