"""The bench of the memory runs on a tiny model; its figures mean nothing here."""

import argparse
from pathlib import Path

import pytest

from bench import memory
from protocol.tasks import Record
from tests.tiny import tiny_gguf

pytestmark = pytest.mark.llama


def some(name: str, count: int) -> list[Record]:
    words = ("the cat sat on a mat", "the tank is low", "water is due")
    return [
        Record(id=f"{name}-{n}", task=memory.TRANSLATION.name, source=f"{words[n % 3]} {name} {n}", target=f"el tanque {n % 3}", lang="es")
        for n in range(count)
    ]


def test_every_way_is_measured_beside_off(tmp_path: Path) -> None:
    options = argparse.Namespace(seed=1, ways="exact,near,examples", work=tmp_path / "work")
    known, asked = some("known", 12), some("asked", 4)

    found = memory.measure(tiny_gguf(tmp_path / "tiny.gguf"), memory.TRANSLATION, known, asked, options)

    assert [found[use]["minus_off"]["n"] for use in ("off", "exact", "near", "examples")] == [4] * 4
    assert found["again"]["exact"]["right"] == 1.0 and found["near"]["agreeing"]["n"] <= 4
    assert (tmp_path / "work" / memory.TRANSLATION.name / "memory.db").is_file()
    assert len(memory.rows({"translation": found})) == 5
