"""Teacher correction: a short fine-tuning of a general model on the task, embeddings frozen, before anything is distilled from it.

Correction first, always: minutes of it turn a model that cannot do the task into a useful teacher (Minitron's finding, and docs/log.md).
A recipe says what is free: LoRA factors that are folded in afterwards, or the upper blocks whole.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from transformers import Gemma3ForCausalLM

from coordinator.forge.students.ternary import make_ternary, settle
from coordinator.forge.training.scale import OneProcess, Together
from protocol.adapters import unpack
from protocol.errors import BadInput
from protocol.models.checkpoint import Checkpoint, encode_tensor
from protocol.models.feed import Epochs, Feed
from protocol.models.lora import ALL_MODULES, Factors, attach, detach, initial_adapter
from protocol.models.tokenizer import Example
from protocol.models.torch_model import best_dtype, body, from_torch, to_torch
from protocol.models.training import Loss, Step, TrainResult, cross_entropy, train


class Recipe(msgspec.Struct, frozen=True):
    """How a model is trained. Defaults are the teacher's; measured in docs/log.md."""

    mode: Literal["lora", "full"] = "lora"
    learning_rate: float = 1e-3
    rank: int = 16  # LoRA only; alpha is twice the rank
    first_block: int = 0  # blocks below it stay as they are: they run once an example, and never backwards
    ternary: bool = False  # train three-valued matrices (students.ternary); whole models only
    embedding: bool = False  # train the embedding too, which a student from scratch needs; else it stays as stored
    batch_tokens: int = 512  # about 8 ranch records: many small steps beat few large ones in minutes of training
    accumulate: int = 1  # batches a step, over all processes of a world
    warm_up: float = 0.05
    seconds: float | None = None
    epochs: float | None = None
    steps: int | None = None


def upper_half(blocks: int, *, seconds: float | None = None, steps: int | None = None) -> Recipe:
    """How a teacher of so many blocks is corrected: the upper half of them whole, which learns faster than LoRA on all (docs/log.md)."""
    return Recipe(mode="full", learning_rate=3e-4, first_block=blocks // 2, seconds=seconds, steps=steps)


def trained(
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    seed: int,
    loss: Loss = cross_entropy,
    progress: Callable[[Step], None] | None = None,
    state: Path | None = None,
    world: Together | None = None,
) -> tuple[Checkpoint, TrainResult]:
    """Train a copy of `checkpoint` on `examples`; returns it in F16, which holds ternary weights exactly. An embedding that is not
    trained stays as stored.

    Raises:
        BadInput: a ternary recipe or one with the embedding that leaves blocks out, or rows that ternary blocks do not fit.
        NotEnough, Diverged: as `protocol.models.training.train`.
    """
    return trained_by(
        checkpoint,
        lambda _: (Epochs(examples, batch_tokens=recipe.batch_tokens, seed=seed), loss),
        recipe,
        seed=seed,
        progress=progress,
        state=state,
        world=world,
    )


def trained_by(
    checkpoint: Checkpoint,
    course: Callable[[Gemma3ForCausalLM], tuple[Feed, Loss]],
    recipe: Recipe,
    *,
    seed: int,
    progress: Callable[[Step], None] | None = None,
    state: Path | None = None,
    world: Together | None = None,
) -> tuple[Checkpoint, TrainResult]:
    """As `trained`, on whatever `course` makes of the model in training: a feed that lets it write, for one."""
    if (recipe.ternary or recipe.embedding) and (recipe.mode != "full" or recipe.first_block):
        raise BadInput("ternary training, and that of the embedding, is of whole models: mode 'full' and first_block 0")
    together = world or OneProcess()
    dtype = best_dtype() if together.device.type == "cpu" else torch.bfloat16
    model = to_torch(checkpoint, dtype=dtype)

    def run(parameters: Sequence[torch.nn.Parameter]) -> TrainResult:
        model.to(together.device)
        feed, loss = course(model)
        result = train(
            model,
            feed,
            parameters=parameters,
            learning_rate=recipe.learning_rate,
            loss=loss,
            seconds=recipe.seconds,
            epochs=recipe.epochs,
            steps=recipe.steps,
            warm_up=recipe.warm_up,
            progress=progress,
            state=state,
            accumulate=recipe.accumulate,
            world=together,
        )
        model.cpu()
        return result

    if recipe.mode == "lora":
        digest = checkpoint.digest if checkpoint.path else f"{seed}"
        flat, header = initial_adapter(
            checkpoint, rank=recipe.rank, alpha=2.0 * recipe.rank, seed=seed, base_digest=digest, modules=ALL_MODULES
        )
        factors = {name: pair for name, pair in unpack(flat, header).items() if int(name.split(".")[1]) >= recipe.first_block}
        header = msgspec.structs.replace(header, modules=tuple(module for module in header.modules if module.tensor in factors))
        flat = np.concatenate([part.ravel() for pair in factors.values() for part in pair])
        result = run(attach(model, flat, header))
        scale = header.alpha / header.rank
        return folded(checkpoint, unpack(detach(model, header), header), dict.fromkeys(factors, scale)), result
    if recipe.ternary:
        make_ternary(model)
    result = run(list(model.parameters()) if recipe.embedding else body(model, first=recipe.first_block))
    if recipe.ternary:
        settle(model)
    return from_torch(model.float(), checkpoint, embedding="F16" if recipe.embedding else None), result


def folded(checkpoint: Checkpoint, factors: Factors, scales: Mapping[str, float], *, kind: str = "F16") -> Checkpoint:
    """The checkpoint with scale * B @ A added to each named weight, in float32, rounded once; matrices are stored as `kind`."""
    tensors = dict(checkpoint.tensors)
    for name, _ in checkpoint.matrices():
        weight = checkpoint.array(name)
        if name in factors:
            a, b = factors[name]
            weight = weight + scales[name] * (b @ a)
        tensors[name] = encode_tensor(weight, kind)
    return checkpoint.with_tensors(tensors)
