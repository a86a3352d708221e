"""The claim gate: the one place that may write a sentence about how models compare. No I/O.

Every sentence is made from an interval, carries it with n, and goes no further:
 * "keeps X% of the teacher's ..." only where the paired 95% interval of the ratio is narrower than +-CLOSE and holds X as printed (X is
   rounded down); else the sentence is the interval itself, rounded outwards, and says that it allows no closer one;
 * "better" and "worse" only where the interval leaves zero out and, among several comparisons, p stays below ALPHA after Holm's correction;
   else "no difference found", with the interval that could hide one: never "equal", "matches" or "loses nothing";
 * a baseline whose interval reaches the student's is named as being as good, and one above it as better: this errs against us;
 * a gain on one held-out set is followed by what the other sets say;
 * figures that cannot be (not finite, an upside-down interval, no records) make no sentence at all.
tests/evaluation/test_claims.py searches the other modules and the templates for such sentences.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.forge.judging import regressions
from coordinator.forge.judging.evaluation import Evaluation
from coordinator.forge.judging.metrics import paired_ratio
from coordinator.forge.judging.regressions import ALPHA, CHRF, Comparison
from protocol.errors import BadInput, NotEnough

CLOSE = 0.03  # half-width of a ratio's interval that still carries "keeps X%"
EDGE = 1e-9  # of a printed unit: what floating point may add to a figure that lies exactly on a printed one
ABSURD = 1e9  # no share, difference or number of records is this large
LABELS = {
    "nearest": "nearest neighbour on the text", "trees": "boosted trees on the figures",
    "trees_note": "boosted trees on figures and note", "previous": "the previous release", "untrained": "the untrained cut",
    "teacher": "the teacher", "student_float": "the float student",
}  # fmt: skip


class Unsupported(NotEnough):
    """The interval does not carry the sentence that was asked for; the message is the sentence it does carry."""


def retention(teacher: Evaluation, student: Evaluation, where: str, *, seed: int, comparisons: int = 1) -> str:
    """How much of the teacher's quality the student keeps, as far as the paired interval carries it."""
    what = "verdict accuracy" if student.kind == "verdict" else "mean sentence chrF"
    found = paired_ratio(teacher.quality(), student.quality(), seed=seed)
    if found is None:
        return f"{where}: the teacher's {what} is too near zero on {len(teacher.answers)} records for a ratio to mean anything."
    return keeps(found, where, what, comparisons=comparisons)


def keeps(found: Mapping[str, float], where: str, what: str, *, comparisons: int = 1, strict: bool = False) -> str:
    """The sentence about a share kept: `found` has ratio, low, high (95%, paired) and n.

    Args:
        strict: refuse where only the weaker sentence is carried.

    Raises:
        Unsupported: with `strict`; the message is the weaker sentence.
        BadInput: figures that cannot be.
    """
    ratio, low, high, n = _checked(found["ratio"], found["low"], found["high"], found["n"])
    if low < 0:
        raise BadInput(f"{where}: a share kept of {low} is below zero: no sentence is made from it")
    many = _among(comparisons)
    if (high - low) / 2 <= CLOSE and (shown := _share_inside(ratio, low, high)):
        interval = f"95% interval {_down(100 * low, 1)}% to {_up(100 * high, 1)}%"
        return f"{where}: the student keeps {shown}% of the teacher's {what} ({interval}, paired, n = {n}{many})."
    weaker = (
        f"{where}: the student keeps between {_down(100 * low, 0)}% and {_up(100 * high, 0)}% of the teacher's {what} "
        f"(95% interval, paired{many}); {n} records allow no closer statement."
    )
    if strict:
        raise Unsupported(weaker)
    return weaker


def quantisation(change: Mapping[str, float], where: str, kind: str) -> str:
    """What quantisation did, from the paired difference of the GGUF and the float student."""
    found = _interval(change, kind)
    if _told_apart(change):
        return f"{where}: quantisation changed the student by {found}."
    return f"{where}: no difference found between the quantised student and the float one: {found}."


def against(name: str, baseline: Mapping[str, Any], student: Mapping[str, Any], where: str) -> str:
    """A sentence where the baseline is as good as the student or better; empty where the student is clearly ahead."""
    if "accuracy" not in baseline or "accuracy" not in student:
        return ""
    low, high = baseline.get("accuracy_ci") or (baseline["accuracy"], baseline["accuracy"])
    its, low, high, _ = _checked(baseline["accuracy"], low, high, baseline.get("n") or 1)
    bottom, top = student["accuracy_ci"]
    mine, bottom, top, _ = _checked(student["accuracy"], bottom, top, student.get("n") or 1)
    figures = f"{its:.1%} [{low:.1%}, {high:.1%}] against {mine:.1%} [{bottom:.1%}, {top:.1%}]"
    if low > top:
        return f"{where}: the baseline {_label(name)} is better than the student: {figures}."
    if high >= bottom:
        return f"{where}: the baseline {_label(name)} is as good as the student within the intervals: {figures}."
    return ""


def against_peer(name: str, change: Mapping[str, float], where: str, kind: str) -> str:
    """How the student stands to another model or system on the same records."""
    found, other = _interval(change, kind), _label(name)
    if _told_apart(change):
        return f"{where}: {f'the student is better than {other}' if change['low'] > 0 else f'{other} is better than the student'}: {found}."
    return f"{where}: no difference found between the student and {other}: {found}."


def elsewhere(name: str, changes: Mapping[str, Mapping[str, float]], kind: str) -> str:
    """For a gain that not every held-out set shows: which show it, and what the others say. Empty where all do or none does."""
    gained = [where for where, change in changes.items() if _told_apart(change) and change["low"] > 0]
    others = [where for where in changes if where not in gained]
    if not gained or not others:
        return ""
    told = "; ".join(f"{where} {_interval(changes[where], kind)}" for where in others)
    return f"The gain over {_label(name)} at {', '.join(gained)} is not found everywhere: {told}."


def loss(row: Comparison) -> str:
    """A loss in a category, named.

    Raises:
        Unsupported: the corrected test or the interval does not carry it.
    """
    _, low, high, n = _checked(row.diff, row.low, row.high, row.n)
    kind = "text" if row.measure == CHRF else "verdict"
    found = f"{_points(row.diff, kind)} (95% interval {_points(low, kind, _down)} to {_points(high, kind, _up)}, paired, n = {n}"
    if not (row.loss and high < 0 and row.p_holm < ALPHA):
        raise Unsupported(f"{row.set}, {row.category}: no loss found in {row.measure} against {_label(row.against)}: {found}).")
    return (
        f"{row.set}, {row.category}: {row.measure} is worse than with {_label(row.against)}: {found}; "
        f"p {_chance(row.p_holm)} after Holm's correction over {row.tests} tests)."
    )


def losses(rows: Sequence[Comparison]) -> list[str]:
    """What may be said of losses by category: each named one, and per model compared with, what "none" could hide."""
    told = [loss(row) for row in regressions.losses(rows)]
    for name in dict.fromkeys(row.against for row in rows):
        its = [row for row in rows if row.against == name]
        if not any(row.loss for row in its):
            told.append(_none_found(name, its))
    return told


def _none_found(name: str, rows: Sequence[Comparison]) -> str:
    blind = [(row.detectable / (100 if row.measure == CHRF else 1), row) for row in rows if row.detectable is not None]
    tail = ""
    if blind:
        _, worst = max(blind, key=lambda pair: pair[0])
        size = _points(worst.detectable or 0.0, "text" if worst.measure == CHRF else "verdict", _up).lstrip("+")
        tail = (
            f" The bluntest of them ({worst.set}, {worst.category}, {worst.measure}, n = {worst.n}) misses one of {size} in 2 of 10 runs."
        )
    return f"No loss by category found against {_label(name)}: {len(rows)} of {rows[0].tests} tests, Holm's correction.{tail}"


def cost(found: Mapping[str, float], where: str, *, assumption: str) -> str:
    """The student's CPU-seconds as a share of the teacher's; joules are the same share, by the stated model.

    Raises:
        BadInput: figures that cannot be.
    """
    _, low, high, n = _checked(found["ratio"], found["low"], found["high"], found["n"])
    return (
        f"{where}: an answer takes between {_down(100 * low, 1)}% and {_up(100 * high, 1)}% of the teacher's CPU-seconds (95% interval, "
        f"paired, n = {n}), and of its joules by the model used here ({assumption})."
    )


def _told_apart(change: Mapping[str, float]) -> bool:
    """Whether the interval leaves zero out, and p after correction agrees where there is one."""
    _checked(change["diff"], change["low"], change["high"], change.get("n", 1))
    return (change["low"] > 0 or change["high"] < 0) and change.get("p_holm", 0.0) < ALPHA


def _checked(value: float, low: float, high: float, n: float) -> tuple[float, float, float, int]:
    """The figures, the interval widened to hold the value (a percentile interval of few records need not).

    Raises:
        BadInput: not finite (NaN fails every comparison), absurdly large, upside down, or of no records.
    """
    if not all(abs(each) < ABSURD for each in (value, low, high, n)) or low > high or n < 1:
        raise BadInput(f"{value} in [{low}, {high}] of {n} records is no result: no sentence is made from it")
    return value, min(low, value), max(high, value), int(n)


def _interval(change: Mapping[str, float], kind: str) -> str:
    value, low, high, n = _checked(change["diff"], change["low"], change["high"], change.get("n", 1))
    size = f", n = {n}" if "n" in change else ""
    holm = f"; p {_chance(change['p_holm'])} after Holm over {int(change['comparisons'])} comparisons" if "p_holm" in change else ""
    return f"{_points(value, kind)} (95% interval {_points(low, kind, _down)} to {_points(high, kind, _up)}, paired{size}{holm})"


def _share_inside(ratio: float, low: float, high: float) -> str:
    """The ratio in percent, rounded down, with as few decimals as keep it inside its interval; "" where one decimal is not enough."""
    for digits in (0, 1):
        shown = _down(100 * ratio, digits)
        if low - EDGE <= float(shown) / 100 <= high + EDGE:
            return shown
    return ""


def _down(value: float, digits: int) -> str:
    return f"{math.floor(value * 10**digits + EDGE) / 10**digits:.{digits}f}"


def _up(value: float, digits: int) -> str:
    return f"{math.ceil(value * 10**digits - EDGE) / 10**digits:.{digits}f}"


def _near(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def _points(value: float, kind: str, rounded: Any = _near) -> str:
    """A difference for people: points of a share, or of chrF; ends of intervals are rounded outwards."""
    found = rounded(100 * value, 1) if kind == "verdict" else rounded(value, 1)
    found = "0.0" if float(found) == 0 else found  # no minus zero
    return ("" if found.startswith("-") else "+") + found + (" points" if kind == "verdict" else " chrF")


def _chance(p: float) -> str:
    if not 0 <= p <= 1:
        raise BadInput(f"a p of {p} is no probability: no sentence is made from it")
    return "< 0.001" if p < 0.001 else f"{math.ceil(1000 * p - EDGE) / 1000:.3f}"


def _among(comparisons: int) -> str:
    return f"; one of {comparisons} such intervals, each 95% by itself" if comparisons > 1 else ""


def _label(name: str) -> str:
    return LABELS.get(name, name)
