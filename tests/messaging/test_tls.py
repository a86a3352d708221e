"""Mutual TLS between our session and a real mosquitto: the certificate's name is the node's name."""

import datetime
import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from deploy.broker import Broker, Tls
from protocol import topics
from protocol.errors import BadInput
from protocol.mqtt import Session
from protocol.ports import free_port

pytestmark = pytest.mark.broker


class Authority:
    """Signs certificates for a test, P-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        self.ca = self._write("ca.pem", self._certificate(self.name, self.key, authority=True))

    def issue(self, common_name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]), key, authority=False)
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return self._write(f"{common_name}.pem", certificate), self._write(f"{common_name}.key", private)

    def _certificate(self, name, key, *, authority):
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
            .sign(self.key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


def authority(folder: Path) -> Authority:
    folder.mkdir()
    return Authority(folder)


@pytest.fixture
def ours(tmp_path):
    return authority(tmp_path / "ours")


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
    foreign = authority(tmp_path / "theirs")
    bare, forged = session("bare", ours.ca), session("forged", ours.ca, *foreign.issue("esteli"))

    eventually(lambda: bare.problem != "connecting" and forged.problem != "connecting")

    assert not bare.connected
    assert not forged.connected


def test_a_broker_with_a_foreign_certificate_is_not_trusted(session, ours, tmp_path, eventually):
    foreign = authority(tmp_path / "theirs")
    esteli = session("esteli", foreign.ca, *ours.issue("esteli"))

    eventually(lambda: "certificate verify failed" in esteli.problem, lambda: esteli.problem)

    assert not esteli.connected
