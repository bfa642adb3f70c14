"""What methods cost (Figs 4 and 9): memory, tokens and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from ..results.text import Table
from .charts import COLOURS, ROW_HEIGHT, Chart, Entry, Panel, row_name
from .evidence import Evidence
from .methods import look, number, plain_name

_PANELS = {
    "peak_memory_bytes": ("peak memory of one process (GB)", 1e9),
    "total_tokens": ("tokens from the pre-trained model (million)", 1e6),
    "total_time_s": ("training time from the pre-trained model (minutes)", 60.0),
}
_COLUMNS = {"peak_memory_bytes": 1e9, "tokens": 1e6, "total_tokens": 1e6, "time_s": 60.0, "total_time_s": 60.0}
_OWN = {"total_tokens": "tokens", "total_time_s": "time_s"}


def cost_chart(evidence: Evidence) -> Chart:
    """Bars for each method up to its best checkpoint, and for the baseline also up to its end."""
    record = evidence.record("cost")
    start = plain_name(evidence.comparison.baseline) if evidence.comparison else ""
    methods = {plain_name(name): kind for name, kind in evidence.methods.items()}
    order = list(methods)
    rows = [row for row in record["rows"] if row["role"] == "best"]
    tokens = {row["name"]: row["total_tokens"] for row in rows}
    ends = [row for row in record["rows"] if row["role"] != "best" and row["name"] == start]
    rows += [row for row in ends if row["total_tokens"] != tokens.get(start)]  # else the best is the end
    rows.sort(key=lambda row: order.index(row["name"]) if row["name"] in order else len(order))
    table = [
        (row["name"], row["role"], str(row["num_seeds"]), *(number(row[q]["mean"] / s) for q, s in _COLUMNS.items()))
        for row in record["rows"]
    ]
    columns = ("method", "until", "seeds", "peak memory (GB)", "tokens (million)", "total tokens (million)")
    columns += ("minutes", "total minutes")
    text = (
        "Means over seeds, up to the kept checkpoint; the full bar counts from the pre-trained model, its dark part is "
        "the method's own. Times are comparable between runs of one machine only, memory between runs of one device."
    )
    panels = [
        Panel(
            title,
            lambda axes, q=quantity, s=scale: _draw(axes, rows, q, s, methods),
            True,
            0.65 + ROW_HEIGHT * len(rows),
        )
        for quantity, (title, scale) in _PANELS.items()
    ]
    entries = [Entry("spent before this method", "rule", "", "s")]
    return Chart(text, panels, Table(columns, table), entries)


def _draw(axes: Axes, rows: Sequence[Mapping], quantity: str, scale: float, methods: Mapping) -> None:
    for place, row in enumerate(rows):
        total = row[quantity]["mean"] / scale
        own = row[_OWN[quantity]]["mean"] / scale if quantity in _OWN else total
        colour = look(*methods.get(row["name"], (None, False)))[0]
        axes.barh(place, total, color=COLOURS["rule"], height=0.7)
        axes.barh(place, own, left=total - own, color=COLOURS[colour], height=0.7)
        axes.text(total, place, f" {number(total, 3)}", va="center", fontsize="small")
    names = [row["name"] + (" (to the end)" if row["role"] == "last" else "") for row in rows]
    axes.set_yticks(range(len(rows)), list(map(row_name, names)))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
