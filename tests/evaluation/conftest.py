"""Models that exist only as answers: how often they are right and how well they know it is set; all after that is the real code."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.forge.judging.engine_process import Answered
from coordinator.forge.judging.evaluation import Evaluation, judged
from protocol.confidence import FEATURES
from protocol.tasks import RANCH, Record, translation
from tests.tiny import tiny_gguf

SENTENCES = ("the tank is empty and the pump runs dry", "la bomba trabaja en seco", "the north valve stays open", "el panel tiene polvo")
SPANISH = translation("English", "Spanish")


def ranch_records(count: int, *, site: str = "") -> list[Record]:
    """Records whose answers go through the codes and sentences in turn."""
    rows = []
    for index in range(count):
        code, sentence = RANCH.codes[index % len(RANCH.codes)], SENTENCES[index % len(SENTENCES)]
        rows.append(Record(id=f"{site or 'r'}-{index}", task="ranch", source=f"window {index}", target=f"{code}: {sentence}", site=site))
    return rows


def answers(records: list[Record], right: list[bool], sure: list[float]) -> list[Answered]:
    """Right or wrong as asked, the verdict's probability as given."""
    found = []
    for record, good, confidence in zip(records, right, sure, strict=True):
        code, _, sentence = record.target.partition(": ")
        said = code if good else RANCH.codes[(RANCH.codes.index(code) + 1) % len(RANCH.codes)]
        logp = math.log(confidence)
        told = {
            "in_form": 1.0, "verdict_sum": logp, "verdict_min": logp, "first_margin": 3.0 * confidence, "verdict_entropy": 1.0 - confidence,
            "mean": logp / 4, "lowest": logp, "tenth": logp, "length": 12.0,
        }  # fmt: skip
        signals = tuple(told.get(name, 0.0) for name in FEATURES)
        found.append(Answered(f" {said}: {sentence}", signals, 12, 80, 0.1, "end"))
    return found


@functools.cache
def simulated(
    count: int, *, accuracy: float, seed: int = 0, skill: float = 1.5, name: str = "student", overconfident: float = 0.0
) -> Evaluation:
    """A verdict model on `count` records. `skill` is how far apart right and wrong answers are in confidence (log-odds)."""
    random = np.random.default_rng(seed)
    right = random.random(count) < accuracy
    odds = random.normal(size=count) + skill * np.where(right, 1.0, -1.0) + overconfident
    sure = np.clip(1 / (1 + np.exp(-odds)), 1e-6, 1 - 1e-6)
    records = ranch_records(count)
    made = judged(records, RANCH, answers(records, right.tolist(), sure.tolist()), name=name, seed=1)
    return msgspec.structs.replace(made, model_digest="d" * 64, file_mb=30.0, peak_rss_mb=80.0, engines=2)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def pairs_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str, name: str = "pairs.tsv") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write
