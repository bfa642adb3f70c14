"""Held-out loss and score against steps (Fig. 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from ..results.text import Table
from .charts import Chart, Panel
from .evidence import Evidence
from .methods import by_name, entry, line_style, look, mean, number

LOSS = "eval_loss"
_CUT = 1.6  # the axis ends so many times the spread of what was measured after the first tenth of a run


def curves_chart(evidence: Evidence) -> Chart:
    """Fig. 1: every metric that was measured during training, one line per kind of method, from the first step on."""
    series = evidence.record("curves")["series"]
    metrics = dict.fromkeys(name for each in series for name in each["metrics"])
    groups = by_name(series)
    kinds = _kinds(series)
    chosen = sorted(_one_of_each_kind(groups, kinds), key=lambda name: not kinds[name][1])  # starts first
    entries = {name: entry(name, *kinds[name]) for name in chosen}

    def draw(axes: Axes, metric: str) -> None:
        lines = {name: _mean_line(rows, metric) for name, rows in groups.items() if name in entries}
        for name, line in lines.items():
            if line:
                axes.plot(*np.transpose(line), **line_style(entries[name]), markevery=max(1, len(line) // 8))
        _cut(axes, [[y for _, y in line] for line in lines.values() if line], metric == LOSS)
        axes.set_xlabel("optimizer steps from the pre-trained model")
        axes.set_ylabel(_label(metric))

    rows = [
        (name, _short(metric), number(x, 6), number(y), str(len(group)))
        for name, group in groups.items()
        for metric in metrics
        for x, y in _mean_line(group, metric)
    ]
    text = (
        "The first full fine-tuning, then what was trained from its best checkpoint; means over seeds where all seeds "
        "were measured at the same steps. Of several masks or controls of one kind, the one with the lowest held-out "
        "loss is drawn; the table has all. Held-out rows choose checkpoints here; they are not the test items."
    )
    panels = [Panel(_short(metric), partial(draw, metric=metric), True, 2.6) for metric in metrics]
    return Chart(text, panels, Table(("method", "measure", "step", "mean", "seeds"), rows), list(entries.values()))


def _kinds(series: Sequence[Mapping]) -> dict[str, tuple[str, bool]]:
    """Name -> method, and whether others were trained from it, or it from the pre-trained model."""
    starts = {each["start"] for each in series}
    parents = {each["name"] for each in series if each["run"] in starts or each["start"] is None}
    return {each["name"]: (each["method"], each["name"] in parents) for each in series}


def _one_of_each_kind(groups: Mapping[str, Sequence[Mapping]], kinds: Mapping[str, tuple[str, bool]]) -> list[str]:
    """Names to draw: every start, and of each look the method with the lowest held-out loss."""
    lowest: dict[tuple, tuple[float, str]] = {}
    drawn = set()
    for name, rows in groups.items():
        losses = [min(values) for row in rows if (values := [v for v in row["metrics"].get(LOSS, []) if v is not None])]
        if losses and kinds[name][1]:
            drawn.add(name)
        elif losses:
            kind = look(*kinds[name])
            lowest[kind] = min(lowest.get(kind, (mean(losses), name)), (mean(losses), name))
    drawn |= {name for _, name in lowest.values()}
    return [name for name in groups if name in drawn]


def _mean_line(rows: Sequence[Mapping], metric: str) -> list[tuple[float, float]]:
    """Mean of steps and values over seeds; the first seed alone where the seeds were not measured alike."""
    lines = [
        [(x, y) for x, y in zip(row["steps"], row["metrics"].get(metric, []), strict=False) if y is not None]
        for row in rows
    ]
    lines = [line for line in lines if line]
    if len({len(line) for line in lines}) > 1:
        lines = lines[:1]
    return [(mean([p[0] for p in points]), mean([p[1] for p in points])) for points in zip(*lines, strict=True)]


def _cut(axes: Axes, lines: Sequence[Sequence[float]], is_loss: bool) -> None:
    """End the axis where early losses would hide what happens later; say so on it."""
    values = [value for line in lines for value in line]
    settled = [value for line in lines for value in line[max(1, len(line) // 10) :]] or values
    if not values or not is_loss:
        return
    low, high = min(values), max(values)
    top = low + _CUT * (float(np.quantile(settled, 0.9)) - low)
    if 0 < top - low < 0.6 * (high - low):
        margin = 0.05 * (top - low)
        axes.set_ylim(low - margin, top + margin)
        axes.text(
            0.99, 0.98, f"clipped (max {high:.3g})", ha="right", va="top", fontsize="small", transform=axes.transAxes
        )


def _short(metric: str) -> str:
    return "held-out loss" if metric == LOSS else metric.removeprefix("eval_").replace("_", " ")


def _label(metric: str) -> str:
    return "held-out loss (nats/token)" if metric == LOSS else _short(metric)
