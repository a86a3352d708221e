"""The forge from end to end: trim, correct, cut, capture, distil, if asked on policy and polish, export.

A stage is cached by the digest of its inputs, and resumable: it owns the folder `work/STAGE-DIGEST/`; its last act is to write
`finished.json` there. A folder without that file is unfinished work and is gone on with (training state, captured targets, rounds); one
with it is never computed again. Another input, another folder.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from transformers import Gemma3ForCausalLM

from coordinator.forge.pairs import translated
from coordinator.forge.plan import Plan
from coordinator.forge.sharing import Worker
from coordinator.forge.students.cut import check_fits, cut_student, evenly, preset
from coordinator.forge.students.export import export, stored
from coordinator.forge.students.importance import ENOUGH, importance
from coordinator.forge.students.scratch import from_scratch
from coordinator.forge.students.trim import coverage, trim
from coordinator.forge.synthesis.language import identify
from coordinator.forge.targets.cache import TargetCache, read_header
from coordinator.forge.targets.capture import capture, captured_in, examples_of, header_of, log_of
from coordinator.forge.targets.score import score
from coordinator.forge.teachers.packaged import packaged_licence, packaged_teacher
from coordinator.forge.training.objective import Objective, check_loss, distillation_loss, read_head, token_weights
from coordinator.forge.training.on_policy import OnPolicyPlan, Writer, alone, taught_on_policy
from coordinator.forge.training.on_policy import together as in_blocks
from coordinator.forge.training.polish import PolishPlan, naturalness, polished
from coordinator.forge.training.recipe import Recipe, trained, upper_half
from coordinator.forge.training.rewards import ensemble
from coordinator.forge.training.scale import OneProcess, Together, first
from coordinator.forge.training.speculative import Block
from protocol.blobs import write_atomically
from protocol.digests import digest_file, digest_value
from protocol.errors import BadInput, NotEnough, WrongDigest
from protocol.models.checkpoint import Checkpoint
from protocol.models.lora import initial_adapter, write_adapter_gguf
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import best_dtype, to_torch, use_threads
from protocol.models.training import Step
from protocol.tasks import Record, Task

VERSION = 2  # raise it when a stage computes something else from the same inputs
RANK = 8  # of a site's adapter; the merge of two has rank 16
CALIBRATION = 256  # training records that decide what a preset's cut keeps
PLAIN_KINDS = ("F16", "Q8_0")  # too fine for an importance matrix to matter
HELD_BACK = 500  # texts that the counting corpus does not see, to report coverage on

Progress = Callable[[str, float, str], None]  # stage, share done in [0, 1], a few words


class Forged(msgspec.Struct, frozen=True):
    """What came out."""

    teacher: Path  # corrected, quantised
    student: Path  # quantised
    student_float: Path  # F16
    initial_adapter: Path  # what every site's LoRA starts from: independent starts cannot be merged
    lineage: dict[str, Any]  # per stage: digest, seconds, figures; the sources' digests, the licence


class Stage:
    """One stage's folder and what it reported."""

    def __init__(self, work: Path, name: str, inputs: object) -> None:
        self.name = name
        self.digest = digest_value([VERSION, name, inputs])
        self.folder = work / f"{name}-{self.digest[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()

    @property
    def report(self) -> dict[str, Any] | None:
        """What it wrote when it finished, or None."""
        marker = self.folder / "finished.json"
        return msgspec.json.decode(marker.read_bytes()) if marker.is_file() else None

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Mark it done, last of all."""
        report = {"digest": self.digest, "seconds": round(time.monotonic() - self.began, 1), **figures}
        write_atomically(self.folder / "finished.json", msgspec.json.encode(report))


def forge(
    task: Task,
    records: Sequence[Record],
    *,
    work: Path,
    out: Path,
    plan: Plan,
    base: Path | None = None,
    cache: Path | None = None,
    texts: Sequence[str] = (),
    targets: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    world: Together | None = None,
) -> Forged:
    """Make a teacher and a student for `task` from training records.

    Args:
        base: the general model, a Gemma 3 GGUF; by default the packaged one.
        work: stages are kept here and found again.
        out: gets teacher.gguf, student.gguf, student-f16.gguf, untrained.gguf, initial-adapter.gguf and lineage.json, the last one last.
        cache: what `base`, or a teacher of the same pieces, thinks of the targets, captured before by any number of processes. `base` then
            stays as it is, vocabulary and weights, nothing more is captured, and the student has the whole budget.
        texts: general text in the task's languages, for the vocabulary.
        targets: who wrote the records' targets, where a teacher did (`synthesis.made`), for the lineage.
        world: the processes that share the training stages; the first one does the others. Alone by default.

    Raises:
        NotEnough: fewer than 8 records with a target, or a cache without any.
        BadInput: no base model, one we cannot train or that is smaller than the student, or a plan that cannot be followed.
        WrongDigest: the cache is of another vocabulary, or holds hidden states of another teacher.
    """
    together = world or OneProcess()
    told = progress if progress and together.rank == 0 else (lambda stage, share, words: None)
    use_threads(plan.threads)
    records = sorted(records, key=lambda record: digest_value(record.id))  # a file may be in an order that any first part would show
    learnable = [record for record in records if record.target]
    check_loss(plan.loss, read_header(cache).mode if cache else plan.mode)
    if plan.scratch and not plan.preset:
        raise BadInput("a student from scratch needs a shape: name a preset, or blocks x width x feed-forward x heads")
    if together.size > 1 and (plan.on_policy or plan.polish):
        raise BadInput("on-policy distillation and polishing run in one process: distil with the launcher first, then add them without it")
    if len(learnable) < 8:
        raise NotEnough(f"{len(learnable)} records have a target; at least 8 are needed, some thousands are useful")
    work.mkdir(parents=True, exist_ok=True)
    lineage: dict[str, Any] = {"task": task.name, "seed": plan.seed, "budget": plan.budget.name, "records": len(records)}
    if base is None:
        told("trim", 0.0, "assembling the packaged teacher")
        base = first(together, lambda: packaged_teacher(work))
        lineage["licence"] = msgspec.to_builtins(packaged_licence())
    else:
        lineage["licence"] = {"name": _licence_in(base), "notice": "as stated by the model file", "file": ""}
    lineage["base_digest"] = digest_file(base)
    lineage["records_digest"] = digest_value(records)
    if targets:
        lineage["targets"] = dict(targets)

    if plan.preset and not plan.scratch:
        check_fits(Checkpoint.read(base), preset(plan.preset))
    general, digest = base, lineage["base_digest"]
    if cache:
        corrected, plan = general, replace(plan, budget=plan.budget.for_student())
        captured, lineage["capture"] = _given(cache, general, told)
    else:
        trimmed, lineage["trim"] = first(
            together, lambda: _trim(task, records, work=work, base=general, base_digest=digest, texts=texts, plan=plan, told=told)
        )
        corrected, lineage["correct"] = _correct(task, learnable, work=work, trimmed=trimmed, plan=plan, told=told, world=together)
        captured, lineage["capture"] = first(
            together, lambda: _capture(task, records, work=work, corrected=corrected, plan=plan, told=told)
        )
    cut, lineage["cut"] = first(together, lambda: _cut(task, learnable, work=work, corrected=corrected, plan=plan, told=told))
    student, lineage["distil"] = _distil(
        task, learnable, work=work, cut=cut, corrected=corrected, captured=captured, plan=plan, told=told, world=together
    )
    if plan.on_policy:
        student, lineage["on_policy"] = _on_policy(
            task, learnable, work=work, student=student, corrected=corrected, captured=captured, plan=plan, told=told
        )
    if plan.polish:
        student, lineage["polish"] = _polish(task, learnable, work=work, student=student, corrected=corrected, plan=plan, told=told)
    if together.rank == 0:
        _export(task, learnable, out, corrected=corrected, cut=cut, student=student, plan=plan, lineage=lineage, told=told)
    together.wait()
    teacher, student, student_float, start = (out / f"{name}.gguf" for name in ("teacher", "student", "student-f16", "initial-adapter"))
    return Forged(teacher, student, student_float, start, msgspec.json.decode((out / "lineage.json").read_bytes()))


def _trim(
    task: Task, records: Sequence[Record], *, work: Path, base: Path, base_digest: str, texts: Sequence[str], plan: Plan, told: Progress
) -> tuple[Path, dict[str, Any]]:
    held = {record.id for record in records[:: max(2, len(records) // HELD_BACK)]} if len(records) > 4 * HELD_BACK else set()
    counted = [*texts, *_texts(task, [record for record in records if record.id not in held]), task.template, *task.codes]
    general = translated(task) if plan.general is None else plan.general
    stage = Stage(work, "trim", [base_digest, digest_value(counted), plan.frequent, general, plan.pieces])
    path = stage.folder / "trimmed.gguf"
    if stage.report is None:
        told("trim", 0.1, "counting pieces")
        trim(base, counted, path, frequent=plan.frequent, general=general, pieces=plan.pieces)
        unseen = _texts(task, [record for record in records if record.id in held])
        found = coverage(base, path, unseen or counted[:HELD_BACK])
        stage.finish({**msgspec.to_builtins(found), "unseen": bool(unseen), "general": general, "file_digest": digest_file(path)})
    return path, _told(told, stage)


def _correct(
    task: Task, records: Sequence[Record], *, work: Path, trimmed: Path, plan: Plan, told: Progress, world: Together
) -> tuple[Path, dict[str, Any]]:
    checkpoint = Checkpoint.read(trimmed)
    recipe = _within(plan.correct or upper_half(checkpoint.blocks), plan.budget.correct_s, plan.accumulate)
    stage = Stage(work, "correct", [checkpoint.digest, task, digest_value(records), recipe, plan.verdict, plan.seed])
    path = stage.folder / "corrected-f16.gguf"
    if stage.report is None:
        with Tokenizer(trimmed) as tokenizer:
            examples = [make_example(tokenizer, task, record) for record in records]
            weights = token_weights(tokenizer, task, examples, verdict=plan.verdict)
        loss = distillation_loss(examples, weights=weights)
        state = stage.folder / "train.state"
        model, result = trained(
            checkpoint, examples, recipe, seed=plan.seed, loss=loss, progress=_steps(told, "correct"), state=state, world=world
        )
        if world.rank == 0:
            _finish_training(stage, model, path, state, {"recipe": recipe, "training": result})
        world.wait()
    return path, _told(told, stage)


def _finish_training(stage: Stage, model: Checkpoint, path: Path, state: Path, figures: Mapping[str, Any]) -> None:
    """The weights first, the marker last; the training's state, larger than both, goes."""
    model.write(path)
    state.unlink(missing_ok=True)
    stage.finish({**figures, "file_digest": model.digest})


def _cut(task: Task, records: Sequence[Record], *, work: Path, corrected: Path, plan: Plan, told: Progress) -> tuple[Path, dict[str, Any]]:
    checkpoint = Checkpoint.read(corrected)
    if plan.preset:
        wanted, examples = preset(plan.preset), _calibration(task, records[:CALIBRATION], corrected)
        stage = Stage(work, "cut", [checkpoint.digest, wanted, examples, plan.scratch, plan.seed])
    else:  # by the loss it would be ten drops of six candidates, longer than the shortest budgets train
        keep = evenly(checkpoint.blocks, min(plan.blocks, checkpoint.blocks))
        stage = Stage(work, "cut", [checkpoint.digest, keep])
    path = stage.folder / "cut-f16.gguf"
    if stage.report is None:
        told("cut", 0.1, plan.preset or f"{plan.blocks} blocks")
        if plan.scratch:
            student, report = from_scratch(checkpoint, wanted, seed=plan.seed), {"preset": plan.preset, "scratch": True}
        elif plan.preset:
            student, report = cut_student(checkpoint, wanted, examples, seed=plan.seed)
        else:
            student, report = checkpoint.keep_blocks(keep), {"kept": keep, "of": checkpoint.blocks}
        student.write(path)
        stage.finish({**report, "file_digest": digest_file(path)})
    return path, _told(told, stage)


def _calibration(task: Task, records: Sequence[Record], model: Path) -> list[Example]:
    with Tokenizer(model) as tokenizer:
        return [make_example(tokenizer, task, record) for record in records]


class _Targets(NamedTuple):
    """A cache of what the teacher thinks, and the logs of what was captured into it."""

    folder: Path
    digest: str  # of what went in


def _given(cache: Path, teacher: Path, told: Progress) -> tuple[_Targets, dict[str, Any]]:
    """What another run captured. Its teacher may be a larger one than the student is cut from, where both have the same pieces."""
    header, checkpoint = TargetCache.open(cache).header, Checkpoint.read(teacher)
    if header.tokenizer != header_of(checkpoint).tokenizer:
        raise WrongDigest(
            f"{cache} has the ids of another vocabulary than {teacher}: name the file it was captured from, or one of its pieces"
        )
    if header.mode == "hidden8" and header.teacher != checkpoint.digest:
        raise WrongDigest(f"{cache} holds hidden states of {header.teacher[:12]}, not of {teacher}: name the file it was captured from")
    found = captured_in(cache)
    if not any(one.target for one in found):
        raise NotEnough(f"{cache} holds no record with a target; fill it with `milpa-coordinator capture` first")
    told("capture", 1.0, f"{len(found)} records were captured before")
    targets = _Targets(cache, digest_value([header, found]))
    return targets, {"given": True, "digest": targets.digest, "teacher": header.teacher, "records": len(found), "mode": header.mode}


def _capture(
    task: Task, records: Sequence[Record], *, work: Path, corrected: Path, plan: Plan, told: Progress
) -> tuple[_Targets, dict[str, Any]]:
    checkpoint = Checkpoint.read(corrected)
    header = header_of(checkpoint, mode=plan.mode)
    stage = Stage(work, "capture", [header, task, digest_value(records), plan.budget.capture_s])
    if stage.report is None:
        cache = TargetCache(stage.folder, header)
        with Tokenizer(corrected) as tokenizer:
            _, result = capture(
                to_torch(checkpoint, dtype=best_dtype()), tokenizer, task, records, cache=cache, log=log_of(stage.folder, Worker()),
                seconds=plan.budget.capture_s, progress=lambda share, words: told("capture", share, words),
            )  # fmt: skip
        cache.close()
        stage.finish(msgspec.to_builtins(result))
    return _Targets(stage.folder, stage.digest), _told(told, stage)


class _Lesson(NamedTuple):
    """What the student is taught: captured records first, then others with their own targets."""

    examples: list[Example]
    weights: list[torch.Tensor]  # of each example's target tokens
    captured: int
    own: int


def _lesson(task: Task, records: Sequence[Record], *, model: Path, captured: _Targets, plan: Plan) -> _Lesson:
    log = captured_in(captured.folder)
    examples, asked = examples_of(log), {one.id for one in log}
    others = [record for record in records if record.id not in asked][: round(plan.own * len(log))]
    with Tokenizer(model) as tokenizer:
        examples += [make_example(tokenizer, task, record) for record in others]
        return _Lesson(examples, token_weights(tokenizer, task, examples, verdict=plan.verdict), len(log), len(others))


def _loss(lesson: _Lesson, cache: TargetCache, teacher: Path, plan: Plan) -> Objective:
    head = read_head(teacher, cache.header) if cache.header.mode == "hidden8" else None
    return distillation_loss(lesson.examples, weights=lesson.weights, cache=cache, alpha=plan.alpha, name=plan.loss, head=head)


def _distil(
    task: Task, records: Sequence[Record], *, work: Path, cut: Path, corrected: Path, captured: _Targets, plan: Plan, told: Progress,
    world: Together,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    recipe = _student(_within(plan.student, plan.budget.student_s, plan.accumulate), plan)
    checkpoint = Checkpoint.read(cut)
    stage = Stage(work, "distil", [checkpoint.digest, captured.digest, recipe, plan.loss, plan.alpha, plan.own, plan.verdict, plan.seed])
    path = stage.folder / "student-f16.gguf"
    if stage.report is None:
        lesson = _lesson(task, records, model=cut, captured=captured, plan=plan)
        cache = TargetCache.open(captured.folder)
        loss = _loss(lesson, cache, corrected, plan)
        state = stage.folder / "train.state"
        model, result = trained(
            checkpoint, lesson.examples, recipe, seed=plan.seed, loss=loss, progress=_steps(told, "distil"), state=state, world=world
        )
        cache.close()
        figures = {
            "recipe": recipe, "training": result, "loss": plan.loss, "alpha": plan.alpha, "captured": lesson.captured, "own": lesson.own,
            "spoken_for": round(loss.coverage, 4),  # share of the target tokens, as often as they were learned, that the cache held
        }  # fmt: skip
        if world.rank == 0:
            _finish_training(stage, model, path, state, figures)
        world.wait()
    return path, _told(told, stage)


def _on_policy(
    task: Task, records: Sequence[Record], *, work: Path, student: Path, corrected: Path, captured: _Targets, plan: Plan, told: Progress
) -> tuple[Path, dict[str, Any]]:
    assert plan.on_policy is not None
    recipe, how = _student(plan.on_policy, plan), OnPolicyPlan()
    checkpoint, teacher = Checkpoint.read(student), Checkpoint.read(corrected)
    inputs = [checkpoint.digest, teacher.digest, captured.digest, recipe, how, plan.blockwise, plan.loss, plan.alpha, plan.own, plan.seed]
    stage = Stage(work, "on-policy", inputs)
    path = stage.folder / "student-f16.gguf"
    if stage.report is None:
        lesson = _lesson(task, records, model=student, captured=captured, plan=plan)
        fixed = TargetCache.open(captured.folder)
        cache = TargetCache(stage.folder / "cache", header_of(teacher))
        knows, state = to_torch(teacher, dtype=best_dtype()), stage.folder / "train.state"
        with Tokenizer(student) as tokenizer:
            prompts, eos = [tokenizer.encode(task.prompt(record), bos=True) for record in records], tokenizer.eos
        room, k = task.max_new_tokens + 1, cache.header.k

        def writer(writes: Gemma3ForCausalLM) -> Writer:
            if plan.blockwise:
                return in_blocks(writes, teacher=knows, block=Block(), k=k, max_new_tokens=room, eos=eos)
            return alone(writes, score=lambda written: score(knows, written, k=k), max_new_tokens=room, eos=eos)

        model, result, rounds = taught_on_policy(
            checkpoint, lesson.examples, prompts, recipe, plan=how, seed=plan.seed, origin=teacher.digest, cache=cache,
            writer=writer, loss=_loss(lesson, fixed, corrected, plan),
            log=stage.folder / "rounds.jsonl", progress=_steps(told, "on policy"), state=state,
        )  # fmt: skip
        fixed.close()
        cache.close()
        _finish_training(stage, model, path, state, {"recipe": recipe, "training": result, "rounds": rounds})
    return path, _told(told, stage)


def _polish(
    task: Task, records: Sequence[Record], *, work: Path, student: Path, corrected: Path, plan: Plan, told: Progress
) -> tuple[Path, dict[str, Any]]:
    assert plan.polish is not None
    recipe, how = _student(plan.polish, plan), PolishPlan()
    checkpoint, teacher = Checkpoint.read(student), Checkpoint.read(corrected)
    stage = Stage(work, "polish", [checkpoint.digest, teacher.digest, task, digest_value(records), recipe, how, plan.seed])
    path = stage.folder / "student-f16.gguf"
    if stage.report is None:
        state = stage.folder / "train.state"
        model, result, rounds = polished(
            checkpoint, records, task, recipe, rewards=ensemble(identify), plan=how, seed=plan.seed, origin=teacher.digest,
            natural=naturalness(to_torch(teacher, dtype=best_dtype())), log=stage.folder / "rounds.jsonl",
            progress=_steps(told, "polish"), state=state,
        )  # fmt: skip
        _finish_training(stage, model, path, state, {"recipe": recipe, "training": result, "rounds": rounds})
    return path, _told(told, stage)


def _export(
    task: Task, records: Sequence[Record], out: Path, *, corrected: Path, cut: Path, student: Path, plan: Plan, lineage: dict[str, Any],
    told: Progress,
) -> None:  # fmt: skip
    began = time.monotonic()
    staging = out.with_name(out.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    made_of = Checkpoint.read(student)
    spared = None if plan.kind in PLAIN_KINDS else importance(made_of, _calibration(task, records[:ENOUGH], student))
    student_float, student_file = export(made_of, staging, name="student", kind=plan.kind, importance=spared)
    told("export", 0.5, plan.kind)
    teacher_float, teacher_file = export(Checkpoint.read(corrected), staging, name="teacher", kind=plan.teacher_kind)
    teacher_float.unlink()
    untrained = staging / "untrained.gguf"  # what the distilling is held to; a cut has no weights of three values yet
    if plan.student.ternary:
        shutil.copyfile(cut, untrained)
    else:
        export(Checkpoint.read(cut), staging, name="untrained", kind=plan.kind)[0].unlink()
    start = staging / "initial-adapter.gguf"
    write_adapter_gguf(start, *initial_adapter(Checkpoint.read(student_file), rank=RANK, alpha=2.0 * RANK, seed=plan.seed))
    made = (teacher_file, student_file, student_float, untrained, start)
    files = {path.name: {"digest": digest_file(path), "bytes": path.stat().st_size} for path in made}
    lineage["export"] = {"seconds": round(time.monotonic() - began, 1), "student": plan.kind, "teacher": plan.teacher_kind, "files": files}
    lineage["export"]["untrained"] = "F16" if plan.student.ternary else plan.kind
    lineage["export"]["stored"] = msgspec.to_builtins(stored(student_file, plan.kind))
    write_atomically(staging / "lineage.json", msgspec.json.format(msgspec.json.encode(lineage)))
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "lineage.json"):  # the description last
        path.replace(out / path.name)
    staging.rmdir()
    told("export", 1.0, "done")


def _student(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe of a stage that trains the student: a ternary one stays ternary to the end, one from scratch learns its embedding."""
    return msgspec.structs.replace(recipe, ternary=plan.student.ternary, embedding=plan.scratch)


def _within(recipe: Recipe, seconds: float, accumulate: int) -> Recipe:
    """The recipe with the budget's seconds, unless it has a limit of its own, and the plan's batches a step."""
    limited = recipe.seconds or recipe.epochs or recipe.steps
    return msgspec.structs.replace(recipe, seconds=recipe.seconds if limited else seconds, accumulate=recipe.accumulate * accumulate)


def _texts(task: Task, records: Sequence[Record]) -> list[str]:
    """What the model reads and says, tokenised apart as in training."""
    return [text for record in records for text in (task.prompt(record), *([task.target(record)] if record.target else []))]


def _steps(told: Progress, stage: str) -> Callable[[Step], None]:
    return lambda step: told(
        stage, step.share, f"step {step.step}, loss {step.loss:.3f}, {step.tokens / max(step.seconds, 1e-9):.0f} tokens/s"
    )


def _told(told: Progress, stage: Stage) -> dict[str, Any]:
    report = stage.report
    assert report is not None
    told(stage.name, 1.0, "done")
    return report


def _licence_in(base: Path) -> str:
    entry = Checkpoint.read(base).metadata.get("general.license")
    return str(entry.value) if entry else "not stated"
