"""Quantities over the shown span, counted by the database. Counters in statuses start again at every boot: increments are within one."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from coordinator.fleet.ledger import Ledger
from coordinator.fleet.tables import events, statuses

SPANS = (
    (3_600, 120),
    (6 * 3_600, 600),
    (86_400, 1_800),
    (7 * 86_400, 6 * 3_600),
    (14 * 86_400, 43_200),
    (30 * 86_400, 86_400),
)  # seconds shown, seconds a step


class Point(msgspec.Struct, frozen=True):
    """One step of a series; low and high are the 95% interval where there is one."""

    at: int
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0


class Series(msgspec.Struct, frozen=True):
    """A quantity over the shown span. `kind` is a key of the catalogue."""

    kind: str
    unit: Literal["share", "count", "ms", "bytes", "wh"]
    points: tuple[Point, ...]
    start: int
    end: int
    releases: tuple[tuple[int, int], ...]  # (time, number) of releases within the span
    latest: Point | None  # the last step with a value
    whole: Point | None = None  # over the whole span
    age_s: int = 0  # since the newest thing counted


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927); good at 0 and 1 and for small n, where the normal one is not."""
    z, share = 1.96, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def span(ledger: Ledger, now: int) -> tuple[int, int]:
    """(start, seconds a step) of what charts show: the shortest of SPANS that holds all there is, at most 30 days."""
    with ledger.read() as connection:
        oldest = connection.execute(
            sa.select(
                sa.select(sa.func.min(statuses.c.received)).scalar_subquery(), sa.select(sa.func.min(events.c.received)).scalar_subquery()
            )
        ).one()
    first = min((time for time in oldest if time is not None), default=now)
    length, step = next((one for one in SPANS if now - first <= one[0]), SPANS[-1])
    return now - length, step


def over_time(ledger: Ledger, *, start: int, end: int, step: int) -> tuple[Series, ...]:
    """The four small charts: confirmed and asked always; data and energy where nodes report them, else latency and answers."""
    marks = tuple((kept.published, kept.number) for kept in ledger.releases() if start <= kept.published <= end)
    bucket = (statuses.c.received - start) // step
    counted = (
        sa.select(statuses.c.node, statuses.c.boot, bucket.label("bucket"), sa.func.max(statuses.c.answered).label("answered"),
                  sa.func.max(statuses.c.escalated).label("escalated"), sa.func.max(statuses.c.received).label("newest"))
        .where(statuses.c.received >= start, statuses.c.received <= end)
        .group_by(statuses.c.node, statuses.c.boot, bucket).order_by(statuses.c.node, statuses.c.boot, bucket)
    )  # fmt: skip
    event_bucket = (events.c.received - start) // step
    within = (events.c.received >= start) & (events.c.received <= end)
    state = events.c.detail["state"].as_string()
    checked = (
        sa.select(event_bucket, state, sa.func.count(), sa.func.max(events.c.received))
        .where(within, events.c.kind == "escalation", state.in_(("confirmed", "upgraded"))).group_by(event_bucket, state)
    )  # fmt: skip
    summaries = sa.select(event_bucket, events.c.figures, events.c.received).where(within, events.c.kind == "answers").limit(50_000)
    steps = (end - start + step - 1) // step
    answered, escalated, right, all_checked = ([0] * (steps + 1) for _ in range(4))
    latency: list[list[float]] = [[] for _ in range(steps + 1)]
    sums: dict[str, list[float]] = {}
    newest: dict[str, int] = defaultdict(int)
    with ledger.read() as connection:
        last: dict[tuple[str, str], tuple[int, int]] = {}
        for row in connection.execute(counted):
            before = last.get((row.node, row.boot), (0, 0))
            answered[row.bucket] += max(0, row.answered - before[0])
            escalated[row.bucket] += max(0, row.escalated - before[1])
            last[row.node, row.boot] = (row.answered, row.escalated)
            newest["answers"] = max(newest["answers"], row.newest)
        for at, what, count, latest in connection.execute(checked):
            all_checked[at] += count
            right[at] += count if what == "confirmed" else 0
            newest["confirmed"] = max(newest["confirmed"], latest)
        for at, figures, received in connection.execute(summaries):
            if "latency_p50_ms" in figures:
                latency[at].append(figures["latency_p50_ms"])
                newest["latency"] = max(newest["latency"], received)
            for name in ("data_bytes", "energy_wh"):
                if name in figures:
                    sums.setdefault(name, [0.0] * (steps + 1))[at] += figures[name]
                    newest[name] = max(newest[name], received)

    def made(kind: str, unit: Any, points: Sequence[Point], whole: Point | None, source: str) -> Series:
        latest = next((point for point in reversed(points) if point.value is not None), None)
        age = max(0, end - newest[source]) if newest[source] else 0
        return Series(kind, unit, tuple(points), start, end, marks, latest, whole, age)

    times = [min(end, start + number * step + step // 2) for number in range(steps)]
    shares = [
        made("confirmed", "share", *_shares(times, right, all_checked), "confirmed"),
        made("escalation", "share", *_shares(times, escalated, answered), "answers"),
    ]
    others = [
        made(name, unit, [Point(at, value or None) for at, value in zip(times, sums[name], strict=False)],
             Point(end, sum(sums[name])), name)
        for name, unit in (("data_bytes", "bytes"), ("energy_wh", "wh")) if name in sums
    ]  # fmt: skip
    medians = [Point(at, sum(found) / len(found) if found else None, n=len(found)) for at, found in zip(times, latency, strict=False)]
    flat = [value for found in latency for value in found]
    others.append(made("latency", "ms", medians, Point(end, sum(flat) / len(flat), n=len(flat)) if flat else None, "latency"))
    counts = [Point(at, float(value) if value else None) for at, value in zip(times, answered, strict=False)]
    others.append(made("answers", "count", counts, Point(end, float(sum(answered))) if sum(answered) else None, "answers"))
    return tuple(shares + others[:2])


def _shares(times: Sequence[int], right: Sequence[int], total: Sequence[int]) -> tuple[list[Point], Point | None]:
    points = []
    for at, part, n in zip(times, right, total, strict=False):
        part = min(part, n)  # a question may be counted in the step after its answer
        points.append(Point(at, part / n, *wilson(part, n), n) if n else Point(at, None))
    n, part = sum(total), min(sum(right), sum(total))
    return points, Point(times[-1] if times else 0, part / n, *wilson(part, n), n) if n else None
