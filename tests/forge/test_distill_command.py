"""`milpa-coordinator distill` as a user calls it, with its choices, on a tiny model."""

from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest
import torch

from coordinator.commands.capture import capture
from coordinator.commands.distill import distill
from coordinator.forge.judging.evidence import lineage_steps
from coordinator.forge.plan import Plan
from coordinator.forge.students.trim import cut_vocabulary
from protocol.errors import MilpaError
from protocol.models.checkpoint import Checkpoint
from protocol.tasks import Record
from tests.forge.calling import called as run
from tests.tiny import tiny_checkpoint

pytestmark = [pytest.mark.torch, pytest.mark.llama]
SHAPE = ["--student", "2x256x512x1"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.gguf"
    tiny_checkpoint(layers=3, hidden=512, heads=2, feed_forward=1024).write(path)
    return path


@pytest.fixture
def task(records: Callable[[int], list[Record]], tmp_path: Path) -> list[str]:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records(24)))
    return ["--task", "ranch", "--records", str(path)]


@pytest.mark.parametrize("mode", ["topk", "sampled", "hidden8"])
def test_a_cache_filled_by_several_processes_teaches_a_student_of_the_teacher_as_it_is(
    teacher: Path, task: list[str], tmp_path: Path, mode: str
) -> None:
    for shard in ("0/2", "1/2", "0/1"):  # the last finds all of it there
        run(capture, "--teacher", teacher, *task, "--mode", mode, "--shard", shard, "--out", tmp_path / "cache")

    made = run(distill, "--teacher", teacher, "--cache", tmp_path / "cache", *task, *SHAPE, "--budget", 10, "--out", tmp_path / "out")

    lineage = made["lineage"]
    assert (lineage["capture"]["given"], lineage["capture"]["records"], lineage["capture"]["mode"]) == (True, 24, mode)
    assert lineage["distil"]["captured"] == 24
    assert lineage["distil"]["recipe"]["seconds"] == 10  # nothing else is trained
    assert lineage["distil"]["spoken_for"] == 1.0
    assert "correct" not in lineage
    assert len(Checkpoint.read(Path(made["student"])).vocabulary.tokens) == len(Checkpoint.read(teacher).vocabulary.tokens)


def test_a_larger_teacher_of_the_same_pieces_may_have_filled_the_cache(teacher: Path, task: list[str], tmp_path: Path) -> None:
    larger = tmp_path / "larger.gguf"
    tiny_checkpoint(layers=4, hidden=512, heads=2, feed_forward=1024).write(larger)
    run(capture, "--teacher", larger, *task, "--out", tmp_path / "cache")

    made = run(distill, "--teacher", teacher, "--cache", tmp_path / "cache", *task, *SHAPE, "--budget", 10, "--out", tmp_path / "out")

    assert made["lineage"]["capture"]["teacher"] == Checkpoint.read(larger).digest
    assert made["lineage"]["distil"]["spoken_for"] == 1.0


def test_a_cache_of_other_pieces_of_another_teachers_states_or_without_records_is_refused(
    teacher: Path, task: list[str], tmp_path: Path
) -> None:
    other, pieces = tmp_path / "other.gguf", tmp_path / "pieces.gguf"
    tiny_checkpoint(layers=2, hidden=512, heads=2, feed_forward=1024).write(other)
    cut_vocabulary(tiny_checkpoint(layers=2, hidden=512, heads=2, feed_forward=1024), range(400)).write(pieces)
    run(capture, "--teacher", teacher, *task, "--out", tmp_path / "cache")
    run(capture, "--teacher", teacher, *task, "--mode", "hidden8", "--out", tmp_path / "states")
    given = [*task, *SHAPE, "--budget", 10, "--out", tmp_path / "out"]

    with pytest.raises(MilpaError, match="another vocabulary"):
        run(distill, "--teacher", pieces, "--cache", tmp_path / "cache", *given)
    with pytest.raises(MilpaError, match="name the file it was captured from"):
        run(distill, "--teacher", other, "--cache", tmp_path / "states", *given)
    for log in (tmp_path / "cache").glob("captured-*.jsonl"):
        log.unlink()
    with pytest.raises(MilpaError, match="milpa-coordinator capture"):
        run(distill, "--teacher", teacher, "--cache", tmp_path / "cache", *given)


def test_the_choices_of_a_lesson_are_in_the_lineage(teacher: Path, task: list[str], tmp_path: Path) -> None:
    out = ["--teacher", teacher, *task, *SHAPE, "--budget", 10, "--out", tmp_path / "out", "--work", tmp_path / "work"]

    made = run(distill, *out, "--loss", "jsd", "--alpha", 0.5, "--own", 0, "--pieces", 5000)["lineage"]

    assert (made["distil"]["loss"], made["distil"]["alpha"], made["distil"]["own"]) == ("jsd", 0.5, 0)
    assert made["capture"]["records"] == made["distil"]["captured"]


def test_a_student_from_scratch_learns_its_embedding_and_one_that_is_cut_keeps_it(teacher: Path, task: list[str], tmp_path: Path) -> None:
    out = ["--teacher", teacher, *task, *SHAPE, "--budget", 10, "--work", tmp_path / "work", "--kind", "Q8_0"]

    scratch = run(distill, *out, "--scratch", "--out", tmp_path / "scratch")
    cut = run(distill, *out, "--out", tmp_path / "cut")

    assert "random weights" in " ".join(step["note"] for step in lineage_steps(scratch["lineage"]))
    assert {step["name"]: step["note"] for step in lineage_steps(cut["lineage"])}["untrained.gguf"] == "Q8_0"
    began = {one["lineage"]["cut"].get("scratch"): one for one in (scratch, cut)}
    assert set(began) == {True, None}
    for made, learned in ((scratch, True), (cut, False)):
        (start,) = (path for path in (tmp_path / "work").glob("cut-*/cut-f16.gguf") if Checkpoint.read(path).digest == digest_of(made))
        before, after = (Checkpoint.read(path).array("token_embd.weight") for path in (start, Path(made["student_float"])))
        assert bool(abs(before - after).max() > 1e-3) is learned


def digest_of(made: dict[str, Any]) -> str:
    return str(made["lineage"]["cut"]["file_digest"])


def test_a_ternary_student_learns_on_policy_in_blocks_and_is_polished(teacher: Path, task: list[str], tmp_path: Path) -> None:
    more = ["--ternary", "--on-policy", 3, "--blockwise", "--polish", 3, "--limit", 8]

    made = run(distill, "--teacher", teacher, *task, *SHAPE, "--budget", 10, *more, "--out", tmp_path / "out")

    assert Checkpoint.read(Path(made["student"])).tensors["blk.0.ffn_gate.weight"].kind == gguf.GGMLQuantizationType.TQ2_0
    assert made["lineage"]["on_policy"]["rounds"]["acceptance"] is not None  # only blocks are accepted or not
    assert made["lineage"]["polish"]["training"]["steps"] >= 1
    assert Checkpoint.read(tmp_path / "out" / "untrained.gguf").blocks == 2


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--kind", "TQ2_0", *SHAPE], "--ternary"),
        (["--ternary", *SHAPE, "--kind", "Q8_0"], "--ternary"),
        (["--student", "12x512x1024x3"], "heads must divide"),
        (["--student", "9x1024x2048x4"], "9 blocks of 3, 1024 channels of 512, 2048 neurons of 1024, 4 heads of 2"),
        (["--scratch"], "--student"),
        (["--loss", "hinge"], "reverse_kl"),
        (["--loss", "jsd", "--mode", "sampled"], "topk or hidden8"),
        (["--cache", "cache"], "captured"),
        (["--cache", "cache", "--teacher", "t.gguf", "--mode", "hidden8"], "--mode hidden8 was decided"),
        (["--cache", "cache", "--teacher", "t.gguf", "--pieces", "9000"], "--pieces 9000 was decided"),
    ],
)
def test_what_cannot_work_is_told_before_any_training(teacher: Path, task: list[str], tmp_path: Path, asked: list[str], told: str) -> None:
    base = [] if "--cache" in asked else ["--teacher", str(teacher)]

    with pytest.raises(MilpaError, match=told):
        run(distill, *base, *task, *asked, "--budget", 10, "--out", tmp_path / "out")

    assert not list(tmp_path.glob("out/work/*-*"))


def test_what_help_says_of_a_default_is_what_a_plan_has() -> None:
    plan, said = {one.name: one.default for one in fields(Plan)}, {name: one.default for name, one in signature(distill).parameters.items()}
    for name in ("seed", "blocks", "scratch", "loss", "alpha", "own", "blockwise", "threads", "accumulate"):
        assert said[name].default == plan[name]
    for name in ("pieces", "mode"):
        assert said[name].show_default == str(plan[name])
