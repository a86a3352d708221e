"""What a student keeps of its corrected teacher: distilled by the pipeline itself, then both files answer the same held-out records.

Training is bought in CPU-seconds (`threads` of them a second); a killed run goes on where it was, its earlier seconds counted.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import stamps
from bench.settings import Settings
from coordinator.forge.judging.evaluation import Evaluation, evaluate
from coordinator.forge.judging.metrics import paired_ratio
from coordinator.forge.pipeline import Forged, forge
from coordinator.forge.plan import Budget, Plan
from coordinator.forge.teachers.gguf import GgufTeacher
from coordinator.forge.training.recipe import Recipe
from protocol.tasks import Record, Task

TOGETHER = 100  # prompts
LEAST_S = 10.0  # the smallest budget there is


def distilled(settings: Settings, key: str, task: Task, records: Sequence[Record], *, budget: Budget, **plan: Any) -> Forged:
    """Teacher and student of a budget in CPU-seconds, made once."""
    if settings.quick:
        few = Recipe(mode="full", learning_rate=3e-3, steps=4)
        plan = {"blocks": 2, "kind": "Q8_0", "correct": few, "student": few}
    budget = Budget.named(str(LEAST_S)) if settings.quick else budget.over(settings.threads)
    stages = settings.folder(key) / "stages"
    before, done, began = stamps.read(stages), _finished(stages), time.monotonic()
    now = stamps.begun(stages)
    made = forge(
        task,
        records,
        work=stages,
        out=settings.folder(key) / "model",
        plan=Plan(budget=budget, seed=settings.seed, threads=settings.threads, **plan),
        base=settings.base() if settings.quick else None,
        progress=_told(key),
    )
    if _finished(stages) == done and before.seconds is not None:  # nothing was left to do
        stamps.write(stages, before)
        settings.used(stages, before)
        return made
    here = time.monotonic() - began
    stamp = stamps.Stamp(now.runs, seconds=max(here, _seconds(made.lineage)), here=here)
    stamps.write(stages, stamp)
    settings.used(stages, stamp)
    return made


def _finished(stages: Path) -> set[Path]:
    return set(stages.glob("*/finished.json"))


def _seconds(lineage: Mapping[str, Any]) -> float:
    """Of all stages; a training's are those of every run of it, a stage's only of the run that finished it."""
    told = [report for report in lineage.values() if isinstance(report, dict) and "seconds" in report]
    return sum(max(report["seconds"], report.get("training", {}).get("seconds", 0.0)) for report in told)


def answered(settings: Settings, key: str, name: str, model: Path, records: Sequence[Record], task: Task) -> Evaluation:
    """The file's answers, judged, and kept."""
    made = settings.kept(key, name, lambda: evaluate(model, records, task, threads=settings.threads))
    return msgspec.convert(made, Evaluation)


def shown(
    model: Path, shots: Task, records: Sequence[Record], *, seed: int, told: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Greedy answers after the solved examples of `shots` (`few_shot`), which are read once. Many share a pass: no figure of speed."""
    texts: list[str] = []
    with GgufTeacher(model) as teacher:
        for begin in range(0, len(records), TOGETHER):
            prompts = [shots.prompt(record) for record in records[begin : begin + TOGETHER]]
            said = teacher.generate(prompts, n=1, temperature=0.0, seed=seed, max_new_tokens=shots.max_new_tokens)
            texts += [one[0].text.strip() for one in said]
            told(len(texts), len(records))
    return texts


def share(values: Callable[[Evaluation], Sequence[float]], teacher: Evaluation, student: Evaluation, *, seed: int) -> dict[str, Any]:
    """The share of the teacher's mean that the student has, with the paired interval; a figure of None where the teacher has nothing."""
    found = paired_ratio(values(teacher), values(student), seed=seed)
    if found is None:
        return {"figure": None, "n": len(teacher.answers), "why": "the teacher's mean is too near 0 for a ratio"}
    return {"figure": found["ratio"], "interval": [found["low"], found["high"]], "n": int(found["n"])}


def _told(key: str) -> Callable[[str, float, str], None]:
    shown: dict[str, int] = {}

    def told(stage: str, part: float, words: str) -> None:
        tenth = int(10 * part)
        if shown.get(stage) != tenth:
            shown[stage] = tenth
            print(f"{key}: {stage} {part:.0%} {words}", flush=True)

    return told
