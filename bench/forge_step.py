"""CPU-seconds a step: ours, with the teacher's top 50 and tail from the cache, against the loops that keep a teacher running.

naive loop                 fresh answers of the student, live teacher, TRL's dense generalised JSD           (goal 5x)
live teacher, dense KL     the batch's own targets, live teacher, forward KL over the whole vocabulary       (goal 2x)

All arms take the same batches, one arm after the other, and one optimiser step each; process CPU time, medians, and the ratio batch by
batch. A baseline is measured in float32 and under bfloat16 autocast, and the faster one counts. As a bound, the live teacher inside our own
loop is told too.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.naive import Naive, lesson, live
from bench.settings import Settings
from coordinator.forge.targets.cache import TargetCache
from coordinator.forge.targets.capture import header_of
from coordinator.forge.targets.score import views
from coordinator.forge.training.objective import distillation_loss
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Epochs
from protocol.models.tokenizer import Example
from protocol.models.torch_model import best_dtype, body, to_torch
from protocol.models.training import Loss, Step, train

BATCH_TOKENS = 512
TURNS = 10
RECORDS = 400


def measure(settings: Settings) -> dict[str, Any]:
    turns = 2 if settings.quick else TURNS
    teacher, student, examples, eos = lesson(settings, RECORDS)
    batches = list(zip(range(turns + 1), Epochs(examples, batch_tokens=BATCH_TOKENS, seed=settings.seed).batches(0), strict=False))
    spent: dict[str, list[float]] = {}
    cache = scored(settings.folder("step") / "cache", teacher, [examples[i] for _, batch in batches for i in batch])
    spent["ours"] = ours(student, examples, distillation_loss(examples, cache=cache, alpha=0.5), batches, settings.seed)
    cache.close()
    spent["live teacher in our loop"] = ours(student, examples, live(teacher), batches, settings.seed)
    for name, fresh in (("naive", True), ("dense KL", False)):
        for kind, autocast in (("float32", False), ("bfloat16 autocast", True)):
            torch.manual_seed(settings.seed)
            arm = Naive(teacher, student, fresh=fresh, autocast=autocast, eos=eos)
            spent[f"{name}, {kind}"] = [arm.step([examples[i] for i in batch]) for _, batch in batches]
            del arm
    spent = {name: each[1:] for name, each in spent.items()}  # the first step warms up
    about = {
        "n": turns, "batch_tokens": BATCH_TOKENS, "seconds_a_step": {name: statistics.median(each) for name, each in spent.items()},
        "parameters": {"teacher": size(teacher), "student": size(student)}, "vocabulary": len(teacher.vocabulary.tokens),
    }  # fmt: skip
    return {"step": against(spent, "naive") | about, "step_2": against(spent, "dense KL") | about}


def against(spent: dict[str, list[float]], name: str) -> dict[str, Any]:
    """The ratio to the faster variant of a baseline, batch by batch: its median and the middle half."""
    fastest = min((arm for arm in spent if arm.startswith(name)), key=lambda arm: statistics.median(spent[arm]))
    ratios = [theirs / mine for theirs, mine in zip(spent[fastest], spent["ours"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    middle = {"interval": [low, high], "interval_of": "middle half of the steps"}
    return {"figure": statistics.median(ratios), **middle, "against": {fastest: statistics.median(spent[fastest])}}


def ours(student: Checkpoint, examples: Sequence[Example], loss: Loss, batches: Sequence[tuple[int, list[int]]], seed: int) -> list[float]:
    """CPU-seconds of each whole step of our loop, reading the cache and making the batch included."""
    model = to_torch(student, dtype=best_dtype())
    marks: list[float] = []

    def progress(_: Step) -> None:
        marks.append(time.process_time())

    feed = Epochs(examples, batch_tokens=BATCH_TOKENS, seed=seed)
    marks.append(time.process_time())
    train(model, feed, parameters=body(model), learning_rate=1e-4, loss=loss, steps=len(batches), progress=progress)
    return [after - before for before, after in itertools.pairwise(marks)]


def scored(folder: Path, teacher: Checkpoint, examples: Sequence[Example]) -> TargetCache:
    """A cache of the teacher's view of the examples' own targets."""
    cache = TargetCache(folder, header_of(teacher))
    missing = [one for one in examples if one not in cache]
    if missing:
        for one, view in zip(missing, views(to_torch(teacher, dtype=best_dtype()), missing, cache.header), strict=True):
            cache.put(one, view)
        cache.sync()
    return cache


def size(checkpoint: Checkpoint) -> int:
    return sum(parameter.numel() for parameter in to_torch(checkpoint).parameters())


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU-seconds of this process while it works."""
    began = time.process_time()
    work()
    return time.process_time() - began
