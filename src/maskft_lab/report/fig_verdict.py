"""Differences from the baseline with their intervals: the verdicts as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.axes import Axes

from ..results.comparison import NOT_DISTINGUISHABLE, Difference
from ..results.text import difference_table, difference_text, task_text
from .charts import COLOURS, ROW_HEIGHT, Chart, Panel, row_name
from .evidence import Evidence, NotComputed
from .methods import look

_SHOWN = 4.0  # times the median size of a difference; what lies beyond is written at the edge


def are_simultaneous(rows: Sequence[Difference]) -> bool:
    """Whether simultaneous intervals are known; comparisons of earlier versions have only unadjusted ones."""
    return bool(rows) and all(row.unadjusted_low is not None for row in rows)


def verdict_chart(evidence: Evidence) -> Chart:
    """One panel per metric: every method's difference, its interval, and the baseline at 0."""
    comparison = evidence.comparison
    if comparison is None:
        raise NotComputed("there is one model only; nothing is compared")
    groups: dict[tuple[str, str], list[Difference]] = {}
    for row in evidence.differences:
        groups.setdefault((row.task, row.metric), []).append(row)
    panels = [
        Panel(_title(rows[0]), partial(_draw, rows=rows, methods=evidence.methods), True, 0.65 + ROW_HEIGHT * len(rows))
        for rows in groups.values()
    ]
    kind = "simultaneous" if are_simultaneous(comparison.differences) else "unadjusted"
    text = (
        f"Each line is a {kind} {100 * comparison.confidence:g} % interval of the difference from "
        f"{comparison.baseline} (0). A filled mark is a difference that the study calls better or worse after Holm's "
        "correction; a hollow one is not distinguishable. Intervals over two seeds are too wide to draw; the table has "
        "them. What lies off scale is an arrow with its number."
    )
    return Chart(text, panels, difference_table(comparison))


def has_interval(row: Difference) -> bool:
    """Whether the interval is worth drawing: over two seeds it is wider than any picture."""
    return row.num_seeds != 2 or row.by_seed is not None


def _title(row: Difference) -> str:
    better = "right" if row.higher_is_better else "left"
    unit = "points" if row.unit == "fraction" else row.unit
    return f"{row.metric} on {task_text(row)} ({unit}); better is to the {better}"


def _draw(axes: Axes, rows: Sequence[Difference], methods: Mapping[str, tuple[str | None, bool]]) -> None:
    scale = 100.0 if rows[0].unit == "fraction" else 1.0
    low, high = _limits(rows, scale)
    for place, row in enumerate(rows):
        colour, _, marker = look(*methods.get(row.method, (None, False)))
        value, ends = scale * row.difference, tuple(scale * end for end in (row.ci_low, row.ci_high))
        if not low <= value <= high:
            at, side = (low, "left") if value < low else (high, "right")
            text = difference_text(row) if has_interval(row) else f"{value:+.3g}"
            text = f"◀ {text}" if side == "left" else f"{text} ▶"
            axes.text(at, place, text, ha=side, va="center", fontsize="small", color=COLOURS[colour])
            continue
        face = "none" if row.verdict == NOT_DISTINGUISHABLE else COLOURS[colour]
        if has_interval(row):
            axes.plot(ends, [place, place], color=COLOURS[colour], clip_on=True, solid_capstyle="butt")
        for end, edge, arrow in ((ends[0], low, "<"), (ends[1], high, ">")):
            if has_interval(row) and abs(end) > abs(edge) and end * edge > 0:  # it goes on beyond the axes
                axes.plot(edge, place, arrow, color=COLOURS[colour], markersize=4, clip_on=False)
        axes.plot(value, place, marker=marker if marker != "x" else "o", color=COLOURS[colour], markerfacecolor=face)
    axes.axvline(0, color=COLOURS["ink"], linewidth=0.8)
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row_name(row.method) for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.grid(False, axis="y")


def _limits(rows: Sequence[Difference], scale: float) -> tuple[float, float]:
    sizes = sorted(scale * max(map(abs, _ends(row))) for row in rows)
    bound = _SHOWN * (sizes[len(sizes) // 2] or 1.0)
    ends = [scale * end for row in rows if scale * abs(row.difference) <= bound for end in _ends(row)]
    low, high = max(min([0.0, *ends]), -bound), min(max([0.0, *ends]), bound)
    margin = 0.08 * ((high - low) or 1.0)
    return low - margin, high + margin


def _ends(row: Difference) -> tuple[float, float]:
    return (row.ci_low, row.ci_high) if has_interval(row) else (row.difference, row.difference)
