"""Time to equal held-out quality: ours against TRL 1.16's on-policy trainers, on Tatoeba (chrF, dev) and ranch (verdicts, dev).

One corrected teacher, one student cut out of it (`small`), one set of training records, for all arms. Ours asks the teacher once (that is
in its time), then trains on the cache. Each of TRL's two trainers runs tuned and with its defaults (`bench.trl_loop`), until it is as good
as ours ended, its own epochs are over (then it never gets there), or its limit is over: `--limit` seconds, a third of them with its
defaults, or the time of the fastest baseline before it, since what is slower than that one no longer decides. Judging is greedy decoding of
the same dev records, with the clock standing still. The curve of quality over seconds of every arm is kept; so is every arm that is done.
Seconds are the processor's (`bench.trl_loop`).

What is compared is not one method at two speeds. TRL's two distil on policy: the student writes, the teacher scores what it wrote. Ours has
the teacher's distribution of 200 of the 12,000 records, at a weight of 0.1, and learns all others from their own targets: nearly plain
fine-tuning on references. The figure says how soon each way of spending the same teacher, student and records is that good, and not that
on-policy distillation is done that much faster; how much of it the references buy alone, no arm says.

figure = (seconds of the fastest baseline until our quality) / (seconds until ours had it). Where none got there, the longest limit counts
and `at_least_so` says so. A limit bounds that number whatever happens, so every baseline is also compared at the best quality that it
reached itself: `at_its_best` = (its seconds until then) / (ours until we were that good).
"""

import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM

from bench.settings import TRANSLATION, Settings
from bench.student import cut_evenly
from bench.trl_loop import FIRST_LOOK, TRAINERS, Setting, Watch
from coordinator.forge.judging.metrics import sentence_chrf
from coordinator.forge.students.trim import trim
from coordinator.forge.targets.cache import TargetCache
from coordinator.forge.targets.capture import capture, examples_of, header_of
from coordinator.forge.training.objective import distillation_loss
from coordinator.forge.training.recipe import trained, upper_half
from coordinator.ranch import generate as ranch_records
from coordinator.ranch import site_named
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Epochs
from protocol.models.tokenizer import Tokenizer, make_example
from protocol.models.torch_model import best_dtype, body, generate, to_torch
from protocol.models.training import Step, train
from protocol.tasks import RANCH, Record, Task

KEY = "time_to_quality"
TRAIN, DEV = 12_000, 200  # records to learn from; records judged on
TEACHER_S = 600.0  # of correction
CAPTURED = 200  # sources the teacher answers for ours; it learns the others from their own targets
STEPS, RATE, ALPHA = 200, 5e-4, 0.1  # ours
# And their share of the limit; the likely faster first: it bounds the others.
SETTINGS: dict[Setting, float] = {"tuned": 1.0, "default": 1 / 3}
CALIBRATED_ON = 128  # examples that the student is cut out by
JUDGED_TOGETHER = 50  # prompts a batch
WHY = (
    "two ways, not one way at two speeds: TRL distils on policy, the student writes and the teacher scores; ours learns {others:,} of "
    "{all:,} records from their own targets, nearly plain fine-tuning on references, and the teacher's distribution of {captured:,} at a "
    "weight of {alpha}"
)


def measure(settings: Settings) -> dict[str, Any]:
    return {KEY: compared(settings, "tatoeba"), f"{KEY}_2": compared(settings, "ranch")}


def compared(settings: Settings, name: str) -> dict[str, Any]:
    """One task: our curve, every baseline's, and the figure."""
    lesson = Lesson(settings, name)
    mine = settings.kept(KEY, f"{name}-ours", lesson.ours)
    goal = max(quality for _, quality in mine["curve"])
    theirs: dict[str, dict[str, Any]] = {}
    for setting, part in SETTINGS.items():
        for trainer in TRAINERS:
            limit = min([part * settings.limit_s, *(at for run in theirs.values() if (at := reached(run, goal)) is not None)])
            arm = f"{trainer}, {setting}"
            theirs[arm] = settings.kept(
                KEY, f"{name}-{trainer}-{setting}", lambda a=trainer, b=setting, c=limit: lesson.trl(a, b, goal, limit_s=c)
            )
            told = reached(theirs[arm], goal)
            print(f"{KEY}: {name}: {arm}: {'not there' if told is None else f'{told:.0f} s'}", flush=True)
    count, asked = len(lesson.train), mine["captured"]
    return ratio(mine, theirs) | {"why": WHY.format(others=count - asked, all=count, captured=asked, alpha=ALPHA), "n": len(lesson.dev)}


def reached(run: dict[str, Any], goal: float) -> float | None:
    """Seconds until a run was first that good."""
    return next((at for at, quality in run["curve"] if quality >= goal), None)


def ratio(mine: dict[str, Any], theirs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figure of one task out of the curves."""
    goal = max(quality for _, quality in mine["curve"])
    ours = reached(mine, goal)
    seconds = {arm: reached(run, goal) for arm, run in theirs.items()}
    there = [at for at in seconds.values() if at is not None]
    stopped = [run["curve"][-1][0] for run in theirs.values() if run["stopped"]]  # the others never get there
    needed = min(there) if there else max(stopped, default=None)
    return {
        "figure": needed / ours if ours and needed is not None else None,
        "at_least_so": not there,
        "quality": goal,
        "ours": {"seconds": ours} | mine,
        "against": {arm: {"seconds": seconds[arm]} | at_its_best(mine, run) | run for arm, run in theirs.items()},
    }


def at_its_best(mine: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Both sides' seconds until the best quality of a baseline that learned anything, and their ratio."""
    best = max(quality for _, quality in run["curve"])
    its, ours = reached(run, best), reached(mine, best)
    return {"best": best, "best_after": its, "ours_that_good_after": ours, "at_its_best": its / ours if its and ours else None}


class Lesson:
    """Everything that all arms of one task share."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings, self.name = settings, name
        self.folder = settings.folder(KEY) / name
        self.folder.mkdir(exist_ok=True)
        self.task: Task = TRANSLATION if name == "tatoeba" else RANCH
        self.train, self.dev = (self.records(part, count) for part, count in (("train", TRAIN), ("dev", DEV)))
        self.trimmed = self.vocabulary()
        self.teacher = self.file("teacher.gguf", self.corrected)
        self.student = self.file("student.gguf", self.cut)
        with Tokenizer(self.student) as tokenizer:
            self.examples = [make_example(tokenizer, self.task, record) for record in self.train]

    def records(self, part: str, count: int) -> list[Record]:
        if self.name == "ranch":
            wanted = min(count, 24) if self.settings.quick else count
            return ranch_records(site_named("general"), seed=self.settings.seed, count=wanted, split=part)
        found = self.settings.pairs(part)
        random.Random(self.settings.seed).shuffle(found)
        return found[:count]

    def file(self, name: str, make: Callable[[], Checkpoint]) -> Path:
        path = self.folder / name
        return self.settings.once(path, lambda: make().write(path))

    def corrected(self) -> Checkpoint:
        """The teacher: vocabulary trimmed to the task, upper half trained on its records."""
        with Tokenizer(self.trimmed) as tokenizer:
            examples = [make_example(tokenizer, self.task, record) for record in self.train]
        checkpoint = Checkpoint.read(self.trimmed)
        recipe = upper_half(checkpoint.blocks, steps=3) if self.settings.quick else upper_half(checkpoint.blocks, seconds=TEACHER_S)
        return trained(checkpoint, examples, recipe, seed=self.settings.seed, state=self.folder / "teacher.state")[0]

    def vocabulary(self) -> Path:
        """The packaged model with the pieces of this task's records."""
        path, base = self.folder / "trimmed.gguf", self.settings.base()
        texts = [text for one in self.train for text in (self.task.prompt(one), self.task.target(one))]
        return self.settings.once(path, lambda: trim(base, [*texts, self.task.template], path))

    def cut(self) -> Checkpoint:
        with Tokenizer(self.teacher) as tokenizer:
            examples = [make_example(tokenizer, self.task, record) for record in self.train[:CALIBRATED_ON]]
        return cut_evenly(Checkpoint.read(self.teacher), examples, quick=self.settings.quick)

    def judge(self, model: Gemma3ForCausalLM) -> float:
        """Mean sentence chrF in [0, 1], or the share of right verdicts, on the dev records."""
        said: list[str] = []
        with Tokenizer(self.student) as tokenizer:
            prompts = [tokenizer.encode(self.task.prompt(record), bos=True) for record in self.dev]
            for first in range(0, len(prompts), JUDGED_TOGETHER):
                batch = prompts[first : first + JUDGED_TOGETHER]
                answers = generate(model, batch, max_new_tokens=self.longest, eos=tokenizer.eos)
                said += [tokenizer.decode([token for token in answer if token != tokenizer.eos]) for answer in answers]
        parsed = [self.task.parse(text) for text in said]
        if self.task.kind == "verdict":
            return statistics.mean(answer.verdict == record.verdict for answer, record in zip(parsed, self.dev, strict=True))
        scores = sentence_chrf([answer.sentence for answer in parsed], [record.target for record in self.dev])
        return round(statistics.mean(scores) / 100, 4)

    @property
    def longest(self) -> int:
        return 6 if self.settings.quick else self.task.max_new_tokens

    @property
    def first_look(self) -> float:
        return 1.0 if self.settings.quick else FIRST_LOOK

    def ours(self) -> dict[str, Any]:
        """Capture, then train on the cache; the seconds of both."""
        steps, captured = (4, 8) if self.settings.quick else (STEPS, CAPTURED)
        folder = self.folder / "cache"
        teacher = Checkpoint.read(self.teacher)
        model = to_torch(Checkpoint.read(self.student), dtype=best_dtype())
        watch = Watch(lambda: self.judge(model), limit_s=self.settings.limit_s, first_look=self.first_look)
        cache = TargetCache(folder, header_of(teacher))
        with Tokenizer(self.teacher) as tokenizer:
            asked = self.train[:captured]
            source = to_torch(teacher, dtype=best_dtype())
            log, result = capture(source, tokenizer, self.task, asked, cache=cache, log=folder / "log.jsonl")
        capture_s = watch.elapsed
        examples = [*examples_of(log), *self.examples[captured:]]

        def progress(_: Step) -> None:
            watch.tick()

        train(
            model, Epochs(examples, seed=self.settings.seed, batch_tokens=512), parameters=body(model), learning_rate=RATE, steps=steps,
            loss=distillation_loss(examples, cache=cache, alpha=ALPHA), progress=progress,
        )  # fmt: skip
        watch.look()
        cache.close()
        return {"curve": watch.curve, "capture_s": round(capture_s, 1), "captured": result.records, "steps": steps}

    def trl(self, trainer: str, setting: Setting, goal: float, *, limit_s: float) -> dict[str, Any]:
        """One baseline, until it is as good as ours or its limit is over."""
        torch.manual_seed(self.settings.seed)
        student = trainable(Checkpoint.read(self.student), self.eos)
        teacher = to_torch(Checkpoint.read(self.teacher))
        limit = 3.0 if self.settings.quick else limit_s
        watch = Watch(lambda: self.judge(student), limit_s=limit, goal=None if self.settings.quick else goal, first_look=self.first_look)
        used = TRAINERS[trainer](
            student, teacher, self.examples, setting, out=self.folder / "trl", watch=watch, eos=self.eos, longest=self.longest,
            seed=self.settings.seed,
        )  # fmt: skip
        watch.look()
        return {"curve": watch.curve, "settings": used, "limit_s": limit, "stopped": watch.elapsed >= limit}

    @property
    def eos(self) -> int:
        with Tokenizer(self.student) as tokenizer:
            return tokenizer.eos


def trainable(checkpoint: Checkpoint, eos: int) -> Gemma3ForCausalLM:
    """The student as TRL wants it: float32, everything free but the embedding, generation told where an answer ends."""
    model = to_torch(checkpoint).requires_grad_(True)
    model.model.embed_tokens.requires_grad_(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0
    return model
