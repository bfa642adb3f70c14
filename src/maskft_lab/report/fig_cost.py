"""The cost of methods (Figs 4 and 9): memory, tokens and time, from the training histories of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes

from ..analysis.runs import BEST, LAST, TrainedRun, plain_name
from ..results.tables import Table
from .charts import COLOURS, ROW_HEIGHT, Chart, Entry, Panel, row_name
from .evidence import Evidence, NotComputed
from .fig_curves import spent_before, spent_until
from .methods import look, number
from .scale import few_ticks, name_rows

NEARLY_EQUAL = 1.15  # largest bar / smallest bar; up to here a sentence replaces the bars


class Quantity(NamedTuple):
    """A quantity that is drawn as bars: all that was spent until now, and the part that the method itself spent."""

    total: str  # key of `Cost.spent`
    own: str  # key of `Cost.spent`
    title: str
    scale: float  # numbers of a cost are divided by it for the picture
    unit: str  # of the picture


_QUANTITIES = (
    Quantity("peak_memory_bytes", "peak_memory_bytes", "peak memory of one process", 1e9, "GB"),
    Quantity("total_tokens", "tokens", "tokens from the pre-trained model", 1e6, "million"),
    Quantity("total_time_s", "time_s", "training time from the pre-trained model", 60.0, "minutes"),
)
# Column of the table -> key of `Cost.spent`, and the number by which it is divided.
_COLUMNS = {
    "peak memory (GB)": ("peak_memory_bytes", 1e9),
    "tokens (million)": ("tokens", 1e6),
    "total tokens (million)": ("total_tokens", 1e6),
    "minutes": ("time_s", 60.0),
    "total minutes": ("total_time_s", 60.0),
}


class Cost(NamedTuple):
    """Mean cost of a method over seeds, up to its best checkpoint (role ``best``) or its end (``last``)."""

    name: str
    role: str
    num_seeds: int
    spent: Mapping[str, float]  # as `cost_of`: bytes, tokens, seconds


def cost_of(
    run: TrainedRun,
    role: str,
    runs: Sequence[TrainedRun],
) -> dict[str, float]:
    """Bytes of one process, tokens and seconds of a run, and from the pre-trained model on (``total_``).

    Args:
        run: The run, with a training history.
        role: Until when: ``best``, its best checkpoint, or ``last``, its end.
        runs: All runs, among them those that it starts from.
    """
    if role == LAST:
        step = run.summary["num_steps"]
    else:
        step = run.best_step
    # A run's later steps are no cost of its best checkpoint, though one has to train them to know that it is the best.
    own = spent_until(run, step)
    before = spent_before(run, runs)
    # Memory does not add up over runs that follow each other, so it has no total. Of a parent only the part up to its
    # best checkpoint counts, where this run has started.
    return {
        "peak_memory_bytes": run.summary["peak_memory_bytes"],
        "tokens": own["tokens"],
        "time_s": own["time_s"],
        "total_tokens": before["tokens"] + own["tokens"],
        "total_time_s": before["time_s"] + own["time_s"],
    }


def costs_of(runs: Sequence[TrainedRun]) -> list[Cost]:
    """The cost of each method and role, in the order of the runs."""
    # Name and role -> the cost of each seed.
    groups = {}
    for run in runs:
        if not run.summary.get("num_steps"):
            continue  # a fixed mask, or the base itself
        for role in (BEST, LAST):
            of_seeds = groups.setdefault((run.name, role), [])
            of_seeds.append(cost_of(run, role, runs))

    # Means over seeds; all of them have the same quantities.
    costs = []
    for (name, role), of_seeds in groups.items():
        means = {}
        for quantity in of_seeds[0]:
            values = [spent[quantity] for spent in of_seeds]
            means[quantity] = fmean(values)
        cost = Cost(name, role, len(of_seeds), means)
        costs.append(cost)
    return costs


def cost_chart(evidence: Evidence) -> Chart:
    """Bars for each method up to its best checkpoint, and for the baseline also up to its end.

    A quantity in which all methods are nearly equal is a sentence instead of a picture.

    Raises:
        NotComputed: If no run has a training history.
    """
    costs = costs_of(evidence.runs)
    if not costs:
        raise NotComputed("no run tells memory, tokens and time: it needs training.json")

    # Bars, or a sentence where all bars would have one length.
    rows = _rows(costs, evidence)
    drawn = []
    sentences = []
    for quantity in _QUANTITIES:
        if _is_nearly_equal(rows, quantity):
            sentences.append(_equal_text(rows, quantity))
        else:
            drawn.append(quantity)

    text = " ".join(sentences)
    if drawn:
        text += (
            " Bars are means over seeds, up to the kept checkpoint; the full bar counts from the pre-trained model, "
            "its dark part is the method's share."
        )
    text += " Times are comparable between runs of one machine only, memory between runs of one device."

    # All panels have the same rows, so one height fits all.
    # 0.65 inches for the ticks below the rows.
    height = 0.65 + ROW_HEIGHT * len(rows)
    panels = []
    for quantity in drawn:
        panel = Panel(
            title=f"{quantity.title} ({quantity.unit})",
            draw=partial(_draw, rows=rows, quantity=quantity, methods=evidence.methods),
            is_wide=True,
            height=height,
        )
        panels.append(panel)

    # The grey part of a bar needs a legend. The colours of methods do not, because each row has its name.
    legend = []
    if any(_has_parts(rows, quantity) for quantity in drawn):
        legend.append(Entry("spent before this method", "rule", "", "s"))
    return Chart(text.strip(), panels, _table(costs), legend)


def _table(costs: Sequence[Cost]) -> Table:
    rows = []
    for cost in costs:
        cells = [cost.name, cost.role, str(cost.num_seeds)]
        for quantity, scale in _COLUMNS.values():
            cells.append(number(cost.spent[quantity] / scale))
        rows.append(tuple(cells))
    return Table(("method", "until", "seeds", *_COLUMNS), rows)


def _rows(costs: Sequence[Cost], evidence: Evidence) -> list[Cost]:
    """The costs to draw, in the order of the comparison."""
    comparison = evidence.comparison
    start = ""
    compared = []
    if comparison:
        start = plain_name(comparison.baseline)
        compared = [plain_name(name) for name in comparison.methods]
    order = list(dict.fromkeys([start, *compared]))  # each once: the best and the last model of a run have one name

    # Every method until its best checkpoint.
    rows = [cost for cost in costs if cost.role == BEST]
    tokens = {cost.name: cost.spent["total_tokens"] for cost in rows}
    # Also the baseline until its end: further training is the alternative to a mask of its best checkpoint.
    for cost in costs:
        is_end_of_start = cost.role == LAST and cost.name == start
        # Its last checkpoint may be the best one, and is not drawn twice then.
        is_also_best = cost.spent["total_tokens"] == tokens.get(start)
        if is_end_of_start and not is_also_best:
            rows.append(cost)

    # Methods that were not compared come last.
    def place(cost: Cost) -> int:
        if cost.name in order:
            return order.index(cost.name)
        return len(order)

    # Both rows of the baseline have one place, and a stable sort leaves its end below its best checkpoint.
    rows.sort(key=place)
    return rows


def _is_nearly_equal(rows: Sequence[Cost], quantity: Quantity) -> bool:
    """Whether a sentence says as much as bars would: all have about one length, and none has parts."""
    # The sentence has no room for the parts.
    if _has_parts(rows, quantity):
        return False
    values = [cost.spent[quantity.total] for cost in rows]
    return max(values) <= NEARLY_EQUAL * min(values)


def _has_parts(rows: Sequence[Cost], quantity: Quantity) -> bool:
    """Whether any method started from another's model, so that a part of its bar was spent before."""
    for cost in rows:
        # Peak memory has one key for both, so it has no parts.
        if cost.spent[quantity.own] != cost.spent[quantity.total]:
            return True
    return False


def _equal_text(rows: Sequence[Cost], quantity: Quantity) -> str:
    values = [cost.spent[quantity.total] / quantity.scale for cost in rows]
    low = number(min(values), 3)
    high = number(max(values), 3)
    values_text = f"{low} to {high}"
    # Compared as texts: numbers that are printed alike are one.
    if low == high:
        values_text = low
    # Not str.capitalize, which would turn the rest to lower case.
    title = quantity.title[0].upper() + quantity.title[1:]
    return f"{title}: {values_text} {quantity.unit}, nearly equal."


def _draw(
    axes: Axes,
    rows: Sequence[Cost],
    quantity: Quantity,
    methods: Mapping[str, tuple[str, bool]],
) -> None:
    for place, cost in enumerate(rows):
        total = cost.spent[quantity.total] / quantity.scale
        own = cost.spent[quantity.own] / quantity.scale
        method, is_start = methods.get(cost.name, (None, False))
        # Bars have neither dash nor marker.
        colour, _, _ = look(method, is_start)

        # A full bar, and over its right end the part of the method itself.
        # The whole length in grey, which remains visible to the left as the part that was spent before.
        axes.barh(place, total, color=COLOURS["rule"], height=0.7)
        axes.barh(
            place,
            own,
            left=total - own,
            color=COLOURS[colour],
            height=0.7,
        )
        axes.text(
            total,
            place,
            f" {number(total, 3)}",
            va="center",
            fontsize="small",
        )

    names = []
    for cost in rows:
        name = cost.name
        if cost.role == LAST:
            name += " (to the end)"
        names.append(row_name(name))
    name_rows(axes, range(len(rows)), names)
    axes.margins(x=0.14)  # room for the numbers beside the bars
    few_ticks(axes)
