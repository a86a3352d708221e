import socket
from pathlib import Path
from typing import Any

import pytest

from node import doctor
from node.settings import read, secret
from node.update.rules import BUILT_AT
from protocol.errors import BadInput, UnknownName
from tests.node.conftest import settings


def test_a_node_starts_with_no_settings_at_all() -> None:
    given, origins = read(environment={})

    assert (given.api.host, given.broker.host, given.update.url, given.site) == ("127.0.0.1", "", "", "node")
    assert {origin.origin for origin in origins} == {"default"}


def test_the_environment_wins_over_the_file_and_a_flag_over_both(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('[node]\nname = "esteli"\n[api]\nport = 1\nqueue = 4\n')

    given, origins = read(
        tmp_path / "node.toml", flags={"api.port": 3}, environment={"MILPA_NODE_API_PORT": "2", "MILPA_NODE_API_QUEUE": "5"}
    )

    assert (given.node.name, given.api.port, given.api.queue) == ("esteli", 3, 5)
    assert {o.name: o.origin for o in origins}["api.queue"] == "environment MILPA_NODE_API_QUEUE"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"node.name": "Estelí"}, "node.name"),
        ({"api.queue": 1000}, "between 1 and 32"),
        ({"model.budget": 1.5}, "model.budget"),
        ({"model.task": "cook"}, "unknown task"),
        ({"peers.ask": ["base"]}, "broker.host is empty"),
        ({"model.path": "a.gguf", "update.url": "http://x"}, "set one of them"),
        ({"api.prot": 1}, "did you mean 'port'"),
    ],
)
def test_a_setting_that_cannot_work_is_named(flags: dict[str, Any], says: str) -> None:
    with pytest.raises((BadInput, UnknownName), match=says):
        read(flags=flags, environment={})


def test_an_empty_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")

    with pytest.raises(BadInput, match="is empty"):
        secret(str(tmp_path / "key"), what="api.key_file")


def test_the_doctor_finds_a_clock_before_the_program_was_made() -> None:
    assert doctor.clock(12.0).state == "bad"
    assert doctor.clock(BUILT_AT + 1).state == "good"


def test_the_doctor_finds_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage(tmp_path)

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))

    assert doctor.disk(tmp_path / "not" / "made" / "yet").state == "bad"


def test_the_doctor_finds_a_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = doctor.port(settings(tmp_path, api__port=taken.getsockname()[1]), running=False)

    assert (found.state, "in use" in found.found) == ("bad", True)


def test_the_doctor_takes_an_absent_broker_calmly_and_an_absent_model_not(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as once:
        nobody = once.getsockname()[1]

    found = {f.what: f for f in doctor.examine(settings(tmp_path, broker__host="127.0.0.1", broker__port=nobody))}

    assert (found["broker"].state, found["model"].state, found["release"].state) == ("warn", "bad", "bad")
    assert not (tmp_path / "state").exists()  # it looks, and changes nothing


@pytest.mark.llama
def test_the_doctor_makes_a_fixed_model_speak(tmp_path: Path, tiny: Path) -> None:
    found = {f.what: f for f in doctor.examine(settings(tmp_path, model__path=str(tiny)))}

    assert (found["model"].state, found["release"].state) == ("good", "good")
