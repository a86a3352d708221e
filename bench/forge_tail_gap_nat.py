"""What a cached view of the teacher costs in quality: held-out NLL of students that differ in nothing but what they were told of it.

One teacher (WORK/teacher.gguf where it is, or the trimmed packaged model corrected for a few steps), one start (its blocks 0, 1, 2, 5, ...
of 18), the same pairs in the same order, the same number of steps, and KL to the teacher alone as the loss:

dense          the whole distribution, from the live teacher     hidden8       the same, rebuilt from a byte a number
topk           top 50 and one number for the rest                topk_bare     top 50, made to add up to 1, no tail
sampled        50 draws                                          cross_entropy the pairs' own targets, no teacher

The figure is NLL(topk) - NLL(dense) in nat a target token, on pairs that nobody trained on, with the interval of a paired bootstrap.
"""

import random
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import stamps
from bench.naive import live
from bench.settings import TRANSLATION, Settings
from coordinator.forge.students.cut import evenly
from coordinator.forge.targets.cache import TargetCache, Targets
from coordinator.forge.targets.capture import capture, header_of
from coordinator.forge.targets.score import log_probs
from coordinator.forge.training.objective import Objective, read_head
from coordinator.forge.training.recipe import Recipe, trained
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import best_dtype, to_torch
from protocol.models.training import Loss
from protocol.tasks import Record

KEY = "tail_gap_nat"
ARMS = ("dense", "hidden8", "topk", "topk_bare", "sampled", "cross_entropy")
MODES = ("topk", "sampled", "hidden8")
PAIRS, HELD_OUT = 1_500, 400
CORRECTED_STEPS, STEPS = 150, 240  # of 512 tokens; at 80 an arm has left its first plateau or not, and that decides everything
BLOCKS = 8
RESAMPLES = 2_000


def measure(settings: Settings) -> dict[str, Any]:
    bench = Bench(settings)
    caches = {mode: settings.kept(KEY, f"cache-{mode}", lambda mode=mode: bench.captured(mode)) for mode in MODES}
    arms = {arm: settings.kept(KEY, f"arm-{arm}", lambda arm=arm: bench.student(arm)) for arm in ARMS}
    nll = {arm: sum(found["nll"]) / sum(found["tokens"]) for arm, found in arms.items()}
    return {
        "figure": nll["topk"] - nll["dense"],
        "interval": gap(arms["topk"], arms["dense"], seed=settings.seed),
        "against": {"dense KL, held-out nat a token": nll["dense"]},
        "ours": {f"{arm}, held-out nat a token": value for arm, value in nll.items() if arm != "dense"},
        "gaps": {
            arm: {"figure": nll[arm] - nll["dense"], "interval": gap(arms[arm], arms["dense"], seed=settings.seed)} for arm in ARMS[1:]
        },
        "caches": caches,
        "seconds_of_training": {arm: found["seconds"] for arm, found in arms.items()},
        "teacher": {"digest": bench.teacher.digest, "held-out nat a token": settings.kept(KEY, "teacher", bench.teacher_nll)},
        "n": len(bench.held_out),
        "steps": bench.steps,
        "pairs": len(bench.examples),
    }


class Bench:
    """The teacher, the pairs, and a student of each kind."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.folder = settings, settings.folder(KEY)
        self.steps = 3 if settings.quick else STEPS
        torch.set_num_threads(settings.threads)

    @cached_property
    def teacher(self) -> Checkpoint:
        """The lead's, or made here once."""
        given, made = self.settings.work / "teacher.gguf", self.folder / "teacher.gguf"
        if given.is_file() and not self.settings.quick:
            self.settings.used(given, stamps.read(given))
            return Checkpoint.read(given)
        steps = 3 if self.settings.quick else CORRECTED_STEPS
        return self.settings.corrected(made, self.records("train", 3 * PAIRS, skip=PAIRS), steps=steps)

    @cached_property
    def examples(self) -> list[Example]:
        """What the students learn."""
        return self._examples(self.path, self.records("train", PAIRS))

    @cached_property
    def held_out(self) -> list[Example]:
        """What they are judged on."""
        return self._examples(self.path, self.records("dev", HELD_OUT))

    @property
    def path(self) -> Path:
        """The teacher's file."""
        assert self.teacher.path is not None
        return self.teacher.path

    def records(self, part: str, count: int, *, skip: int = 0) -> list[Record]:
        """`count` pairs of the part in a random order, after the first `skip`."""
        found = self.settings.pairs(part)
        random.Random(self.settings.seed).shuffle(found)
        return found[skip : skip + count] if skip < len(found) else found

    def _examples(self, model: Path, records: Sequence[Record]) -> list[Example]:
        with Tokenizer(model) as tokenizer:
            return [make_example(tokenizer, TRANSLATION, record) for record in records]

    def captured(self, mode: Any) -> dict[str, float]:
        """Capture the pairs' own targets in a mode; what a token takes on disk, to capture and to read."""
        with Tokenizer(self.path) as tokenizer, TargetCache(self.folder / mode, header_of(self.teacher, mode=mode)) as cache:
            model, records = to_torch(self.teacher, dtype=best_dtype()), self.records("train", PAIRS)
            log = self.folder / f"{mode}.jsonl"
            _, result = capture(model, tokenizer, TRANSLATION, records, cache=cache, log=log, answers="given")
            began = time.process_time()
            for example in self.examples:
                cache.get(example)
            reading = (time.process_time() - began) / sum(len(example.target) for example in self.examples)
        return {"bytes_a_token": result.bytes_a_token, "tokens_a_second": result.tokens_a_second, "reading_us_a_token": 1e6 * reading}

    def student(self, arm: str) -> dict[str, Any]:
        """Train a student by that loss; its NLL on each held-out pair."""
        start = self.teacher.keep_blocks(evenly(self.teacher.blocks, min(BLOCKS, self.teacher.blocks - 1)))
        start.write(self.folder / "start.gguf")
        recipe = Recipe(mode="full", learning_rate=5e-4, steps=self.steps)
        began = time.monotonic()
        made, _ = trained(start, self.examples, recipe, seed=self.settings.seed, loss=self._loss(arm))
        return {"seconds": time.monotonic() - began, **self._nll(made)}

    def teacher_nll(self) -> float:
        """The teacher's own, on the same pairs."""
        found = self._nll(self.teacher)
        return float(sum(found["nll"]) / sum(found["tokens"]))

    def _nll(self, checkpoint: Checkpoint) -> dict[str, list[float]]:
        found = log_probs(to_torch(checkpoint, dtype=best_dtype()), self.held_out)
        return {"nll": [-float(one.sum()) for one in found], "tokens": [len(one) for one in found]}

    def _loss(self, arm: str) -> Loss:
        losses: dict[str, Callable[[], Loss]] = {
            "dense": lambda: live(self.teacher),
            "hidden8": lambda: self._cached("hidden8", head=read_head(self.path, header_of(self.teacher, mode="hidden8"))),
            "topk": lambda: self._cached("topk"),
            "topk_bare": lambda: self._cached(without_tail(self.folder / "topk", self.folder / "topk_bare", self.examples)),
            "sampled": lambda: self._cached("sampled"),
            "cross_entropy": lambda: Objective({"cross_entropy": 1.0}, self.examples),
        }
        return losses[arm]()

    def _cached(self, folder: str, *, head: torch.Tensor | None = None) -> Objective:
        return Objective({"kl": 1.0}, self.examples, cache=TargetCache.open(self.folder / folder), head=head)


def without_tail(source: Path, target: Path, examples: list[Example]) -> str:
    """The cache that many write: the same top k, made to add up to 1, and nothing about the rest."""
    with TargetCache.open(source) as found, TargetCache(target, found.header) as bare:
        for example in examples:
            view = found.get(example)
            assert isinstance(view, Targets)
            inside = np.logaddexp.reduce(view.log_probs, axis=1, keepdims=True)
            bare.put(example, Targets(view.ids, view.log_probs - inside, np.full_like(view.tail, -np.inf)))
    return target.name


def gap(ours: dict[str, Any], theirs: dict[str, Any], *, seed: int) -> list[float]:
    """95% interval of the difference in NLL a token, pairs resampled together."""
    difference, tokens = np.array(ours["nll"]) - np.array(theirs["nll"]), np.array(ours["tokens"])
    drawn = np.random.default_rng(seed).integers(0, len(tokens), (RESAMPLES, len(tokens)))
    means = difference[drawn].sum(1) / tokens[drawn].sum(1)
    return [float(edge) for edge in np.percentile(means, [2.5, 97.5])]
