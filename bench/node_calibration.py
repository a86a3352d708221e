"""Whether the confidence means what it says, and whether a budget is spent as planned.

calibration     expected calibration error (Guo et al. 2017, 10 equally wide bins) on test records: the worse of ranch and translation.
                Against: the uncalibrated probability's. `by_chance` is what a confidence that is exactly true would show on as many
                records: the error is a sum of absolute values, so it is never 0.
calibration_2   |realised - planned| share over 1,000 answers, the worst of several budgets and streams, each through a node's own budget:
                test records; another ranch than the calibration's; a season that turns (the test records from the surest to the least sure
                and the other way round); one ranch after the other. Against: the threshold that the calibration records planned, fixed.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from bench.cascade import Cascade, cascades
from bench.settings import Settings
from bench.stream import asked
from coordinator.forge.judging.metrics import calibration_error

BUDGETS = (0.05, 0.10, 0.25, 0.40)
OVER = 1_000  # answers
DRAWS = 100


def measure(settings: Settings) -> dict[str, Any]:
    both = cascades(settings)
    errors = {name: calibration_error(one.confidences, one.good) for name, one in both.items()}
    plain = {f"uncalibrated, {name}": calibration_error(one.student.confidences(None), one.good) for name, one in both.items()}
    lucky = {name: by_chance(one.confidences, seed=settings.seed) for name, one in both.items()}
    worst = max(errors, key=lambda name: errors[name])
    return {
        "calibration": {
            "figure": errors[worst],
            "of": worst,
            "tasks": errors,
            "by_chance": lucky,
            "against": plain,
            **both[worst].about(),
        },
        "calibration_2": shares(both, settings),
    }


def by_chance(confidences: Sequence[float], *, seed: int) -> float:
    """The mean calibration error of as many answers that are right exactly as often as these say."""
    random = np.random.default_rng(seed)
    truth = np.array(confidences)
    errors = [calibration_error(confidences, (random.random(len(truth)) < truth).astype(float).tolist()) for _ in range(DRAWS)]
    return float(np.mean(errors))


def shares(both: dict[str, Cascade], settings: Settings) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for (name, cascade), budget in product(both.items(), BUDGETS):
        for stream, confidences in streams(cascade).items():
            sent = asked(confidences, cascade.calibration, share=budget, seed=settings.seed)
            fixed = cascade.calibration.threshold(budget)
            rows.append(
                {
                    "task": name,
                    "stream": stream,
                    "budget": budget,
                    "n": len(sent),
                    "off": abs(sum(sent) / len(sent) - budget),
                    "off_fixed": abs(sum(sure < fixed for sure in confidences) / len(confidences) - budget),
                }
            )
    worst = max(rows, key=lambda row: row["off"])
    return {
        "figure": worst["off"],
        "of": {key: worst[key] for key in ("task", "stream", "budget")},
        "n": worst["n"],
        "against": {"the planned threshold, fixed": max(row["off_fixed"] for row in rows)},
        "rows": rows,
    }


def streams(cascade: Cascade) -> dict[str, Sequence[float]]:
    """By name, at most OVER confidences each."""
    test = cascade.confidences[:OVER]
    found: dict[str, Sequence[float]] = {"test": test, "ever less sure": sorted(test, reverse=True), "ever surer": sorted(test)}
    if cascade.elsewhere is not None:
        other = cascade.elsewhere.confidences(cascade.calibration)[:OVER]
        found |= {"another site": other, "the other site after this one": [*test[: OVER // 2], *other[: OVER // 2]]}
    return found
