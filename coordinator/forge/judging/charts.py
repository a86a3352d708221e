"""The few charts of evidence and reports, as inline SVG that follows the page's light or dark colours.

matplotlib draws with stand-in colours that are replaced by CSS custom properties; text stays text in the page's own font. Labels are at
the data and not in a legend, intervals are bars or bands, every axis has its unit. Every figure comes from the caller's numbers.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coordinator.forge.judging.metrics import wilson
from protocol.confidence import interpolate

INK, MUTED, LINE, ACCENT, FAINT, RED = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", ACCENT: "var(--accent)", FAINT: "var(--faint)", RED: "var(--red)",
}  # fmt: skip
WIDTH = 10.4  # inches; the SVG scales with the page, and this gives its text the size of the page's small print
HALF = 4.9
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "font.size": 9.5, "axes.edgecolor": LINE, "axes.linewidth": 0.8, "axes.labelcolor": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 0,
    "ytick.major.size": 0, "text.color": INK, "axes.titlesize": 9.5, "axes.titlecolor": INK, "axes.titlelocation": "left",
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "font.family": "DejaVu Sans",
    "lines.solid_capstyle": "butt",
}  # fmt: skip

Row = tuple[str, float, Sequence[float] | None, bool]  # label, value, [low, high], stands out
Difference = tuple[str, float, float, float, bool]  # label, difference, low, high, a named loss
Sized = tuple[str, float, float, Sequence[float] | None, bool]  # label, MiB, quality, [low, high], stands out


def _draw(paint: Callable[[Any], None], *, height: float, label: str, width: float = WIDTH) -> str:
    """An <svg> element with what `paint(axes)` drew."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_plain(label)}"', 1)


def bars(rows: Sequence[Row], *, unit: str, label: str, share: bool = True) -> str:
    """Horizontal points with their 95% intervals, one row each, value written at the end; zero on the axis."""
    scale = 100.0 if share else 1.0

    def paint(axes: Any) -> None:
        top = max([scale * row[1] for row in rows] + [scale * row[2][1] for row in rows if row[2]] + [1e-9])
        for place, (_, value, interval, strong) in enumerate(reversed(rows)):
            colour = ACCENT if strong else MUTED
            axes.barh(place, scale * value, height=0.34, color=colour, alpha=0.85 if strong else 0.35, linewidth=0)
            end = scale * value
            if interval:
                axes.plot([scale * interval[0], scale * interval[1]], [place, place], color=INK, linewidth=1.1)
                end = max(end, scale * interval[1])
            axes.text(end + top * 0.012, place, f"{scale * value:.1f}", va="center", color=INK, fontweight="bold" if strong else "normal")
        axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
        for text, row in zip(axes.get_yticklabels(), reversed(rows), strict=True):
            text.set_color(INK if row[3] else MUTED)
        axes.set_xlim(0, min(top * 1.09, 108) if share else top * 1.09)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(unit)
        axes.spines["left"].set_visible(False)
        _grid(axes, "x")

    return _draw(paint, height=0.62 + 0.3 * len(rows), label=label)


def deferral(curves: Mapping[str, Sequence[Sequence[float]]], *, points: Mapping[str, tuple[float, float]], unit: str, label: str) -> str:
    """Quality against the share of questions asked of the peer. The last curve stands out; a dot marks where the threshold works.

    The dotted straight line between a whole curve's ends is what asking at random would give. Cut-off axis: the curves' shape is the point.
    """
    scale = 100.0 if unit == "%" else 1.0
    last = list(curves)[-1]

    def paint(axes: Any) -> None:
        everything = [scale * y for curve in curves.values() for _, y in curve]
        span = max(max(everything) - min(everything), 1.0)
        for name, curve in curves.items():
            colour = ACCENT if name == last else MUTED
            xs, ys = [100 * x for x, _ in curve], [scale * y for _, y in curve]
            axes.plot(xs, ys, color=colour, linewidth=1.8 if name == last else 1.3)
            if xs[-1] > 99.9:  # a live site knows the peer's answers only for what it asked
                axes.plot([xs[0], xs[-1]], [ys[0], ys[-1]], color=colour, linewidth=0.8, linestyle=(0, (1, 2.5)))
            if name in points:
                axes.plot([100 * points[name][0]], [scale * points[name][1]], "o", color=colour, markersize=5, clip_on=False)
            place = round(0.55 * (len(xs) - 1))
            at = xs[place]
            others = [interpolate(at, [(100 * x, scale * y) for x, y in other]) for key, other in curves.items() if key != name]
            offset = (0, 8) if all(ys[place] >= other for other in others) else (0, -15)
            axes.annotate(name, (xs[place], ys[place]), xytext=offset, textcoords="offset points", color=colour, ha="center")
        axes.set_xlim(0, min(100.0, 1.06 * 100 * max(curve[-1][0] for curve in curves.values())))
        axes.set_ylim(max(0.0, min(everything) - 0.15 * span), min(100.0, max(everything) + 0.2 * span))
        axes.set_xlabel("share asked of the peer, %")
        axes.set_ylabel("verdicts right, %" if unit == "%" else unit)
        _grid(axes, "y")

    return _draw(paint, height=3.0, label=label, width=HALF)


def calibration(groups: Mapping[str, Sequence[Mapping[str, float]]], *, label: str, target: str) -> str:
    """Reliability: how often answers of a confidence were right. On the diagonal the confidence tells the truth.

    A dot's area is its share of the answers, the thin line its 95% interval: a small dot far off the diagonal says little.
    """
    last = list(groups)[-1]

    def paint(axes: Any) -> None:
        axes.plot([0, 100], [0, 100], color=LINE, linewidth=1.0, zorder=0)
        for name, bins in groups.items():
            colour = ACCENT if name == last else MUTED
            total = sum(bar["count"] for bar in bins)
            for bar in bins:
                low, high = wilson(round(bar["accuracy"] * bar["count"]), int(bar["count"]))
                axes.plot([100 * bar["confidence"]] * 2, [100 * low, 100 * high], color=colour, linewidth=0.9, alpha=0.45)
            xs, ys = [100 * bar["confidence"] for bar in bins], [100 * bar["accuracy"] for bar in bins]
            sizes = [8 + 190 * bar["count"] / total for bar in bins]
            axes.scatter(xs, ys, s=sizes, color=colour, alpha=0.9, linewidths=0, clip_on=False, zorder=3)
            if len(groups) > 1:
                place = 0.97 if name == last else 0.89
                axes.text(0.03, place, f"\N{BLACK CIRCLE} {name}", transform=axes.transAxes, color=colour, va="top")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_xlabel("confidence, %")
        axes.set_ylabel(f"{target}, %")
        _grid(axes, "y")

    return _draw(paint, height=3.0, label=label, width=HALF)


def forest(rows: Sequence[Difference], *, unit: str, label: str) -> str:
    """Differences with their 95% intervals, one row a category, around a line at zero; a named loss is red and bold."""

    def paint(axes: Any) -> None:
        axes.axvline(0, color=LINE, linewidth=1.0, zorder=0)
        for place, (_, value, low, high, lost) in enumerate(reversed(rows)):
            colour = RED if lost else INK
            axes.plot([low, high], [place, place], color=colour, linewidth=1.1)
            axes.plot([value], [place], "o", color=colour, markersize=5)
        axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
        for text, row in zip(axes.get_yticklabels(), reversed(rows), strict=True):
            text.set_color(RED if row[4] else INK)
            text.set_fontweight("bold" if row[4] else "normal")
        reach = max([abs(end) for row in rows for end in row[1:4]] + [1.0])  # where nothing moved, a point
        axes.set_xlim(-1.08 * reach, 1.08 * reach)  # the same scale on both sides: a loss does not look smaller than a gain
        axes.locator_params(axis="x", nbins=6)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(unit)
        axes.spines["left"].set_visible(False)
        _grid(axes, "x")

    return _draw(paint, height=0.72 + 0.26 * len(rows), label=label, width=HALF)


def pareto(rows: Sequence[Sized], *, unit: str, label: str, share: bool) -> str:
    """Quality against file size (logarithmic), with intervals. The line joins what no smaller file equals or beats."""
    scale = 100.0 if share else 1.0

    def paint(axes: Any) -> None:
        best, edge = float("-inf"), []
        for _, size, value, _, _ in sorted(rows, key=lambda row: (row[1], -row[2])):
            if value > best:
                best = value
                edge.append((size, scale * value))
        axes.plot([x for x, _ in edge], [y for _, y in edge], color=LINE, linewidth=1.2, zorder=0)
        largest = max(row[1] for row in rows)
        for name, size, value, interval, strong in rows:
            colour = ACCENT if strong else MUTED
            if interval:
                axes.plot([size, size], [scale * interval[0], scale * interval[1]], color=colour, linewidth=1.0, alpha=0.7)
            axes.plot([size], [scale * value], "o", color=colour, markersize=6)
            right = size <= largest / 2
            axes.annotate(
                name, (size, scale * value), xytext=(7 if right else -7, 4), textcoords="offset points", ha="left" if right else "right",
                color=INK if strong else MUTED, fontweight="bold" if strong else "normal",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(min(row[1] for row in rows) / 1.4, max(row[1] for row in rows) * 1.4)
        ticks = _sizes(min(row[1] for row in rows), max(row[1] for row in rows))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("file, MiB (logarithmic)")
        axes.set_ylabel(unit)
        _grid(axes, "y")

    return _draw(paint, height=3.0, label=label, width=HALF)


def _sizes(low: float, high: float) -> list[float]:
    """Round sizes from below `low` to above `high`: 1, 2, 5, 10, ... but at most about six."""
    found = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
    inside = [size for size in found if low / 1.4 <= size <= high * 1.4] or [low]
    return inside[:: -(-len(inside) // 6)]


def timeline(stages: Sequence[Mapping[str, Any]], *, label: str) -> str:
    """Stages one after another on a time axis in seconds; cached ones are faint and say so."""
    unit, scale = ("min", 60.0) if sum(stage["seconds"] for stage in stages) > 300 else ("s", 1.0)

    def paint(axes: Any) -> None:
        start, total = 0.0, max(sum(stage["seconds"] for stage in stages), 1e-9)
        for place, stage in enumerate(stages):
            row = len(stages) - 1 - place
            seconds, cached = stage["seconds"], bool(stage.get("cached"))
            axes.barh(
                row,
                max(seconds, total * 0.002) / scale,
                left=start / scale,
                height=0.42,
                color=MUTED if cached else ACCENT,
                alpha=0.85,
                linewidth=0,
            )
            told = f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
            ends = (start + seconds) / scale
            right = ends < 0.8 * total / scale
            axes.text(
                ends + 0.008 * total / scale if right else start / scale - 0.008 * total / scale, row,
                told + (", from the cache" if cached else ""), va="center", ha="left" if right else "right", color=INK,
            )  # fmt: skip
            start += seconds
        axes.set_yticks(range(len(stages)), [stage["name"] for stage in reversed(stages)])
        for text in axes.get_yticklabels():
            text.set_color(INK)
        axes.set_xlim(0, total / scale)
        axes.set_ylim(-0.6, len(stages) - 0.4)
        axes.set_xlabel(unit)
        axes.spines["left"].set_visible(False)
        _grid(axes, "x")

    return _draw(paint, height=0.62 + 0.27 * len(stages), label=label)


def _grid(axes: Any, axis: str) -> None:
    axes.grid(True, axis=axis, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
