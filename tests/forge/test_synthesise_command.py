"""`milpa-coordinator synthesise`, run as people run it."""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from coordinator.cli import complete
from coordinator.forge.pairs import read_records
from coordinator.forge.synthesis.made import file_of, read_made
from coordinator.forge.synthesis.rows import read_rows
from coordinator.forge.training.recipe import Recipe, trained
from protocol.digests import digest_file
from protocol.errors import BadInput, WrongDigest
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


@pytest.fixture
def many(tmp_path: Path) -> Path:
    file = tmp_path / "many.tsv"
    file.write_text("".join(f"the cat sees {number} houses\tel gato ve {number} casas\n" for number in range(10, 50)))
    return file


def call(*words: object) -> Result:
    return CliRunner().invoke(complete(), ["synthesise", *map(str, words)], catch_exceptions=True)


def figures(result: Result) -> dict[str, Any]:
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


def test_workers_rows_joined_give_the_targets_and_the_audit_of_one_worker(many: Path, tmp_path: Path) -> None:
    generic = tmp_path / "generic.tsv"
    generic.write_text("".join(f"we read {number} books\tleemos {number} libros\n" for number in range(100, 160)))
    work = ("--teacher", f"file:{many}", "--pairs", many, "--json")
    last = ("--generic", generic, "--audit", f"file:{many}", "--audit-sample", 10)
    parts = [tmp_path / f"{number}.jsonl" for number in range(2)]

    whole = figures(call(*work, "--out", tmp_path / "whole.jsonl", "--targets", tmp_path / "whole.targets", *last))
    for number, part in enumerate(parts):
        figures(call(*work, "--out", part, "--shard", f"{number}/2"))
    joined = figures(
        call(
            *work,
            "--out",
            tmp_path / "joined.jsonl",
            "--join",
            parts[0],
            "--join",
            parts[1],
            "--targets",
            tmp_path / "joined.targets",
            *last,
        )
    )

    assert all(len(list(read_rows(part))) > 5 for part in parts)
    assert (whole["sources"], whole["targets"]["records"]) == (40, 57)
    assert joined["targets"]["records"] == whole["targets"]["records"]
    for ending in ("targets", "audit.json"):
        assert (tmp_path / f"joined.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()


def test_joining_asks_what_no_worker_has(many: Path, tmp_path: Path) -> None:
    work = ("--teacher", f"file:{many}", "--pairs", many, "--json")
    figures(call(*work, "--out", tmp_path / "0.jsonl", "--shard", "0/2"))

    made = figures(call(*work, "--out", tmp_path / "all.jsonl", "--join", tmp_path / "0.jsonl"))

    worker, everything = list(read_rows(tmp_path / "0.jsonl")), list(read_rows(tmp_path / "all.jsonl"))
    assert (made["sources"], made["left"]) == (40, 0)
    assert everything[: len(worker)] == worker  # taken over before any other is asked
    assert len(everything) == 40


def test_the_way_back_is_a_plain_command_and_part_of_the_plan(pairs: Path, tmp_path: Path) -> None:
    turned = {target: source for source, target in WORDS.items()} | {"el sol": "quite another thing"}
    script = tmp_path / "back"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nprint('\\n\\n'.join({turned!r}[text] for text in sys.stdin.read().split('\\n\\n') if text))\n"
    )
    script.chmod(0o755)
    words = ("--teacher", f"file:{pairs}", "--pairs", pairs, "--out", tmp_path / "rows.jsonl", "--back", f"command:{script}", "--json")

    made = figures(call(*words))

    trips = {row.record.source: row.hypotheses[0].signals.round_trip for row in read_rows(tmp_path / "rows.jsonl")}
    assert made["kept"] == 4
    assert [trips[source] for source in ("the cat", "the mat", "the moon")] == [100.0] * 3
    assert trips["the sun"] < 50.0
    script.write_text(script.read_text() + "# another translator\n")
    refused = call(*words).exception
    assert isinstance(refused, WrongDigest)
    assert "back '" in str(refused)


def test_beside_the_targets_stands_who_wrote_them_what_that_costs_and_what_was_suspected(many: Path, tmp_path: Path) -> None:
    targets = tmp_path / "targets.jsonl"
    made = figures(
        call("--teacher", f"file:{many}", "--pairs", many, "--out", tmp_path / "rows.jsonl", "--targets", targets, "--json",
             "--audit", f"file:{many}", "--audit-sample", 10)
    )  # fmt: skip

    found = read_made(targets)

    assert found is not None
    assert (found.file_digest, found.teacher_digest) == (digest_file(targets), made["teacher_digest"])
    assert (found.plan["samples"], found.counts.kept, found.records) == (6, 40, 40)
    assert found.cost is not None
    assert "on-policy scoring" in found.cost.sentence
    assert found.audit is not None
    assert len(found.audit.verdicts) == 10
    assert not any(verdict.source or verdict.target for verdict in found.audit.verdicts)
    assert found.sentence == (
        f"40 of 40 sources have a target of {many.name} (tells text only); {many.name} suspects 0.0% of 10 targets (0.0% to 27.8%)"
    )


def test_an_open_teachers_targets_cost_nothing_of_that(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    targets = tmp_path / "targets.jsonl"
    figures(call("--teacher", teacher, "--pairs", pairs, "--out", tmp_path / "rows.jsonl", "--targets", targets, "--threads", 1, "--json"))

    found = read_made(targets)

    assert found is not None
    assert found.cost is None
    assert found.sentence.endswith("(tells log-probabilities too); not audited")


def test_targets_that_were_changed_since_are_not_described_by_what_stands_beside_them(many: Path, tmp_path: Path) -> None:
    targets = tmp_path / "targets.jsonl"
    figures(call("--teacher", f"file:{many}", "--pairs", many, "--out", tmp_path / "rows.jsonl", "--targets", targets, "--json"))
    targets.write_bytes(targets.read_bytes() * 2)

    with pytest.raises(BadInput, match="was changed since"):
        read_made(targets)
    file_of(targets).write_text("{}")
    with pytest.raises(BadInput, match="is not what"):
        read_made(targets)
    file_of(targets).unlink()
    assert read_made(targets) is None


def test_another_plan_is_not_appended(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    words = ("--teacher", teacher, "--pairs", pairs, "--out", tmp_path / "rows.jsonl", "--threads", 1)
    call(*words)

    assert "samples 6, not 4" in str(call(*words, "--samples", 4, "--keep", 3).exception)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--generic", "g.tsv"), "--generic needs --targets"),
        (("--shard", "4/4"), "0 to N - 1"),
        (("--shard", "0/2", "--targets", "t.jsonl"), "of all workers' rows together"),
        (("--shard", "0/2", "--audit", "file:a.tsv"), "of all workers' rows together"),
        (("--temperature", "0"), "not usable"),
        (("--records", "r.jsonl"), "either --pairs"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(words: tuple[str, ...], told: str, teacher: Path, pairs: Path, tmp_path: Path) -> None:
    result = call("--teacher", teacher, "--pairs", pairs, "--out", tmp_path / "rows.jsonl", *words)

    assert isinstance(result.exception, BadInput)
    assert told in str(result.exception)
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_students_lineage_names_who_wrote_its_targets_and_changed_targets_are_refused(tiny: Path, many: Path, tmp_path: Path) -> None:
    targets = tmp_path / "targets.jsonl"
    figures(
        call("--teacher", f"file:{many}", "--pairs", many, "--out", tmp_path / "rows.jsonl", "--targets", targets, "--json",
             "--audit", f"file:{many}", "--audit-sample", 10)
    )  # fmt: skip
    words = ["distill", "--task", TASK.name, "--records", targets, "--teacher", tiny, "--blocks", 1, "--budget", 10, "--threads", 1]

    result = CliRunner().invoke(complete(), [*map(str, words), "--out", str(tmp_path / "out"), "--json"])

    lineage = figures(result)["lineage"]
    assert lineage["targets"]["teacher"] == many.name
    assert lineage["targets"]["cost"]["missing"][0]["what"] == "sparse KL on the top k and the tail"
    assert len(lineage["targets"]["audit"]["verdicts"]) == 10
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["targets"]["file_digest"] == digest_file(targets)
    targets.write_bytes(targets.read_bytes() * 2)
    refused = CliRunner().invoke(complete(), [*map(str, words), "--out", str(tmp_path / "other")])
    assert "was changed since" in str(refused.exception)
