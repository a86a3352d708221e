"""Targets made up, and a process that does nothing but write them: `python -m tests.forge.written FOLDER WORKER OF`.

It puts the examples of its worker in order, those that are there again too, and says each number once its record is in the file.
"""

import sys
from pathlib import Path

import numpy as np

from coordinator.forge.sharing import Worker
from coordinator.forge.targets.cache import CacheHeader, TargetCache, Targets
from protocol.models.tokenizer import Example

HEADER = CacheHeader(teacher="a" * 64, tokenizer="b" * 64, k=50, vocabulary=8192)


def example(number: int, length: int = 18) -> Example:
    return Example([2, number], [7] * (length - 1) + [1])


def targets(seed: int, length: int = 18) -> Targets:
    chance = np.random.default_rng(seed)
    ids = np.stack([chance.choice(HEADER.vocabulary, HEADER.k, replace=False) for _ in range(length)])
    share = chance.dirichlet(np.ones(HEADER.k + 1), size=length)
    return Targets(ids, np.log(share[:, :-1]).astype(np.float32), np.log(share[:, -1]).astype(np.float32))


def main() -> None:
    folder, number, of = sys.argv[1:]
    worker, same = Worker(int(number), int(of)), targets(1)
    with TargetCache(Path(folder), HEADER, worker=worker) as cache:
        for i in range(5000):
            cache.put(example(worker.of * i + worker.number), same)
            print(i, flush=True)


if __name__ == "__main__":
    main()
