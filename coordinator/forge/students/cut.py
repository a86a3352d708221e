"""Cutting a student out of its teacher: which blocks stay, and how wide they are.

At equal CPU time a cut student is far ahead of one from scratch (docs/log.md). Depth first, by what the loss on a calibration set says
(`by_loss`), then width, by importance (`width.py`). llama.cpp takes local or global attention from a block's number, every sixth being
global, so a kept block may change its kind; the measure sees it, because it numbers them as llama.cpp will (docs/adr/0014).
"""

import re
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from transformers import Gemma3ForCausalLM

from coordinator.forge.students.width import Order, Widths, calibrate, choose, narrowed
from protocol.errors import BadInput
from protocol.models.checkpoint import GLOBAL_EVERY, Checkpoint
from protocol.models.feed import collate, plan
from protocol.models.tokenizer import Example
from protocol.models.torch_model import best_dtype, embed, hidden_states, to_torch
from protocol.models.training import mean_loss
from protocol.names import known

BATCH_TOKENS = 2048
DEPTH_EXAMPLES = 64  # calibration examples that decide the depth: some 40 forward passes of them
CANDIDATES = 6  # blocks of least influence, out of which the loss decides
ROW = 256

_SHAPE = re.compile(r"(\d{1,3})x(\d{1,5})x(\d{1,5})x(\d{1,2})")


class Preset(msgspec.Struct, frozen=True):
    """What a student's figures are. Rows are multiples of ROW, which K-quants and ternary types want."""

    name: str
    blocks: int
    hidden: int
    feed_forward: int
    heads: int  # of the teacher's width each

    @property
    def widths(self) -> Widths:
        """Without the depth."""
        return Widths(self.hidden, self.feed_forward, self.heads)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("nano", blocks=4, hidden=256, feed_forward=768, heads=2),
        Preset("tiny", blocks=6, hidden=512, feed_forward=1536, heads=4),
        Preset("small", blocks=12, hidden=512, feed_forward=1536, heads=4),
    )
}


def preset(name: str) -> Preset:
    """The preset called `name`, or the shape that it spells out: "12x512x1024x2" is blocks, width, feed-forward, heads.

    Raises:
        UnknownName: there is none; the message lists them.
        BadInput: a shape with rows that are no multiples of ROW, or heads that do not divide the width.
    """
    if shape := _SHAPE.fullmatch(name):
        blocks, hidden, feed_forward, heads = map(int, shape.groups())
        if hidden % ROW or feed_forward % ROW or not min(blocks, hidden, feed_forward, heads) or hidden % heads:
            raise BadInput(
                f"student {name!r}: width and feed-forward must be multiples of {ROW}, heads must divide the width, and nothing is 0, "
                "as in 12x512x1024x2"
            )
        return Preset(name, blocks, hidden, feed_forward, heads)
    known(name, PRESETS, what="student preset")
    return PRESETS[name]


def check_fits(teacher: Checkpoint, wanted: Preset) -> None:
    """Check that `wanted` can be cut out of the teacher.

    Raises:
        BadInput: it is larger in any way.
    """
    has = {
        "blocks": (teacher.blocks, wanted.blocks),
        "channels": (teacher.hidden, wanted.hidden),
        "neurons": (int(teacher.number("feed_forward_length")), wanted.feed_forward),
        "heads": (int(teacher.number("attention.head_count")), wanted.heads),
    }
    if more := [f"{asked} {what} of {there}" for what, (there, asked) in has.items() if asked > there]:
        raise BadInput(f"student {wanted.name!r} wants {', '.join(more)}: it cannot be larger than its teacher")


def cut_student(
    checkpoint: Checkpoint,
    wanted: Preset,
    examples: Sequence[Example],
    *,
    order: Order = "importance",
    blocks: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[Checkpoint, dict[str, Any]]:
    """The teacher cut down to `wanted`, untrained, and what was kept.

    Args:
        examples: calibration set, tokenised for this checkpoint; some hundred are enough.
        order: what widths are chosen by.
        blocks: those to keep; by default `by_loss`, on the first `DEPTH_EXAMPLES`.

    Raises:
        BadInput: no examples, or a student larger than its teacher in any way.
    """
    began = time.monotonic()
    if not examples:
        raise BadInput("cutting needs examples to calibrate on; it was given none")
    report: dict[str, Any] = {"preset": wanted.name, "of": checkpoint.blocks, "examples": len(examples)}
    if blocks is None:
        blocks, losses = by_loss(to_torch(checkpoint, dtype=best_dtype()), examples[:DEPTH_EXAMPLES], wanted.blocks)
        report["losses"] = [round(loss, 3) for loss in losses]
    shallow = checkpoint.keep_blocks(blocks)
    found = calibrate(to_torch(shallow), examples)
    kept = choose(found, wanted.widths, order=order, seed=seed)
    student = narrowed(shallow, found, kept)
    report |= {
        "kept": list(blocks),
        "order": order,
        "channels": kept.channels.tolist(),
        "heads": [block.tolist() for block in kept.heads],
        "tokens": found.tokens,
        "seconds": round(time.monotonic() - began, 1),
    }
    return student, report


def by_loss(model: Gemma3ForCausalLM, examples: Sequence[Example], keep: int) -> tuple[tuple[int, ...], list[float]]:
    """Drop one block after the other, each time the one without which the loss is lowest, out of the `CANDIDATES` of least influence.

    (Kim et al. 2024, Shortened LLaMA, by perplexity.) Returns the blocks that stay and the loss after each drop, nats a target token.
    The model comes back whole.

    Raises:
        BadInput: more blocks than there are, or fewer than 1.
    """
    layers = model.model.layers
    kept, losses = list(range(len(layers))), []
    _checked(len(layers), keep)
    try:
        while len(kept) > keep:
            influence = block_influence(model, examples)  # of the blocks that are left
            tried = sorted(range(len(kept)), key=influence.__getitem__)[:CANDIDATES]
            found = []
            for place in tried:
                rest = [*kept[:place], *kept[place + 1 :]]
                model.model.layers = torch.nn.ModuleList(layers[block] for block in rest)
                found.append((mean_loss(model, examples), rest))
            loss, kept = min(found)
            model.model.layers = torch.nn.ModuleList(layers[block] for block in kept)
            losses.append(loss)
    finally:
        model.model.layers = layers
    return tuple(kept), losses


def _checked(blocks: int, keep: int) -> None:
    if not 1 <= keep <= blocks:
        raise BadInput(f"a student keeps 1 to {blocks} blocks, not {keep}")


def by_influence(influence: Sequence[float], keep: int, *, same_kind: bool = True) -> tuple[int, ...]:
    """The `keep` blocks of most influence together, ascending; with `same_kind` global blocks stay global and local ones local.

    Where no choice keeps every kind, kinds are ignored.

    Raises:
        BadInput: more than there are, or fewer than 1.
    """
    _checked(len(influence), keep)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # number kept so far -> their influence, which
    for block, value in enumerate(influence):
        for count, (total, chosen) in sorted(best.items(), reverse=True):
            fits = not same_kind or _is_global(block) == _is_global(count)  # the block's new number is `count`
            if count < keep and fits and total + value > best.get(count + 1, (-1.0, ()))[0]:
                best[count + 1] = (total + value, (*chosen, block))
    return best[keep][1] if keep in best else by_influence(influence, keep, same_kind=False)


def _is_global(block: int) -> bool:
    return (block + 1) % GLOBAL_EVERY == 0


def evenly(blocks: int, keep: int) -> tuple[int, ...]:
    """`keep` of `blocks`: the first and last stay, early ones denser. 18 and 8 -> 0 1 2 5 8 11 14 17.

    Raises:
        BadInput: more than there are, or fewer than 1.
    """
    _checked(blocks, keep)
    step = -(-(blocks - 1) // max(1, keep - 1))
    tail = list(range(blocks - 1, -1, -step))[:keep]
    head = [number for number in range(blocks) if number not in tail]
    return tuple(sorted([*tail, *head[: keep - len(tail)]]))


@torch.no_grad()
def block_influence(model: Gemma3ForCausalLM, examples: Sequence[Example]) -> list[float]:
    """How much each block changes its input: 1 - mean cosine at predicting positions (Men et al. 2024, ShortGPT). Low means dispensable."""
    blocks = len(model.model.layers)
    total, count = [0.0] * blocks, 0
    for index in plan([len(one.prompt) + len(one.target) - 1 for one in examples], batch_tokens=BATCH_TOKENS, generator=None):
        batch = collate(examples, index)
        count += len(batch.targets)
        x = embed(model, batch.ids)
        for number in range(blocks):
            y = hidden_states(model, x, first=number, last=number + 1)
            pair = x[batch.rows, batch.columns].float(), y[batch.rows, batch.columns].float()
            total[number] += float(F.cosine_similarity(*pair, dim=-1).sum())
            x = y
    return [1.0 - value / count for value in total]
