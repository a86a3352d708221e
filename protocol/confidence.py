"""How sure a model is of one answer, and whether the answer stands or is asked of a peer. No I/O: numbers in, a decision out.

Signals come free with the one forward pass that made the answer (Gupta et al. 2024: sums and means alone suffer from length bias,
quantiles help; Ramirez et al. 2024: the first token's margin is the best single one for short answers). For a verdict the tokens
before ":" decide, the sentence after it hardly matters. A `Calibration`, fitted by the coordinator on records with known answers,
turns the signals into a probability of being right and a budget (share of questions) into a threshold. It is bound to one model and
one adapter by digest: another quantisation or adapter shifts every signal, so it invalidates the calibration.

Without a calibration the plain probability of the verdict (or the mean token's, for free text) stands in, and the reason says so.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Protocol

import msgspec

FEATURES = (
    "in_form",  # 1.0 when the answer begins with "code:", else 0.0 (free text, or a broken answer)
    "verdict_sum",  # log-probability of the verdict; of the whole answer where it has none
    "verdict_min",  # the least likely token in it
    "first_margin",  # first token: top-1 minus top-2, in log-probability
    "verdict_entropy",  # mean over the verdict, nats
    "mean",  # log-probability per token, whole answer with its end
    "lowest",
    "tenth",  # 10% quantile of the token log-probabilities
    "length",  # tokens, with the end token
)
LOGPROB_FLOOR = -30.0  # nats; what is less likely than 1e-13, or not a number, counts as this
MARGIN_LIMIT = 30.0  # nats
TIE_BREAK = 0.01  # isotonic steps give many answers one value; this share of the logistic score keeps their order
ABOVE_ALL = 1.01  # a threshold no confidence reaches: escalate everything
DEFAULT_BUDGET = 0.25  # share of questions; where the literature's cascades match the large model (fleet notes 3.1)
UNCALIBRATED_THRESHOLD = 0.5
VERDICT_RIGHT = "verdict is right"
CALIBRATION_LIMIT = 64 * 1024  # bytes of the JSON file; a real one is about 3 kB

_VERDICT = re.compile(r"\s*[a-z][a-z-]*\s*")


class Generated(Protocol):
    """What `features` reads of `protocol.models.engine.Generation`: one entry a token, the end token included."""

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Natural log of each chosen token's probability."""

    @property
    def margins(self) -> tuple[float, ...]:
        """Top-1 minus top-2 in log-probability, one a token."""

    @property
    def entropies(self) -> tuple[float, ...]:
        """Nats, one a token."""

    @property
    def pieces(self) -> tuple[str, ...]:
        """Text of each token, "" for the end token."""


def features(generation: Generated) -> tuple[float, ...]:
    """The signals of one generation, in the order of FEATURES; always finite.

    Raises:
        ValueError: no token at all: no answer is not a confident answer.
    """
    logprobs = [_within(value, LOGPROB_FLOOR, 0.0) for value in generation.logprobs]
    if not logprobs:
        raise ValueError("a generation without tokens has no confidence")
    count = verdict_tokens(generation.pieces)
    verdict = logprobs[: count or len(logprobs)]
    entropies = [_within(value, 0.0, MARGIN_LIMIT, broken=MARGIN_LIMIT) for value in generation.entropies[: len(verdict)]]
    return (
        1.0 if count else 0.0,
        math.fsum(verdict),
        min(verdict),
        _within(generation.margins[0], 0.0, MARGIN_LIMIT) if generation.margins else 0.0,
        math.fsum(entropies) / max(1, len(entropies)),
        math.fsum(logprobs) / len(logprobs),
        min(logprobs),
        quantile(logprobs, 0.10),
        float(len(logprobs)),
    )


def verdict_tokens(pieces: Sequence[str]) -> int:
    """How many leading pieces spell the verdict before ":"; 0 when the text does not begin with "code:"."""
    text = ""
    for index, piece in enumerate(pieces):
        before, colon, _ = piece.partition(":")
        text += before
        if colon:
            if not _VERDICT.fullmatch(text):
                return 0
            return index + 1 if before.strip() else index
    return 0


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Turns features into a probability of being right, for one model and adapter.

    score = bias + sum(weights * (features - means) / scales); the isotonic curve through `points` maps the score to a probability.
    `quantiles` are evenly spaced quantiles of that probability over the calibration records, from share 0 to share 1.
    """

    task: str
    model_digest: str
    adapter_digest: str
    means: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    points: tuple[tuple[float, float], ...]  # (score, probability), both rising
    quantiles: tuple[float, ...]
    count: int  # calibration records
    right: int  # of them answered rightly
    method: str  # "logistic", "single" (too few records for more than one signal) or "constant" (all right or all wrong)
    target: str = VERDICT_RIGHT  # what the probability is of
    names: tuple[str, ...] = FEATURES

    def __post_init__(self) -> None:
        """Refuse what cannot be used; msgspec reports it as a validation error when decoding."""
        if self.names != FEATURES:
            raise ValueError(f"calibration is for other signals ({', '.join(self.names)}): fit it again")
        if not len(self.means) == len(self.scales) == len(self.weights) == len(FEATURES):
            raise ValueError(f"calibration must have {len(FEATURES)} means, scales and weights")
        numbers = (
            *self.means,
            *self.scales,
            *self.weights,
            self.bias,
            *self.quantiles,
            *(value for point in self.points for value in point),
        )
        if not all(math.isfinite(value) for value in numbers) or not all(scale > 0 for scale in self.scales):
            raise ValueError("calibration holds a number that is not finite, or a scale that is not above 0")
        if not self.points or len(self.quantiles) < 2:
            raise ValueError("calibration needs at least one isotonic point and two quantiles")
        for sequence in (self.quantiles, [x for x, _ in self.points], [y for _, y in self.points]):
            if any(later < earlier for earlier, later in itertools.pairwise(sequence)):
                raise ValueError("calibration's points and quantiles must rise")

    def fits(self, model_digest: str, adapter_digest: str) -> bool:
        """Whether this calibration was made for exactly these files. Otherwise judge without it."""
        return (self.model_digest, self.adapter_digest) == (model_digest, adapter_digest)

    def score(self, values: Sequence[float]) -> float:
        """The linear score, before the isotonic curve."""
        terms = zip(values, self.means, self.scales, self.weights, strict=True)
        return self.bias + math.fsum(weight * (value - mean) / scale for value, mean, scale, weight in terms)

    def confidence(self, values: Sequence[float]) -> float:
        """The probability that the answer is right, in [0, 1]; strictly rising in the score. 0 for a verdict task's broken answer."""
        if self.target == VERDICT_RIGHT and values[0] == 0.0:
            return 0.0
        score = self.score(values)
        return (1 - TIE_BREAK) * _within(interpolate(score, self.points), 0.0, 1.0) + TIE_BREAK * _logistic(score)

    def threshold(self, budget: float) -> float:
        """Escalate what is below this, and a share of about `budget` of the questions is escalated.

        Args:
            budget: share of the questions, in [0, 1].

        Raises:
            ValueError: a budget outside [0, 1].
        """
        if not 0.0 <= budget <= 1.0:
            raise ValueError(f"budget {budget} is not a share between 0 and 1")
        if budget == 0.0:
            return 0.0
        if budget == 1.0:
            return ABOVE_ALL
        return quantile(self.quantiles, budget)


class Judgement(msgspec.Struct, frozen=True):
    """Whether the local answer stands by itself, and why."""

    keep: bool
    confidence: float  # in [0, 1]; a calibrated probability only when the reason does not say otherwise
    reason: str  # for the operator: "probability of a right verdict 0.41 below 0.63 (budget 25%)"


def judge(
    values: Sequence[float],
    *,
    calibration: Calibration | None,
    threshold: float | None,
    budget: float | None = None,
    in_form: bool = True,
) -> Judgement:
    """Decide from one answer's features whether it stands.

    Args:
        values: what `features` gave.
        calibration: of the model and adapter that spoke, or None.
        threshold: escalate below it. None: the calibration's threshold for `budget`, or 0.5 without a calibration.
        budget: share of questions to escalate, named in the reason. None: 25%.
        in_form: whether the task could read the answer (`Task.parse` found a verdict, where it has them). A broken one never stands.
    """
    if not in_form:
        return Judgement(False, 0.0, "the answer is not of the task's form")
    verdict = values[0] == 1.0
    if calibration is None:
        confidence = math.exp(values[1] if verdict else values[5])
        limit = UNCALIBRATED_THRESHOLD if threshold is None else threshold
        what, note = ("verdict probability" if verdict else "mean token probability"), "not calibrated"
    else:
        confidence = calibration.confidence(values)
        share = DEFAULT_BUDGET if budget is None else budget
        limit = calibration.threshold(share) if threshold is None else threshold
        what = "probability of a right verdict" if verdict else "probability of a good answer"
        note = f"budget {share:.0%}" if threshold is None or budget is not None else "fixed threshold"
    keep = confidence >= limit
    return Judgement(keep, confidence, f"{what} {confidence:.2f} {'not below' if keep else 'below'} {limit:.2f} ({note})")


def quantile(values: Sequence[float], share: float) -> float:
    """The linearly interpolated quantile of `values` (any order) at `share` in [0, 1]."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def interpolate(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Piecewise linear through `points` (x rising), flat outside them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def _within(value: float, low: float, high: float, *, broken: float | None = None) -> float:
    if math.isnan(value):
        return low if broken is None else broken
    return min(max(value, low), high)


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
