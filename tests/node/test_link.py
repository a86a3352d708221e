"""The node's link as its settings, its status and its doctor see it."""

from pathlib import Path

import pytest

from node.doctor.outside import link as looked_at
from node.link import Link
from node.settings import read
from node.store import open_database
from protocol.errors import BadInput, UnknownName


def settings(**flags: object):
    return read(flags={key.replace("__", "."): value for key, value in flags.items()}, environment={})[0]


def test_a_node_hangs_on_a_lan_without_a_limit_unless_told_otherwise():
    alone = settings()

    assert (alone.link_rules.name, alone.link_rules.bytes_a_day, alone.heartbeat_s, alone.poll_s) == ("lan", 0, 300.0, 900.0)


def test_a_class_makes_the_node_rarer_and_never_more_frequent():
    cellular = settings(link__class="cellular", broker__heartbeat_s=10.0, update__poll_s=60.0)
    patient = settings(link__class="cellular", broker__heartbeat_s=900.0, update__poll_s=90_000.0)

    assert (cellular.heartbeat_s, cellular.poll_s) == (300.0, 21_600.0)
    assert (patient.heartbeat_s, patient.poll_s) == (900.0, 90_000.0)


def test_the_class_can_be_set_in_a_file_and_by_the_environment(tmp_path: Path):
    (tmp_path / "node.toml").write_text('[link]\nclass = "cellular"\nbytes_a_day = 5000000\n')

    filed, _ = read(tmp_path / "node.toml", environment={})
    told, origins = read(tmp_path / "node.toml", environment={"MILPA_NODE_LINK_CLASS": "lan"})

    assert (filed.link_rules.name, filed.link_rules.bytes_a_day) == ("cellular", 5_000_000)
    assert told.link_rules.name == "lan"
    assert any(origin.name == "link.class" and origin.value == "lan" for origin in origins)


@pytest.mark.parametrize(
    "flags", [{"link__class": "lora", "peers__serve": True}, {"link__class": "lora", "link__radio": ("esteli",)}], ids=str
)
def test_a_node_on_a_radio_cannot_serve_others(flags: dict):
    with pytest.raises(BadInput, match="one way only"):
        settings(**flags)


def test_an_unknown_class_is_named():
    with pytest.raises((BadInput, UnknownName), match=r"link\.class"):
        settings(link__class="pigeon")


def test_the_day_is_told_in_the_status_and_by_the_doctor(tmp_path: Path):
    part = Link(settings(link__class="cellular", link__bytes_a_day=10_000), open_database(tmp_path / "node.db"))
    assert [found.state for found in looked_at({"link": part.status()})] == ["good"]

    part.meter.spend(6_000, 4_000)

    status = part.status()
    assert (status["class"], status["up_bytes"], status["down_bytes"]) == ("cellular", 6_000, 4_000)
    assert not part.may_spend(1, "event").ok
    assert not part.may_travel("bulk").ok
    assert [found.state for found in looked_at({"link": status, "broker": {"set_aside": 1}})] == ["warn", "warn"]
    assert {name: value() for name, _, value in part.figures()}["link_limit_bytes"] == 10_000.0
