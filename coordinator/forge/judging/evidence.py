"""The evidence of a release: what was measured, how sure it is, and which sentences it allows.

One JSON object a release: every model on every held-out set with intervals and signatures, sizes, digests, machine, commit, seed, the
command that repeats it, lineage, calibration quality, and what was not tested.

Claims are gated by the figures, never written by hand:
 * "keeps X% of the teacher's accuracy" only where the paired 95% interval of the ratio is narrower than +-CLOSE; else the sentence gives
   the interval and says that it allows no closer one;
 * a baseline whose interval reaches the student's is named as being as good as the student, and one above it as better;
 * quantisation "costs nothing measurable" only as "no difference found", with the interval that could hide one.
No I/O but `machine` and `commit`, which look at this computer.
"""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from coordinator.forge.judging.calibrate import good_enough
from coordinator.forge.judging.evaluation import Evaluation, paired_bootstrap
from coordinator.forge.judging.metrics import at_budget, calibration_error, deferral_area, deferral_curve, paired_ratio, reliability
from protocol.confidence import DEFAULT_BUDGET, VERDICT_RIGHT, Calibration

CLOSE = 0.03  # half-width of a ratio's interval that still carries "keeps X%"
STAGES = {
    "trim": "vocabulary trimmed", "correct": "teacher, corrected", "cut": "student, cut out", "capture": "teacher's answers",
    "distil": "student, distilled",
}  # fmt: skip
LABELS = {
    "nearest": "nearest neighbour on the text", "trees": "boosted trees on the figures",
    "trees_note": "boosted trees on figures and note",
}  # fmt: skip
BUDGETS = (0.1, 0.2, 0.25, 0.3)
CURVE_POINTS = 50  # of a deferral curve kept for the plot
TEACHER, FLOAT, STUDENT = "teacher", "student_float", "student"  # names with a meaning; any other model is a peer
LIBRARIES = ("llama-cpp-python", "sacrebleu", "scikit-learn", "torch", "transformers", "numpy")
ALWAYS_UNTESTED = (
    "Boards: everything ran on the machine named here, none of it on a Raspberry Pi or another ARM board.",
    "Human judgement: no person rated an answer; chrF and BLEU count shared letters and words.",
)


def bundle(
    *,
    release: int,
    task: str,
    sets: Mapping[str, Mapping[str, Evaluation]],
    seed: int,
    command: str,
    baselines: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    calibration: Calibration | None = None,
    lineage: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    not_tested: Sequence[str] = (),
    machine: Mapping[str, Any] | None = None,
    commit: str = "",
    created: int = 0,
) -> dict[str, Any]:
    """The evidence of one release as plain JSON values.

    Args:
        sets: held-out set ("general", "esteli", ...) -> model ("teacher", "student_float", "student", or a peer) -> evaluation.
        baselines: held-out set -> name -> at least `accuracy` and `accuracy_ci` (share right).
        calibration: of the student's GGUF; judged here on the held-out sets, on which it was not fitted.
        lineage: what the pipeline wrote (`Forged.lineage`), or steps as `lineage_steps` gives them.
        not_tested: sentences, added to those that always hold.
        created: seconds since 1970, UTC.
    """
    found = {name: one_set(name, models, (baselines or {}).get(name, {}), calibration, seed=seed) for name, models in sets.items()}
    return {
        "release": release,
        "task": task,
        "created": created,
        "seed": seed,
        "command": command,
        "commit": commit,
        "machine": dict(machine or {}),
        "sets": found,
        "statements": [sentence for each in found.values() for sentence in each["statements"]],
        "calibration": None if calibration is None else described(calibration),
        "lineage": lineage_steps(lineage),
        "not_tested": [*not_tested, *ALWAYS_UNTESTED],
    }


def one_set(
    name: str, models: Mapping[str, Evaluation], baselines: Mapping[str, Mapping[str, Any]], calibration: Calibration | None, *, seed: int
) -> dict[str, Any]:
    """Figures, comparisons and sentences of one held-out set."""
    teacher, student, exact = models.get(TEACHER), models.get(STUDENT), models.get(FLOAT)
    result: dict[str, Any] = {
        "models": {key: evaluation.figures() | {"name": evaluation.name} for key, evaluation in models.items()},
        "baselines": {key: dict(figures) for key, figures in baselines.items()},
        "paired": {},
        "statements": [],
    }
    say = result["statements"].append
    if teacher and student:
        result["paired"]["student - teacher"] = paired_bootstrap(teacher, student, seed=seed)
        say(retention(teacher, student, name, seed=seed))
    if exact and student:
        result["paired"]["student - student_float"] = change = paired_bootstrap(exact, student, seed=seed)
        say(quantisation(change, name, student.kind))
    if student:
        for key, figures in baselines.items():
            if sentence := against(key, figures, student.figures(), name):
                say(sentence)
        for key, other in models.items():
            if key not in (TEACHER, FLOAT, STUDENT):
                result["paired"][f"student - {key}"] = change = paired_bootstrap(other, student, seed=seed)
                say(against_peer(key, change, name, student.kind))
        if student.kind == "verdict":
            result["codes"] = by_code(student, teacher)
        if all(answer.features for answer in student.answers):
            result["confidence"] = operating_point(student, teacher, calibration)
    return result


def retention(teacher: Evaluation, student: Evaluation, where: str, *, seed: int) -> str:
    """The one sentence about how much of the teacher the student keeps, as far as the paired interval carries it."""
    what = "verdict accuracy" if student.kind == "verdict" else "mean sentence chrF"
    found = paired_ratio(teacher.quality(), student.quality(), seed=seed)
    if found is None:
        return f"{where}: the teacher's {what} is too near zero on {len(teacher.answers)} records for a ratio to mean anything."
    low, high, ratio, n = found["low"], found["high"], found["ratio"], int(found["n"])
    if (high - low) / 2 > CLOSE:
        return (
            f"{where}: the student keeps between {low:.0%} and {high:.0%} of the teacher's {what} (95% interval, paired); "
            f"{n} records allow no closer statement."
        )
    return f"{where}: the student keeps {ratio:.0%} of the teacher's {what} (95% interval {low:.1%} to {high:.1%}, paired, n = {n})."


def quantisation(change: Mapping[str, float], where: str, kind: str) -> str:
    """What quantisation did, from the paired difference of the GGUF and the float student."""
    interval = f"{_points(change['diff'], kind)} (95% interval {_points(change['low'], kind)} to {_points(change['high'], kind)}, paired)"
    if change["low"] <= 0 <= change["high"]:
        return f"{where}: no difference found between the quantised student and the float one: {interval}."
    return f"{where}: quantisation changed the student by {interval}."


def against(name: str, baseline: Mapping[str, Any], student: Mapping[str, Any], where: str) -> str:
    """A sentence where the baseline is as good as the student or better; empty where the student is clearly ahead."""
    if "accuracy" not in baseline or "accuracy" not in student:
        return ""
    low, high = baseline.get("accuracy_ci") or (baseline["accuracy"], baseline["accuracy"])
    figures = f"{baseline['accuracy']:.1%} [{low:.1%}, {high:.1%}] against {student['accuracy']:.1%} [{_span(student)}]"
    name = LABELS.get(name, name)
    if low > student["accuracy_ci"][1]:
        return f"{where}: the baseline {name} is better than the student: {figures}."
    if high >= student["accuracy_ci"][0]:
        return f"{where}: the baseline {name} is as good as the student within the intervals: {figures}."
    return ""


def against_peer(name: str, change: Mapping[str, float], where: str, kind: str) -> str:
    """How the student stands to another system on the same records."""
    interval = f"{_points(change['diff'], kind)} (95% interval {_points(change['low'], kind)} to {_points(change['high'], kind)}, paired)"
    if change["low"] > 0:
        return f"{where}: the student is better than {name}: {interval}."
    if change["high"] < 0:
        return f"{where}: {name} is better than the student: {interval}."
    return f"{where}: no difference found between the student and {name}: {interval}."


def by_code(student: Evaluation, teacher: Evaluation | None) -> list[dict[str, Any]]:
    """Per verdict code how many the student and the teacher have right; the student's worst loss against the teacher first."""
    right = {answer.id: answer.correct for answer in teacher.answers} if teacher else {}
    rows: dict[str, dict[str, Any]] = {}
    for answer in student.answers:
        row = rows.setdefault(answer.expected, {"code": answer.expected, "n": 0, "student": 0, "teacher": 0 if teacher else None})
        row["n"] += 1
        row["student"] += answer.correct
        if teacher:
            row["teacher"] += right.get(answer.id, False)
    return sorted(rows.values(), key=lambda row: (row["student"] - (row["teacher"] or 0)) / row["n"])


def operating_point(
    student: Evaluation, teacher: Evaluation | None, calibration: Calibration | None, *, budget: float = DEFAULT_BUDGET
) -> dict[str, Any]:
    """How well the student knows when it is wrong, and what asking the teacher buys.

    Returns:
        `calibrated`, `ece`, `reliability` (bins), `budget`, `escalated` (share that the threshold really sends), and with a teacher
        `audc`, `accuracy_with_escalation` (at the threshold), `accuracy_at_budget` (exactly `budget` sent), `at` (budget -> quality),
        `curve` ([share, quality] pairs) and `ends` (student alone, teacher alone). For text, quality is mean sentence chrF.
    """
    confidences = student.confidences(calibration)
    good, target = good_enough(student, teacher=teacher)
    mine = student.quality()
    threshold = (
        calibration.threshold(budget) if calibration else sorted(confidences)[min(len(confidences) - 1, int(budget * len(confidences)))]
    )
    sent = [confidence < threshold for confidence in confidences]
    result: dict[str, Any] = {
        "calibrated": calibration is not None,
        "target": target,
        "ece": calibration_error(confidences, good),
        "reliability": [
            {"confidence": bar.confidence, "accuracy": bar.accuracy, "count": bar.count} for bar in reliability(confidences, good)
        ],
        "budget": budget,
        "threshold": threshold,
        "escalated": sum(sent) / len(sent),
    }
    if teacher is not None:
        its = teacher.quality()
        curve = deferral_curve(confidences, mine, its)
        steps = sorted({round(step * (len(curve) - 1) / CURVE_POINTS) for step in range(CURVE_POINTS + 1)})
        result |= {
            "audc": deferral_area(confidences, mine, its),
            "accuracy_with_escalation": sum(t if asked else m for m, t, asked in zip(mine, its, sent, strict=True)) / len(mine),
            "accuracy_at_budget": at_budget(confidences, mine, its, budget),
            "at": {f"{share:g}": at_budget(confidences, mine, its, share) for share in BUDGETS},
            "curve": [[step / (len(curve) - 1), float(curve[step])] for step in steps],
            "ends": [float(curve[0]), float(curve[-1])],
        }
    return result


def live_curve(confidences: Sequence[float], own: Sequence[float], final: Sequence[float], asked: Sequence[bool]) -> dict[str, Any]:
    """What `operating_point` gives for the plots, from a site's real answers, where the peer's answer is known for the asked ones only.

    Args:
        own, final: 1.0 where the first answer, and the one after the replies, was right.

    Returns:
        `ece`, `reliability`, `target`, and `curve` from share 0 to the share that was asked; empty when nothing was.
    """
    curve = deferral_curve(confidences, own, final)
    count = sum(asked)
    steps = sorted({round(step * count / CURVE_POINTS) for step in range(CURVE_POINTS + 1)})
    return {
        "target": VERDICT_RIGHT,
        "ece": calibration_error(confidences, own),
        "reliability": [
            {"confidence": bar.confidence, "accuracy": bar.accuracy, "count": bar.count} for bar in reliability(confidences, own)
        ],
        "curve": [[step / len(own), float(curve[step])] for step in steps] if count else [],
    }


def described(calibration: Calibration) -> dict[str, Any]:
    """What a reader needs to know of a calibration."""
    return {
        "method": calibration.method,
        "target": calibration.target,
        "records": calibration.count,
        "right": calibration.right,
        "model_digest": calibration.model_digest,
        "adapter_digest": calibration.adapter_digest,
        "thresholds": {f"{budget:g}": calibration.threshold(budget) for budget in BUDGETS},
    }


def lineage_steps(lineage: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """From the base model to the file on the node, in order: each step's `name` and what is known of `digest`, `file_mb` and `note`.

    Takes the pipeline's lineage (a mapping from stage to its report) or such steps already made.
    """
    if not isinstance(lineage, Mapping):
        return [dict(step) for step in lineage]
    if not lineage:
        return []
    steps = [{"name": "base model", "digest": lineage.get("base_digest", ""), "note": lineage.get("licence", {}).get("name", "")}]
    for stage, title in STAGES.items():
        if report := lineage.get(stage):
            steps.append({"name": title, "digest": report.get("file_digest", ""), "note": _stage_note(stage, report)})
    for name, file in lineage.get("export", {}).get("files", {}).items():
        kind = lineage["export"].get(name.removesuffix(".gguf"), "F16")
        steps.append({"name": name, "digest": file["digest"], "note": kind, "file_mb": file["bytes"] / (1 << 20)})
    return steps


def _stage_note(stage: str, report: Mapping[str, Any]) -> str:
    """One line on what a stage did, from its own figures."""
    match stage, report:
        case "trim", {"before": before, "after": after}:
            return f"{before:,} to {after:,} pieces"
        case "cut", {"kept": kept, "of": blocks}:
            return f"{len(kept)} of {blocks} blocks"
        case "capture", {"records": count}:
            return f"on {count:,} records"
        case _, {"training": {"examples": count, "first_loss": first, "last_loss": last}}:
            return f"{count:,} examples, loss {first:.2f} to {last:.2f}"
    return ""


def machine() -> dict[str, Any]:
    """This computer in a few words: what a figure in seconds depends on."""
    found: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {},
    }
    for library in LIBRARIES:
        try:
            found["libraries"][library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        memory = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return found
    found["cpu"] = next((line.partition(":")[2].strip() for line in cpu if line.startswith("model name")), found["cpu"])
    found["memory_mb"] = next((int(line.split()[1]) >> 10 for line in memory if line.startswith("MemTotal:")), 0)
    return found


def commit(folder: Path | None = None) -> str:
    """The git commit of the code, with "+changes" where the tree differs from it; "" outside a clone."""
    git = ["git", "-C", str(folder or Path(__file__).parents[3])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+changes" if changed else "")


def _points(value: float, kind: str) -> str:
    """A difference for people: points of accuracy, or of chrF."""
    return f"{100 * value:+.1f} points" if kind == "verdict" else f"{value:+.1f} chrF"


def _span(figures: Mapping[str, Any]) -> str:
    return f"{figures['accuracy_ci'][0]:.1%}, {figures['accuracy_ci'][1]:.1%}"
