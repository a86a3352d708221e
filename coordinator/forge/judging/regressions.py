"""Category by category: how good each model is, and where one lost against another. No I/O; randomness comes in as a seed.

 * Measures: verdict right (verdict tasks), chrF of the sentence (mean of the sentences), and "kept": the numbers, names, negation or
   language that make the record one of the category stand in the answer (`categories.kept`). A gain in chrF hides a spoiled digit; "kept"
   does not.
 * A loss is named where the paired one-sided randomisation test's p, after Holm's correction over every test of the evidence (all held-out
   sets, categories, measures and models compared with), is below ALPHA, and the 95% interval of the difference lies below zero. So an
   evidence without any true loss names one with probability at most ALPHA.
 * Categories with fewer than FEWEST records are shown and not tested. Every test says which loss it could have found (`detectable`).
Not found is not absent: read `detectable`.
"""

from collections.abc import Mapping, Sequence

import msgspec

from coordinator.forge.judging import categories
from coordinator.forge.judging.evaluation import Evaluation
from coordinator.forge.judging.metrics import FLIPS, detectable_loss, holm, loss_p, mean_interval, paired_difference, wilson
from protocol.errors import BadInput
from protocol.tasks import Record, Task

ALPHA = 0.05  # the chance of naming any loss where there is none
FEWEST = 30  # records of a category; with fewer, only a collapse could be told from chance
RESAMPLES = 2_000  # of a category's interval
ALL = "all"  # every record
VERDICT, CHRF, KEPT = "verdict right", "chrF", "kept"
CORRECTION = (
    f"one-sided paired randomisation tests, Holm's correction over all of them, {ALPHA:.0%}; fewer than {FEWEST} records: not tested"
)


class Value(msgspec.Struct, frozen=True):
    """One model in one category."""

    category: str
    measure: str  # VERDICT and KEPT: share; CHRF: 0 to 100
    model: str
    n: int
    value: float
    low: float  # 95%: Wilson's for shares, bootstrap for chrF
    high: float


class Comparison(msgspec.Struct, frozen=True):
    """The student against another model, paired, in one category."""

    set: str
    category: str
    measure: str
    against: str
    n: int
    diff: float  # student - other, in the measure's unit
    low: float  # 95%, paired bootstrap; this interval by itself
    high: float
    p: float  # one-sided, of a loss
    detectable: float | None  # the loss that would have been found 8 times in 10, before Holm lets later tests pass more easily
    p_holm: float = 1.0
    tests: int = 1  # in the evidence
    loss: bool = False


Measured = dict[tuple[str, str], list[float]]  # (category, measure) -> a figure a record


def places(records: Sequence[Record], task: Task) -> dict[str, list[int]]:
    """Category -> the places of its records, in the order that readers expect."""
    found: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        for category in categories.categories(record, task):
            found.setdefault(category, []).append(place)
    return {ALL: list(range(len(records)))} | {name: found[name] for name in categories.order(found)}


def measured(evaluation: Evaluation, records: Sequence[Record], task: Task, where: Mapping[str, Sequence[int]]) -> Measured:
    """Every category's figures, a record each.

    Raises:
        BadInput: the evaluation is of other records.
    """
    if [answer.id for answer in evaluation.answers] != [record.id for record in records]:
        raise BadInput(f"{evaluation.name or 'a model'} was evaluated on other records than those given for the categories")
    answers = evaluation.answers
    found: Measured = {}
    for category, chosen in where.items():
        if evaluation.kind == "verdict":
            found[category, VERDICT] = [float(answers[place].correct) for place in chosen]
        found[category, CHRF] = [answers[place].chrf for place in chosen]
        said = [categories.kept(category, task.parse(answers[place].text).sentence, records[place], task) for place in chosen]
        if said and None not in said:
            found[category, KEPT] = [float(bool(keeps)) for keeps in said]
    return found


def values(model: str, figures: Measured, *, seed: int) -> list[Value]:
    """A model's table: one row a category and measure."""
    rows = []
    for (category, measure), each in figures.items():
        count, mean = len(each), sum(each) / len(each)
        low, high = mean_interval(each, seed=seed) if measure == CHRF else wilson(round(sum(each)), count)
        rows.append(Value(category, measure, model, count, mean, min(low, mean), max(high, mean)))
    return rows


def compare(
    set_name: str, against: str, before: Measured, after: Measured, *, seed: int, flips: int = FLIPS, resamples: int = RESAMPLES
) -> list[Comparison]:
    """The student (`after`) against one other model (`before`) in every category with FEWEST records or more; not corrected yet."""
    rows = []
    for (category, measure), mine in after.items():
        theirs = before[category, measure]
        if len(mine) < FEWEST:
            continue
        change = paired_difference(theirs, mine, seed=seed, resamples=resamples)
        rows.append(
            Comparison(
                set=set_name, category=category, measure=measure, against=against, n=len(mine), diff=change["diff"], low=change["low"],
                high=change["high"], p=loss_p(theirs, mine, seed=seed, flips=flips),
                detectable=detectable_loss(theirs, mine, alpha=ALPHA),
            )
        )  # fmt: skip
    return rows


def corrected(rows: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons after Holm's correction over all of them: these must be all of the evidence's."""
    return [
        msgspec.structs.replace(row, p_holm=adjusted, tests=len(rows), loss=adjusted < ALPHA and row.high < 0)
        for row, adjusted in zip(rows, holm([row.p for row in rows]), strict=True)
    ]


def losses(rows: Sequence[Comparison]) -> list[Comparison]:
    """The named losses, the surest first."""
    return sorted((row for row in rows if row.loss), key=lambda row: (row.p_holm, row.diff))
