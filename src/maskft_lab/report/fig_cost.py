"""What methods cost (Figs 4 and 9): memory, tokens and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from ..results.text import Table
from .charts import COLOURS, Chart, Entry, Panel, plain
from .methods import look, number

_PANELS = {
    "peak_memory_bytes": ("peak memory of one process (GB)", 1e9),
    "total_tokens": ("tokens from the pre-trained model (million)", 1e6),
    "total_time_s": ("training time from the pre-trained model (minutes)", 60.0),
}
_COLUMNS = {"peak_memory_bytes": 1e9, "tokens": 1e6, "total_tokens": 1e6, "time_s": 60.0, "total_time_s": 60.0}
_OWN = {"total_tokens": "tokens", "total_time_s": "time_s"}


def cost_chart(record: Mapping, methods: Mapping[str, tuple[str | None, bool]], start: str) -> Chart:
    """Bars for each method up to its best checkpoint, and for ``start``, the baseline, also up to its end."""
    order = list(methods)
    rows = [row for row in record["rows"] if row["role"] == "best" or row["name"] == start]
    rows.sort(key=lambda row: order.index(row["name"]) if row["name"] in order else len(order))
    table = [
        (row["name"], row["role"], str(row["num_seeds"]), *(number(row[q]["mean"] / s) for q, s in _COLUMNS.items()))
        for row in record["rows"]
    ]
    columns = ("method", "until", "seeds", "peak memory (GB)", "tokens (million)", "tokens in all (million)")
    columns += ("minutes", "minutes in all")
    text = (
        "Means over seeds, up to the kept checkpoint; the full bar counts from the pre-trained model, its dark part is "
        "the method's own. Times are comparable between runs of one machine only, memory between runs of one device."
    )
    panels = [
        Panel(title, lambda axes, q=quantity, s=scale: _draw(axes, rows, q, s, methods), True, 0.65 + 0.13 * len(rows))
        for quantity, (title, scale) in _PANELS.items()
    ]
    entries = [Entry("spent before this method", "rule", "", "s")]
    return Chart("fig04_09_cost", "Cost", text, panels, Table(columns, table), (4, 9), entries)


def _draw(axes: Axes, rows: Sequence[Mapping], quantity: str, scale: float, methods: Mapping) -> None:
    for place, row in enumerate(rows):
        total = row[quantity]["mean"] / scale
        own = row[_OWN[quantity]]["mean"] / scale if quantity in _OWN else total
        colour = look(*_method_of(row["name"], methods))[0]
        axes.barh(place, total, color=COLOURS["rule"], height=0.7)
        axes.barh(place, own, left=total - own, color=COLOURS[colour], height=0.7)
        axes.text(total, place, f" {number(total, 3)}", va="center", fontsize=6.5)
    names = [row["name"] + (" (to the end)" if row["role"] == "last" else "") for row in rows]
    axes.set_yticks(range(len(rows)), list(map(plain, names)))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.grid(False, axis="y")
    axes.margins(x=0.12)


def _method_of(name: str, methods: Mapping) -> tuple[str | None, bool]:
    return methods.get(name) or methods.get(f"{name} (best)") or (None, False)
