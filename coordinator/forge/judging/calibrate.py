"""From an evaluation on calibration records to the `Calibration` that ships with the model.

What is predicted: for verdict tasks, that the verdict is right; for text, that the sentence chrF is good enough: within MARGIN points
of the teacher's on the same record where the teacher's answers are given, else above FLOOR.

A small logistic regression joins the standardised signals, an isotonic curve maps its score to a probability (UCCI 2026: margin, then
isotonic, takes the calibration error from 0.12 to 0.03). With fewer than ENOUGH records of either kind there is one signal only; with
one kind only, the smoothed base rate in the signal's order. Never fails for lack of data; `method` tells how it was made.
The isotonic curve is fitted on scores of records that the logistic regression had not seen (5 folds), else it would be overconfident.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.forge.judging.evaluation import Evaluation
from protocol.confidence import FEATURES, VERDICT_RIGHT, Calibration, quantile
from protocol.errors import BadInput, NotEnough

FLOOR = 50.0  # chrF2 of one sentence; below it a translation usually has something wrong
MARGIN = 5.0  # chrF2 points; a student this near the teacher gains nothing from asking
ENOUGH = 25  # records right and wrong each, for more than one signal
FEWEST = 20  # records at all
FOLDS = 5
STRENGTH = 0.3  # inverse of the L2 penalty on standardised signals; nine signals, some hundred records
STEPS = 101  # quantiles kept: budgets to one percent

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
    if [answer.id for answer in teacher.answers] != [answer.id for answer in evaluation.answers]:
        raise BadInput("the teacher answered other records than the student: calibration compares them one by one")
    pairs = zip(evaluation.answers, teacher.answers, strict=True)
    return tuple(float(mine.chrf >= its.chrf - MARGIN) for mine, its in pairs), f"chrF within {MARGIN:.0f} points of the teacher's"


def fit(evaluation: Evaluation, *, teacher: Evaluation | None = None, seed: int = 0) -> Calibration:
    """Fit a calibration for the model and adapter of `evaluation`, which must not be the records it is later judged on.

    Args:
        teacher: text tasks: the peer's evaluation on the same records.
        seed: of the folds.

    Raises:
        NotEnough: fewer than FEWEST records.
        BadInput: the answers came as text only.
    """
    if len(evaluation.answers) < FEWEST:
        raise NotEnough(f"{len(evaluation.answers)} calibration records; at least {FEWEST} are needed, some hundred are good")
    if any(not answer.features for answer in evaluation.answers):
        raise BadInput(f"{evaluation.name or 'this model'} gave text only: there are no log-probabilities to calibrate")
    good, target = good_enough(evaluation, teacher=teacher)
    signals = np.array([answer.features for answer in evaluation.answers])  # (records, features)
    right = np.array(good)
    means, scales = signals.mean(axis=0), signals.std(axis=0)
    scales[scales < 1e-9] = 1.0
    standard = (signals - means) / scales
    count, positive = len(right), int(right.sum())
    single = "verdict_sum" if evaluation.kind == "verdict" else "mean"
    if min(positive, count - positive) >= ENOUGH:
        method = "logistic"
        weights, bias = _logistic(standard, right)
        points = _isotonic(_unseen_scores(standard, right, seed), right)
    else:
        method = "single" if 0 < positive < count else "constant"
        weights, bias = np.zeros(len(FEATURES)), 0.0
        weights[FEATURES.index(single)] = 1.0
        rate = (positive + 1) / (count + 2)  # Laplace: all right of 50 is not certainty
        points = _isotonic(standard @ weights, right) if method == "single" else ((0.0, rate),)
    rounded: dict[str, Any] = {
        "means": _tuple(means), "scales": _tuple(scales), "weights": _tuple(weights), "bias": float(bias),
    }  # fmt: skip
    draft = Calibration(
        task=evaluation.task, model_digest=evaluation.model_digest, adapter_digest=evaluation.adapter_digest, points=points,
        quantiles=(0.0, 1.0), count=count, right=positive, method=method, target=target, **rounded,
    )  # fmt: skip
    confidences = evaluation.confidences(draft)
    quantiles = tuple(quantile(confidences, step / (STEPS - 1)) for step in range(STEPS))
    return Calibration(
        task=draft.task, model_digest=draft.model_digest, adapter_digest=draft.adapter_digest, points=points,
        quantiles=quantiles, count=count, right=positive, method=method, target=target, **rounded,
    )  # fmt: skip


def _logistic(standard: Floats, right: Floats) -> tuple[Floats, float]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=STRENGTH, max_iter=1000).fit(standard, right)
    return model.coef_[0], float(model.intercept_[0])


def _unseen_scores(standard: Floats, right: Floats, seed: int) -> Floats:
    """The score of each record by a regression fitted without it: (records,)."""
    from sklearn.model_selection import StratifiedKFold

    scores = np.zeros(len(right))
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(standard, right):
        weights, bias = _logistic(standard[train], right[train])
        scores[test] = standard[test] @ weights + bias
    return scores


def _isotonic(scores: Floats, right: Floats) -> tuple[tuple[float, float], ...]:
    """Corner points of the rising curve from score to probability. Its ends are kept off 0 and 1 by half a record."""
    from sklearn.isotonic import IsotonicRegression

    edge = 0.5 / len(right)
    curve = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip").fit(scores, right)
    return tuple((float(x), float(y)) for x, y in zip(curve.X_thresholds_, curve.y_thresholds_, strict=True))


def _tuple(values: Sequence[float] | Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
