"""Adapters over TLS: the real SuperLink with a certificate, a real node that trusts its authority, and those who do not."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from coordinator.federation.superlink import Certificate, place_in
from node.doctor.outside import superlink
from node.learn.sync import sync
from node.settings import read
from protocol.errors import BadInput, Unavailable
from protocol.flower import authorities
from tests.certificates import Authority
from tests.federation.conftest import SuperLink, Window
from tests.federation.test_collect import gather, store_adapter


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "signer")


@pytest.fixture(scope="module")
def secured(signer: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    pytest.importorskip("flwr", reason="pip install -e '.[sync]'")
    found = SuperLink(tmp_path_factory.mktemp("secured") / "state", (*signer.issue("superlink"), signer.ca))
    found.start()
    yield found
    found.stop()


@pytest.mark.flower
def test_an_adapter_arrives_over_tls(secured: SuperLink, windows: Callable[..., Window], tmp_path: Path) -> None:
    store_adapter(tmp_path / "esteli", "esteli")
    window = windows(tmp_path / "esteli", "esteli", link=secured)

    replies = gather(secured, tmp_path / "round", expected=("esteli",))

    assert [(reply.node, reply.code) for reply in replies] == [("esteli", "adapter")]
    assert window.wait().delivered
    assert place_in(secured.state).ca == str(secured.ca)  # type: ignore[union-attr]
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{secured.address}/health", timeout=5.0)


@pytest.mark.flower
@pytest.mark.parametrize("trusts", ["another", "nobody"])
def test_a_node_that_does_not_trust_the_superlink_tells_it_nothing(
    secured: SuperLink, windows: Callable[..., Window], tmp_path: Path, trusts: str
) -> None:
    ca = str(Authority(tmp_path / "another").ca) if trusts == "another" else ""
    store_adapter(tmp_path / "malacatoya", "malacatoya")
    window = windows(tmp_path / "malacatoya", "malacatoya", link=secured, seconds=9.0, ca=ca)

    assert gather(secured, tmp_path / "round", seconds=7.0, expected=("malacatoya",)) == []

    assert not window.wait().delivered
    assert window.result is not None and window.result.answered == ()


@pytest.mark.flower
def test_a_coordinator_that_does_not_trust_the_superlink_gives_it_no_token(secured: SuperLink, tmp_path: Path) -> None:
    other = Authority(tmp_path / "another").ca

    with pytest.raises(Unavailable, match=r"no SuperLink answers at .*CERTIFICATE_VERIFY_FAILED"):
        gather(secured, tmp_path / "round", seconds=8.0, ca=str(other))


@pytest.mark.flower
def test_the_doctor_says_why_a_superlink_and_a_node_do_not_come_together(secured: SuperLink, tmp_path: Path) -> None:
    (tmp_path / "stale.token").write_text("x" * 40)
    other = str(Authority(tmp_path / "another").ca)

    def found(address: str = secured.address, ca: str = secured.ca, token: str = "fleet.token") -> tuple[str, str]:
        file = secured.state / token if token == "fleet.token" else tmp_path / token
        learn = {"superlink": address, "superlink_ca_file": ca, "fleet_token_file": str(file)}
        given, _ = read(None, flags={"node.state_dir": str(tmp_path), **{f"learn.{key}": value for key, value in learn.items()}})
        (one,) = superlink(given)
        return one.state, f"{one.found}; {one.advice}"

    assert found() == ("good", f"{secured.address} answers over TLS; ")
    for state, words, given in (
        ("bad", "fleet.token again", {"token": "stale.token"}),
        ("bad", "not of the authority that signed", {"ca": other}),
        ("bad", "may want TLS", {"ca": ""}),
        ("bad", "another name", {"address": secured.address.replace("127.0.0.1", "localhost")}),
        ("bad", "cannot read", {"ca": str(tmp_path / "none.pem")}),
        ("warn", "nothing listens", {"address": "127.0.0.1:1"}),
    ):
        judged, told = found(**given)
        assert (judged, words in told) == (state, True), told


def test_files_that_are_no_certificate_are_told_before_anything_is_sent(signer: Authority, tmp_path: Path) -> None:
    certificate, key = signer.issue("one")
    _, other = signer.issue("two")
    (tmp_path / "ca.pem").write_text("milk, nails, seed")

    Certificate(certificate, key, signer.ca).check()
    with pytest.raises(BadInput, match=r"one\.pem and .*two\.key"):
        Certificate(certificate, other, signer.ca).check()
    with pytest.raises(BadInput, match=r"ca\.pem is no PEM file"):
        Certificate(certificate, key, tmp_path / "ca.pem").check()
    with pytest.raises(BadInput, match="cannot read"):
        authorities(str(tmp_path / "none.pem"))
    with pytest.raises(BadInput, match=r"ca\.pem is no PEM file"):
        sync(tmp_path / "state", "esteli", "127.0.0.1:1", window_s=5.0, ca=str(tmp_path / "ca.pem"))
