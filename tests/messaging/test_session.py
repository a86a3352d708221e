"""protocol/mqtt.py against a real mosquitto."""

import queue
import socket
import threading
import time
from pathlib import Path

import pytest

from deploy.broker import Broker
from protocol import topics
from protocol.errors import BadInput, ConnectionLost, TooLarge, Unavailable
from protocol.mqtt import IN_FLIGHT_LIMIT, Session
from protocol.ports import free_port
from tests.faults import Fault, FaultProxy

pytestmark = pytest.mark.broker
EVENT = topics.event("esteli")


def kill_once_saved(broker: Broker, last: bytes, eventually):
    """SIGKILL the broker when its database has `last`: what it acknowledged and saved must survive."""
    database = broker.folder / "data" / "mosquitto.db"
    eventually(lambda: database.exists() and last in database.read_bytes())
    broker.kill()


def test_a_question_carries_its_response_topic_correlation_and_remaining_life(join, eventually):
    got = []
    base = join("base", start=False)
    base.subscribe(topics.questions_to("base"), got.append)
    base.start()
    assert base.wait_connected(10)
    esteli = join("esteli")

    esteli.publish(topics.question("base", "esteli"), b"?", response_topic=topics.reply("esteli", "base"), correlation=b"q-1", expiry=100)

    eventually(lambda: got)
    assert (got[0].topic, got[0].payload) == (topics.question("base", "esteli"), b"?")
    assert (got[0].response_topic, got[0].correlation) == (topics.reply("esteli", "base"), b"q-1")
    assert 95 <= got[0].expiry <= 100
    assert got[0].content_type == "application/json"


def test_connected_means_that_what_is_published_from_now_on_comes(broker, join, eventually):
    """On a slow link the broker's CONNACK is here long before our SUBSCRIBE is there."""
    got = []
    esteli = join("esteli")
    with FaultProxy((broker.host, broker.port), lambda n: Fault(latency_s=0.3)) as slow:
        coordinator = join("coordinator", start=False, port=slow.port)
        coordinator.subscribe(topics.ALL_EVENTS, lambda message: got.append(message.payload))
        coordinator.start()
        assert coordinator.wait_connected(10)

        esteli.publish(EVENT, b"now")

        eventually(lambda: got)
        coordinator.stop()


def asleep(join):
    """The broker keeps events for the coordinator, which is away."""
    session = join("coordinator", start=False)
    session.subscribe(topics.ALL_EVENTS, lambda message: None)
    session.start()
    assert session.wait_connected(10)
    session.stop()


def test_what_arrives_while_a_session_sleeps_is_delivered_in_order_when_its_process_comes_back(join, eventually):
    asleep(join)
    esteli = join("esteli")
    for number in range(30):
        esteli.publish(EVENT, b"%d" % number)

    got = []
    second = join("coordinator", start=False)
    second.subscribe(topics.ALL_EVENTS, lambda message: got.append(message.payload))
    second.start()

    eventually(lambda: len(got) >= 30, lambda: got)
    assert got == [b"%d" % number for number in range(30)]


def test_a_broker_that_sends_more_than_fits_is_heard_to_the_end(join, eventually):
    asleep(join)
    esteli = join("esteli")
    for number in range(30):
        esteli.publish(EVENT, b"%d" % number)

    got = set()
    second = join("coordinator", start=False)
    second._inbox = queue.Queue(maxsize=4)  # as a broker does after a kill: ten times what was agreed
    second.subscribe(topics.ALL_EVENTS, lambda message: (time.sleep(0.02), got.add(message.payload)))
    second.start()

    eventually(lambda: len(got) == 30, lambda: got)
    assert second.connects > 1


def test_a_message_past_its_expiry_is_not_delivered(join, eventually):
    asleep(join)
    esteli = join("esteli")
    esteli.publish(EVENT, b"short", expiry=1)
    esteli.publish(EVENT, b"long", expiry=100)
    time.sleep(2.1)  # the broker's own clock, in whole seconds

    got = []
    second = join("coordinator", start=False)
    second.subscribe(topics.ALL_EVENTS, lambda message: got.append(message.payload))
    second.start()

    eventually(lambda: b"long" in got)
    assert got == [b"long"]


def test_after_a_kill_of_the_broker_the_session_comes_back_with_everything_that_was_saved(broker, join, eventually):
    asleep(join)
    esteli = join("esteli")
    for number in range(50):
        esteli.publish(EVENT, b"event-%02d" % number)
    kill_once_saved(broker, b"event-49", eventually)
    eventually(lambda: not esteli.connected)

    with pytest.raises(Unavailable):
        esteli.publish(EVENT, b"nobody there", timeout=1)
    broker.start()
    eventually(lambda: esteli.connected, lambda: esteli.problem)
    got = []
    back = join("coordinator", start=False)
    back.subscribe(topics.ALL_EVENTS, lambda message: got.append(message.payload))
    back.start()

    eventually(lambda: len(got) >= 50, lambda: len(got))
    assert got == [b"event-%02d" % number for number in range(50)]


def test_a_broker_that_forgot_everything_gets_the_subscriptions_again_and_the_birth_is_announced(broker, join, eventually):
    present, got = [], []
    base = join("base", start=False)
    base.subscribe(topics.questions_to("base"), lambda message: got.append(message.payload))
    base.on_connected(present.append)
    base.start()
    eventually(lambda: present == [False])
    broker.kill()
    for file in (broker.folder / "data").iterdir():
        file.unlink()

    broker.start()
    eventually(lambda: present == [False, False], lambda: present)
    esteli = join("esteli")

    esteli.publish(topics.question("base", "esteli"), b"again")
    eventually(lambda: got == [b"again"], lambda: got)


def test_a_handler_that_raises_parks_its_message_and_the_next_is_handled(join, eventually):
    parked, got = [], []

    def handler(message):
        if message.payload == b"bad":
            raise ValueError("no such thing")
        got.append(message.payload)

    coordinator = join("coordinator", start=False, on_parked=lambda message, reason: parked.append((message.payload, reason)))
    coordinator.subscribe(topics.ALL_EVENTS, handler)
    coordinator.start()
    assert coordinator.wait_connected(10)
    esteli = join("esteli")

    esteli.publish(EVENT, b"bad")
    esteli.publish(EVENT, b"good")

    eventually(lambda: got == [b"good"])
    assert parked == [(b"bad", "no such thing")]
    assert coordinator.connected


def test_a_message_is_acknowledged_only_after_its_handler(join, broker, eventually):
    """A process that dies inside a handler gets the message again."""
    entered, release = threading.Event(), threading.Event()

    def stuck(message):
        entered.set()
        release.wait(20)

    first = join("coordinator", start=False)
    first.subscribe(topics.ALL_EVENTS, stuck)
    first.start()
    assert first.wait_connected(10)
    esteli = join("esteli")
    esteli.publish(EVENT, b"once")
    assert entered.wait(10)

    got = []  # the same client id takes the session over, as a restarted process would
    second = join("coordinator", start=False)
    second.subscribe(topics.ALL_EVENTS, got.append)
    first._stopping.set()
    second.start()

    eventually(lambda: got)
    release.set()
    assert got[0].payload == b"once"
    assert got[0].redelivered


def test_more_messages_than_may_be_unacknowledged_all_arrive(join, eventually):
    got = []
    coordinator = join("coordinator", start=False)
    coordinator.subscribe(topics.ALL_EVENTS, lambda message: got.append(message.payload))
    coordinator.start()
    assert coordinator.wait_connected(10)
    esteli = join("esteli")

    handed = [esteli.send(EVENT, b"%d" % number) for number in range(500)]

    for future in handed:
        future.result(10)
    eventually(lambda: len(got) == 500, lambda: len(got))
    assert got == [b"%d" % number for number in range(500)]


def test_a_message_over_the_brokers_limit_is_refused_here_and_the_link_stays_up(join):
    esteli = join("esteli")

    with pytest.raises(TooLarge, match="262144"):
        esteli.publish(EVENT, b"x" * 262_144)

    esteli.publish(EVENT, b"small")
    assert esteli.connects == 1


def test_what_the_broker_disconnects_for_fails_its_own_publication_and_the_link_comes_back(join, eventually):
    esteli = join("esteli")
    esteli.maximum_packet = 10**9  # as if the broker had not told

    with pytest.raises(ConnectionLost):
        esteli.publish(EVENT, b"x" * 300_000)

    eventually(lambda: esteli.connects == 2 and esteli.connected, lambda: esteli.problem)
    esteli.publish(EVENT, b"small")


def test_a_topic_nobody_can_publish_to_is_refused_and_takes_no_place_in_flight(join):
    esteli = join("esteli")

    for _ in range(IN_FLIGHT_LIMIT + 1):
        with pytest.raises(BadInput, match="milpa/#"):
            esteli.publish("milpa/#", b"x", timeout=1)


def test_publishing_on_anothers_topic_is_refused_by_name(join):
    esteli = join("esteli")

    with pytest.raises(BadInput, match="access list"):
        esteli.publish(topics.event("malacatoya"), b"not mine")


def test_a_wrong_password_is_told_and_tried_again(join, eventually):
    esteli = join("esteli", start=False, password="wrong")

    esteli.start()

    eventually(lambda: "Not authorized" in esteli.problem, lambda: esteli.problem)
    assert not esteli.connected
    assert not esteli.broken


def test_starting_and_stopping_without_a_broker_takes_no_time():
    session = Session("esteli", "127.0.0.1", free_port(), backoff_base=0.01, backoff_cap=0.05)

    session.start()
    with pytest.raises(Unavailable, match="not connected"):
        session.publish(EVENT, b"x", timeout=0.1)
    session.stop()

    assert session.broken  # both threads have ended
    assert session.problem == "stopped"


def test_a_server_that_never_says_connack_is_given_up(monkeypatch, eventually):
    monkeypatch.setattr("protocol.mqtt.CONNACK_DEADLINE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        session = Session("esteli", "127.0.0.1", deaf.getsockname()[1], backoff_base=0.01, backoff_cap=0.05)
        session.start()

        eventually(lambda: "no CONNACK" in session.problem, lambda: session.problem)

        session.stop()
    assert not session.connected


def test_a_retained_will_is_published_when_a_process_vanishes_and_not_when_it_says_goodbye(join, eventually):
    deaths = []
    watcher = join("base", start=False)
    watcher.subscribe(topics.ALL_STATUS, lambda message: deaths.append(message.topic))
    watcher.start()
    assert watcher.wait_connected(10)
    polite = join("malacatoya", will=lambda _: (topics.status("malacatoya"), b"lost"))
    rude = join("esteli", will=lambda _: (topics.status("esteli"), b"lost"))

    polite.stop()
    rude._stopping.set()  # its loop ends and the socket closes without a word

    eventually(lambda: deaths, lambda: deaths)
    assert deaths == [topics.status("esteli")]


def test_a_will_with_a_delay_is_not_published_for_a_short_gap(broker, join, eventually):
    deaths, other = [], []
    watcher = join("base", start=False)
    watcher.subscribe(topics.ALL_STATUS, lambda message: (deaths if message.payload == b"lost" else other).append(message.topic))
    watcher.start()
    assert watcher.wait_connected(10)
    esteli = join("esteli", will=lambda _: (topics.status("esteli"), b"lost"), will_delay=30)
    esteli._client.socket().shutdown(socket.SHUT_RDWR)

    eventually(lambda: esteli.connects == 2 and esteli.connected)
    esteli.publish(topics.status("esteli"), b"here again", retain=True)

    eventually(lambda: other)
    assert deaths == []


def test_tls_needs_the_files_it_is_given(tmp_path: Path, eventually):
    session = Session("esteli", "127.0.0.1", free_port(), ca_file=tmp_path / "missing.pem", backoff_base=0.01, backoff_cap=0.05)
    session.start()

    eventually(lambda: "missing" in session.problem or "No such file" in session.problem, lambda: session.problem)

    assert not session.broken
    session.stop()
