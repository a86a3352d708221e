"""Several peers answered one question: which answer stands, and how sure are they together. No I/O.

 * verdict tasks   the verdict with the most weight wins, each reply weighing its own confidence; among its sentences the rule for text.
 * text            minimum Bayes risk: the text that is on average most like the others, in chrF (Eikema & Aziz 2020; Freitag et al. 2022).
One reply is its own consensus, with its own confidence. Do not evaluate the outcome with chrF alone: it was chosen by chrF.
"""

import math
from collections import Counter
from collections.abc import Sequence

import msgspec

from protocol.messages import Reply
from protocol.tasks import Task

ORDER = 6  # longest character n-gram (Popovic 2015)
BETA = 2.0  # recall counts four times as much as precision
WEIGHT_FLOOR = 0.05  # a peer that is unsure, or cannot tell, still has a voice


class Consensus(msgspec.Struct, frozen=True):
    """What the peers say together."""

    reply: Reply  # the one that stands, its confidence replaced by the common one
    agreement: float  # share of the weight behind it (verdicts), or its mean likeness to all (text), in [0, 1]


def agree(replies: Sequence[Reply], task: Task) -> Consensus:
    """Choose among `replies`; the earlier wins a tie.

    confidence = that of the chosen reply * agreement: a lone voice among equals gets less, unanimity adds nothing, since
    peers with one teacher err alike.

    Raises:
        ValueError: no reply at all, or only refusals.
    """
    said = [reply for reply in replies if not reply.refused and reply.text]
    if not said:
        raise ValueError("nobody answered: there is nothing to agree on")
    verdicts = [task.parse(reply.text).verdict for reply in said]
    if any(verdicts):
        said, agreement = _most_weight(said, verdicts)
        chosen, _ = _most_central(said)
    else:
        chosen, agreement = _most_central(said)
    return Consensus(msgspec.structs.replace(chosen, confidence=_unit(chosen.confidence) * agreement), agreement)


def chrf(text: str, reference: str) -> float:
    """Character n-gram F-score in [0, 1], white space removed; a hundredth of sacreBLEU's sentence chrF2 without word n-grams."""
    precisions, recalls = [], []
    for n in range(1, ORDER + 1):
        ours, theirs = _ngrams(text, n), _ngrams(reference, n)
        if not ours or not theirs:
            break
        shared = (ours & theirs).total()
        precisions.append(shared / ours.total())
        recalls.append(shared / theirs.total())
    precision, recall = sum(precisions), sum(recalls)  # both over the same orders, so the mean's divisor cancels in the quotient
    if not precision + recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall) / len(precisions)


def _most_weight(replies: Sequence[Reply], verdicts: Sequence[str]) -> tuple[list[Reply], float]:
    weights: dict[str, float] = {}
    for reply, verdict in zip(replies, verdicts, strict=True):
        weights[verdict] = weights.get(verdict, 0.0) + (_weight(reply) if verdict else 0.0)  # text without a verdict has no vote
    winner = max(weights, key=lambda verdict: weights[verdict])
    total = math.fsum(_weight(reply) for reply in replies)
    return [reply for reply, verdict in zip(replies, verdicts, strict=True) if verdict == winner], min(1.0, weights[winner] / total)


def _most_central(replies: Sequence[Reply]) -> tuple[Reply, float]:
    weights = [_weight(reply) for reply in replies]
    total = math.fsum(weights)
    scores = [
        math.fsum(weight * chrf(reply.text, other.text) for other, weight in zip(replies, weights, strict=True)) / total
        for reply in replies
    ]
    best = max(range(len(replies)), key=lambda index: (scores[index], replies[index].confidence))
    return replies[best], 1.0 if len(replies) == 1 else min(1.0, scores[best])


def _weight(reply: Reply) -> float:
    return max(WEIGHT_FLOOR, _unit(reply.confidence))


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))


def _ngrams(text: str, n: int) -> Counter[str]:
    packed = "".join(text.split())
    return Counter(packed[index : index + n] for index in range(len(packed) - n + 1))
