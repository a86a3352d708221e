"""The evidence of a release: what was measured, how sure it is, and which sentences it allows.

One JSON object a release: every model on every held-out set with intervals and signatures, category by category with the losses named,
sizes and costs, digests of records, models and code, machine, commit, seed, the command that repeats it, lineage, calibration quality, and
what was not tested. Its keys: docs/evidence.md; its types: `schema.py`.

The sentences come from `claims`, the gate, and from nowhere else. All paired comparisons of an evidence are corrected together (Holm), and
so are all tests by category. No I/O but `machine`, `commit` and `code`, which look at this computer.
"""

import math
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from coordinator.forge.judging import categories, claims, economics, regressions
from coordinator.forge.judging.calibrate import good_enough
from coordinator.forge.judging.economics import ASSUMED, PowerModel
from coordinator.forge.judging.evaluation import Evaluation, paired_bootstrap
from coordinator.forge.judging.metrics import at_budget, calibration_error, deferral_area, deferral_curve, holm, reliability
from protocol.confidence import DEFAULT_BUDGET, VERDICT_RIGHT, Calibration
from protocol.digests import digest_bytes, digest_file, digest_value
from protocol.tasks import Record, Task, task_named

STAGES = {
    "trim": "vocabulary trimmed", "correct": "teacher, corrected", "cut": "student, cut out", "capture": "teacher's answers",
    "distil": "student, distilled", "on_policy": "student, on its own answers", "polish": "student, polished",
}  # fmt: skip
BUDGETS = (0.1, 0.2, 0.25, 0.3)
CURVE_POINTS = 50  # of a deferral curve kept for the plot
TEACHER, FLOAT, STUDENT = "teacher", "student_float", "student"  # names with a meaning
PREVIOUS, UNTRAINED = "previous", "untrained"  # the release before (also "release-N"), the student as it was cut; any other is a peer
LIBRARIES = ("llama-cpp-python", "sacrebleu", "scikit-learn", "torch", "transformers", "numpy")
CODE = ("coordinator", "protocol")  # folders whose Python decides the figures
ALWAYS_UNTESTED = (
    "Boards: everything ran on the machine named here, none of it on a Raspberry Pi or another ARM board.",
    "Human judgement: no person rated an answer; chrF and BLEU count shared letters and words.",
)
ONE_SET = "Other text than this: there is one held-out set, so nothing here says how the student does outside its kind of text."
NO_CATEGORIES = "Categories: a loss in numbers, names, negation, length or language could hide behind the averages."


def bundle(
    *,
    release: int,
    task: str,
    sets: Mapping[str, Mapping[str, Evaluation]],
    seed: int,
    command: str,
    records: Mapping[str, Sequence[Record]] | None = None,
    baselines: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    calibration: Calibration | None = None,
    lineage: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    not_tested: Sequence[str] = (),
    power: PowerModel = ASSUMED,
    machine: Mapping[str, Any] | None = None,
    commit: str = "",
    code: str = "",
    created: int = 0,
) -> dict[str, Any]:
    """The evidence of one release as plain JSON values.

    Args:
        sets: held-out set ("general", "esteli", ...) -> model ("teacher", "student_float", "student", "previous", "untrained", a
            quantisation's or a peer's name) -> evaluation. The first set is the student's own kind of text, where there are several.
        records: held-out set -> the records behind it, in order: with them come categories, their losses, and the records' digests.
        baselines: held-out set -> name -> at least `accuracy` and `accuracy_ci` (share right).
        calibration: of the student's GGUF; judged here on the held-out sets, on which it was not fitted.
        lineage: what the pipeline wrote (`Forged.lineage`), or steps as `lineage_steps` gives them.
        not_tested: sentences, added to those that always hold.
        power: from CPU-seconds to joules; its source is printed with them.
        created: seconds since 1970, UTC.
    """
    found = {name: one_set(models, (baselines or {}).get(name, {}), calibration, power, seed=seed) for name, models in sets.items()}
    correct_together(found)
    named = by_category(task_named(task), sets, records, found, seed=seed) if records else None
    statements = _statements(sets, found, baselines or {}, power, seed=seed)
    return {
        "release": release,
        "task": task,
        "created": created,
        "seed": seed,
        "command": command,
        "commit": commit,
        "code_digest": code,
        "machine": dict(machine or {}),
        "sets": found,
        "statements": [*statements, *(named["statements"] if named else ())],
        "regressions": named,
        "calibration": None if calibration is None else described(calibration),
        "lineage": lineage_steps(lineage),
        "not_tested": [
            *not_tested,
            *([ONE_SET] if len(sets) == 1 else []),
            *(categories.not_read(task_named(task)) if named else [NO_CATEGORIES]),
            *ALWAYS_UNTESTED,
        ],
    }


def one_set(
    models: Mapping[str, Evaluation],
    baselines: Mapping[str, Mapping[str, Any]],
    calibration: Calibration | None,
    power: PowerModel,
    *,
    seed: int,
) -> dict[str, Any]:
    """Figures and comparisons of one held-out set; no sentences yet."""
    teacher, student = models.get(TEACHER), models.get(STUDENT)
    result: dict[str, Any] = {
        "models": {key: evaluation.figures() | {"name": evaluation.name} for key, evaluation in models.items()},
        "baselines": {key: dict(figures) for key, figures in baselines.items()},
        "paired": {},
        "statements": [],
        "economics": {"power": msgspec.to_builtins(power), "models": economics.table(models, power), "share_of_teacher": None},
    }
    if not student:
        return result
    for key, other in models.items():
        if key != STUDENT:
            result["paired"][f"{STUDENT} - {key}"] = paired_bootstrap(other, student, seed=seed)
    if teacher:
        result["economics"]["share_of_teacher"] = economics.share(teacher, student, seed=seed)
    if student.kind == "verdict":
        result["codes"] = by_code(student, teacher)
    if all(answer.features for answer in student.answers):
        result["confidence"] = operating_point(student, teacher, calibration)
    return result


def correct_together(found: Mapping[str, dict[str, Any]]) -> None:
    """Write `p_holm` and `comparisons` into every paired comparison: Holm's correction over all sets' together."""
    changes = [change for each in found.values() for change in each["paired"].values()]
    for change, adjusted in zip(changes, holm([change["p"] for change in changes]), strict=True):
        change |= {"p_holm": adjusted, "comparisons": float(len(changes))}


def by_category(
    task: Task,
    sets: Mapping[str, Mapping[str, Evaluation]],
    records: Mapping[str, Sequence[Record]],
    found: Mapping[str, dict[str, Any]],
    *,
    seed: int,
) -> dict[str, Any]:
    """Write each set's table by category and its records' digest into `found`, and return the named losses of all sets together."""
    rows: list[regressions.Comparison] = []
    few: list[dict[str, Any]] = []
    for name, models in sets.items():
        if name not in records:
            continue
        found[name]["records"] = {"n": len(records[name]), "digest": digest_value(list(records[name]))}
        where = regressions.places(records[name], task)
        figures = {key: regressions.measured(model, records[name], task, where) for key, model in models.items()}
        found[name]["categories"] = category_table(figures, seed=seed)
        few += [{"set": name, "category": key, "n": len(which)} for key, which in where.items() if len(which) < regressions.FEWEST]
        if STUDENT in figures:
            for key in filter(is_held_to, figures):
                rows += regressions.compare(name, key, figures[key], figures[STUDENT], seed=seed)
    rows = regressions.corrected(rows)
    return {
        "alpha": regressions.ALPHA,
        "fewest": regressions.FEWEST,
        "correction": regressions.CORRECTION,
        "tests": len(rows),
        "rows": msgspec.to_builtins(rows),
        "too_few": few,
        "statements": claims.losses(rows),
    }


def is_held_to(model: str) -> bool:
    """Whether a loss against this model is looked for by category: the teacher, the float student, the release before."""
    return model in (TEACHER, FLOAT, PREVIOUS) or model.startswith("release-")


def category_table(figures: Mapping[str, regressions.Measured], *, seed: int) -> list[dict[str, Any]]:
    """One row a category and measure, with every model's value and interval."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for model, measured in figures.items():
        for row in regressions.values(model, measured, seed=seed):
            place = rows.setdefault(
                (row.category, row.measure), {"category": row.category, "measure": row.measure, "n": row.n, "models": {}}
            )
            place["models"][model] = {"value": row.value, "low": row.low, "high": row.high}
    return list(rows.values())


def _statements(
    sets: Mapping[str, Mapping[str, Evaluation]],
    found: Mapping[str, dict[str, Any]],
    baselines: Mapping[str, Mapping[str, Mapping[str, Any]]],
    power: PowerModel,
    *,
    seed: int,
) -> list[str]:
    """Every sentence, each also with its set: one topic after another, so that a gain on one set stands beside what the others say."""
    topics: dict[str, list[str]] = {}
    intervals = sum(TEACHER in models and STUDENT in models for models in sets.values())
    for name, models in sets.items():
        for topic, sentence in _sentences(name, models, found[name], baselines.get(name, {}), power, seed=seed, intervals=intervals):
            topics.setdefault(topic, []).append(sentence)
            found[name]["statements"].append(sentence)
    kind = next((model.kind for models in sets.values() for model in models.values()), "text")
    for topic in topics:
        changes = {name: change for name, each in found.items() if (change := each["paired"].get(f"{STUDENT} - {topic}"))}
        if sentence := claims.elsewhere(topic, changes, kind):
            topics[topic].append(sentence)
    return [sentence for each in topics.values() for sentence in each]


def _sentences(
    name: str,
    models: Mapping[str, Evaluation],
    found: Mapping[str, Any],
    baselines: Mapping[str, Mapping[str, Any]],
    power: PowerModel,
    *,
    seed: int,
    intervals: int,
) -> list[tuple[str, str]]:
    """(topic, sentence) of one set. The topic of a comparison is the other model."""
    student = models.get(STUDENT)
    if student is None:
        return []
    told: list[tuple[str, str]] = []
    if TEACHER in models:
        told.append(("kept", claims.retention(models[TEACHER], student, name, seed=seed, comparisons=intervals)))
    for key in models:
        change = found["paired"].get(f"{STUDENT} - {key}")
        if key == FLOAT:
            told.append((FLOAT, claims.quantisation(change, name, student.kind)))
        elif key not in (STUDENT, TEACHER):
            told.append((key, claims.against_peer(key, change, name, student.kind)))
    for key, figures in baselines.items():
        if sentence := claims.against(key, figures, student.figures(), name):
            told.append(("baselines", sentence))
    if share := found["economics"]["share_of_teacher"]:
        told.append(("cost", claims.cost(share["cpu"], name, assumption=f"{power.watts_per_core:g} W a busy core; {power.source}")))
    return told


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
    if made := lineage.get("targets"):  # with all verdicts of the audit, and what a teacher that only tells text cannot do
        told = {"cost": made.get("cost"), "audit": made.get("audit")}
        steps.append({"name": "targets", "digest": made.get("file_digest", ""), "note": made.get("sentence", ""), **told})
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
        case "trim", {"before": before, "after": after, "texts": texts, "identical": identical, "same": same}:
            seen = "unseen" if report.get("unseen") else "counted"
            return (
                f"{before:,} to {after:,} pieces; of {texts:,} {seen} texts {_percent(identical)} are read as before, "
                f"of their tokens {_percent(same)}"
            )
        case "cut", {"kept": kept, "of": blocks}:
            return f"{len(kept)} of {blocks} blocks"
        case "cut", {"scratch": True}:
            return "not cut: random weights in its shape"
        case "capture", {"records": count}:
            return f"on {count:,} records"
        case _, {"training": {"examples": count, "first_loss": first, "last_loss": last}}:
            return f"{count:,} examples, loss {first:.2f} to {last:.2f}"
    return ""


def _percent(share: float) -> str:
    """With one decimal, rounded down: what is not all is not shown as 100."""
    return f"{math.floor(1000 * share) / 10:.1f}%"


def repeat_line(
    model: Path,
    flags: Mapping[str, object],
    option: str,
    files: Mapping[str, Path],
    others: Mapping[str, tuple[Path, Path | None]],
    *,
    seed: int,
) -> str:
    """The command that measures an evidence's figures again; they come out the same, but for times.

    Args:
        flags: option of `evaluate` -> its value; those of None are left out.
        option: how the held-out sets were given, `--pairs` or `--records`; `files`: their files by name.
        others: the models beside the student -> GGUF and adapter.
    """
    words: list[object] = ["milpa-coordinator", "evaluate", "--model", model]
    for flag, value in flags.items():
        words += [flag, value] if value is not None else []
    for name, file in files.items():
        words += [option, _under(name, str(file))]
    for name, (file, lora) in others.items():
        words += ["--against", _under(name, f"{file}+{lora}" if lora else str(file))]
    return shlex.join(str(word) for word in [*words, "--seed", seed, "--categories", "--json"])


def _under(name: str, value: str) -> str:
    """NAME=VALUE; a name with a "=" can only be the file's own, which it has without being told."""
    return value if "=" in name else f"{name}={value}"


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
    """The git commit of the code, with "+changes" where the tree differs from it in more than measured results; "" outside a clone."""
    git = ["git", "-C", str(folder or Path(__file__).parents[3])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+changes" if changed else "")


def code(folder: Path | None = None) -> str:
    """SHA-256 over the Python that decides the figures (CODE), by file name and content: holds where there is no git too."""
    root = folder or Path(__file__).parents[3]
    files = sorted(path for side in CODE for path in (root / side).rglob("*.py"))
    return digest_bytes("".join(f"{path.relative_to(root).as_posix()} {digest_file(path)}\n" for path in files).encode())
