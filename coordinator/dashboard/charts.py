"""Geometry of the charts: numbers in, SVG coordinates out. Drawn on the server, so a page without scripts has its charts.

The small chart is a stretched SVG (its lines do not scale) with its labels in HTML around it; the plots of shares (deferral, calibration)
are square-ish SVGs with their own text. Every chart has zero on its axis where the quantity has one, an interval as a band, and the
releases as vertical hairlines.
"""

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from coordinator.dashboard.views.series import Point, Series

WIDTH, HEIGHT = 300.0, 72.0  # of the small chart's viewBox; stretched to its column
PLOT, LEFT, RIGHT, TOP, BOTTOM = 320.0, 34.0, 18.0, 12.0, 34.0  # of the square plots


class Hairline(msgspec.Struct, frozen=True):
    """A release's moment."""

    x: float
    number: int


class SmallChart(msgspec.Struct, frozen=True):
    """One quantity over time, in the viewBox 0 0 WIDTH HEIGHT."""

    lines: tuple[str, ...]  # path data, one for each stretch without a gap
    bands: tuple[str, ...]
    dots: tuple[tuple[float, float], ...]  # steps that stand alone, and the last
    hairlines: tuple[Hairline, ...]
    top: float  # value at the upper edge; the lower edge is zero


def nice(value: float) -> float:
    """The next of 1, 2, 5, 10, ... that holds `value`."""
    if value <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(value))
    return next(step * scale for step in (1, 2, 2.5, 5, 10) if value <= step * scale * (1 + 1e-9))


def small(series: Series) -> SmallChart:
    """Lay out a series."""
    known = [point for point in series.points if point.value is not None]
    highest = max((point.high if point.high is not None else point.value or 0.0 for point in known), default=1.0)
    top = min(1.0, nice(highest)) if series.unit == "share" else nice(highest)
    length = max(1, series.end - series.start)

    def x(at: int) -> float:
        return round(WIDTH * (at - series.start) / length, 1)

    def y(value: float) -> float:
        return round(HEIGHT - (HEIGHT - 4) * min(value, top) / top, 1)

    stretches: list[list[Point]] = [[]]
    for point in series.points:
        if point.value is None:
            stretches.append([])
        else:
            stretches[-1].append(point)
    runs = [run for run in stretches if run]
    lines = tuple("M" + "L".join(f"{x(p.at)} {y(p.value or 0.0)}" for p in run) for run in runs if len(run) > 1)
    bands = []
    for run in runs:
        if len(run) > 1 and all(p.low is not None and p.high is not None for p in run):
            upper = [f"{x(p.at)} {y(p.high or 0.0)}" for p in run]
            lower = [f"{x(p.at)} {y(p.low or 0.0)}" for p in reversed(run)]
            bands.append("M" + "L".join(upper + lower) + "Z")
    dots = [(x(run[0].at), y(run[0].value or 0.0)) for run in runs if len(run) == 1]
    if runs and len(runs[-1]) > 1:
        dots.append((x(runs[-1][-1].at), y(runs[-1][-1].value or 0.0)))
    return SmallChart(lines, tuple(bands), tuple(dots), tuple(Hairline(x(at), number) for at, number in series.releases), top)


class Line(msgspec.Struct, frozen=True):
    """One labelled line of a plot."""

    name: str
    path: str
    label_x: float
    label_y: float
    faint: bool = False


class Dot(msgspec.Struct, frozen=True):
    """One point of a plot, with its words."""

    x: float
    y: float
    r: float
    words: str = ""
    low_y: float | None = None
    high_y: float | None = None


class Plot(msgspec.Struct, frozen=True):
    """Lines over [0, 1] x [low, high], in the viewBox 0 0 PLOT PLOT*0.8."""

    lines: tuple[Line, ...]
    dots: tuple[Dot, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: float = PLOT
    height: float = PLOT * 0.8
    left: float = LEFT
    right: float = PLOT - RIGHT
    top: float = TOP
    bottom: float = PLOT * 0.8 - BOTTOM


def plot(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]], bool]],
    dots: Sequence[tuple[float, float, float, str, float | None, float | None]],
    *,
    low: float = 0.0,
) -> Plot:
    """Lay out lines of (name, points, faint) and dots of (x, y, radius, words, low, high); all coordinates are shares."""
    empty = Plot((), (), (), ())

    def x(value: float) -> float:
        return round(empty.left + (empty.right - empty.left) * min(1.0, max(0.0, value)), 1)

    def y(value: float) -> float:
        return round(empty.bottom - (empty.bottom - empty.top) * (min(1.0, max(low, value)) - low) / (1 - low), 1)

    drawn = tuple(
        Line(name, "M" + "L".join(f"{x(a)} {y(b)}" for a, b in points), x(points[-1][0]), y(points[-1][1]), faint)
        for name, points, faint in lines if points
    )  # fmt: skip
    placed = tuple(
        Dot(x(a), y(b), r, words, y(lower) if lower is not None else None, y(upper) if upper is not None else None)
        for a, b, r, words, lower, upper in dots
    )
    step = 0.1 if low >= 0.5 else 0.25 if low == 0 else 0.2
    steps = [value for value in (low + number * step for number in range(9)) if value <= 1.0001]
    return Plot(drawn, placed, tuple((x(v / 4), f"{v * 25}%") for v in range(5)), tuple((y(v), f"{100 * v:.0f}%") for v in steps))


class Bar(msgspec.Struct, frozen=True):
    """A value on a scale from 0 to 100, with its interval."""

    value: float
    low: float | None
    high: float | None


def bar(value: float, low: float | None, high: float | None, *, top: float) -> Bar:
    """Lay out a bar against `top`, the scale's end."""

    def at(one: float) -> float:
        return round(100 * min(1.0, max(0.0, one / top)), 2)

    return Bar(at(value), at(low) if low is not None else None, at(high) if high is not None else None)


def listed(value: Any) -> Sequence[Any]:
    """A list from a document, or an empty one."""
    return value if isinstance(value, list) else ()


def finite(value: Any) -> float | None:
    """A number from a document, or None."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
