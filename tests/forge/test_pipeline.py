"""From records to two model files, once; and the command that does it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest
import torch
from typer.testing import CliRunner

from coordinator.forge.pipeline import Forged, forge
from coordinator.forge.plan import Budget, Plan
from coordinator.forge.training.recipe import Recipe
from protocol.digests import digest_file
from protocol.errors import BadInput, MilpaError, NotEnough
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Tokenizer
from protocol.tasks import RANCH, Record, Task, translation
from tests.tiny import tiny_checkpoint, tiny_gguf

pytestmark = [pytest.mark.torch, pytest.mark.llama]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "base.gguf", layers=3)


def make(
    base: Path,
    records: list[Record],
    folder: Path,
    *,
    seed: int = 0,
    blocks: int = 2,
    ternary: bool = False,
    task: Task = RANCH,
    **more: Any,
) -> tuple[Forged, list[str]]:
    plan = Plan(
        budget=Budget.named("10"), seed=seed, blocks=blocks, threads=1, correct=Recipe(learning_rate=5e-3, steps=6),
        student=Recipe(mode="full", learning_rate=3e-3, steps=6, ternary=ternary), **more,
    )  # fmt: skip
    worked: list[str] = []
    made = forge(
        task, records, work=folder / "work", out=folder / "out", plan=plan, base=base,
        progress=lambda stage, share, words: worked.append(stage) if words.startswith(("step", "counting")) or "records" in words else None,
    )  # fmt: skip
    return made, list(dict.fromkeys(worked))


def test_a_teacher_and_a_smaller_student_come_out_and_the_second_run_computes_nothing(
    base: Path, records: Callable[[int], list[Record]], tmp_path: Path
) -> None:
    made, worked = make(base, records(20), tmp_path)
    again, idle = make(base, records(20), tmp_path)

    assert worked == ["trim", "correct", "capture", "distil"]
    assert idle == []
    assert made.lineage["distil"] == again.lineage["distil"]
    assert (Checkpoint.read(made.teacher).blocks, Checkpoint.read(made.student).blocks) == (3, 2)
    assert made.lineage["export"]["files"]["student.gguf"]["digest"] == digest_file(made.student)
    assert Checkpoint.read(tmp_path / "out" / "untrained.gguf").blocks == 2
    assert digest_file(tmp_path / "out" / "untrained.gguf") != digest_file(made.student)
    assert msgspec.json.decode((tmp_path / "out" / "lineage.json").read_bytes())["licence"]["name"] == "not stated"
    with Tokenizer(made.student) as small, Tokenizer(made.teacher) as large:
        assert small.encode("soil low", bos=True) == large.encode("soil low", bos=True)


@pytest.mark.parametrize(("kind", "ternary", "stored"), [("Q4_K_M", False, "Q4_K"), ("TQ2_0", True, "TQ2_0")])
def test_a_preset_is_cut_in_depth_and_width_and_its_rows_fit_the_small_types(
    records: Callable[[int], list[Record]], tmp_path: Path, kind: str, ternary: bool, stored: str
) -> None:
    wide = tmp_path / "wide.gguf"
    tiny_checkpoint(layers=5, hidden=512, heads=2, feed_forward=1024).write(wide)

    made, _ = make(wide, records(12), tmp_path, preset="nano", kind=kind, ternary=ternary)

    student = Checkpoint.read(made.student)
    assert (student.blocks, student.hidden) == (4, 256)
    assert student.tensors["blk.0.ffn_gate.weight"].kind == gguf.GGMLQuantizationType[stored]
    assert made.lineage["cut"]["preset"] == "nano"
    assert not any(one["fell_back"] for one in made.lineage["export"]["stored"])


def test_other_blocks_reuse_the_teacher_and_another_seed_does_not(
    base: Path, records: Callable[[int], list[Record]], tmp_path: Path
) -> None:
    first, _ = make(base, records(12), tmp_path)

    other_blocks, worked = make(base, records(12), tmp_path, blocks=1)
    other_seed, all_but_trim = make(base, records(12), tmp_path, seed=1)

    assert worked == ["distil"]
    assert other_blocks.lineage["correct"] == first.lineage["correct"]
    assert all_but_trim == ["correct", "capture", "distil"]
    assert other_seed.lineage["export"]["files"] != first.lineage["export"]["files"]


def test_a_translations_vocabulary_keeps_general_words_of_both_languages_and_a_verdict_tasks_does_not(
    base: Path, records: Callable[[int], list[Record]], tmp_path: Path
) -> None:
    task = translation("English", "Spanish")
    pairs = [Record(id=f"p{i}", task=task.name, source=f"the cat {i}", target=f"el agua {i}") for i in range(12)]

    made, _ = make(base, pairs, tmp_path / "pairs", task=task, frequent=0)
    other, _ = make(base, records(12), tmp_path / "ranch", frequent=0)

    assert made.lineage["trim"]["general"] == ["en", "es"]
    assert other.lineage["trim"]["general"] == []
    assert made.lineage["trim"]["after"] > other.lineage["trim"]["after"]


def test_after_distilling_the_student_learns_from_its_own_answers_and_by_rewards_once(
    base: Path, records: Callable[[int], list[Record]], tmp_path: Path
) -> None:
    more = {name: Recipe(mode="full", learning_rate=1e-3, steps=2) for name in ("on_policy", "polish")}
    short = msgspec.structs.replace(RANCH, max_new_tokens=6)

    plain, _ = make(base, records(12), tmp_path, task=short)
    taught, worked = make(base, records(12), tmp_path, task=short, **more)
    again, idle = make(base, records(12), tmp_path, task=short, **more)

    assert worked == ["on policy", "polish"]
    assert idle == []
    assert taught.lineage["polish"]["training"]["steps"] == 2
    assert taught.lineage["on_policy"]["rounds"]["rounds"] >= 1
    assert digest_file(again.student) != plain.lineage["export"]["files"]["student.gguf"]["digest"]


def test_unfinished_stages_are_gone_on_with(base: Path, records: Callable[[int], list[Record]], tmp_path: Path) -> None:
    first, _ = make(base, records(12), tmp_path)
    for marker in (tmp_path / "work").glob("distil-*/finished.json"):
        marker.unlink()

    second, worked = make(base, records(12), tmp_path)

    assert worked == ["distil"]
    assert second.lineage["export"]["files"] == first.lineage["export"]["files"]


def test_the_order_of_the_records_is_nobodys_choice(base: Path, records: Callable[[int], list[Record]], tmp_path: Path) -> None:
    """A file sorted by length would otherwise calibrate a cut, and fill a capture that ends early, with its short ones."""
    first, _ = make(base, records(12), tmp_path / "a")
    second, _ = make(base, records(12)[::-1], tmp_path / "b")

    assert second.lineage["export"]["files"] == first.lineage["export"]["files"]


def test_too_few_records_are_told_before_any_work(base: Path, records: Callable[[int], list[Record]], tmp_path: Path) -> None:
    with pytest.raises(NotEnough, match="3 records"):
        make(base, records(3), tmp_path)

    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", ["soon", "-5", "3", "nan", "inf", "40,10", "40,0,10", "4,1,4", "9,nan,9", "40,10,150,3"])
def test_a_budget_is_a_name_or_seconds(name: str) -> None:
    with pytest.raises(BadInput, match="demo, hour"):
        Budget.named(name)


def test_a_budget_may_say_what_each_stage_gets() -> None:
    assert Budget.named("40,10,150") == Budget("40,10,150", correct_s=40.0, capture_s=10.0, student_s=150.0)
    assert Budget.named("1000") == Budget("1000", correct_s=520.0, capture_s=150.0, student_s=330.0)


def test_a_budget_of_processor_seconds_is_shared_by_the_cores_that_work_at_once() -> None:
    assert Budget("mine", correct_s=100.0, capture_s=40.0, student_s=60.0).over(2) == Budget("mine", 50.0, 20.0, 30.0)


def refused(arguments: list[str]) -> str:
    import typer

    from coordinator.commands.distill import distill

    app = typer.Typer()
    app.command()(distill)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, MilpaError), result.output
    return str(result.exception)


def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("One.\tUno.\nTwo without a translation\n", encoding="utf-8")
    out = tmp_path / "model"

    assert "line 2" in refused(["--pairs", str(tmp_path / "pairs.tsv"), "--out", str(out)])
    assert "--pairs" in refused(["--out", str(out)])
    assert "--task" in refused(["--records", "x.jsonl", "--out", str(out)])
    assert "budget" in refused(["--pairs", str(tmp_path / "pairs.tsv"), "--budget", "soon", "--out", str(out)])
    assert not out.exists()
