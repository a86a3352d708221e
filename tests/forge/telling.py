"""A teacher that says what it was told to, and a process that synthesises with it: `python -m tests.forge.telling FILE COUNT [SHARD]`.

Its answers depend on the source, the seed and the place among the samples, as a model's do; never on the batch.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from coordinator.forge.sharing import Worker
from coordinator.forge.synthesis.rows import RowLog
from coordinator.forge.synthesis.sampling import Plan, plan_of, synthesise
from coordinator.forge.synthesis.scoring import Judge
from coordinator.forge.targets.cache import Targets
from coordinator.forge.teachers import NoLogits, Said
from protocol.errors import TooLarge
from protocol.models.tokenizer import Example
from protocol.tasks import Record, translation

TASK = translation("English", "Spanish")
PLAN = Plan(samples=4, keep=2, seed=1)


class Telling:
    """Answers by source: a list of texts, taken in turn as samples are asked for; its sources are the only ones it knows."""

    open = False
    reads: Literal["prompt", "source"] = "source"
    name, digest, tokenizer, vocabulary = "telling", "t" * 64, "", 0

    def __init__(self, answers: dict[str, Sequence[str]], *, slow_s: float = 0.0, longest: int = 1000) -> None:
        self.answers, self.slow_s, self.longest = answers, slow_s, longest
        self.asked: list[tuple[str, int]] = []

    def generate(self, prompts: Sequence[str], *, n: int, temperature: float, seed: int, max_new_tokens: int) -> list[list[Said]]:
        time.sleep(self.slow_s)
        if any(len(prompt) > self.longest for prompt in prompts):
            raise TooLarge("the prompt is too long")
        self.asked += [(prompt, n) for prompt in prompts]
        first = 2 if seed > PLAN.seed else 0  # a second call goes on where the first ended
        return [
            [Said(self.answers[prompt][(first + at) % len(self.answers[prompt])], None, None, finished=True) for at in range(n)]
            for prompt in prompts
        ]

    def score(self, examples: Sequence[Example], *, k: int) -> list[Targets]:
        raise NoLogits(self.name)

    def log_probs(self, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        raise NoLogits(self.name)

    def close(self) -> None:
        pass


def record(number: int) -> Record:
    return Record(id=f"r{number}", task=TASK.name, source=f"the cat sat on mat {number}", lang="es")


def answers(count: int) -> dict[str, Sequence[str]]:
    said = ("el gato en la mesa", "un gato estaba en la alfombra", "the cat sat on mat", "el gato se sentó en la alfombra")
    return {record(number).source: [f"{text} {number}" for text in said] for number in range(count)}


def run(file: Path, count: int, *, shard: str = "0/1", slow_s: float = 0.0) -> Telling:
    teacher, worker = Telling(answers(count), slow_s=slow_s), Worker.named(shard)
    with RowLog(file, plan_of(teacher, TASK, PLAN, worker=worker, signals=[])) as log:
        synthesise(
            teacher, TASK, [record(number) for number in range(count)], log, plan=PLAN, judge=Judge(), worker=worker,
            progress=lambda done, total: print(done, flush=True),
        )  # fmt: skip
    return teacher


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), shard=sys.argv[3] if len(sys.argv) > 3 else "0/1", slow_s=0.02)
