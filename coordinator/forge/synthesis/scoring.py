"""How consistent a text is with its source, its teacher and the other samples. A number to rank by; no measure of quality.

    score = sum of weight * (signal - usual), each signal clipped at its floor; one that is not known adds nothing

 * log_prob     the teacher's mean log-probability a token, the end apart, nats. Fomicheva et al. 2020: rivals trained estimators.
 * end          its log-probability that the text is over there: what tells a truncated text (AUC 1.00, by the mean of all tokens 0.92).
 * length       |log of the characters' ratio|, negative. Translation only.
 * round_trip   chrF of the source against the text translated back, 0 to 100.
 * agreement    mean chrF with the other samples (minimum Bayes risk with chrF; Eikema and Aziz 2022), 0 to 100.
`usual` is a human translation's, so 0 is as consistent as one of those; the weights are of a logistic regression that tells 500 human
translations from truncated, shuffled and foreign ones, that of agreement from how well it ranks a teacher's samples (docs/adr/0012).
Scores of the same signals compare; a text known by fewer signals is nearer to 0. Copies score high: gates come first, always.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.forge.judging.metrics import sentence_chrf
from protocol.models.tokenizer import Example, Tokenizer
from protocol.tasks import Record, Task


class Weight(msgspec.Struct, frozen=True):
    """What a signal counts for."""

    weight: float  # of a unit
    usual: float  # the mean of 500 human translations; of agreement, of a teacher's samples
    floor: float  # lower is no worse


WEIGHTS: Mapping[str, Weight] = {
    "log_prob": Weight(1.8, -1.9, -8.0),
    "end": Weight(1.7, -0.03, -6.0),
    "length": Weight(3.0, -0.15, -1.5),
    "round_trip": Weight(0.09, 52.0, 0.0),
    "agreement": Weight(0.1, 48.0, 0.0),
}

LogProbs = Callable[[Sequence[Example]], Sequence[NDArray[np.float32]]]  # log p of every target token, `Teacher.log_probs`
Back = Callable[[Sequence[str]], Sequence[str]]  # texts back into the source's language


class Signals(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known about one text; None where it could not be known."""

    log_prob: float | None = None
    end: float | None = None
    length: float | None = None
    round_trip: float | None = None
    agreement: float | None = None


class Candidate(msgspec.Struct, frozen=True):
    """A text to judge, and how often it was said."""

    text: str  # the answer, parsed: one line
    tokens: tuple[int, ...] | None = None  # of the whole answer as the teacher said it, what ended it included
    log_prob: float | None = None  # of these tokens together, nats
    times: int = 1


def consistency(signals: Signals) -> float:
    """The score: 0 is usual for a human translation, lower is less consistent."""
    known = ((weight, getattr(signals, name)) for name, weight in WEIGHTS.items())
    return math.fsum(weight.weight * (max(value, weight.floor) - weight.usual) for weight, value in known if value is not None)


class Judge:
    """Where signals come from: a teacher that tells log-probabilities, a way back, or neither.

    Args:
        log_probs: an open teacher's.
        text: its tokeniser; without it only what the teacher told with its samples is known.
        back: a translator the other way round.
    """

    def __init__(self, *, log_probs: LogProbs | None = None, text: Tokenizer | None = None, back: Back | None = None) -> None:
        self._log_probs, self._text, self._back = log_probs, text, back

    def signals(self, task: Task, records: Sequence[Record], said: Sequence[Sequence[Candidate]]) -> list[list[Signals]]:
        """What is known about every candidate of every record; all of them go to the teacher and back together."""
        places = [(row, candidate) for row, candidates in enumerate(said) for candidate in candidates]
        chances = self._chances(task, [(records[row], candidate) for row, candidate in places])
        trips = self._trips([(records[row], candidate.text) for row, candidate in places]) if task.kind == "text" else [None] * len(places)
        found: list[list[Signals]] = [[] for _ in records]
        for at, (row, candidate) in enumerate(places):
            log_prob, end = chances[at]
            found[row].append(
                Signals(
                    log_prob=log_prob,
                    end=end,
                    length=length_signal(records[row].source, candidate.text) if task.kind == "text" else None,
                    round_trip=trips[at],
                    agreement=agreement(said[row], len(found[row])),
                )
            )
        return found

    def _chances(self, task: Task, asked: Sequence[tuple[Record, Candidate]]) -> list[tuple[float | None, float | None]]:
        """Mean log-probability of the tokens before the end, and of the end."""
        if self._log_probs is None or self._text is None or any(candidate.tokens is None for _, candidate in asked):
            return [(_mean(candidate), None) for _, candidate in asked]
        text = self._text
        examples = [Example(text.encode(task.prompt(record), bos=True), list(candidate.tokens or ())) for record, candidate in asked]
        rows = self._log_probs(examples) if examples else []
        return [(float(row[:-1].mean()) if len(row) > 1 else float(row[-1]), float(row[-1])) for row in rows]

    def _trips(self, asked: Sequence[tuple[Record, str]]) -> Sequence[float | None]:
        if self._back is None or not asked:
            return [None] * len(asked)
        return sentence_chrf(self._back([text for _, text in asked]), [record.source for record, _ in asked])


def agreement(candidates: Sequence[Candidate], place: int) -> float | None:
    """Mean chrF of one candidate against the other samples, each as often as it was said; None where there is no other."""
    mine = candidates[place]
    others = [candidate for at, candidate in enumerate(candidates) if at != place]
    count = mine.times - 1 + sum(other.times for other in others)
    if not count:
        return None
    scores = sentence_chrf([mine.text] * len(others), [other.text for other in others]) if others else ()
    return (100.0 * (mine.times - 1) + math.fsum(score * other.times for score, other in zip(scores, others, strict=True))) / count


def length_signal(source: str, text: str) -> float:
    """-|log(characters of the text / characters of the source)|."""
    return -abs(math.log(max(1, len(text)) / max(1, len(source))))


def _mean(candidate: Candidate) -> float | None:
    return candidate.log_prob / len(candidate.tokens) if candidate.log_prob is not None and candidate.tokens else None
