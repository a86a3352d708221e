"""What open teachers share: from drawn tokens to an answer, and what they can read."""

from collections.abc import Callable, Collection, Sequence

import torch

from coordinator.forge.teachers import Said
from protocol.errors import BadInput, TooLarge
from protocol.models.tokenizer import Example


def to_said(tokens: Sequence[int], log_prob: float, decode: Callable[[Sequence[int]], str], ends: Collection[int]) -> Said:
    """An answer from its tokens; the last one is an end (of `ends`) or the answer was cut off."""
    finished = bool(tokens) and tokens[-1] in ends
    text = decode(tokens).partition("\n")[0]  # an end token decodes to nothing, a token with a line break may begin with text
    return Said(text=text, tokens=tuple(tokens), log_prob=log_prob, finished=finished)


def chosen_log_probs(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """log p of the chosen tokens at temperature 1: logits (rows, V), chosen (rows,) -> (rows,)."""
    logits = logits.float()
    return logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(-1)


def check_examples(examples: Sequence[Example], *, vocabulary: int, room: int) -> None:
    """Check that a model can read the examples.

    Raises:
        BadInput: an empty prompt or target, or ids of another vocabulary.
        TooLarge: longer than `room` tokens.
    """
    for at, one in enumerate(examples):
        if not one.prompt or not one.target:
            raise BadInput(f"example {at} has an empty prompt or target: there is nothing to score")
        if not 0 <= min(*one.prompt, *one.target) <= max(*one.prompt, *one.target) < vocabulary:
            raise BadInput(f"example {at} has ids outside this teacher's {vocabulary} tokens; it was tokenised with another vocabulary")
        if len(one.prompt) + len(one.target) - 1 > room:
            raise TooLarge(f"example {at} has {len(one.prompt) + len(one.target)} tokens, the teacher reads {room}; shorten the record")
