"""Differences from the baseline with their intervals: the verdicts as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from ..results.comparison import NOT_DISTINGUISHABLE, Comparison, Difference
from ..results.text import difference_table, difference_text
from .charts import COLOURS, Chart, Panel, plain
from .methods import look

_SHOWN = 4.0  # times the median size of a difference; what lies beyond is written at the edge


def holds_at_once(rows: Sequence[Difference]) -> bool:
    """Whether intervals that hold together are known; comparisons of earlier versions have only those of each alone."""
    return bool(rows) and all(row.unadjusted_low is not None for row in rows)


def verdict_chart(comparison: Comparison, methods: Mapping[str, tuple[str | None, bool]]) -> Chart:
    """One panel per metric: every method's difference, its interval, and the baseline at 0."""
    groups: dict[tuple[str, str], list[Difference]] = {}
    for row in (*comparison.differences, *comparison.averages):
        groups.setdefault((row.task, row.metric), []).append(row)
    panels = [
        Panel(_title(rows[0]), lambda axes, rows=rows: _draw(axes, rows, methods), True, 0.65 + 0.18 * len(rows))
        for rows in groups.values()
    ]
    at_once = "; it holds together with all others" if holds_at_once(comparison.differences) else ", each alone"
    text = (
        f"Each line is a {100 * comparison.confidence:g} % interval of the difference from {comparison.baseline} "
        f"(0){at_once}. A filled mark is a difference that the study calls better or worse after Holm's correction; "
        "a hollow one is not distinguishable."
    )
    return Chart("verdicts", "Differences from the baseline", text, panels, difference_table(comparison))


def interval(row: Difference) -> tuple[float, float]:
    """The interval that goes with the verdict: that which holds with all others, where it is known."""
    return row.ci_low, row.ci_high


def _title(row: Difference) -> str:
    better = "right" if row.higher_is_better else "left"
    unit = "points" if row.unit == "fraction" else row.unit
    return f"{row.metric} on {row.task} ({unit}); better is to the {better}"


def _draw(axes: Axes, rows: Sequence[Difference], methods: Mapping[str, tuple[str | None, bool]]) -> None:
    scale = 100.0 if rows[0].unit == "fraction" else 1.0
    low, high = _limits(rows, scale)
    for place, row in enumerate(rows):
        colour, _, marker = look(*methods.get(row.method, (None, False)))
        value, ends = scale * row.difference, tuple(scale * end for end in interval(row))
        if not low <= value <= high:
            at, side = (low, "left") if value < low else (high, "right")
            text = f"◀ {difference_text(row)}" if side == "left" else f"{difference_text(row)} ▶"
            axes.text(at, place, text, ha=side, va="center", fontsize=7, color=COLOURS[colour])
            continue
        face = "none" if row.verdict == NOT_DISTINGUISHABLE else COLOURS[colour]
        axes.plot(ends, [place, place], color=COLOURS[colour], clip_on=True, solid_capstyle="butt")
        for end, edge, arrow in ((ends[0], low, "<"), (ends[1], high, ">")):
            if abs(end) > abs(edge) and end * edge > 0:  # it goes on beyond the axes
                axes.plot(edge, place, arrow, color=COLOURS[colour], markersize=4, clip_on=False)
        axes.plot(value, place, marker=marker if marker != "x" else "o", color=COLOURS[colour], markerfacecolor=face)
    axes.axvline(0, color=COLOURS["ink"], linewidth=0.8)
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [plain(row.method) for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.grid(False, axis="y")


def _limits(rows: Sequence[Difference], scale: float) -> tuple[float, float]:
    sizes = sorted(max(map(abs, interval(row))) * scale for row in rows)
    bound = _SHOWN * (sizes[len(sizes) // 2] or 1.0)
    ends = [scale * end for row in rows if scale * abs(row.difference) <= bound for end in interval(row)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    margin = 0.08 * ((high - low) or 1.0)
    return low - margin, high + margin
