"""From the logits of one position to a token and how sure the model was of it. Numbers in, numbers out.

All figures are the free model's: a form that forbids tokens changes which one is taken, never what the model thought of it. Where the
form overruled the model the log-probability is low and the margin negative, and confidence sees it.
"""

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol.errors import DoesNotFit

FLOOR = np.float32(-100.0)  # log-probabilities below the top by more than this are exp() == 0 in float32

Logits = NDArray[np.float32]
Tokens = NDArray[np.int32]


class Figures(msgspec.Struct, frozen=True):
    """How sure the model was of one token."""

    logprob: float  # natural log of its probability
    margin: float  # over the best other token, in log-probability; below 0 when it was not the best
    entropy: float  # of the whole distribution, nats


def greedy(logits: Logits, allowed: Tokens | None) -> int:
    """The likeliest token, or the likeliest of the `allowed` ones."""
    if allowed is None:
        return int(logits.argmax())
    return int(allowed[logits[allowed].argmax()])


def drawn(logits: Logits, allowed: Tokens | None, *, temperature: float, uniform: float) -> int:
    """A token drawn from softmax(logits / temperature), of the `allowed` ones if given, by one `uniform` number in [0, 1)."""
    among = logits if allowed is None else logits[allowed]
    weights = np.exp((among - among.max()).astype(np.float64) / temperature)
    place = int(np.searchsorted(np.cumsum(weights), uniform * weights.sum(), side="right"))
    place = min(place, len(weights) - 1)  # rounding at the very end
    return place if allowed is None else int(allowed[place])


def figures(logits: Logits, token: int) -> Figures:
    """Log-softmax over (vocabulary,), read at `token`.

    Raises:
        DoesNotFit: the logits are not finite.
    """
    others = logits.copy()
    others[token] = -np.inf
    second = float(others.max())  # a copy and a maximum are ten times faster than np.partition
    top = max(float(logits[token]), second)
    with np.errstate(invalid="ignore"):  # inf - inf: told below
        below = np.maximum(logits - np.float32(top), FLOOR)  # (vocabulary,), all <= 0
    weights = np.exp(below)
    total = float(weights.sum(dtype=np.float64))
    if not np.isfinite(total):
        raise DoesNotFit("the model computes figures that are not finite; the model or its adapter is damaged")
    entropy = np.log(total) - float(np.dot(weights, below)) / total
    return Figures(float(logits[token]) - top - float(np.log(total)), float(logits[token]) - second, float(entropy))


def likeliest(logits: Logits, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens with their log-probabilities, best first."""
    top = float(logits.max())
    total = float(np.log(np.exp(np.maximum(logits - np.float32(top), FLOOR)).sum(dtype=np.float64)))
    best = np.argpartition(logits, -count)[-count:] if count < len(logits) else np.arange(len(logits))
    return [(int(token), float(logits[token]) - top - total) for token in sorted(best, key=lambda token: (-logits[token], token))]
