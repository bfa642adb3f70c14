"""Held-out loss and score against steps (Fig. 1), from the training histories of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes

from ..analysis.runs import TrainedRun, parent_of
from ..results.tables import Table
from .charts import Chart, Panel, line_style
from .evidence import Evidence, NotComputed
from .methods import entries_of, look, number
from .scale import few_ticks

LOSS = "eval_loss"
MIN_POINTS = 3  # of the longest line: two points are two numbers of the table, and no curve
_CUT = 1.6  # the axis ends so many times the spread of what was measured after the first tenth of a run
_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "mean_token_accuracy", "entropy")

Lines = dict[str, list[tuple[float, float]]]  # metric -> (steps from the pre-trained model, value)


def spent_until(run: TrainedRun, step: float | None) -> dict[str, float]:
    """Steps, tokens and seconds of a run up to a step; 0 where nothing was trained.

    Tokens are as counted there, else by the share of the steps, as seconds are; measuring on held-out rows is in these.
    """
    num_steps = run.summary.get("num_steps")
    if not num_steps or not step:
        return {"steps": 0.0, "tokens": 0.0, "time_s": 0.0}
    counted = {row["step"]: row["eval_num_tokens"] for row in run.history if row.get("eval_num_tokens")}
    share = step / num_steps
    tokens = counted.get(step, run.summary["num_train_tokens"] * share)
    return {"steps": step, "tokens": tokens, "time_s": run.summary["train_time_s"] * share}


def spent_before(run: TrainedRun, runs: Sequence[TrainedRun]) -> dict[str, float]:
    """Steps, tokens and seconds from the pre-trained model to the start of a run: of its parents' best checkpoints."""
    parent = parent_of(run, runs)
    if parent is None:
        return spent_until(run, 0)
    own = spent_until(parent, parent.best_step)
    before = spent_before(parent, runs)
    return {name: own[name] + before[name] for name in own}


def lines_of(run: TrainedRun, runs: Sequence[TrainedRun]) -> Lines:
    """Every metric that was measured on held-out rows: the loss in nats per token, scores in [0, 1]."""
    before = spent_before(run, runs)["steps"]
    lines: Lines = {}
    for row in run.history:
        for name, value in row.items():
            # The candidates that a best of several random masks was chosen from were measured at no step.
            is_metric = name.startswith("eval_") and not name.endswith(_NOT_METRICS)
            if is_metric and "step" in row and value is not None:
                lines.setdefault(name, []).append((before + row["step"], value))
    return lines


def curves_chart(evidence: Evidence) -> Chart:
    """Fig. 1: every metric that was measured during training, one line per kind of method, from the first step on."""
    groups: dict[str, list[Lines]] = {}
    for run in evidence.runs:
        groups.setdefault(run.name, []).append(lines_of(run, evidence.runs))
    metrics = dict.fromkeys(name for lines in groups.values() for each in lines for name in each)
    if not metrics:
        raise NotComputed("no run has a training history with measurements: it needs training.json")
    kinds = evidence.methods
    chosen = sorted(_one_of_each_kind(groups, kinds), key=lambda name: not kinds[name][1])  # starts first
    entries = entries_of({name: kinds[name] for name in chosen})

    def draw(axes: Axes, metric: str) -> None:
        lines = {name: _mean_line(_alike(groups[name], metric)) for name in groups if name in entries}
        for name, line in lines.items():
            if line:
                axes.plot(*np.transpose(line), **line_style(entries[name]), markevery=max(1, len(line) // 8))
        _cut(axes, [[y for _, y in line] for line in lines.values() if line], metric == LOSS)
        few_ticks(axes, "x", 7)
        axes.set_xlabel("optimizer steps from the pre-trained model")
        axes.set_ylabel("held-out loss (nats/token)" if metric == LOSS else _short(metric))

    rows = [
        (name, _short(metric), number(x, 6), number(y), str(len(alike)))
        for name, group in groups.items()
        for metric in metrics
        for alike in [_alike(group, metric)]
        for x, y in _mean_line(alike)
    ]
    text = (
        "Full fine-tuning of the base, what others start from, and what was trained; means over seeds where all seeds "
        "were measured at the same steps, else the first. Of several masks or controls of one kind, the one with the "
        "lowest held-out loss is drawn; the table has all. Held-out rows choose checkpoints; they are no test items."
    )
    drawn = [metric for metric in metrics if _longest(groups, entries, metric) >= MIN_POINTS]
    panels = [Panel(_short(metric), partial(draw, metric=metric), True, 2.6) for metric in drawn]
    if not panels:
        text = f"Measured at fewer than {MIN_POINTS} steps, so there is no curve: the numbers are in the table."
    legend = list(entries.values()) if panels else []
    return Chart(text, panels, Table(("method", "measure", "step", "mean", "seeds"), rows), legend)


def _longest(groups: Mapping[str, Sequence[Lines]], names: Iterable[str], metric: str) -> int:
    """The number of points of the longest line that would be drawn."""
    return max((len(lines.get(metric, [])) for name in names for lines in groups[name]), default=0)


def _one_of_each_kind(groups: Mapping[str, Sequence[Lines]], kinds: Mapping[str, tuple[str, bool]]) -> list[str]:
    """Names to draw: every start, and of each look the method with the lowest held-out loss."""
    lowest: dict[tuple[str, str, str], tuple[float, str]] = {}
    drawn = set()
    for name, group in groups.items():
        losses = [min(value for _, value in lines[LOSS]) for lines in group if LOSS in lines]
        if losses and kinds[name][1]:
            drawn.add(name)
        elif losses:
            kind = look(*kinds[name])
            lowest[kind] = min(lowest.get(kind, (fmean(losses), name)), (fmean(losses), name))
    drawn |= {name for _, name in lowest.values()}
    return [name for name in groups if name in drawn]


def _alike(group: Sequence[Lines], metric: str) -> list[list[tuple[float, float]]]:
    """The line of each seed that has one; the first alone where the seeds were not measured alike."""
    lines = [line[metric] for line in group if metric in line]
    return lines[:1] if len({len(line) for line in lines}) > 1 else lines


def _mean_line(lines: Sequence[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean of steps and values over seeds."""
    return [(fmean([p[0] for p in points]), fmean([p[1] for p in points])) for points in zip(*lines, strict=True)]


def _cut(axes: Axes, lines: Sequence[Sequence[float]], is_loss: bool) -> None:
    """End the axis where early losses would hide what happens later; say so on it."""
    values = [value for line in lines for value in line]
    settled = [value for line in lines for value in line[max(1, len(line) // 10) :]] or values
    if not values or not is_loss:
        return
    low = min(values)
    high = max(values)
    top = low + _CUT * (float(np.quantile(settled, 0.9)) - low)
    if 0 < top - low < 0.6 * (high - low) and 5 * sum(value > top for value in values) <= len(values):
        margin = 0.05 * (top - low)
        axes.set_ylim(low - margin, top + margin)
        text = f"clipped (max {high:.3g})"
        axes.text(0.99, 0.98, text, ha="right", va="top", fontsize="small", transform=axes.transAxes)


def _short(metric: str) -> str:
    return "held-out loss" if metric == LOSS else metric.removeprefix("eval_").replace("_", " ")
