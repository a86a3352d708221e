"""`milpa-coordinator synthesise`, run as people run it."""

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from coordinator.cli import complete
from coordinator.forge.pairs import read_records
from coordinator.forge.synthesis.rows import read_rows
from coordinator.forge.training.recipe import Recipe, trained
from protocol.errors import BadInput
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Tokenizer, make_example
from protocol.tasks import Record, translation

pytestmark = [pytest.mark.torch, pytest.mark.llama]
TASK = translation("English", "Spanish")
WORDS = {"the cat": "el gato", "the mat": "la mesa", "the moon": "la luna", "the sun": "el sol"}


@pytest.fixture(scope="module")
def teacher(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows four translations by heart."""
    known = [Record(id=source, task=TASK.name, source=source, target=target) for source, target in WORDS.items()]
    with Tokenizer(tiny) as tokenizer:
        examples = [make_example(tokenizer, TASK, one) for one in known] * 8
    model, _ = trained(Checkpoint.read(tiny), examples, Recipe(mode="full", learning_rate=1e-2, steps=120), seed=0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.gguf"
    model.write(path)
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{source}\t{target}\n" for source, target in WORDS.items()))
    return file


def call(*words: object) -> Result:
    return CliRunner().invoke(complete(), ["synthesise", *map(str, words)], catch_exceptions=True)


def figures(result: Result) -> dict[str, object]:
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


def test_a_real_teachers_answers_are_kept_scored_and_written_as_records(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    out, targets = tmp_path / "rows.jsonl", tmp_path / "targets.jsonl"

    made = figures(call("--teacher", teacher, "--pairs", pairs, "--out", out, "--targets", targets, "--threads", 1, "--json"))

    assert (made["sources"], made["kept"], made["left"]) == (4, 4, 0)
    best = {row.record.source: row.hypotheses[0] for row in read_rows(out)}
    assert {source: one.text for source, one in best.items()} == WORDS
    assert all(one.signals.log_prob is not None and one.signals.end is not None for one in best.values())
    assert {record.target for record in read_records(targets, TASK)} >= set(WORDS.values())


def test_running_it_again_asks_nothing_and_says_the_same(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    words = ("--teacher", teacher, "--pairs", pairs, "--out", tmp_path / "rows.jsonl", "--threads", 1, "--json")
    first = figures(call(*words))
    rows = (tmp_path / "rows.jsonl").read_bytes()

    again = figures(call(*words))

    assert (tmp_path / "rows.jsonl").read_bytes() == rows
    assert again | {"seconds": 0} == first | {"seconds": 0}


def test_generic_records_and_an_audit_join(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    out, targets = tmp_path / "rows.jsonl", tmp_path / "targets.jsonl"

    made = figures(
        call("--teacher", teacher, "--pairs", pairs, "--out", out, "--targets", targets, "--keep", 1, "--threads", 1, "--json",
             "--generic", pairs, "--generic-share", 0.5, "--audit", f"file:{pairs}", "--audit-sample", 4)
    )  # fmt: skip

    assert made["targets"] == {"file": str(targets), "records": 8, "generic": 0.5}
    audit = msgspec.json.decode((tmp_path / "rows.audit.json").read_bytes())
    assert audit["suspect"] == 0.0
    assert len(audit["verdicts"]) == 4


def test_another_plan_is_not_appended(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    words = ("--teacher", teacher, "--pairs", pairs, "--out", tmp_path / "rows.jsonl", "--threads", 1)
    call(*words)

    assert "samples 6, not 4" in str(call(*words, "--samples", 4, "--keep", 3).exception)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--generic", "g.tsv"), "--generic needs --targets"),
        (("--shard", "4/4"), "0 to N - 1"),
        (("--temperature", "0"), "not usable"),
        (("--records", "r.jsonl"), "either --pairs"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(words: tuple[str, ...], told: str, teacher: Path, pairs: Path, tmp_path: Path) -> None:
    result = call("--teacher", teacher, "--pairs", pairs, "--out", tmp_path / "rows.jsonl", *words)

    assert isinstance(result.exception, BadInput)
    assert told in str(result.exception)
    assert not (tmp_path / "rows.jsonl").exists()
