"""Evidence bundles as rows to print: tolerant of what is missing, strict about what is shown. No I/O.

Rules: a figure that is not in the bundle is not shown, and never computed from another. Qualities are shares in [0, 1] here: verdict
accuracy as it is, chrF divided by 100. The bundle's keys are described in `docs/evidence.md`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from coordinator.dashboard import losses
from coordinator.dashboard.charts import Bar, Plot, bar, finite, listed, plot
from coordinator.dashboard.views.series import wilson
from coordinator.dashboard.words import NO_VALUE, THIN, Words
from coordinator.fleet.ledger import PublishedRelease

ORDER = ("teacher", "student_float", "student")
GENERAL = "general"
MIB = 2**20


class Row(msgspec.Struct, frozen=True):
    """One model on one set."""

    name: str
    where: str  # of a row that is not this release's: which it is, or when it was measured
    before: bool
    bar: Bar
    told: str
    interval: str
    n: int | None
    gap: str  # to the teacher, points
    size: str
    memory: str
    speed: str
    latency: str


class Set(msgspec.Struct, frozen=True):
    """One held-out set."""

    name: str
    rows: tuple[Row, ...]
    tables: tuple[losses.Table, ...]
    baselines: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]


class Proof(msgspec.Struct, frozen=True):
    """A bundle, ready to print."""

    metric: str  # "accuracy", "chrf" or "bleu"
    lost: tuple[str, ...]  # what the evidence says of losses by kind of record
    sets: tuple[Set, ...]
    not_tested: tuple[str, ...]
    signatures: tuple[str, ...]
    command: str
    machine: str
    commit: str
    seed: str


class Quality(msgspec.Struct, frozen=True):
    """A release in one bar."""

    metric: str
    set: str
    bar: Bar
    told: str


class Curve(msgspec.Struct, frozen=True):
    """A plot with the words below it."""

    plot: Plot
    metric: str
    words: str


class Step(msgspec.Struct, frozen=True):
    """One step of a lineage."""

    what: str  # "teacher", or the step's note
    name: str
    size: int = 0
    digest: str = ""


def sets_of(evidence: Any) -> dict[str, dict[str, Any]]:
    """Held-out set -> what is known of it, the general one first. A flat bundle {"teacher": .., "student": ..} counts as general."""
    if not isinstance(evidence, Mapping):
        return {}
    sets = evidence.get("sets")
    if not isinstance(sets, Mapping):
        models = {name: evidence[name] for name in ORDER if isinstance(evidence.get(name), Mapping)}
        sets = {GENERAL: {"models": models}} if models else {}
    kept = {str(name): dict(value) for name, value in sets.items() if isinstance(value, Mapping)}
    return dict(sorted(kept.items(), key=lambda item: (item[0] != GENERAL, item[0])))


def figures_of(found: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A model's figures on a set, or {}."""
    models = found.get("models")
    value = models.get(model) if isinstance(models, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def quality_of(figures: Mapping[str, Any]) -> tuple[str, float, float | None, float | None] | None:
    """(metric, value, low, high) as shares: accuracy where there is one, else chrF, else BLEU."""
    for metric, scale in (("accuracy", 1.0), ("chrf", 100.0), ("bleu", 100.0)):
        value = finite(figures.get(metric))
        if value is not None:
            interval = figures.get(f"{metric}_ci")
            low, high = (finite(one) for one in interval) if isinstance(interval, list) and len(interval) == 2 else (None, None)
            return metric, value / scale, low / scale if low is not None else None, high / scale if high is not None else None
    return None


def summary(release: PublishedRelease, words: Words) -> tuple[Quality | None, str]:
    """(the student's quality in one bar, its gap to the teacher) on the general set, or on the first there is."""
    for name, found in sets_of(release.evidence).items():
        mine = quality_of(figures_of(found, "student"))
        if mine is not None:
            metric, value, low, high = mine
            teacher = quality_of(figures_of(found, "teacher"))
            gap = words.signed(100 * (value - teacher[1])) if teacher and teacher[0] == metric else ""
            return Quality(words.text(f"metric.{metric}"), name, bar(value, low, high, top=1.0), _told(words, metric, value)), gap
    return None, ""


def proof(
    release: PublishedRelease, before: PublishedRelease | None, words: Words, *, earlier: Sequence[PublishedRelease] = ()
) -> Proof | None:
    """A release's bundle beside the one it was judged against; None when there is nothing to show.

    Args:
        earlier: where to look for the teacher's figures when this bundle, of a round, has none.
    """
    sets, then = sets_of(release.evidence), sets_of(before.evidence if before else None)
    shown, metric, signatures = [], "", []
    for name, found in sets.items():
        rows = _rows(name, found, then.get(name, {}), before, words, earlier)
        if not rows:
            continue
        first = quality_of(figures_of(found, "student")) or quality_of(figures_of(found, "teacher"))
        metric = metric or (first[0] if first else "")
        baselines = found.get("baselines")
        shown.append(
            Set(
                name=name, rows=rows, tables=losses.tables(name, found, then.get(name, {}), release.evidence or {}, words),
                baselines=tuple(_baselines(baselines, words)) if isinstance(baselines, Mapping) else (),
                statements=_lines(found.get("statements")),
            )
        )  # fmt: skip
        figures = figures_of(found, "student")
        signatures += [str(figures[key]) for key in ("chrf_signature", "bleu_signature") if figures.get(key)]
    if not shown or not isinstance(release.evidence, Mapping):
        return None
    machine = release.evidence.get("machine")
    computer = ", ".join(str(machine[key]) for key in ("cpu", "system") if machine.get(key)) if isinstance(machine, Mapping) else ""
    seed = release.evidence.get("seed")
    return Proof(
        metric=metric, lost=losses.told(release.evidence), sets=tuple(shown), not_tested=_lines(release.evidence.get("not_tested")),
        signatures=tuple(dict.fromkeys(signatures)), command=_text(release.evidence.get("command")), machine=computer,
        commit=_text(release.evidence.get("commit")), seed=str(seed) if isinstance(seed, int) else "",
    )  # fmt: skip


def lineage(release: PublishedRelease, words: Words) -> tuple[Step, ...]:
    """From the teacher to this release, left to right: what the bundle tells, else what the manifest holds."""
    told = release.evidence.get("lineage") if isinstance(release.evidence, Mapping) else None
    steps: list[Step] = []
    manifest = release.manifest
    if isinstance(told, list) and told:
        for one in told[:20]:
            if isinstance(one, Mapping) and one.get("name"):
                size = int((finite(one.get("file_mb")) or 0.0) * MIB)
                steps.append(Step(_text(one.get("note")), _text(one["name"]), size, _text(one.get("digest"))))
    else:
        for role, kind in (("teacher", "model"), ("student", "model"), ("student", "adapter"), ("student", "calibration")):
            file = manifest.file(role, kind)  # type: ignore[arg-type]
            if file is not None:
                steps.append(Step(words.text(f"lineage.{role if kind == 'model' else kind}"), file.name, file.size, file.digest))
    steps.append(Step(words.text("lineage.this"), words.text("release-n", number=release.number), digest=release.digest))
    return tuple(steps)


def deferral(release: PublishedRelease | None, asked: float | None, words: Words) -> Curve | None:
    """The deferral curve of the first set that has one, the planned operating point on it, and where the fleet really is."""
    for found in sets_of(release.evidence if release else None).values():
        known = found.get("confidence")
        points = known.get("curve") if isinstance(known, Mapping) else None
        mine = quality_of(figures_of(found, "student"))
        if not isinstance(known, Mapping) or not isinstance(points, list) or mine is None:
            continue
        scale = 1.0 if mine[0] == "accuracy" else 100.0
        curve = [(float(share), float(value) / scale) for share, value in points if finite(share) is not None and finite(value) is not None]
        if len(curve) < 2:
            continue
        dots = []
        plan, reached = finite(known.get("escalated")), finite(known.get("accuracy_with_escalation"))
        told = ""
        if plan is not None and reached is not None:
            dots.append((plan, reached / scale, 5.0, words.text("escalations.plan", share=words.percent(plan)), None, None))
            told = words.text("escalations.operating", share=words.percent(plan), quality=_told(words, mine[0], reached / scale))
        if asked is not None:
            told = f"{told} {words.text('escalations.really', share=words.percent(asked))}".strip()
        straight = ("", (curve[0], curve[-1]), True)
        low = int(min(value for _, value in curve) * 10) / 10
        return Curve(
            plot([straight, (words.text("escalations.curve"), curve, False)], dots, low=low), words.text(f"metric.{mine[0]}"), told
        )
    return None


def calibration(release: PublishedRelease | None, words: Words) -> Curve | None:
    """Said against found: one dot a bin of confidence, its size after the count."""
    for found in sets_of(release.evidence if release else None).values():
        known = found.get("confidence")
        bins = known.get("reliability") if isinstance(known, Mapping) else None
        if not isinstance(known, Mapping) or not isinstance(bins, list):
            continue
        dots = []
        counted = [one for one in bins if isinstance(one, Mapping) and (finite(one.get("count")) or 0) > 0]
        most = max((finite(one.get("count")) or 0.0 for one in counted), default=0.0)
        for one in counted:
            said, right, count = finite(one.get("confidence")), finite(one.get("accuracy")), int(finite(one.get("count")) or 0)
            if said is not None and right is not None:
                low, high = wilson(min(count, round(right * count)), count)
                dots.append(
                    (
                        said,
                        right,
                        2.5 + 4 * (count / most) ** 0.5,
                        f"{words.percent(said)} / {words.percent(right)}, n = {count}",
                        low,
                        high,
                    )
                )
        if dots:
            ece = finite(known.get("ece"))
            told = words.text("escalations.ece", value=words.number(100 * ece, 1)) if ece is not None else ""
            if not known.get("calibrated", True):
                told = f"{words.text('escalations.uncalibrated')} {told}".strip()
            return Curve(plot([("", ((0.0, 0.0), (1.0, 1.0)), True)], dots), "", told)
    return None


def _rows(
    name: str, found: Mapping[str, Any], then: Mapping[str, Any], before: PublishedRelease | None, words: Words,
    earlier: Sequence[PublishedRelease],
) -> tuple[Row, ...]:  # fmt: skip
    """Teacher, student, the student before, then the others. A round's bundle has the release before under "release-N", on the same
    records: then that is the row, and the older bundle is not needed."""
    models = found.get("models")
    names = [str(model) for model in models] if isinstance(models, Mapping) else []
    judged = f"release-{before.number}" if before is not None else ""
    teacher = quality_of(figures_of(found, "teacher"))
    rows: list[Row] = []
    if "teacher" not in names:
        for one in sorted(earlier, key=lambda kept: -kept.number):
            if figures := figures_of(sets_of(one.evidence).get(name, {}), "teacher"):
                rows += _row("teacher", figures, None, words, where=words.text("model.measured-then", number=one.number))
                break
    for model in [known for known in ORDER if known in names] + sorted(known for known in names if known not in ORDER):
        if model == judged:
            continue
        rows += _row(model, figures_of(found, model), teacher if model != "teacher" else None, words)
        if model == "student" and before is not None:
            where = words.text("release-n", number=before.number)
            if judged in names:
                same = f"{where}, {words.text('model.same-records')}"
                rows += _row("student", figures_of(found, judged), teacher, words, where=same, before=True)
            else:
                rows += _row(
                    "student", figures_of(then, "student"), quality_of(figures_of(then, "teacher")), words, where=where, before=True
                )
    return tuple(rows)


def _row(
    name: str,
    figures: Mapping[str, Any],
    teacher: tuple[str, float, Any, Any] | None,
    words: Words,
    *,
    where: str = "",
    before: bool = False,
) -> list[Row]:
    quality = quality_of(figures)
    if quality is None:
        return []
    metric, value, low, high = quality
    interval = f"[{words.number(100 * low, 1)}, {words.number(100 * high, 1)}]" if low is not None and high is not None else ""
    count = finite(figures.get("n"))

    def measure(key: str, unit: str, digits: int) -> str:
        known = finite(figures.get(key))
        return words.number(known, digits) + THIN + unit if known is not None else NO_VALUE

    return [
        Row(
            name=words.word(f"model.{name}", name), where=where, before=before, bar=bar(value, low, high, top=1.0),
            told=_told(words, metric, value), interval=interval, n=int(count) if count is not None else None,
            gap=words.signed(100 * (value - teacher[1])) if teacher and teacher[0] == metric else "",
            size=measure("file_mb", "MiB", 1), memory=measure("peak_rss_mb", "MiB", 0),
            speed=measure("tokens_per_second", "tok/s", 0), latency=measure("latency_p50_ms", "ms", 0),
        )
    ]  # fmt: skip


def _baselines(baselines: Mapping[str, Any], words: Words) -> list[tuple[str, str]]:
    told = []
    for name, figures in baselines.items():
        quality = quality_of(figures) if isinstance(figures, Mapping) else None
        if quality is not None:
            metric, value, low, high = quality
            interval = f" [{words.number(100 * low, 1)}, {words.number(100 * high, 1)}]" if low is not None and high is not None else ""
            told.append((str(name).replace("_", " "), _told(words, metric, value) + interval))
    return told


def _told(words: Words, metric: str, value: float) -> str:
    return words.percent(value) if metric == "accuracy" else words.number(100 * value, 1)


def _lines(value: Any) -> tuple[str, ...]:
    return tuple(str(line) for line in listed(value))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
