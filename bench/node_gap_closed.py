"""What asking buys: the share of the gap between student and teacher that closes when 30% of the answers are the teacher's.

The answers come one after the other through a node's own budget (`node.confidence.budget.Tracker`, as shipped: its audits included), which
knows nothing of the records beforehand but the calibration. The figure is of the task where less closes; both stand beside it, with the
share that was really asked, and what the mean log-probability closes when exactly 30% are asked by it.
"""

from typing import Any

from bench.cascade import Cascade, cascades
from bench.settings import Settings
from bench.stream import asked
from coordinator.forge.judging.metrics import at_budget

BUDGET = 0.30


def measure(settings: Settings) -> dict[str, Any]:
    found = {name: closed(cascade, settings) for name, cascade in cascades(settings).items()}
    with_gap = {name: one["closed"] for name, one in found.items() if one["closed"] is not None}
    if not with_gap:
        return {"figure": None, "why": "the teacher's mean is not above the student's", "tasks": found}
    worst = min(with_gap, key=lambda name: with_gap[name])
    return {
        "figure": with_gap[worst],
        "of": worst,
        "against": {f"mean log-probability, {name}": one["by_mean_log_probability"] for name, one in found.items()},
        "tasks": found,
        "n": found[worst]["n"],
    }


def closed(cascade: Cascade, settings: Settings) -> dict[str, Any]:
    student, teacher = cascade.student.quality(), cascade.teacher.quality()
    sent = asked(cascade.confidences, cascade.calibration, share=BUDGET, seed=settings.seed)
    alone, full = sum(student) / len(student), sum(teacher) / len(teacher)
    together = sum(t if ask else s for s, t, ask in zip(student, teacher, sent, strict=True)) / len(student)
    plain = at_budget(cascade.mean_log_probability, student, teacher, BUDGET)
    gap = full - alone
    return {
        "closed": (together - alone) / gap if gap > 0 else None,
        "by_mean_log_probability": (plain - alone) / gap if gap > 0 else None,
        "asked": sum(sent) / len(sent),
        "together": together,
        **cascade.about(),
    }
