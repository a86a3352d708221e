"""Heartbeats: an alive frame between two statuses, and what both sides make of it."""

import msgspec
import pytest

from coordinator.fleet.ledger import Ledger
from coordinator.fleet.listening import Listener
from coordinator.fleet.tables import nodes
from node.escalation.presence import Presence, Voice, same_but_counts
from protocol import frames, topics
from protocol.codec import decode_message, encode
from protocol.messages import Status
from protocol.mqtt import Incoming

BORN = Status(node="esteli", boot="b1", sequence=1, state="answering", model_digest="a" * 64, answered=10, answer_s=0.2)


class Air:
    """A session that takes everything down."""

    connected, connection = True, 1

    def __init__(self) -> None:
        self.said: list[tuple[str, bytes, bool]] = []

    def on_connected(self, listener):
        pass

    def publish(self, topic, payload, *, retain=False, **options):
        self.said.append((topic, payload, retain))


@pytest.fixture
def air():
    return Air()


def alive(status: Status) -> Incoming:
    return Incoming(topics.alive(status.node), frames.encode(frames.alive(status)))


def test_a_heartbeat_that_only_counts_is_a_frame_of_20_bytes(air):
    now = [BORN]
    voice = Voice("esteli", "b1", air, lambda: now[0])

    voice._say(now[0], timeout=1)
    now[0] = msgspec.structs.replace(BORN, answered=99, queue=3, waiting=2)
    voice._say(now[0], timeout=1, news=False)

    assert [(topic, retain) for topic, _, retain in air.said] == [(topics.status("esteli"), True), (topics.alive("esteli"), False)]
    assert len(air.said[1][1]) == 20
    assert frames.decode(air.said[1][1]).answered == 99


@pytest.mark.parametrize(
    "change", [{"state": "no-model"}, {"release": 2}, {"model_digest": "b" * 64}, {"serves": True}, {"answer_s": 0.5}], ids=str
)
def test_a_heartbeat_with_anything_new_is_a_status(air, change):
    voice = Voice("esteli", "b1", air, lambda: BORN)
    voice._say(BORN, timeout=1)

    voice._say(msgspec.structs.replace(BORN, **change), timeout=1, news=False)

    assert [topic for topic, _, _ in air.said] == [topics.status("esteli")] * 2


def test_a_status_the_broker_did_not_take_is_said_again_in_full(air):
    from protocol.errors import Unavailable

    voice = Voice("esteli", "b1", air, lambda: BORN)
    take, air.publish = air.publish, lambda *a, **o: (_ for _ in ()).throw(Unavailable("gone"))
    voice._say(BORN, timeout=1)
    air.publish = take

    voice._say(BORN, timeout=1, news=False)

    assert decode_message(air.said[0][1]).sequence == 2


def test_a_little_faster_or_slower_is_nothing_new():
    assert same_but_counts(BORN, msgspec.structs.replace(BORN, answer_s=0.3, sequence=5))
    assert not same_but_counts(BORN, msgspec.structs.replace(BORN, answer_s=0.05))


def test_a_peer_hears_the_counts_and_that_the_node_is_there():
    now = [0.0]
    presence = Presence(monotonic=lambda: now[0])
    presence.note(BORN)
    now[0] = 900.0

    presence.hear_alive(alive(msgspec.structs.replace(BORN, sequence=2, answered=20, queue=4)))
    now[0] = 1_800.0

    assert presence.likely("esteli")
    assert (presence.last("esteli").answered, presence.last("esteli").queue) == (20, 4)
    assert presence.last("esteli").model_digest == "a" * 64


def test_an_alive_frame_of_nobody_known_or_of_another_boot_says_nothing():
    presence = Presence()
    presence.hear_alive(alive(BORN))
    assert presence.last("esteli") is None

    presence.note(BORN)
    presence.hear_alive(alive(msgspec.structs.replace(BORN, boot="b2", sequence=9)))

    assert presence.last("esteli") == BORN


def test_the_ledger_learns_the_counts_from_an_alive_frame_and_refuses_other_bytes(tmp_path):
    class Quiet:
        def subscribe(self, topic_filter, handler):
            pass

        def on_connected(self, listener):
            pass

    import sqlalchemy as sa

    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.migrate()
    now = [1_000.0]
    listener = Listener(Quiet(), ledger, clock=lambda: now[0])
    listener.status(Incoming(topics.status("esteli"), encode(BORN)))
    now[0] = 1_300.0

    listener.alive(alive(msgspec.structs.replace(BORN, sequence=2, answered=20)))
    listener.alive(Incoming(topics.alive("esteli"), b"\xff" * 20))

    with ledger.read() as connection:
        row = connection.execute(sa.select(nodes)).one()
    assert (row.answered, row.last_seen, row.model_digest) == (20, 1_300, "a" * 64)
    ledger.close()
