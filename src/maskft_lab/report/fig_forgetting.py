"""What a method gains against what it forgets: the test on one axis, what the model could do before on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from ..results.comparison import Comparison, Difference
from ..results.schema import BEFORE
from ..results.text import Table
from .charts import COLOURS, Chart, Entry, Panel, plain
from .methods import entry, line_style, number

_SHOWN = 4.0  # times the median distance from the baseline; the table has what lies beyond
_HEIGHT = 3.0

Pair = tuple[Difference, Difference]  # of one method: gain, and on a set of earlier abilities


def forgetting_chart(comparison: Comparison, methods: Mapping[str, tuple[str | None, bool]]) -> Chart | None:
    """One panel per set of earlier abilities; None where the study measures none."""
    tests = [row for row in comparison.differences if not _is_before(row)]
    first = next((row for row in tests if row.unit == "fraction"), tests[0] if tests else None)
    gains = {row.method: row for row in _alike(tests, first)}
    groups: dict[str, list[Pair]] = {}
    earlier: dict[str, list[Difference]] = {}
    for row in comparison.differences:
        if _is_before(row):
            earlier.setdefault(row.task, []).append(row)
    for task, rows in earlier.items():
        # Its loss, where it has one: what was forgotten altogether has no accuracy left to differ in.
        finest = next((row for row in rows if row.unit != "fraction"), rows[0])
        groups[task] = [(gains[row.method], row) for row in _alike(rows, finest) if row.method in gains]
    groups = {task: pairs for task, pairs in groups.items() if pairs}
    if not groups:
        return None
    names = list(dict.fromkeys(gain.method for pairs in groups.values() for gain, _ in pairs))
    shown = {name: str(place) for place, name in enumerate(names, start=1)}
    panels = [
        Panel(
            f"gain against {task.removeprefix(BEFORE)}, which the model could do before",
            lambda axes, pairs=pairs: _draw(axes, pairs, methods, shown),
            True,
            _HEIGHT,
        )
        for task, pairs in groups.items()
    ]
    text = (
        f"Differences from {comparison.baseline}, the cross of the axes; up is a gain, right is less forgotten. Lines "
        f"are {100 * comparison.confidence:g} % intervals, as in the tables. Methods are numbered "
        "as in the legend; what lies far outside is in the table only."
    )
    entries = [Entry(f"{shown[name]}  {name}", *_look(name, methods)) for name in names]
    return Chart("forgetting", "Gain and forgetting", text, panels, _table(groups), (), entries)


def _look(name: str, methods: Mapping[str, tuple[str | None, bool]]) -> tuple[str, str, str]:
    of = entry(name, *methods.get(name, (None, False)))
    return of.colour, "", of.marker


def _is_before(row: Difference) -> bool:
    return row.task.startswith(BEFORE)


def _alike(rows: Sequence[Difference], of: Difference | None) -> list[Difference]:
    """Those of one task and metric."""
    return [row for row in rows if of is not None and (row.task, row.metric) == (of.task, of.metric)]


def _draw(axes: Axes, pairs: Sequence[Pair], methods: Mapping, shown: Mapping[str, str]) -> None:
    up, right = pairs[0]
    (bottom, top), (left, end) = (_limits([_scaled(pair[side])[0] for pair in pairs]) for side in (0, 1))
    for gain, kept in pairs:
        (y, *y_ends), (x, *x_ends) = _scaled(gain), _scaled(kept)
        if not (bottom <= y <= top and left <= x <= end):
            continue
        style = line_style(entry(gain.method, *methods.get(gain.method, (None, False))))
        axes.plot(x_ends, [y, y], color=style["color"], linewidth=0.6, alpha=0.4)
        axes.plot([x, x], y_ends, color=style["color"], linewidth=0.6, alpha=0.4)
        axes.plot(x, y, color=style["color"], marker=style["marker"])
        axes.annotate(plain(shown[gain.method]), (x, y), (3, 3), textcoords="offset points", fontsize=6.5)
    for line in (axes.axhline, axes.axvline):
        line(0, color=COLOURS["ink"], linewidth=0.8)
    axes.set_ylim(bottom, top)
    axes.set_xlim(left, end)
    axes.set_ylabel(plain(_axis(up)))
    axes.set_xlabel(plain(_axis(right)))
    for row, invert in ((up, axes.invert_yaxis), (right, axes.invert_xaxis)):
        if not row.higher_is_better:
            invert()


def _limits(values: Sequence[float]) -> tuple[float, float]:
    sizes = sorted(map(abs, values))
    bound = _SHOWN * (sizes[len(sizes) // 2] or 1.0)
    near = [0.0, *(value for value in values if abs(value) <= bound)]
    margin = 0.15 * ((max(near) - min(near)) or 1.0)
    return min(near) - margin, max(near) + margin


def _scaled(row: Difference) -> tuple[float, float, float]:
    scale = 100.0 if row.unit == "fraction" else 1.0
    return scale * row.difference, scale * row.ci_low, scale * row.ci_high


def _axis(row: Difference) -> str:
    return f"{row.metric} on {row.task.removeprefix(BEFORE)} ({_unit(row)})"


def _unit(row: Difference) -> str:
    return "points" if row.unit == "fraction" else row.unit


def _table(groups: Mapping[str, Sequence[Pair]]) -> Table:
    columns = ("method", "gain", "95 %", "before", "difference", "95 %")
    rows = [
        (gain.method, _amount(gain), _ends(gain), task.removeprefix(BEFORE), _amount(kept), _ends(kept))
        for task, pairs in groups.items()
        for gain, kept in pairs
    ]
    return Table(columns, rows)


def _amount(row: Difference) -> str:
    return f"{number(_scaled(row)[0])} {_unit(row)}"


def _ends(row: Difference) -> str:
    _, low, high = _scaled(row)
    return f"[{number(low)}, {number(high)}]"
