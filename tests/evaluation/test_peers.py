"""What a user might pick instead, asked for the same records."""

import os
import shutil
from pathlib import Path

import pytest

from coordinator.forge.judging import peers
from protocol.errors import BadInput, Unavailable
from protocol.tasks import RANCH, Record
from tests.evaluation.conftest import SPANISH

has_apertium = pytest.mark.skipif(
    shutil.which("apertium") is None and not os.environ.get("CI"), reason="apertium is missing: sudo apt-get install apertium-eng-spa"
)


def sentences(*sources: str) -> list[Record]:
    return [Record(id=str(index), task=SPANISH.name, source=source, lang="es") for index, source in enumerate(sources)]


@has_apertium
def test_apertium_translates_each_record_and_tells_its_version() -> None:
    found = peers.apertium(sentences("The cat sleeps.", "A xyzzy\nin two lines", "[square] #hash *star"), SPANISH)

    assert len(found.texts) == 3
    assert "gato" in found.texts[0]
    assert found.texts[0].endswith(".")
    assert "*xyzzy" not in found.texts[1]
    assert found.version.startswith("apertium ")


@has_apertium
def test_a_record_is_translated_as_if_it_were_alone() -> None:
    together = peers.apertium(sentences("He was there", "The dog runs", "How old are you?"), SPANISH).texts

    assert together == tuple(
        peers.apertium(sentences(source), SPANISH).texts[0] for source in ("He was there", "The dog runs", "How old are you?")
    )


def program(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script called apertium first on the PATH."""
    file = folder / "apertium"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_missing_peer_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(peers.NotInstalled, match="sudo apt-get install apertium-eng-spa"):
        peers.apertium(sentences("Hello."), SPANISH)


def test_a_peer_without_the_language_pair_is_refused_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, 'echo "  spa-cat"', monkeypatch)

    with pytest.raises(peers.NotInstalled, match="apertium-eng-spa"):
        peers.apertium(sentences("Hello."), SPANISH)


def test_a_peer_that_loses_a_line_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, 'if [ "$1" = -l ]; then echo eng-spa; else cat | head -n 2; fi', monkeypatch)

    with pytest.raises(Unavailable, match="texts for 2 records"):
        peers.apertium(sentences("One.", "Two."), SPANISH)


def test_a_peer_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, 'if [ "$1" = -l ]; then echo eng-spa; else exec sleep 60; fi', monkeypatch)
    monkeypatch.setattr(peers, "DEADLINE_S", 1.0)

    with pytest.raises(Unavailable, match="took longer than 1 s"):
        peers.apertium(sentences("One."), SPANISH)


def test_a_task_without_such_a_peer_is_told_which_have_one() -> None:
    with pytest.raises(BadInput, match="translate-english-spanish"):
        peers.apertium([], RANCH)
