"""What tests/forge/test_scale.py starts, once alone and once under a launcher: a short training of the tiny model, its losses as JSON.

python -m tests.forge.scaled MODEL.gguf LOSSES.json
"""

import json
import sys
from pathlib import Path

import torch

from coordinator.forge.training import scale
from coordinator.forge.training.recipe import Recipe, trained
from protocol.models.checkpoint import Checkpoint
from protocol.models.tokenizer import Example


def main() -> None:
    model, losses = (Path(word) for word in sys.argv[1:])
    torch.set_num_threads(1)
    examples = [Example([2, 300 + i % 7, 310 + i % 5], [320 + i % 11] * (1 + i % 4) + [1]) for i in range(64)]
    recipe = Recipe(mode="full", learning_rate=3e-3, batch_tokens=32, steps=12, accumulate=4)
    world = scale.world()
    seen: list[tuple[float, int]] = []
    _, result = trained(
        Checkpoint.read(model), examples, recipe, seed=1, world=world, progress=lambda step: seen.append((step.loss, step.tokens)),
        state=losses.with_suffix(".state"),
    )  # fmt: skip
    world.close()
    if world.rank == 0:
        losses.write_text(json.dumps({"processes": world.size, "losses": [loss for loss, _ in seen], "steps": result.steps}))


if __name__ == "__main__":
    main()
