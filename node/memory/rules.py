"""Which remembered answer fits a record, and when a near one may be trusted. No I/O.

exact     the same task, language and source, white space and Unicode form aside; letter case and digits count
pattern   the operator's own "when you see this": its words stand in the source, as whole words in that order; the longest one wins
near      the NEIGHBOURS most similar records all mean the same and even the farthest of them is at least `least` similar, where `least` was
          learned from this site's own confirmed answers: each is held against the others, and a similarity is trusted from where on they
          would have been right often enough, and more often than the model was (`learned_least`). Too few of them: no near answers
examples  the NEIGHBOURS nearest are shown to the model before the record, the nearest last

Similarity is the cosine of the model's own vectors. It means nothing across models, and little in absolute terms: the vectors of a small
causal model point much the same way, so 0.95 may be far. That is why the limit is learned and never set.
"""

import math
import unicodedata
from collections.abc import Sequence
from typing import Literal

import msgspec

from protocol.digests import digest_bytes
from protocol.reasons import Why
from protocol.tasks import Record, Task

Use = Literal["off", "exact", "near", "examples"]
Match = Literal["exact", "pattern", "near"]
USES: tuple[Use, ...] = ("off", "exact", "near", "examples")

NEIGHBOURS = 3  # that must agree: two agree by chance too often with 16 verdicts of which one is common
LEAST_PAIRS = 30  # leave-one-out answers behind a learned limit; with fewer the bound below stays under 0.9 anyway
SIDED_Z = 1.645  # of the lower bound: 95%, one side
SHOWN_CHARACTERS = 1_500  # of all examples in a prompt; about 500 tokens of the 1,024 a node reads
PATTERN_LEAST = 4  # letters and digits a pattern has at least
USE_S = 7 * 86_400.0  # seconds that one use keeps an entry longer
USES_LIMIT = 50  # more uses keep it no longer: about a year
OPERATORS_USES = 10  # what the operator confirmed is kept as if it had been used so often
OPERATOR, PEER = "operator", "peer:"


class Recalled(msgspec.Struct, frozen=True):
    """An answer that came from memory, and why."""

    match: Match
    key: str  # of the memory entry
    text: str
    confidence: float  # in [0, 1]: the weight of who confirmed it, or what near answers like it are worth here
    why: Why  # with the source answer and the similarity
    source: str  # id of the answer it was confirmed on; "" for a pattern
    similarity: float = 1.0


class Neighbour(msgspec.Struct, frozen=True):
    """A remembered answer beside a record."""

    key: str
    similarity: float  # cosine
    meaning: str  # what must be equal for two answers to agree: see `meaning`


class Remembered(msgspec.Struct, frozen=True):
    """What an entry means, and what the model had said."""

    meaning: str
    model: str | None = None  # None: nobody knows any more


class Pair(msgspec.Struct, frozen=True):
    """What the neighbours of a remembered record would have said about it."""

    similarity: float  # of the farthest of them
    right: bool
    model_right: bool | None = None  # whether the model's own answer was; None: nobody knows any more


class Least(msgspec.Struct, frozen=True):
    """From which similarity on near answers are trusted."""

    similarity: float
    precision: float  # lower bound of how often they are right, in [0, 1]
    model: float | None  # how often the model was right on the same records; None: unknown for most
    pairs: int  # leave-one-out answers at or above it
    of: int  # all that were tried


def normalised(source: str) -> str:
    """The source as it is compared: NFC, runs of white space as one space. Case and digits mean something and stay."""
    return " ".join(unicodedata.normalize("NFC", source).split())


def memory_key(task: str, lang: str, source: str) -> str:
    """Name of the entry for a record: SHA-256 of task, language and normalised source."""
    return digest_bytes("\0".join((task, lang, normalised(source))).encode())


def pattern_key(task: str, lang: str, when: str) -> str:
    """Name of a pattern's entry; never that of a record."""
    return digest_bytes("\0".join(("pattern", task, lang, spread(when))).encode())


def spread(source: str) -> str:
    """The words of a text between single spaces, lower case, a space at both ends: `spread(a) in spread(b)` is "a's words stand in b"."""
    kept = (sign if sign.isalnum() else " " for sign in unicodedata.normalize("NFC", source).casefold())
    return f" {' '.join(''.join(kept).split())} "


def scope(task: str, lang: str) -> str:
    """What is compared with each other: one task, one language."""
    return f"{task}/{lang}"


def meaning(verdict: str, text: str) -> str:
    """What two answers share that agree: the verdict, or for free text the text itself, case and end mark aside."""
    return verdict or spread(text).strip()


def agreed(neighbours: Sequence[Neighbour], least: float) -> Neighbour | None:
    """The nearest, if all NEIGHBOURS of them are there, mean the same and are similar enough."""
    near = sorted(neighbours, key=lambda one: -one.similarity)[:NEIGHBOURS]
    if len(near) < NEIGHBOURS or near[-1].similarity < least or len({one.meaning for one in near}) > 1:
        return None
    return near[0]


def leave_one_out(own: Remembered, neighbours: Sequence[Neighbour]) -> Pair | None:
    """What agreeing neighbours would have said about an entry of which the truth is known; None: they do not agree, so nothing."""
    found = agreed(neighbours, least=-1.0)
    if found is None:
        return None
    farthest = sorted((one.similarity for one in neighbours), reverse=True)[NEIGHBOURS - 1]
    return Pair(farthest, found.meaning == own.meaning, None if own.model is None else own.model == own.meaning)


def learned_least(pairs: Sequence[Pair], *, of: int, floor: float) -> Least | None:
    """The lowest similarity at and above which agreeing neighbours are surely right often enough; or None.

    Surely: the Wilson bound. Enough: `floor`, and as often as the model was on the same records, where that is known of LEAST_PAIRS.
    Confirmed records are often those the model was unsure of, so its share may be low for the site; hence the floor.

    Args:
        of: how many entries were tried; those whose neighbours did not agree made no pair.
    """
    ordered = sorted(pairs, key=lambda pair: -pair.similarity)
    best, right, model_right, known = None, 0, 0, 0
    for count, pair in enumerate(ordered, start=1):
        right, known, model_right = right + pair.right, known + (pair.model_right is not None), model_right + bool(pair.model_right)
        tied = count < len(ordered) and ordered[count].similarity == pair.similarity
        bound = wilson_low(right, count)
        model = model_right / known if known >= LEAST_PAIRS else None
        if count >= LEAST_PAIRS and not tied and bound >= max(floor, model or 0.0):
            best = Least(pair.similarity, bound, model, count, of)
    return best


def wilson_low(right: int, count: int) -> float:
    """Lower bound of a share, one side, 95% (Wilson 1927)."""
    share, z = right / count, SIDED_Z
    middle = share + z * z / (2 * count)
    spread_ = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - spread_) / (1 + z * z / count)


def with_examples(task: Task, record: Record, shown: Sequence[Record]) -> str:
    """The prompt with solved records before it, as the coordinator asks a teacher (`few_shot`); the first ones go if all are too long."""
    parts: list[str] = []
    room = SHOWN_CHARACTERS
    for example in reversed(shown):
        part = f"{task.prompt(example)}{task.target(example)}\n\n"
        if len(part) > room:
            break
        room -= len(part)
        parts.insert(0, part)
    return "".join(parts) + task.prompt(record)


def trusted(origin: str) -> Why | str:
    """Who confirmed an entry, for a reason's figures: a peer by its name."""
    return Why("operator") if origin == OPERATOR else origin.removeprefix(PEER) or Why("somebody")
