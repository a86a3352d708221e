"""Mutual TLS between our session and a real mosquitto: the certificate's name is the node's name."""

import pytest

from deploy.broker import Broker, Tls
from protocol import topics
from protocol.errors import BadInput
from protocol.mqtt import Session
from protocol.ports import free_port
from tests.certificates import Authority

pytestmark = pytest.mark.broker


@pytest.fixture
def ours(tmp_path):
    return Authority(tmp_path / "ours")


@pytest.fixture
def tls_broker(tmp_path, ours, mosquitto):
    with Broker(tmp_path / "broker", port=free_port(), users={}, tls=Tls(ours.ca, *ours.issue("broker"))) as running:
        yield running


@pytest.fixture
def session(tls_broker, monkeypatch):
    monkeypatch.setattr("protocol.mqtt.CONNACK_DEADLINE_S", 1.0)
    made = []

    def make(name, ca, cert=None, key=None):
        one = Session(
            name, tls_broker.host, tls_broker.port, ca_file=ca, cert_file=cert, key_file=key, backoff_base=0.05, backoff_cap=0.2
        )  # fmt: skip
        made.append(one)
        one.start()
        return one

    yield make
    for one in made:
        one.stop()


def test_a_node_with_a_certificate_speaks_under_the_certificates_name_and_no_other(session, ours):
    esteli = session("esteli", ours.ca, *ours.issue("esteli"))
    assert esteli.wait_connected(10), esteli.problem

    esteli.publish(topics.event("esteli"), b"mine")
    with pytest.raises(BadInput, match="access list"):
        esteli.publish(topics.event("malacatoya"), b"not mine")


def test_a_client_without_or_with_a_foreign_certificate_is_not_let_in(session, ours, tmp_path, eventually):
    foreign = Authority(tmp_path / "theirs")
    bare, forged = session("bare", ours.ca), session("forged", ours.ca, *foreign.issue("esteli"))

    eventually(lambda: bare.problem != "connecting" and forged.problem != "connecting")

    assert not bare.connected
    assert not forged.connected


def test_a_broker_with_a_foreign_certificate_is_not_trusted(session, ours, tmp_path, eventually):
    foreign = Authority(tmp_path / "theirs")
    esteli = session("esteli", foreign.ca, *ours.issue("esteli"))

    eventually(lambda: "certificate verify failed" in esteli.problem, lambda: esteli.problem)

    assert not esteli.connected
