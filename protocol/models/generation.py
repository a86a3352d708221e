"""What a model said, and how sure it was of each token. Values only: importing this loads no model library."""

from typing import Literal

import msgspec

Ending = Literal["end", "line", "length"]  # an end token, a line break, or the room for an answer was full


class Alternative(msgspec.Struct, frozen=True):
    """A token that could have come, and how likely it was."""

    token: int
    text: str
    logprob: float


class Piece(msgspec.Struct, frozen=True):
    """One token as it is said."""

    text: str  # "" for the end token, and for the first parts of a split character
    token: int
    logprob: float
    alternatives: tuple[Alternative, ...] = ()


class Generation(msgspec.Struct, frozen=True):
    """What the model said and how sure it was of each token. The five tuples have one entry a token, the end token included."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural log of the chosen token's probability
    margins: tuple[float, ...]  # top-1 minus top-2, in log-probability
    entropies: tuple[float, ...]  # of the whole next-token distribution, nats
    pieces: tuple[str, ...]  # text of each token, "" for the end token; a character split over tokens belongs to its last one
    prompt_tokens: int
    seconds: float
    stopped: Ending
    alternatives: tuple[tuple[Alternative, ...], ...] = ()  # the likeliest tokens at each place, best first, where they were asked for
