"""An on-policy training of a tiny model as a program of its own, so that it can be killed: FOLDER [rounds until SIGKILL]."""

import os
import signal
import sys
from pathlib import Path

import torch

from coordinator.forge.targets.cache import CacheHeader, TargetCache
from coordinator.forge.targets.score import score
from coordinator.forge.training.objective import distillation_loss
from coordinator.forge.training.on_policy import OnPolicy, OnPolicyPlan, alone, by_kind
from protocol.models.tokenizer import Example
from protocol.models.torch_model import to_torch
from protocol.models.training import train
from tests.tiny import tiny_checkpoint

FIXED = [Example([2, 300 + i], [310 + i, 1]) for i in range(6)]
PROMPTS = [[2, 320 + i, 330 + i] for i in range(12)]
PLAN = OnPolicyPlan(share=0.5, every=4, prompts=4, staleness=2)


def main(folder: Path, dies_in: int | None = None) -> tuple[bytes, torch.Tensor]:
    """Twelve steps, three rounds; returns the log and a trained matrix. Dies in that round, its targets cached and not logged."""
    student, teacher = to_torch(tiny_checkpoint(seed=1)), to_torch(tiny_checkpoint(seed=2))
    header = CacheHeader(teacher="t", tokenizer="t", k=8, vocabulary=student.config.vocab_size)
    cache = TargetCache(folder / "cache", header)
    write = alone(student, score=lambda examples: score(teacher, examples, k=8), max_new_tokens=6, eos=1)
    log = folder / "rounds.jsonl"
    feed = OnPolicy(FIXED, PROMPTS, writer=write, plan=PLAN, cache=cache, log=log, batch_tokens=24, seed=3, origin="test")
    sync = cache.sync

    def dying_sync() -> None:
        sync()
        if len(feed.log) == dies_in:
            with log.open("ab") as file:
                file.write(b'{"examples":[[[2,')  # torn
            os.kill(os.getpid(), signal.SIGKILL)

    cache.sync = dying_sync  # type: ignore[method-assign]
    own = distillation_loss(feed.examples, cache=cache, alpha=1.0)
    parameters = [p for name, p in student.named_parameters() if "embed" not in name]
    train(
        student, feed, parameters=parameters, learning_rate=1e-3, loss=by_kind(feed, fixed=own, own=own), steps=12,
        state=folder / "train.state", save_every_s=0.0,
    )  # fmt: skip
    cache.close()
    return log.read_bytes(), student.model.layers[0].mlp.down_proj.weight.detach()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
