"""What quality is, in numbers, and how sure the numbers are. No I/O; randomness comes in as a seed.

 * Text: BLEU and chrF2 by sacreBLEU, always with their signatures; intervals by bootstrap over records (1,000 resamples, the same
   draws as sacreBLEU's own, so that `sacrebleu --confidence` with the same seed agrees).
 * Verdicts: share right with Wilson's interval. Two models on the same records: paired bootstrap, which sees a difference that two
   overlapping intervals hide (distillation notes 5: decide on paired sentence chrF, not on BLEU).
 * Many comparisons at once: a paired randomisation test for a loss (exact at any number of records, where a bootstrap's p is too small for
   few; Noreen 1989, Riezler and Maxwell 2005), and Holm's correction (1979), which holds for tests that depend on each other.
 * Confidence: expected calibration error, the deferral curve and its area (0 = asking at random, 1 = asking just where it helps).
All intervals are 95%.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from protocol.errors import BadInput

RESAMPLES = 1_000
SEED = 12_345  # sacreBLEU's own default
Z = 1.959963984540054  # 97.5% quantile of the normal distribution
FLIPS = 10_000  # of a randomisation test: the smallest p is 1 / (FLIPS + 1), enough for some hundred tests under Holm
POWER = 0.8  # with which a loss of `detectable_loss` would have been found
BINS = 10  # of the reliability diagram, equally wide

Interval = tuple[float, float]
Floats = NDArray[np.float64]


class TextScores(msgspec.Struct, frozen=True):
    """Corpus scores of one system, 0 to 100."""

    bleu: float
    chrf: float
    bleu_ci: Interval
    chrf_ci: Interval
    bleu_signature: str
    chrf_signature: str


class Bin(msgspec.Struct, frozen=True):
    """One bar of a reliability diagram."""

    confidence: float  # mean
    accuracy: float
    count: int


def text_scores(hypotheses: Sequence[str], references: Sequence[str], *, seed: int = SEED, resamples: int = RESAMPLES) -> TextScores:
    """BLEU and chrF2 of `hypotheses` against one reference each.

    Raises:
        BadInput: no texts, or not as many references.
    """
    _same_length(hypotheses, references)
    bleu, bleu_ci, bleu_signature = _corpus(BLEU(), hypotheses, references, seed, resamples)
    chrf, chrf_ci, chrf_signature = _corpus(CHRF(), hypotheses, references, seed, resamples)
    return TextScores(bleu, chrf, bleu_ci, chrf_ci, bleu_signature, chrf_signature)


def _corpus(metric: Any, hypotheses: Sequence[str], references: Sequence[str], seed: int, resamples: int) -> tuple[float, Interval, str]:
    score = float(metric.corpus_score(list(hypotheses), [list(references)]).score)
    stats = np.asarray(metric._extract_corpus_statistics(list(hypotheses), [list(references)]), dtype=np.float64)  # (records, counts)
    draws = np.random.default_rng(seed).choice(len(stats), size=(resamples, len(stats)), replace=True)
    times = np.stack([np.bincount(draw, minlength=len(stats)) for draw in draws]).astype(np.float64)  # how often each record is drawn
    again = [float(metric._compute_score_from_stats(sums).score) for sums in (times @ stats).tolist()]
    metric.n_bootstrap, metric.seed = resamples, str(seed)  # what we did, so that the signature says it
    low, high = np.quantile(again, (0.025, 0.975))
    return score, (float(low), float(high)), str(metric.get_signature())


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, ...]:
    """chrF2 of each text against its reference, 0 to 100."""
    _same_length(hypotheses, references)
    metric = CHRF()
    return tuple(float(metric.sentence_score(text, [reference]).score) for text, reference in zip(hypotheses, references, strict=True))


def wilson(right: int, count: int) -> Interval:
    """Wilson's 95% interval of a share (Wilson 1927): honest near 0 and 1 and for few records.

    Raises:
        ValueError: no records, or more right ones than records.
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"{right} right of {count} is not a share")
    share = right / count
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    low = 0.0 if right == 0 else max(0.0, centre - half)  # exactly, not 1e-17
    high = 1.0 if right == count else min(1.0, centre + half)
    return low, high


def paired_difference(before: Sequence[float], after: Sequence[float], *, seed: int, resamples: int = 10 * RESAMPLES) -> dict[str, float]:
    """Mean of after - before over the same records in the same order, by paired bootstrap (Koehn 2004).

    Returns:
        diff, low, high (95%), p (two-sided: twice the smaller tail, with one added so that it is never 0), n.
    """
    _same_length(before, after)
    gain = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    means = _resampled_means(gain, seed, resamples)
    low, high = np.quantile(means, (0.025, 0.975))
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (resamples + 1))
    return {"diff": float(gain.mean()), "low": float(low), "high": float(high), "p": p, "n": float(len(gain))}


def paired_ratio(base: Sequence[float], other: Sequence[float], *, seed: int, resamples: int = 10 * RESAMPLES) -> dict[str, float] | None:
    """mean(other) / mean(base) over the same records, by paired bootstrap: what share of the teacher's quality a student keeps.

    Returns:
        ratio, low, high (95%), n; None where the base is so near 0 that a ratio says nothing.
    """
    _same_length(base, other)
    pair = np.stack([np.asarray(base, dtype=np.float64), np.asarray(other, dtype=np.float64)], axis=1)  # (records, 2)
    means = _resampled_means(pair, seed, resamples)  # (resamples, 2)
    if means[:, 0].min() <= 0:
        return None
    low, high = np.quantile(means[:, 1] / means[:, 0], (0.025, 0.975))
    centre = pair.mean(axis=0)
    return {"ratio": float(centre[1] / centre[0]), "low": float(low), "high": float(high), "n": float(len(pair))}


def mean_interval(values: Sequence[float], *, seed: int, resamples: int = RESAMPLES) -> Interval:
    """95% interval of a mean by bootstrap over records."""
    low, high = np.quantile(_resampled_means(np.asarray(values, dtype=np.float64), seed, resamples), (0.025, 0.975))
    return float(low), float(high)


def loss_p(before: Sequence[float], after: Sequence[float], *, seed: int, flips: int = FLIPS) -> float:
    """One-sided p that `after` is worse than `before` on the same records by chance alone.

    Without a difference between the systems each record's gain is as likely to have the other sign. Where all gains have one size
    (verdicts) that is the sign test, exact (McNemar 1947); else `flips` random signs (Noreen 1989), with one added so that p is never 0.
    """
    _same_length(before, after)
    gain = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    moved = gain[gain != 0]
    if not len(moved):
        return 1.0
    if np.all(np.abs(moved) == abs(moved[0])):
        return _binomial_tail(int((moved < 0).sum()), len(moved))
    random = np.random.default_rng(seed)
    worse = 0
    for start in range(0, flips, 500):
        sign = random.integers(0, 2, size=(min(500, flips - start), len(moved)), dtype=np.int8)  # (flips, records): 0 turns a gain over
        worse += int((2.0 * (sign.astype(np.float32) @ moved) - moved.sum() <= moved.sum() + 1e-9 * np.abs(moved).sum()).sum())
    return (worse + 1) / (flips + 1)


def _binomial_tail(worse: int, count: int) -> float:
    """P(at least `worse` of `count` fair coins)."""
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2) for k in range(worse, count + 1)]
    return min(1.0, math.fsum(math.exp(log) for log in logs))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's adjusted p (1979): rejecting where it is below alpha errs in any of the tests with probability at most alpha, however they
    depend on each other."""
    count, found, highest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(count), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (count - rank) * p_values[place]))
        found[place] = highest
    return tuple(found)


def detectable_loss(before: Sequence[float], after: Sequence[float], *, alpha: float) -> float | None:
    """How large a true mean loss must be for a one-sided test at `alpha` to find it 8 times in 10, by the gains' spread here.

    None where no record changed: there is no spread to tell it from.
    """
    _same_length(before, after)
    gain = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if len(gain) < 2 or not gain.any():
        return None
    normal = NormalDist()
    return float((normal.inv_cdf(1 - alpha) + normal.inv_cdf(POWER)) * gain.std(ddof=1) / math.sqrt(len(gain)))


def _resampled_means(values: Floats, seed: int, resamples: int) -> Floats:
    """Means of `resamples` draws with replacement, (resamples, ...); in slices, so that memory stays small."""
    random = np.random.default_rng(seed)
    slices = []
    for start in range(0, resamples, 500):
        draws = random.integers(len(values), size=(min(500, resamples - start), len(values)))
        slices.append(values[draws].mean(axis=1))
    return np.concatenate(slices)


def reliability(confidences: Sequence[float], right: Sequence[float], *, bins: int = BINS) -> tuple[Bin, ...]:
    """The reliability diagram: the non-empty of `bins` equally wide bins, by rising confidence."""
    _same_length(confidences, right)
    sure, good = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    place = np.minimum((sure * bins).astype(int), bins - 1)
    found = [(place == index) for index in range(bins)]
    return tuple(Bin(float(sure[mask].mean()), float(good[mask].mean()), int(mask.sum())) for mask in found if mask.any())


def calibration_error(confidences: Sequence[float], right: Sequence[float], *, bins: int = BINS) -> float:
    """Expected calibration error: the mean gap of confidence and accuracy over the bins, weighted by their size (Guo et al. 2017)."""
    return math.fsum(bar.count * abs(bar.confidence - bar.accuracy) for bar in reliability(confidences, right, bins=bins)) / len(right)


def deferral_curve(confidences: Sequence[float], student: Sequence[float], teacher: Sequence[float]) -> Floats:
    """Mean quality when the k least confident answers are the teacher's, for k = 0..n: (n + 1,). Equal confidences keep their order."""
    _same_length(confidences, student)
    _same_length(student, teacher)
    order = np.argsort(np.asarray(confidences, dtype=np.float64), kind="stable")
    gain = np.asarray(teacher, dtype=np.float64) - np.asarray(student, dtype=np.float64)
    total = float(np.sum(np.asarray(student, dtype=np.float64)))
    return (total + np.concatenate([[0.0], np.cumsum(gain[order])])) / len(student)


def deferral_area(confidences: Sequence[float], student: Sequence[float], teacher: Sequence[float]) -> float | None:
    """Area between the deferral curve (Gupta et al. 2024, arXiv 2404.10136) and the line of asking at random, as a share of the oracle's.

    0: no better than random; 1: asks first where the teacher helps most; below 0: worse than random. None where asking cannot matter
    (the teacher is better by the same amount everywhere).
    """
    gain = [t - s for s, t in zip(student, teacher, strict=True)]
    line = np.linspace(float(np.mean(np.asarray(student))), float(np.mean(np.asarray(teacher))), len(student) + 1)
    best = float((deferral_curve([-g for g in gain], student, teacher) - line).sum())
    if best <= 1e-12:
        return None
    return float((deferral_curve(confidences, student, teacher) - line).sum()) / best


def at_budget(confidences: Sequence[float], student: Sequence[float], teacher: Sequence[float], budget: float) -> float:
    """Mean quality when exactly the least confident `budget` (a share) of the answers are the teacher's: compares two models fairly."""
    curve = deferral_curve(confidences, student, teacher)
    return float(curve[round(budget * (len(curve) - 1))])


def _same_length(one: Sequence[Any], other: Sequence[Any]) -> None:
    if not len(one) or len(one) != len(other):
        raise BadInput(f"cannot compare {len(one)} values with {len(other)}: both must be of the same records, and at least one")
