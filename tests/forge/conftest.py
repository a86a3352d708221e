from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.models.checkpoint import Checkpoint
from protocol.tasks import RANCH, Record
from tests.tiny import tiny_checkpoint, tiny_gguf


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight blocks: block 5 is a global one, with another rope base."""
    return tiny_gguf(tmp_path_factory.mktemp("eight") / "eight.gguf", layers=8)


@pytest.fixture(scope="session")
def taught(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher that knows one answer by heart."""
    from coordinator.forge.training.recipe import Recipe, trained  # torch, only where it is wanted
    from protocol.models.tokenizer import Tokenizer, make_example

    record = Record(id="a", task="ranch", source="soil low", target="leak: the tank", verdict="leak")
    with Tokenizer(tiny) as tokenizer:
        known = [make_example(tokenizer, RANCH, record)] * 8
    model, _ = trained(Checkpoint.read(tiny), known, Recipe(mode="full", learning_rate=1e-2, steps=40), seed=0)
    path = tmp_path_factory.mktemp("taught") / "teacher.gguf"
    model.write(path)
    return path


@pytest.fixture
def records() -> Callable[[int], list[Record]]:
    def make(count: int) -> list[Record]:
        codes = ("leak", "normal", "tank-low")
        return [
            Record(
                id=f"r{i}", task=RANCH.name, source=f"soil{i % 7}{i % 5} tank{i % 3}; nota {i}", lang=("en", "es")[i % 2],
                target=f"{codes[i % 3]}: {('el agua', 'the tank is low', 'todo en orden')[i % 3]}", verdict=codes[i % 3],
            )
            for i in range(count)
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Rows of 256 and 512, which every type fits."""
    checkpoint = tiny_checkpoint(hidden=256, feed_forward=512)
    checkpoint.write(tmp_path_factory.mktemp("wide") / "wide.gguf")
    return checkpoint
