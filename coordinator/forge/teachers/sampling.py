"""What open teachers share: from drawn tokens to an answer, and from logits to what a target cache keeps."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from coordinator.forge.targets.cache import Targets
from coordinator.forge.teachers import Said
from coordinator.forge.training.losses import top_k
from protocol.errors import BadInput, TooLarge
from protocol.models.tokenizer import Example

Reduced = TypeVar("Reduced")
Reduce = Callable[[torch.Tensor, list[int]], Sequence[Reduced]]  # logits (m, V) and the m target tokens -> one value a position


def to_said(tokens: Sequence[int], log_prob: float, decode: Callable[[Sequence[int]], str], ends: Collection[int]) -> Said:
    """An answer from its tokens; the last one is an end (of `ends`) or the answer was cut off."""
    finished = bool(tokens) and tokens[-1] in ends
    text = decode(tokens).partition("\n")[0]  # an end token decodes to nothing, a token with a line break may begin with text
    return Said(text=text, tokens=tuple(tokens), log_prob=log_prob, finished=finished)


def chosen_log_probs(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """log p of the chosen tokens at temperature 1: logits (rows, V), chosen (rows,) -> (rows,)."""
    logits = logits.float()
    return logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(-1)


def reduce_to_top(k: int) -> Reduce[tuple[NDArray[np.int64], NDArray[np.float32], np.float32]]:
    """A reduction to the k likeliest tokens and the log of the mass outside."""

    def reduce(logits: torch.Tensor, _: list[int]) -> list[tuple[NDArray[np.int64], NDArray[np.float32], np.float32]]:
        ids, log_probs, tail = (part.numpy() for part in top_k(logits, k))
        return list(zip(ids, log_probs, tail, strict=True))

    return reduce


def reduce_to_target(logits: torch.Tensor, targets: list[int]) -> list[float]:
    """A reduction to the target token's own log-probability."""
    found: list[float] = F.log_softmax(logits.float(), dim=-1).gather(1, torch.tensor(targets)[:, None]).squeeze(1).tolist()
    return found


def to_targets(rows: Sequence[tuple[NDArray[np.int64], NDArray[np.float32], np.float32]]) -> Targets:
    """One example's positions, put together."""
    ids, log_probs, tail = zip(*rows, strict=True)
    return Targets(np.stack(ids), np.stack(log_probs), np.array(tail, dtype=np.float32))


def check_examples(examples: Sequence[Example], *, vocabulary: int, room: int) -> None:
    """Check that a model can read the examples.

    Raises:
        BadInput: an empty prompt or target, or ids of another vocabulary.
        TooLarge: longer than `room` tokens.
    """
    for at, one in enumerate(examples):
        if not one.prompt or not one.target:
            raise BadInput(f"example {at} has an empty prompt or target: there is nothing to score")
        if not 0 <= min(*one.prompt, *one.target, 0) <= max(*one.prompt, *one.target) < vocabulary:
            raise BadInput(f"example {at} has ids outside this teacher's {vocabulary} tokens; it was tokenised with another vocabulary")
        if len(one.prompt) + len(one.target) - 1 > room:
            raise TooLarge(f"example {at} has {len(one.prompt) + len(one.target)} tokens, the teacher reads {room}; shorten the record")
