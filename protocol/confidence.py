"""How sure a model is of one answer, and whether the answer stands or is asked of a peer. No I/O: numbers in, a decision out.

Signals come free with the one forward pass that made the answer (Gupta et al. 2024: sums and means alone suffer from length bias,
quantiles help; Ramirez et al. 2024: the first token's margin is the best single one for short answers). For a verdict the tokens
before ":" decide, the sentence after it hardly matters. A `Calibration`, fitted by the coordinator on records with known answers,
turns the signals into a probability of being right. It is bound to one model and one adapter by digest: another quantisation or
adapter shifts every signal, so it invalidates the calibration.

    signals -> score (linear, and small trees) -> isotonic curve -> probability -> with the samples' agreement, where it was taken

Without a calibration the plain probability of the verdict (or the mean token's, for free text) stands in, and the reason says so.
What a threshold is on a node, where a budget and what the site really sends decide: `node/confidence`. `Calibration.threshold` is the
plan made beforehand, on the calibration records.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Protocol

import msgspec

from protocol.likeness import chrf
from protocol.reasons import Why
from protocol.tasks import Task

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
    # since version 2
    "quarter",  # 25% quantile
    "median",
    "margin_mean",  # over the whole answer
    "margin_min",
    "verdict_margin",  # the smallest in the verdict
    "entropy_mean",  # over the whole answer, nats
    "entropy_max",
    "repetition",  # share of the token pairs that stood in the answer before
    "length_ratio",  # log of the answer's tokens by the prompt's
    "probability",  # mean over the answer: a token that was hopeless counts as lost, not as minus infinity
    "probability_margin",  # top-1 minus top-2, mean
    "later",  # mean log-probability of the second half, where an answer that began well shows
    "spread",  # standard deviation of the token log-probabilities
    "word",  # mean log-probability of the words
    "tokens_per_character",  # high where the words are rare
)
FIRST_FEATURES = FEATURES[:9]  # of version 1, whose files name them
VERSION = 2  # of the calibration file
LOGPROB_FLOOR = -30.0  # nats; what is less likely than 1e-13, or not a number, counts as this
MARGIN_LIMIT = 30.0  # nats
TIE_BREAK = 0.01  # isotonic steps give many answers one value; this share of the squashed score keeps their order
ABOVE_ALL = 1.01  # a threshold no confidence reaches: escalate everything
DEFAULT_BUDGET = 0.25  # share of questions; where the literature's cascades match the large model (fleet notes 3.1)
UNCALIBRATED_THRESHOLD = 0.5
VERDICT_RIGHT = "verdict is right"
CALIBRATION_LIMIT = 64 * 1024  # bytes of the JSON file; a real one is 3 to 12 kB
VERDICT_TOKENS = 16  # the longest code and its colon
TREES_LIMIT = 200
TREE_DEPTH = 4  # so at most 16 values a tree

_VERDICT = re.compile(r"\s*[a-z][a-z-]*\s*")


class Generated(Protocol):
    """What `features` reads of `protocol.models.engine.Generation`: one entry a token, the end token included."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids."""

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

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""


def features(generation: Generated) -> tuple[float, ...]:
    """The signals of one generation, in the order of FEATURES; always finite.

    Raises:
        ValueError: no token at all: no answer is not a confident answer.
    """
    logprobs = [_within(value, LOGPROB_FLOOR, 0.0) for value in generation.logprobs]
    if not logprobs:
        raise ValueError("a generation without tokens has no confidence")
    margins = [_within(value, 0.0, MARGIN_LIMIT) for value in generation.margins] or [0.0]
    entropies = [_within(value, 0.0, MARGIN_LIMIT, broken=MARGIN_LIMIT) for value in generation.entropies] or [MARGIN_LIMIT]
    count = verdict_tokens(generation.pieces)
    spoken = count or len(logprobs)  # tokens of the verdict, or all
    return (
        1.0 if count else 0.0,
        math.fsum(logprobs[:spoken]),
        min(logprobs[:spoken]),
        margins[0],
        _mean(entropies[:spoken]),
        _mean(logprobs),
        min(logprobs),
        quantile(logprobs, 0.10),
        float(len(logprobs)),
        quantile(logprobs, 0.25),
        quantile(logprobs, 0.50),
        _mean(margins),
        min(margins),
        min(margins[:spoken]),
        _mean(entropies),
        max(entropies),
        repetition(generation.tokens),
        math.log(len(logprobs) / max(1, generation.prompt_tokens)),
        _mean([math.exp(value) for value in logprobs]),
        _mean([math.exp(value) * (1 - math.exp(-margin)) for value, margin in zip(logprobs, margins, strict=False)] or [0.0]),
        _mean(logprobs[len(logprobs) // 2 :]),
        math.sqrt(_mean([(value - _mean(logprobs)) ** 2 for value in logprobs])),
        math.fsum(logprobs) / words(generation.pieces),
        len(logprobs) / max(1, sum(len(piece) for piece in generation.pieces)),
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


def words(pieces: Sequence[str]) -> int:
    """How many words the pieces spell, by the spaces they begin with; at least 1."""
    return max(1, sum(piece.startswith(" ") for piece in pieces))


def repetition(tokens: Sequence[int]) -> float:
    """Share of adjacent token pairs that had already stood in the answer; 0 for a single token."""
    pairs = list(itertools.pairwise(tokens))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def sample_tokens(task: Task) -> int:
    """How long a sample need be for `agreement`: a verdict is said in its first tokens."""
    return min(VERDICT_TOKENS, task.max_new_tokens) if task.codes else task.max_new_tokens


def agreement(text: str, samples: Sequence[str], task: Task) -> float:
    """How far the model's own samples say what its greedy answer says, in [0, 1]: share of equal verdicts, or mean chrF of the texts.

    The stand-in for Monte-Carlo dropout where there is only a quantised file (Fomicheva et al. 2020).

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("agreement needs at least one sample")
    own = task.parse(text)
    if task.codes:
        return math.fsum(bool(own.verdict) and task.parse(sample).verdict == own.verdict for sample in samples) / len(samples)
    return math.fsum(chrf(task.parse(sample).text, own.text) for sample in samples) / len(samples)


class Tree(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A full binary tree: signal `signals[i]` above `at[i]` goes from node i to 2i + 2, else to 2i + 1; past the last node, a value."""

    signals: tuple[int, ...]  # places in the calibration's `names`
    at: tuple[float, ...]
    values: tuple[float, ...]

    def value(self, values: Sequence[float]) -> float:
        """What this tree adds to the score."""
        node = 0
        while node < len(self.signals):
            node = 2 * node + (2 if values[self.signals[node]] > self.at[node] else 1)
        return self.values[node - len(self.signals)]


class Agreed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the samples' agreement moves a probability: log-odds' = bias + slope * log-odds + weight * agreement."""

    samples: int  # as many as it was fitted with
    temperature: float
    bias: float
    slope: float
    weight: float


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Turns features into a probability of being right, for one model and adapter.

    score = bias + sum(weights * (features - means) / scales) + sum of the trees' values; the isotonic curve through `points` maps it to
    a probability. `quantiles` are evenly spaced quantiles of that probability over the calibration records, from share 0 to share 1.
    `names` are the signals it reads, by name: a calibration written before a signal existed is read as what it was.
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
    method: str  # the combiner's name; "single" (too few records for more than one signal), "constant" (all right or all wrong)
    target: str = VERDICT_RIGHT  # what the probability is of
    names: tuple[str, ...] = FIRST_FEATURES
    version: int = 1
    trees: tuple[Tree, ...] = ()
    agreed: Agreed | None = None  # None: agreement was not measured, and is not asked for

    def __post_init__(self) -> None:
        """Refuse what cannot be used; msgspec reports it as a validation error when decoding."""
        if not 1 <= self.version <= VERSION:
            raise ValueError(f"calibration is of version {self.version}, this program reads up to {VERSION}: update it")
        if strange := [name for name in self.names if name not in FEATURES]:
            raise ValueError(f"calibration is for signals unknown here ({', '.join(strange)}): update this program, or fit it again")
        if not len(self.means) == len(self.scales) == len(self.weights) == len(self.names):
            raise ValueError(f"calibration must have {len(self.names)} means, scales and weights")
        self._check_trees()
        numbers = (
            *self.means,
            *self.scales,
            *self.weights,
            self.bias,
            *self.quantiles,
            *(value for point in self.points for value in point),
            *(value for tree in self.trees for value in (*tree.at, *tree.values)),
            *((self.agreed.bias, self.agreed.slope, self.agreed.weight, self.agreed.temperature) if self.agreed else ()),
        )
        if not all(math.isfinite(value) for value in numbers) or not all(scale > 0 for scale in self.scales):
            raise ValueError("calibration holds a number that is not finite, or a scale that is not above 0")
        if not self.points or len(self.quantiles) < 2:
            raise ValueError("calibration needs at least one isotonic point and two quantiles")
        for sequence in (self.quantiles, [x for x, _ in self.points], [y for _, y in self.points]):
            if any(later < earlier for earlier, later in itertools.pairwise(sequence)):
                raise ValueError("calibration's points and quantiles must rise")

    def _check_trees(self) -> None:
        if len(self.trees) > TREES_LIMIT:
            raise ValueError(f"calibration has {len(self.trees)} trees; {TREES_LIMIT} are the limit")
        for tree in self.trees:
            if len(tree.values) not in [1 << depth for depth in range(TREE_DEPTH + 1)]:
                raise ValueError(f"calibration has a tree of {len(tree.values)} values; a power of two up to {1 << TREE_DEPTH} is needed")
            if not len(tree.signals) == len(tree.at) == len(tree.values) - 1:
                raise ValueError("calibration has a tree whose splits and values do not match")
            if any(not 0 <= signal < len(self.names) for signal in tree.signals):
                raise ValueError("calibration has a tree over a signal that it does not name")

    def fits(self, model_digest: str, adapter_digest: str) -> bool:
        """Whether this calibration was made for exactly these files. Otherwise judge without it."""
        return (self.model_digest, self.adapter_digest) == (model_digest, adapter_digest)

    def score(self, values: Sequence[float]) -> float:
        """The combined score, before the isotonic curve. `values` are in the order of FEATURES."""
        mine = values if self.names == FEATURES else [values[FEATURES.index(name)] for name in self.names]
        terms = zip(mine, self.means, self.scales, self.weights, strict=True)
        linear = math.fsum(weight * (value - mean) / scale for value, mean, scale, weight in terms)
        return self.bias + linear + math.fsum(tree.value(mine) for tree in self.trees)

    def confidence(self, values: Sequence[float], *, agreement: float | None = None) -> float:
        """The probability that the answer is right, in [0, 1]; strictly rising in the score. 0 for a verdict task's broken answer.

        Args:
            agreement: what `agreement` gave, where it was taken; used only when the calibration knows what to make of it.
        """
        if self.target == VERDICT_RIGHT and values[0] == 0.0:
            return 0.0
        score = self.score(values)
        sure = (1 - TIE_BREAK) * _within(interpolate(score, self.points), 0.0, 1.0) + TIE_BREAK * logistic(score)
        if agreement is None or self.agreed is None:
            return sure
        return logistic(self.agreed.bias + self.agreed.slope * log_odds(sure) + self.agreed.weight * agreement)

    def threshold(self, budget: float) -> float:
        """Escalate what is below this, and a share of about `budget` of the calibration records is escalated.

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
    """Whether the local answer stands, whether a peer is to be asked, and why."""

    keep: bool  # it stands by itself
    confidence: float  # in [0, 1]; a calibrated probability only when the reason does not say otherwise
    why: Why
    ask: bool = False  # there is a budget for asking; a broken answer may neither stand nor be asked

    @property
    def reason(self) -> str:
        """For the operator: "probability of a right verdict 0.41 below 0.63 (share budget 25%)"."""
        return str(self.why)


def confidence(values: Sequence[float], calibration: Calibration | None, *, in_form: bool = True, agreement: float | None = None) -> float:
    """How sure the model is of one answer, in [0, 1].

    Args:
        values: what `features` gave.
        calibration: of the model and adapter that spoke, or None.
        in_form: whether the task could read the answer (`Task.parse` found a verdict, where it has them). 0 for a broken one.
        agreement: of the model's own samples, where they were taken.
    """
    if not in_form:
        return 0.0
    if calibration is not None:
        return calibration.confidence(values, agreement=agreement)
    return math.exp(values[1] if values[0] == 1.0 else values[5])


def meaning(values: Sequence[float], calibration: Calibration | None) -> Why:
    """What the confidence of such an answer is."""
    verdict = values[0] == 1.0
    if calibration is None:
        return Why("verdict-probability" if verdict else "token-probability")
    return Why("right-verdict" if verdict else "good-answer")


def judge(
    values: Sequence[float],
    *,
    calibration: Calibration | None,
    threshold: float | None,
    budget: float | None = None,
    in_form: bool = True,
) -> Judgement:
    """Decide from one answer's features whether it stands, by a threshold fixed beforehand.

    Args:
        values, calibration, in_form: as for `confidence`.
        threshold: escalate below it. None: the calibration's threshold for `budget`, or 0.5 without a calibration.
        budget: share of questions to escalate, named in the reason. None: 25%.
    """
    if not in_form:
        return Judgement(False, 0.0, Why("not-in-form"), ask=True)
    sure = confidence(values, calibration)
    if calibration is None:
        limit, note = UNCALIBRATED_THRESHOLD if threshold is None else threshold, Why("not-calibrated")
    else:
        share = DEFAULT_BUDGET if budget is None else budget
        limit = calibration.threshold(share) if threshold is None else threshold
        note = Why("budget", {"share": share}) if threshold is None or budget is not None else Why("fixed-threshold")
    keep = sure >= limit
    figures: dict[str, float | Why] = {"what": meaning(values, calibration), "sure": sure, "limit": limit}
    return Judgement(keep, sure, Why("not-below" if keep else "below", figures, (note,)), ask=not keep)


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


def logistic(x: float) -> float:
    """1 / (1 + exp(-x)), for any x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_odds(share: float) -> float:
    """The inverse of `logistic`; the ends are taken as 1e-6 and 1 - 1e-6."""
    share = _within(share, 1e-6, 1 - 1e-6)
    return math.log(share / (1 - share))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _within(value: float, low: float, high: float, *, broken: float | None = None) -> float:
    if math.isnan(value):
        return low if broken is None else broken
    return min(max(value, low), high)
