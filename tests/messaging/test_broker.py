"""deploy/broker.py: what is written, what may be said to whom, and what a start tells."""

import socket
from pathlib import PurePosixPath as Path

import pytest

from deploy.broker import Broker, Tls, mosquitto_access, mosquitto_conf, password_line, prepare
from protocol import topics
from protocol.errors import BadInput, NotEnough, PortInUse, Unavailable
from protocol.mqtt import Session
from protocol.ports import free_port


@pytest.fixture
def listens():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_the_configuration_has_every_setting_whose_default_loses_data():
    text = mosquitto_conf(port=1883, data=Path("/data"), passwords=Path("/p"), access=Path("/a"))

    for line in (
        "listener 1883 127.0.0.1", "allow_anonymous false", "persistence true", "autosave_on_changes true", "autosave_interval 1",
        "max_queued_messages 100000", "max_packet_size 262144", "persistence_location /data/",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert not any(line.startswith("user ") for line in text.splitlines())


def test_a_container_listens_on_all_addresses_and_may_ask_for_certificates():
    text = mosquitto_conf(
        port=8883, host="", data=Path("/d"), passwords=Path("/p"), access=Path("/a"), user="mosquitto",
        tls=Tls(Path("/ca"), Path("/c"), Path("/k")),
    )  # fmt: skip

    lines = text.splitlines()
    assert {"listener 8883", "user mosquitto", "require_certificate true", "use_identity_as_username true"} <= set(lines)


def test_every_topic_of_the_protocol_has_a_line_in_the_access_list():
    access = mosquitto_access()

    for topic in (
        topics.status("n"), topics.alive("n"), topics.event("n"), topics.ack("n"),
        topics.RELEASE, topics.question("n", "n"), topics.reply("n", "n"),
        topics.group_question("n", "n"),
    ):  # fmt: skip
        patterns = [line.split()[2].replace("%u", "+") for line in access.splitlines() if line.startswith("pattern")]
        assert any(_matches(pattern, topic) for pattern in patterns), topic


def _matches(pattern: str, topic: str) -> bool:
    return all(p in ("+", t) for p, t in zip(pattern.split("/"), topic.split("/"), strict=False)) and pattern.count("/") == topic.count("/")


@pytest.mark.broker
def test_no_plain_password_is_on_disk(tmp_path, mosquitto):
    prepare(tmp_path, port=free_port(), users={"esteli": "open-sesame"}, program="mosquitto")

    assert all(b"open-sesame" not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert (tmp_path / "passwords").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("user", "password"), [("No Name", "x"), ("a:b", "x"), ("a", ""), ("a", "x\ny")])
def test_a_user_that_would_break_the_password_file_is_refused(user, password):
    with pytest.raises(BadInput):
        password_line(user, password)


def test_a_port_in_use_is_told_before_anything_is_written(tmp_path, listens):
    with pytest.raises(PortInUse, match=str(listens)):
        Broker(tmp_path / "b", port=listens, users={"a": "x"}).start()

    assert not list((tmp_path / "b").glob("*.conf"))


def test_without_any_broker_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("deploy.broker.find_mosquitto", lambda: None)
    with pytest.raises(NotEnough, match="apt install mosquitto"):
        prepare(tmp_path, port=free_port(), users={}, program="mosquitto")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotEnough, match="pip install iotcore"):
        prepare(tmp_path, port=free_port(), users={})


def test_the_fallback_says_loudly_that_it_is_for_simulation_only_and_asks_for_the_password(tmp_path, monkeypatch, eventually):
    pytest.importorskip("iotcore")
    monkeypatch.setattr("deploy.broker.find_mosquitto", lambda: None)
    told, got = [], []
    port = free_port()
    with Broker(tmp_path, port=port, users={"esteli": 'a "b" \\c', "coordinator": "d"}, tell=told.append) as broker:
        assert broker.program == "iotcore"
        assert "simulation only" in told[0]
        coordinator = Session("coordinator", "127.0.0.1", port, username="coordinator", password="d", backoff_base=0.05)
        coordinator.subscribe(topics.ALL_EVENTS, lambda message: got.append(message.payload))
        esteli = Session("esteli", "127.0.0.1", port, username="esteli", password='a "b" \\c', backoff_base=0.05)
        stranger = Session("stranger", "127.0.0.1", port, username="esteli", password="guess", backoff_base=0.05)
        for session in (coordinator, esteli, stranger):
            session.start()
        try:
            for session in (coordinator, esteli):
                assert session.wait_connected(10), session.problem
            esteli.publish(topics.event("esteli"), b"x")
            eventually(lambda: got == [b"x"])
            assert not stranger.connected
        finally:
            for session in (coordinator, esteli, stranger):
                session.stop()


@pytest.mark.broker
def test_a_broker_that_does_not_come_up_tells_the_end_of_its_log(tmp_path, broker):
    broken = Broker(tmp_path / "broken", port=free_port(), users={"a": "x"}, program="mosquitto")
    broken.folder.mkdir()
    (broken.folder / "access").mkdir()

    with pytest.raises((Unavailable, OSError)):
        broken.start()

    assert broken.process is None or broken.process.poll() is not None


@pytest.mark.broker
def test_a_stopped_broker_may_be_started_again_on_its_data(broker, join, eventually):
    esteli = join("esteli")
    esteli.publish(topics.status("esteli"), b"here", retain=True)
    broker.stop()
    broker.start()
    got = []
    base = join("base", start=False)
    base.subscribe(topics.ALL_STATUS, lambda message: got.append((message.payload, message.retained)))
    base.start()

    eventually(lambda: got)
    assert got == [(b"here", True)]


@pytest.mark.broker
def test_a_node_gets_only_what_is_its_own_whatever_it_subscribes_to(join, eventually):
    """By delivery: mosquitto grants any subscription and filters what it delivers."""
    got = []
    spy = join("malacatoya", start=False)
    spy.subscribe("#", lambda message: got.append(message.topic))
    spy.start()
    assert spy.wait_connected(10)
    esteli, base, coordinator = join("esteli"), join("base"), join("coordinator")
    esteli.publish(topics.question("base", "esteli"), b"private")
    base.publish(topics.reply("esteli", "base"), b"private")
    esteli.publish(topics.event("esteli"), b"private")
    coordinator.publish(topics.ack("esteli"), b"private")
    esteli.publish(topics.status("esteli"), b"for all")
    coordinator.publish(topics.RELEASE, b"for all")
    coordinator.publish(topics.ack("malacatoya"), b"last")

    eventually(lambda: topics.ack("malacatoya") in got, lambda: got)
    assert got == [topics.status("esteli"), topics.RELEASE, topics.ack("malacatoya")]


@pytest.mark.broker
@pytest.mark.rule("message-3")
@pytest.mark.parametrize(
    "topic",
    [
        topics.status("esteli"), topics.event("esteli"), topics.ack("malacatoya"), topics.RELEASE,
        topics.question("base", "esteli"), topics.reply("esteli", "base"), topics.group_question("hills", "esteli"),
    ],
)  # fmt: skip
def test_a_node_cannot_speak_for_another(join, topic):
    malacatoya = join("malacatoya")

    with pytest.raises(BadInput, match="access list"):
        malacatoya.publish(topic, b"forged")
