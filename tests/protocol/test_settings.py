"""Every value has an origin; a setting that nobody reads is an error."""

from pathlib import Path

import msgspec
import pytest

from protocol.errors import BadInput, UnknownName
from protocol.settings import load


class Broker(msgspec.Struct, frozen=True):
    host: str = "127.0.0.1"
    port: int = 1883


class Peers(msgspec.Struct, frozen=True):
    names: tuple[str, ...] = ()
    serve: bool = False


class Settings(msgspec.Struct, frozen=True):
    broker: Broker = Broker()
    peers: Peers = Peers()


def read(file: Path | None = None, environment: dict[str, str] | None = None, **flags: object) -> tuple[Settings, dict[str, str]]:
    settings, origins = load(
        Settings, side="node", file=file, environment=environment or {}, flags={k.replace("__", "."): v for k, v in flags.items()}
    )
    return settings, {origin.name: origin.origin for origin in origins}


def toml(folder: Path, text: str) -> Path:
    file = folder / "node.toml"
    file.write_text(text)
    return file


def test_the_later_source_wins_and_is_named(tmp_path: Path) -> None:
    file = toml(tmp_path, '[broker]\nhost = "file"\nport = 1\n')

    settings, origins = read(file, {"MILPA_NODE_BROKER_PORT": "2"}, broker__host="flag")

    assert settings.broker == Broker(host="flag", port=2)
    assert origins["broker.host"] == "flag"
    assert origins["broker.port"] == "environment MILPA_NODE_BROKER_PORT"
    assert origins["peers.serve"] == "default"


def test_a_list_comes_from_the_environment_by_commas() -> None:
    assert read(None, {"MILPA_NODE_PEERS_NAMES": "base,hill"})[0].peers.names == ("base", "hill")


def test_a_flag_not_given_changes_nothing() -> None:
    assert read(None, {}, broker__host=None)[1]["broker.host"] == "default"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[broker]\nhots = 'x'\n", "did you mean 'host'"),
        ("[brokr]\nhost = 'x'\n", "did you mean 'broker'"),
        ("[broker]\nport = 'many'\n", "broker.port"),
        ("broker = 3\n", "must be a section"),
        ("[broker\n", "not TOML"),
        (f"[broker]\nport = {'9' * 5_000}\n", "not TOML"),
        (f"[broker]\nport = {'[' * 5_000}\n", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_what_to_do(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        read(toml(tmp_path, text))


def test_a_wrong_variable_of_ours_is_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'port'"):
        read(None, {"MILPA_NODE_BROKER_PROT": "1"})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        read(tmp_path / "none.toml")
