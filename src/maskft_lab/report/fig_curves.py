"""Held-out loss and score against steps (Fig. 1)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from ..results.text import Table
from .charts import COLOURS, Chart, Panel, plain
from .evidence import Evidence, Trained
from .methods import by_name, entry, line_style, look, mean, number

LOSS = "eval_loss"
_FAR = 8.0  # times the median distance from the median: what lies farther is named beside the axes
_NAME_HEIGHT = 0.125  # inches that the name of a point takes
_CUT = 1.6  # the axis ends so many times the spread of what was measured after the first tenth of a run


def overview_chart(evidence: Evidence) -> Chart:
    """Fig. 1: every metric that was measured during training, one line per kind of method, from the first step on."""
    series = evidence.arrays["curves"]["series"]
    metrics = dict.fromkeys(name for each in series for name in each["metrics"])
    chosen = {name: rows for name, rows in by_name(series).items() if name in _one_of_each_kind(evidence, series)}
    chosen = dict(sorted(chosen.items(), key=lambda each: not _kind(each[1])[1]))  # starts first
    entries = {name: entry(name, *_kind(rows)) for name, rows in chosen.items()}

    def draw(axes: Axes, metric: str) -> None:
        lines = {name: _mean_line(rows, metric) for name, rows in chosen.items()}
        for name, line in lines.items():
            if line:
                axes.plot(*np.transpose(line), **line_style(entries[name]), markevery=max(1, len(line) // 8))
        _cut(axes, [[y for _, y in line] for line in lines.values() if line], metric == LOSS)
        axes.set_xlabel("optimizer steps from the pre-trained model")
        axes.set_ylabel(_label(metric))

    rows = [
        (name, _short(metric), number(x, 6), number(y), str(len(group)))
        for name, group in by_name(series).items()
        for metric in metrics
        for x, y in _mean_line(group, metric)
    ]
    text = (
        "The first full fine-tuning, then what was trained from its best checkpoint; means over seeds where all seeds "
        "were measured at the same steps. Of several masks or controls of one kind, the one with the lowest held-out "
        "loss is drawn; the table has all. Held-out rows choose checkpoints here; they are not the test items."
    )
    return Chart(
        "fig01_curves",
        "Held-out measures against steps",
        text,
        [Panel(_short(metric), lambda axes, m=metric: draw(axes, m), True, 2.6) for metric in metrics],
        Table(("method", "measure", "step", "mean", "seeds"), rows),
        (1,),
        list(entries.values()),
    )


def methods_chart(trained: Sequence[Trained]) -> Chart:
    """Held-out loss of every method against its own steps, one line per seed."""
    groups: dict[str, list[Trained]] = {}
    for each in trained:
        groups.setdefault(each.name, []).append(each)
    table = [
        (
            each.name,
            "–" if each.seed is None else str(each.seed),
            number(losses[0][1]),
            number(min(loss for _, loss in losses)),
            str(min(losses, key=lambda pair: pair[1])[0]),
            number(losses[-1][1]),
            " ".join(f"{step}: {loss:.4g}" for step, loss in losses),
        )
        for each in trained
        if (losses := _losses(each))
    ]
    columns = ("method", "seed", "at the start", "lowest", "at step", "at the end", "step: held-out loss")
    text = (
        "One line per seed, from the first step of that run. The dot is the checkpoint that was kept. Panels do not "
        "share an axis."
    )
    panels = [Panel(name, lambda axes, group=group: _draw_method(axes, group)) for name, group in groups.items()]
    return Chart("curves_by_method", "Held-out loss of every method", text, panels, Table(columns, table))


def scores_chart(evidence: Evidence) -> Chart:
    """Test scores at the checkpoints that were kept, against the tokens spent until there."""
    rows = evidence.accounts
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    groups = by_name(rows)
    reached = evidence.comparison.scores if evidence.comparison else []
    units = {f"{score.task}/{score.metric}": score.unit for score in reached}

    def points(metric: str) -> list[tuple[str, float, list[float]]]:
        found = []
        for name, members in groups.items():
            values = [row["metrics"][metric] for row in members if row["metrics"].get(metric) is not None]
            if values:
                found.append((name, mean([row["total_tokens"] for row in members]), values))
        return found

    table = [
        (name, metric, number(round(tokens)), number(mean(values)), str(len(values)), " ".join(map(number, values)))
        for metric in metrics
        for name, tokens, values in points(metric)
    ]
    panels = [
        Panel(
            f"{metric.rpartition('/')[2]} on {metric.rpartition('/')[0]}",
            lambda axes, m=metric: _draw_scores(axes, points(m), evidence.methods, units.get(m, "")),
            True,
            max(2.4, 0.9 + _NAME_HEIGHT * len(points(metric))),
        )
        for metric in metrics
    ]
    text = (
        "Means over seeds on the test items; which differences can be told from chance stands above. Tokens count from "
        "the pre-trained model, so those of a mask include the full fine-tuning under it."
    )
    columns = ("model", "measure", "tokens in all", "mean", "seeds", "each seed")
    return Chart("scores_tokens", "Test scores against tokens spent", text, panels, Table(columns, table), (1,))


def _one_of_each_kind(evidence: Evidence, series: Iterable[Mapping]) -> set[str]:
    """Names to draw: of each look, the method whose held-out loss is lowest; every start of others."""
    lowest: dict[tuple, tuple[float, str]] = {}
    starts = {each["start"] for each in series}
    # Of a chain of starts, those that something other than a start was trained from.
    nearest = {each["start"] for each in series if each["run"] not in starts}
    names = {each["name"] for each in series if each["run"] in nearest}
    before = {each["name"] for each in series if each["run"] in starts} - names
    for name, rows in by_name(series).items():
        losses = [min(values) for row in rows if (values := [v for v in row["metrics"].get(LOSS, []) if v is not None])]
        if losses and name not in names | before:
            kind = look(*_kind(rows))
            lowest[kind] = min(lowest.get(kind, (mean(losses), name)), (mean(losses), name))
    return names | {name for _, name in lowest.values()}


def _kind(rows: Sequence[Mapping]) -> tuple[str, bool]:
    # A chain of full fine-tunings, each from the best of the one before, counts as a start.
    return rows[0]["method"], rows[0]["start"] is None or rows[0]["name"] in ("full", "FFT")


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


def _losses(trained: Trained) -> list[tuple[int, float]]:
    return [(row["step"], row[LOSS]) for row in trained.summary["history"] if LOSS in row and "step" in row]


def _draw_method(axes: Axes, group: Sequence[Trained]) -> None:
    colour, dash, _ = look(group[0].method, group[0].is_start)
    for each in group:
        losses = _losses(each)
        axes.plot(*np.transpose(losses), color=COLOURS[colour], linestyle=dash, linewidth=0.9, alpha=0.75)
        best = min(losses, key=lambda pair: pair[1])
        axes.plot(*best, "o", color=COLOURS[colour], markersize=3.5)
    _cut(axes, [[loss for _, loss in _losses(each)] for each in group], True)
    axes.set_xlabel("steps of this run")
    axes.set_ylabel("nats/token")


def _draw_scores(axes: Axes, points: list, methods: Mapping[str, tuple[str | None, bool]], unit: str) -> None:
    """Points, named in a column at the right, with thin lines to their names."""
    scale = 100.0 if unit == "fraction" else 1.0
    values = [scale * mean(each) for _, _, each in points]
    middle = float(np.median(values))
    near = _FAR * (float(np.median(np.abs(np.array(values) - middle))) or 1.0)
    shown = [index for index, value in enumerate(values) if abs(value - middle) <= near]
    far = [f"{points[i][0]}: {number(value)}" for i, value in enumerate(values) if i not in shown]
    low, high = min(values[i] for i in shown), max(values[i] for i in shown)
    height = 1.1 * (high - low or 1.0)
    bottom = (low + high - height) / 2
    axes.set_ylim(bottom, bottom + height)
    places = _spread([(values[i] - bottom) / height for i in shown], 1 / max(len(shown), 14))
    tokens = [points[i][1] / 1e6 for i in shown]
    margin = 0.05 * (max(tokens) - min(tokens) or 1.0)
    left, right = min(tokens) - margin, max(tokens) + margin
    axes.set_xlim(left, right + 0.6 * (right - left))
    axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= right])  # none below the names
    for index, x, place in zip(shown, tokens, places, strict=True):
        name, value, at = points[index][0], values[index], bottom + place * height
        colour, _, marker = look(*methods.get(name, (None, False)))
        axes.plot([x, right], [value, at], color=COLOURS["rule"], linewidth=0.6, zorder=0)
        axes.plot(x, value, marker=marker, color=COLOURS[colour])
        axes.text(right, at, f" {plain(name)}", va="center", fontsize=6.5, color=COLOURS[colour])
    axes.set_ylabel("%" if unit == "fraction" else plain(unit))
    note = textwrap.wrap(plain(f"outside of these axes: {', '.join(far)}"), 110) if far else []
    axes.set_xlabel("\n".join(["million tokens from the pre-trained model, at the kept checkpoint", *note]))


def _spread(values: Sequence[float], step: float) -> list[float]:
    """Places for labels near ``values``, at least ``step`` apart and between 0 and 1 (where that many have room)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = [0.0] * len(values)
    below = -math.inf
    for index in order:
        places[index] = below = max(values[index], below + step)
    above = 1.0
    for index in reversed(order):
        places[index] = min(places[index], above)
        above = places[index] - step
    return places


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
        axes.text(0.99, 0.98, f"up to {high:.3g} above", ha="right", va="top", fontsize=6, transform=axes.transAxes)


def _short(metric: str) -> str:
    return "held-out loss" if metric == LOSS else metric.removeprefix("eval_").replace("_", " ")


def _label(metric: str) -> str:
    return "held-out loss (nats/token)" if metric == LOSS else _short(metric)
