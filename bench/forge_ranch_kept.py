"""Ranch: how much of the corrected teacher's verdicts, and of its sentences' chrF, the student's GGUF keeps; the baselines beside it."""

import dataclasses
from typing import Any

from bench.kept import answered, distilled, share
from bench.settings import Settings
from coordinator.forge.judging.evaluation import Evaluation
from coordinator.forge.plan import Budget
from coordinator.ranch import generate, site_named
from coordinator.ranch.baselines import baselines
from protocol.tasks import RANCH, Record

BUDGET = Budget("ranch", correct_s=1_872.0, capture_s=540.0, student_s=5_400.0)  # CPU-seconds
OWN = 14.0  # nearly all records: the capture has time for one in fifteen
TRAIN, TEST = 24_000, 2_000


def measure(settings: Settings) -> dict[str, Any]:
    train, test = records(settings, "train", 60 if settings.quick else TRAIN), records(settings, "test", 24 if settings.quick else TEST)
    made = distilled(settings, "ranch_kept", RANCH, train, budget=BUDGET, own=OWN)
    teacher = answered(settings, "ranch_kept", "teacher", made.teacher, test, RANCH)
    student = answered(settings, "ranch_kept", "student", made.student, test, RANCH)
    against = {
        "corrected teacher": brief(teacher),
        "student": brief(student),
        **settings.kept("ranch_kept", "baselines", lambda: baselines(train, test, seed=settings.seed)),
    }
    about = {"against": against, "training": made.lineage["distil"]["training"], "budget": dataclasses.asdict(BUDGET), "own": OWN}
    return {
        "ranch_kept": share(Evaluation.quality, teacher, student, seed=settings.seed) | about,
        "ranch_kept_2": share(chrf, teacher, student, seed=settings.seed) | about,
    }


def records(settings: Settings, split: str, count: int) -> list[Record]:
    return generate(site_named("general"), seed=settings.seed, count=count, split=split)


def chrf(evaluation: Evaluation) -> list[float]:
    return [answer.chrf for answer in evaluation.answers]


def brief(evaluation: Evaluation) -> dict[str, Any]:
    return {key: value for key, value in evaluation.figures().items() if key in ("accuracy", "accuracy_ci", "chrf", "chrf_ci", "file_mb")}
