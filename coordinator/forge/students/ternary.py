"""b1.58 training: every matrix of the blocks has three values, -s, 0 and s, with one s for 256 weights, from the first step on.

Rules, each one the other end of what llama.cpp stores and computes, so that the exported file is the model that was trained:
 * s is the mean of |w| over a block of 256 in a row (Ma et al. 2024, arXiv 2402.17764, there one for a whole matrix), rounded to a float16;
   TQ2_0 and TQ1_0 keep one float16 a block, so finer scales cost nothing. (Rounded once more for bfloat16 work: that is a float16 too.)
 * What a matrix reads is rounded to 8 bits by the largest of 256 numbers, as llama.cpp's Q8_K does before it multiplies.
 * Rounding has no gradient: it is passed through as it comes (straight-through, Bengio et al. 2013). What is trained are the full weights.
Embedding and norms stay as they are. Rows must be multiples of 256: 512-wide students fit, Gemma's 640 do not.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma3ForCausalLM

from protocol.errors import BadInput

BLOCK = 256  # weights that share a scale: QK_K of ggml
LEVELS = 127.0  # of an 8-bit activation, each side of 0
SMALLEST = 2.0**-24  # above 0 that a float16 can be


def ternarised(weight: torch.Tensor) -> torch.Tensor:
    """clamp(round(w / s), -1, 1) * s by blocks of a row: (outputs, inputs) -> the same, every number exact in float16."""
    blocks = weight.view(-1, BLOCK)
    mean = torch.linalg.vector_norm(blocks, ord=1, dim=-1, keepdim=True, dtype=torch.float32) / BLOCK  # (blocks, 1)
    scale = mean.half().to(weight.dtype)
    return (blocks / scale.clamp(min=SMALLEST)).round_().clamp_(-1, 1).mul_(scale).view_as(weight)


def eight_bits(x: torch.Tensor) -> torch.Tensor:
    """round(127 x / max|x|) * max|x| / 127 by blocks of the last axis: (..., inputs) -> the same."""
    blocks = x.reshape(-1, BLOCK)
    step = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=-1, keepdim=True) / LEVELS  # (blocks, 1)
    return (blocks / step.clamp(min=torch.finfo(x.dtype).tiny)).round_().mul_(step).view_as(x)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class TernaryLinear(nn.Linear):
    """A linear layer that trains full weights and computes with three-valued ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X (..., inputs) -> (..., outputs)."""
        return F.linear(_StraightThrough.apply(x, eight_bits), _StraightThrough.apply(self.weight, ternarised))


def make_ternary(model: Gemma3ForCausalLM) -> None:
    """Let the blocks' matrices compute in three values, in place; their parameters stay the same objects under the same names.

    Raises:
        BadInput: rows that 256 does not divide.
    """
    for name, linear in model.model.layers.named_modules():
        if isinstance(linear, nn.Linear):
            if linear.in_features % BLOCK:
                raise BadInput(
                    f"ternary weights come in blocks of {BLOCK} and rows of block {name} have {linear.in_features}; "
                    f"cut the student to a width that {BLOCK} divides (512) first"
                )
            linear.__class__ = TernaryLinear  # what it does, not what it has: optimisers and names still point at it


@torch.no_grad()
def settle(model: Gemma3ForCausalLM) -> None:
    """The end of ternary training: the weights become the three values they computed with, the layers plain ones."""
    for linear in model.model.layers.modules():
        if isinstance(linear, TernaryLinear):
            linear.weight.copy_(ternarised(linear.weight))
            linear.__class__ = nn.Linear
