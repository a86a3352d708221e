"""How well the confidence knows whom to hand on: the normalised area under the deferral curve, on ranch and on translation.

Definition. Order the answers by confidence; let the teacher answer the k least sure instead of the student; q(k) is the mean quality of
what comes out (verdicts right; sentence chrF). The curve is q over k / n, from the student alone to the teacher alone: the deferral curve
of Gupta et al. 2024 (arXiv 2404.10136). Asking at random gives the straight line between its ends. The oracle asks in the order of what the
teacher really adds, which no confidence can know. The area is

    (sum of q(k) - line(k)) / (sum of oracle(k) - line(k)),   0 = random in expectation, 1 = oracle, below 0 = worse than random.

The interval is of the difference to the mean log-probability of the same answers: bootstrap over records.
"""

from typing import Any

import numpy as np

from bench.cascade import Cascade, cascades
from bench.settings import Settings
from coordinator.forge.judging.metrics import deferral_area

RESAMPLES, QUICK = 500, 20
KNOWN_STUDENT, KNOWN_TEACHER = "the student's true quality", "the teacher's true quality"


def measure(settings: Settings) -> dict[str, Any]:
    both = cascades(settings)
    return {"audc": entry(both["ranch"], settings), "audc_2": entry(both["translation"], settings)}


def entry(cascade: Cascade, settings: Settings) -> dict[str, Any]:
    student, teacher = cascade.student.quality(), cascade.teacher.quality()
    rivals = {
        "mean log-probability": cascade.mean_log_probability,
        "verdict or answer probability, uncalibrated": cascade.student.confidences(None),
    }
    # what confidence could at best know of its own side, to read the figure by: the rest is what the other side happens to say
    known = {KNOWN_STUDENT: student, KNOWN_TEACHER: [-value for value in teacher]}
    area = deferral_area(cascade.confidences, student, teacher)
    return {
        "figure": area,
        "against": {name: deferral_area(order, student, teacher) for name, order in rivals.items()},
        "above_mean_log_probability": above(cascade, settings),
        "bounds": {name: deferral_area(order, student, teacher) for name, order in known.items()},
        **cascade.about(),
    }


def above(cascade: Cascade, settings: Settings) -> dict[str, float] | None:
    """The difference to the baseline, with its 95% interval."""
    columns = [np.array(column) for column in (cascade.confidences, cascade.mean_log_probability)]
    student, teacher = np.array(cascade.student.quality()), np.array(cascade.teacher.quality())
    random, found = np.random.default_rng(settings.seed), []
    for resample in range((QUICK if settings.quick else RESAMPLES) + 1):
        rows = random.integers(len(student), size=len(student)) if resample else np.arange(len(student))
        areas = [deferral_area(column[rows].tolist(), student[rows].tolist(), teacher[rows].tolist()) for column in columns]
        if areas[0] is None or areas[1] is None:
            return None
        found.append(areas[0] - areas[1])
    low, high = np.quantile(found[1:], (0.025, 0.975))
    return {"diff": found[0], "low": float(low), "high": float(high)}
