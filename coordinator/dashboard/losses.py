"""Where a release is worse: verdict by verdict, and by kind of record (numbers, names, negation, length, language, site). No I/O.

Rules: tolerant of what a bundle lacks. Worst first. Among verdicts, which have no test of their own, "worse" needs the interval of the
difference to lie below zero; among kinds it is what the evidence itself named as a loss, after its correction over all tests.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from coordinator.dashboard.charts import Bar, bar, finite, listed
from coordinator.dashboard.views.series import wilson
from coordinator.dashboard.words import NO_VALUE, Words

TEACHER, STUDENT = "teacher", "student"
CHRF = "chrF"  # the measure whose values are 0 to 100


class Row(msgspec.Struct, frozen=True):
    """One verdict, or one kind of record by one measure: this release and what it is compared with."""

    name: str
    bar: Bar
    told: str
    other: str
    change: str
    worse: bool
    n: int


class Table(msgspec.Struct, frozen=True):
    """Rows, worst first."""

    what: str  # "verdicts" or "kinds"
    compared_with: str  # "" nothing, "teacher", "before"
    rows: tuple[Row, ...]


def tables(name: str, found: Mapping[str, Any], earlier: Mapping[str, Any], evidence: Mapping[str, Any], words: Words) -> tuple[Table, ...]:
    """The tables of one held-out set that have rows.

    Args:
        found: what the bundle knows of the set `name`; `earlier`: the same of the release before.
        evidence: the whole bundle, for the losses it names.
    """
    return tuple(table for table in (_verdicts(found, earlier, words), _kinds(name, found, evidence, words)) if table.rows)


def told(evidence: Mapping[str, Any]) -> tuple[str, ...]:
    """What the evidence says of losses by kind of record."""
    return tuple(str(line) for line in listed(_regressions(evidence).get("statements")))


def _verdicts(found: Mapping[str, Any], earlier: Mapping[str, Any], words: Words) -> Table:
    """Against the release before where it has the same code, else against the teacher."""
    codes, was = _counted(found), {str(row.get("code")): row for row in _counted(earlier)}
    compared = "before" if was else TEACHER if any(finite(row.get(TEACHER)) is not None for row in codes) else ""
    rows = []
    for row in codes:
        n, right = int(row["n"]), finite(row.get(STUDENT))
        if right is None:
            continue
        other: tuple[float, int] | None = None  # share, of how many
        if compared == "before" and (old := was.get(str(row.get("code")))) is not None:
            known = finite(old.get(STUDENT))
            other = (known / int(old["n"]), int(old["n"])) if known is not None else None
        elif compared == TEACHER and (theirs := finite(row.get(TEACHER))) is not None:
            other = theirs / n, n
        worse = other is not None and surely_less(right / n, n, *other)
        rows.append(_row(str(row.get("code")), (right / n, None, None), other[0] if other else None, worse, n, words))
    return Table("verdicts", compared, _worst_first(rows))


def _kinds(name: str, found: Mapping[str, Any], evidence: Mapping[str, Any], words: Words) -> Table:
    """Against the release before where it answered the same records, else against the teacher."""
    known = [row for row in listed(found.get("categories")) if isinstance(row, Mapping) and isinstance(row.get("models"), Mapping)]
    models = dict.fromkeys(str(model) for row in known for model in row["models"])
    before = next((model for model in models if model == "previous" or model.startswith("release-")), "")
    other = before or (TEACHER if TEACHER in models else "")
    lost = {
        (row.get("category"), row.get("measure"))
        for row in listed(_regressions(evidence).get("rows"))
        if isinstance(row, Mapping) and row.get("loss") is True and (row.get("set"), row.get("against")) == (name, other)
    }
    rows = []
    for row in known:
        category, measure, n = str(row.get("category")), str(row.get("measure")), finite(row.get("n"))
        mine, theirs = _shares(row["models"].get(STUDENT), measure), _shares(row["models"].get(other), measure)
        if mine is not None and n:
            title = f"{_called(category, words)}, {words.word('measure.' + measure.replace(' ', '-'), measure)}"
            rows.append(_row(title, mine, theirs[0] if theirs else None, (category, measure) in lost, int(n), words))
    return Table("kinds", "before" if before else other, _worst_first(rows))


def surely_less(share: float, n: int, other: float, others: int) -> bool:
    """Whether the 95% interval of the difference of two shares lies below zero (Newcombe 1998, method 10)."""
    high, low = wilson(round(share * n), n)[1], wilson(round(other * others), others)[0]
    return share - other + ((high - share) ** 2 + (other - low) ** 2) ** 0.5 < 0


def _row(
    name: str, mine: tuple[float, float | None, float | None], other: float | None, worse: bool, n: int, words: Words
) -> tuple[float, Row]:
    """The change to sort by, and the row."""
    change = None if other is None else mine[0] - other
    signed = words.signed(100 * change, 0) if change is not None else NO_VALUE
    row = Row(name, bar(*mine, top=1.0), words.percent(mine[0], 0), words.percent(other, 0), signed, worse, n)
    return change if change is not None else 0.0, row


def _worst_first(rows: Sequence[tuple[float, Row]]) -> tuple[Row, ...]:
    return tuple(row for _, row in sorted(rows, key=lambda pair: (pair[0], pair[1].name)))


def _shares(figures: Any, measure: str) -> tuple[float, float | None, float | None] | None:
    """Value, low and high in [0, 1]."""
    if not isinstance(figures, Mapping) or (value := finite(figures.get("value"))) is None:
        return None
    scale = 100.0 if measure == CHRF else 1.0
    low, high = finite(figures.get("low")), finite(figures.get("high"))
    return value / scale, low / scale if low is not None else None, high / scale if high is not None else None


def _called(category: str, words: Words) -> str:
    """A category in the reader's words: "length: short" is "longitud: corta"; what is new here stays as it is."""
    kind, mark, which = category.partition(": ")
    return words.word(f"category.{kind}", kind) + mark + words.word(f"category.{kind}.{which}", which)


def _regressions(evidence: Mapping[str, Any]) -> Mapping[str, Any]:
    found = evidence.get("regressions")
    return found if isinstance(found, Mapping) else {}


def _counted(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in listed(found.get("codes")) if isinstance(row, Mapping) and (finite(row.get("n")) or 0) > 0]
