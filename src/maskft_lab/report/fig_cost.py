"""What methods cost (Figs 4 and 9): memory, tokens and time, from the training histories of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes

from ..analysis.runs import BEST, LAST, TrainedRun, plain_name
from ..results.tables import Table
from .charts import COLOURS, ROW_HEIGHT, Chart, Entry, Panel, row_name
from .evidence import Evidence, NotComputed
from .fig_curves import spent_before, spent_until
from .methods import look, number

_PANELS = {
    "peak_memory_bytes": ("peak memory of one process (GB)", 1e9),
    "total_tokens": ("tokens from the pre-trained model (million)", 1e6),
    "total_time_s": ("training time from the pre-trained model (minutes)", 60.0),
}
_COLUMNS = {"peak_memory_bytes": 1e9, "tokens": 1e6, "total_tokens": 1e6, "time_s": 60.0, "total_time_s": 60.0}
_OWN = {"total_tokens": "tokens", "total_time_s": "time_s"}


class Cost(NamedTuple):
    """Means over seeds of what a method cost up to its best checkpoint (role ``best``) or its end (``last``)."""

    name: str
    role: str
    num_seeds: int
    spent: Mapping[str, float]


def cost_of(run: TrainedRun, role: str, runs: Sequence[TrainedRun]) -> dict[str, float]:
    """Bytes of one process, tokens and seconds of a run, and from the pre-trained model on (``total_``)."""
    step = run.summary["num_steps"] if role == LAST else run.best_step
    own, before = spent_until(run, step), spent_before(run, runs)
    return {
        "peak_memory_bytes": run.summary["peak_memory_bytes"],
        **{name: own[name] for name in ("tokens", "time_s")},
        **{f"total_{name}": before[name] + own[name] for name in ("tokens", "time_s")},
    }


def costs_of(runs: Sequence[TrainedRun]) -> list[Cost]:
    """Of each method and role, in the order of the runs."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in runs:
        for role in (BEST, LAST) if run.summary.get("num_steps") else ():
            groups.setdefault((run.name, role), []).append(cost_of(run, role, runs))
    means = {key: {q: fmean([cost[q] for cost in each]) for q in _COLUMNS} for key, each in groups.items()}
    return [Cost(*key, len(each), means[key]) for key, each in groups.items()]


def cost_chart(evidence: Evidence) -> Chart:
    """Bars for each method up to its best checkpoint, and for the baseline also up to its end."""
    costs = costs_of(evidence.runs)
    if not costs:
        raise NotComputed("no run tells memory, tokens and time: it needs training.json")
    start = plain_name(evidence.comparison.baseline) if evidence.comparison else ""
    methods, compared = evidence.methods, evidence.comparison.methods if evidence.comparison else []
    order = list(dict.fromkeys([start, *map(plain_name, compared)]))
    rows = [cost for cost in costs if cost.role == BEST]
    tokens = {cost.name: cost.spent["total_tokens"] for cost in rows}
    ends = [cost for cost in costs if cost.role != BEST and cost.name == start]
    rows += [cost for cost in ends if cost.spent["total_tokens"] != tokens.get(start)]  # else the best is the end
    rows.sort(key=lambda cost: order.index(cost.name) if cost.name in order else len(order))
    table = [
        (cost.name, cost.role, str(cost.num_seeds), *(number(cost.spent[q] / s) for q, s in _COLUMNS.items()))
        for cost in costs
    ]
    columns = ("method", "until", "seeds", "peak memory (GB)", "tokens (million)", "total tokens (million)")
    columns += ("minutes", "total minutes")
    text = (
        "Means over seeds, up to the kept checkpoint; the full bar counts from the pre-trained model, its dark part is "
        "the method's own. Times are comparable between runs of one machine only, memory between runs of one device."
    )
    height = 0.65 + ROW_HEIGHT * len(rows)
    panels = [
        Panel(title, lambda axes, q=quantity, s=scale: _draw(axes, rows, q, s, methods), True, height)
        for quantity, (title, scale) in _PANELS.items()
    ]
    return Chart(text, panels, Table(columns, table), [Entry("spent before this method", "rule", "", "s")])


def _draw(axes: Axes, rows: Sequence[Cost], quantity: str, scale: float, methods: Mapping) -> None:
    for place, cost in enumerate(rows):
        total, own = (cost.spent[name] / scale for name in (quantity, _OWN.get(quantity, quantity)))
        colour = look(*methods.get(cost.name, (None, False)))[0]
        axes.barh(place, total, color=COLOURS["rule"], height=0.7)
        axes.barh(place, own, left=total - own, color=COLOURS[colour], height=0.7)
        axes.text(total, place, f" {number(total, 3)}", va="center", fontsize="small")
    names = [cost.name + (" (to the end)" if cost.role == LAST else "") for cost in rows]
    axes.set_yticks(range(len(rows)), list(map(row_name, names)))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
