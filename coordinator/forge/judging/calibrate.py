"""From an evaluation on calibration records to the `Calibration` that ships with the model.

What is predicted: for verdict tasks, that the verdict is right; for text, that the sentence chrF is good enough: within MARGIN points
of the teacher's on the same record where the teacher's answers are given, else above FLOOR.

A combiner joins the signals into a score, chosen by how well its order of unseen records defers (`combiners`), and an isotonic curve maps
the score to a probability (UCCI 2026: margin, then isotonic, takes the calibration error from 0.12 to 0.03). Give the teacher's answers
where there are any: what asking it buys is then known and not guessed. With fewer than ENOUGH records of either kind there is one signal
only; with one kind only, the smoothed base rate in the signal's order. Never fails for lack of data; `method` tells how it was made.
The isotonic curve is fitted on scores of records that the combiner had not seen (folds), else it would be overconfident; so is the
weight of the samples' agreement, where samples were taken.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.forge.judging.combiners import Known, choose, single
from coordinator.forge.judging.evaluation import Evaluation
from coordinator.forge.judging.metrics import sentence_chrf
from protocol.confidence import FEATURES, VERDICT_RIGHT, VERSION, Agreed, Calibration, log_odds, quantile
from protocol.errors import BadInput, NotEnough

FLOOR = 50.0  # chrF2 of one sentence; below it a translation usually has something wrong
MARGIN = 5.0  # chrF2 points; a student this near the teacher gains nothing from asking
ENOUGH = 25  # records right and wrong each, for more than one signal
FEWEST = 20  # records at all
STEPS = 101  # quantiles kept: budgets to one percent
DIGITS = 6  # significant, of the numbers in the file

Floats = NDArray[np.float64]


def good_enough(evaluation: Evaluation, *, teacher: Evaluation | None = None) -> tuple[tuple[float, ...], str]:
    """Per record 1.0 where the answer may stand, and what that means in words.

    Raises:
        BadInput: the teacher answered other records.
    """
    if evaluation.kind == "verdict":
        return evaluation.quality(), VERDICT_RIGHT
    if teacher is None:
        return tuple(float(answer.chrf >= FLOOR) for answer in evaluation.answers), f"chrF at least {FLOOR:.0f}"
    _check_records(evaluation, teacher)
    pairs = zip(evaluation.answers, teacher.answers, strict=True)
    return tuple(float(mine.chrf >= its.chrf - MARGIN) for mine, its in pairs), f"chrF within {MARGIN:.0f} points of the teacher's"


def fit(
    evaluation: Evaluation,
    *,
    teacher: Evaluation | None = None,
    seed: int = 0,
    agreement: Sequence[float] = (),
    samples: int = 0,
    temperature: float = 0.0,
) -> Calibration:
    """Fit a calibration for the model and adapter of `evaluation`, which must not be the records it is later judged on.

    Args:
        teacher: the peer's evaluation on the same records.
        seed: of the folds and the trees.
        agreement: per record what `protocol.confidence.agreement` gave of so many `samples` at `temperature`; empty: none were taken.

    Raises:
        NotEnough: fewer than FEWEST records.
        BadInput: the answers came as text only, or the teacher's or the samples are of other records.
    """
    if len(evaluation.answers) < FEWEST:
        raise NotEnough(f"{len(evaluation.answers)} calibration records; at least {FEWEST} are needed, some hundred are good")
    if any(not answer.features for answer in evaluation.answers):
        raise BadInput(f"{evaluation.name or 'this model'} gave text only: there are no log-probabilities to calibrate")
    if agreement and len(agreement) != len(evaluation.answers):
        raise BadInput(f"{len(agreement)} agreements for {len(evaluation.answers)} records: there must be one each")
    good, target = good_enough(evaluation, teacher=teacher)
    known = _known(evaluation, teacher, good)
    count, positive = len(good), int(known.right.sum())
    enough = min(positive, count - positive) >= ENOUGH
    if enough:
        method, combiner, unseen, _ = choose(known, seed)
    else:
        method, combiner = "single" if 0 < positive < count else "constant", single(known, known.single)
        unseen = combiner.scores(known.signals)
    rate = (positive + 1) / (count + 2)  # Laplace: all right of 50 is not certainty
    points = ((0.0, rate),) if method == "constant" else _isotonic(unseen, known.right)
    draft = Calibration(
        task=evaluation.task, model_digest=evaluation.model_digest, adapter_digest=evaluation.adapter_digest,
        means=_short(combiner.means), scales=_short(combiner.scales), weights=_short(combiner.weights), bias=_short([combiner.bias])[0],
        points=points, quantiles=(0.0, 1.0), count=count, right=positive, method=method, target=target, names=FEATURES, version=VERSION,
        trees=tuple(msgspec.structs.replace(tree, at=_short(tree.at), values=_short(tree.values)) for tree in combiner.trees),
    )  # fmt: skip
    if agreement and enough:
        draft = msgspec.structs.replace(draft, agreed=_agreed(draft, unseen, known.right, agreement, samples, temperature))
    confidences = evaluation.confidences(draft)
    return msgspec.structs.replace(draft, quantiles=_short([quantile(confidences, step / (STEPS - 1)) for step in range(STEPS)]))


def _check_records(evaluation: Evaluation, teacher: Evaluation) -> None:
    if [answer.id for answer in teacher.answers] != [answer.id for answer in evaluation.answers]:
        raise BadInput("the teacher answered other records than the student: calibration compares them one by one")


def _known(evaluation: Evaluation, teacher: Evaluation | None, good: Sequence[float]) -> Known:
    mine, verdicts = evaluation.answers, evaluation.kind == "verdict"
    student, top = np.array(evaluation.quality()), 1.0 if verdicts else 100.0
    best, apart = np.full(len(mine), top), top - student
    if teacher is not None:
        _check_records(evaluation, teacher)
        its = teacher.answers
        best = np.array(teacher.quality())
        if verdicts:
            apart = np.array([float(one.verdict != other.verdict) for one, other in zip(mine, its, strict=True)])
        else:
            apart = top - np.array(sentence_chrf([answer.text for answer in mine], [answer.text for answer in its]))
    signals = np.array([answer.features for answer in mine])  # (records, signals)
    return Known(signals, np.array(good), student, best, apart, FEATURES.index("verdict_sum" if verdicts else "mean"))


def _isotonic(scores: Floats, right: Floats) -> tuple[tuple[float, float], ...]:
    """Corner points of the rising curve from score to probability. Its ends are kept off 0 and 1 by half a record."""
    from sklearn.isotonic import IsotonicRegression

    edge = 0.5 / len(right)
    curve = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip").fit(scores, right)
    return tuple(zip(_short(curve.X_thresholds_), _short(curve.y_thresholds_), strict=True))


def _agreed(draft: Calibration, unseen: Floats, right: Floats, agreement: Sequence[float], samples: int, temperature: float) -> Agreed:
    """How agreement moves the log-odds of records the combiner had not seen."""
    from sklearn.linear_model import LogisticRegression

    xs, ys = zip(*draft.points, strict=True)
    odds = [log_odds(float(share)) for share in np.interp(unseen, xs, ys)]
    model = LogisticRegression(C=1.0, max_iter=1000).fit(np.column_stack([odds, agreement]), right)
    slope, weight = _short(model.coef_[0])
    return Agreed(samples, temperature, _short(model.intercept_)[0], max(0.0, slope), weight)


def _short(values: Sequence[float] | Floats) -> tuple[float, ...]:
    """Numbers as the file has them: DIGITS significant digits keep it small, and what was judged is what ships."""
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)
