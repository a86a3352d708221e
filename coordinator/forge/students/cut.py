"""Cutting a student out of its teacher: which blocks stay.

At equal CPU time a cut student is far ahead of one from scratch (docs/log.md). Default: first and last blocks dense, every third between.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import Gemma3ForCausalLM

from protocol.errors import BadInput
from protocol.models.feed import collate
from protocol.models.tokenizer import Example
from protocol.models.torch_model import embed, hidden_states


def evenly(blocks: int, keep: int) -> tuple[int, ...]:
    """`keep` of `blocks`: the first and last stay, early ones denser. 18 and 8 -> 0 1 2 5 8 11 14 17.

    Raises:
        BadInput: more than there are, or fewer than 1.
    """
    if not 1 <= keep <= blocks:
        raise BadInput(f"a student keeps 1 to {blocks} blocks, not {keep}")
    step = -(-(blocks - 1) // max(1, keep - 1))
    tail = list(range(blocks - 1, -1, -step))[:keep]
    head = [number for number in range(blocks) if number not in tail]
    return tuple(sorted([*tail, *head[: keep - len(tail)]]))


@torch.no_grad()
def block_influence(model: Gemma3ForCausalLM, examples: Sequence[Example]) -> list[float]:
    """How much each block changes its input: 1 - mean cosine at predicting positions (Men et al. 2024, ShortGPT). Low means dispensable."""
    batch = collate(examples, range(len(examples)))
    x = embed(model, batch.ids)
    found = []
    for number in range(len(model.model.layers)):
        y = hidden_states(model, x, first=number, last=number + 1)
        found.append(
            1.0 - float(F.cosine_similarity(x[batch.rows, batch.columns].float(), y[batch.rows, batch.columns].float(), dim=-1).mean())
        )
        x = y
    return found
