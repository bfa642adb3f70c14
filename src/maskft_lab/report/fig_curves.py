"""Held-out loss and score against steps (Fig. 1), from the training histories of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes

from ..analysis.runs import TrainedRun, parent_of
from ..results.tables import Table
from .charts import Chart, Entry, Panel, line_style
from .evidence import Evidence, NotComputed
from .methods import entries_of, look, number
from .scale import few_ticks

LOSS = "eval_loss"
MIN_POINTS = 3  # of the longest line; two points are not a curve, and are in the table alone
_CUT = 1.6  # the axis ends at this times the spread of the values after the first tenth of a run

# Ends of names that transformers and TRL log beside the metrics of held-out rows.
_NOT_METRICS = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "num_tokens",
    "mean_token_accuracy",
    "entropy",
)

Line = list[tuple[float, float]]  # (steps from the pre-trained model, value)
Lines = dict[str, Line]  # by metric


def spent_until(
    run: TrainedRun,
    step: float | None,
) -> dict[str, float]:
    """Steps, tokens and seconds of a run up to a step; 0 if nothing was trained.

    Tokens are as counted at that step, else the share of the steps in all tokens. Seconds are always by that share, and
    contain the measurements on held-out rows.
    """
    num_steps = run.summary.get("num_steps")
    if not num_steps or not step:
        return {
            "steps": 0.0,
            "tokens": 0.0,
            "time_s": 0.0,
        }

    # The share is an estimate, because steps have rows of different lengths. Where the step was evaluated, TRL has
    # logged the exact number.
    share = step / num_steps
    tokens = run.summary["num_train_tokens"] * share
    for row in run.history:
        # Rows without an evaluation lack the number. TRL counts tokens from the start of the run.
        if row.get("eval_num_tokens") and row["step"] == step:
            tokens = row["eval_num_tokens"]
    return {
        "steps": step,
        "tokens": tokens,
        "time_s": run.summary["train_time_s"] * share,
    }


def spent_before(
    run: TrainedRun,
    runs: Sequence[TrainedRun],
) -> dict[str, float]:
    """Steps, tokens and seconds from the pre-trained model to the start of a run.

    A run starts from its parent's best checkpoint, so the parent's later steps do not count.
    """
    parent = parent_of(run, runs)
    if parent is None:
        return spent_until(run, 0)

    # The parent may have a parent, and so on.
    own = spent_until(parent, parent.best_step)
    before = spent_before(parent, runs)
    return {name: own[name] + before[name] for name in own}


def lines_of(run: TrainedRun, runs: Sequence[TrainedRun]) -> Lines:
    """Every metric that was measured on held-out rows: the loss in nats per token, scores in [0, 1]."""
    # Steps count from the pre-trained model, so that the line of a mask continues that of its parent.
    before = spent_before(run, runs)["steps"]
    lines = {}
    for row in run.history:
        if "step" not in row:
            continue  # the best of several random masks: a row for each candidate, and no steps
        step = before + row["step"]
        for name, value in row.items():
            # None: a number that JSON cannot hold.
            is_metric = name.startswith("eval_") and not name.endswith(_NOT_METRICS)
            if is_metric and value is not None:
                line = lines.setdefault(name, [])
                line.append((step, value))
    return lines


def curves_chart(evidence: Evidence) -> Chart:
    """Fig. 1: every metric that was measured during training, one line per kind of method, from the first step on.

    Raises:
        NotComputed: If no run has a training history with measurements.
    """
    # Name of a method -> the lines of each of its seeds.
    groups = {}
    for run in evidence.runs:
        group = groups.setdefault(run.name, [])
        group.append(lines_of(run, evidence.runs))

    metrics = {}  # a dictionary instead of a set, to keep the order of the histories
    for group in groups.values():
        for lines in group:
            metrics |= dict.fromkeys(lines)
    if not metrics:
        raise NotComputed("no run has a training history with measurements: it needs training.json")

    # Lines to draw: starts first, because others continue them.
    kinds = evidence.methods
    chosen = _one_of_each_kind(groups, kinds)
    starts = {name for name, (_, is_start) in kinds.items() if is_start}
    chosen.sort(key=lambda name: name not in starts)  # False sorts before True
    entries = entries_of({name: kinds[name] for name in chosen})

    # The table has all methods, the picture one of each kind.
    rows = []
    for name, group in groups.items():
        for metric in metrics:
            of_seeds = _alike(group, metric)
            for step, value in _mean_line(of_seeds):
                row = (
                    name,
                    _short(metric),
                    number(step, 6),
                    number(value),
                    str(len(of_seeds)),
                )
                rows.append(row)
    table = Table(("method", "measure", "step", "mean", "seeds"), rows)

    # A panel for each metric that was measured often enough.
    panels = []
    for metric in metrics:
        if _longest(groups, entries, metric) >= MIN_POINTS:
            panel = Panel(
                title=_short(metric),
                draw=partial(_draw, groups=groups, entries=entries, metric=metric),
                is_wide=True,
                height=2.6,
            )
            panels.append(panel)
    if not panels:
        text = f"Measured at fewer than {MIN_POINTS} steps, so there is no curve: the numbers are in the table."
        return Chart(text, panels, table)
    text = (
        "Full fine-tuning of the base, what others start from, and what was trained; means over seeds where all seeds "
        "were measured equally often, else the first. Of several masks or controls of one kind, the one with the "
        "lowest held-out loss is drawn; the table has all. Held-out rows choose checkpoints; they are no test items."
    )
    return Chart(text, panels, table, list(entries.values()))


def _draw(
    axes: Axes,
    groups: Mapping[str, Sequence[Lines]],
    entries: Mapping[str, Entry],
    metric: str,
) -> None:
    drawn = []
    for name, group in groups.items():
        if name not in entries:
            continue
        line = _mean_line(_alike(group, metric))
        # A method may lack this metric.
        if not line:
            continue

        # (points, 2) -> (2, points).
        steps, values = np.transpose(line)
        marker_interval = max(1, len(line) // 8)  # about eight markers on a line
        style = line_style(entries[name])
        axes.plot(steps, values, **style, markevery=marker_interval)
        drawn.append(line)

    # Only a loss begins far above its later values. Scores are in [0, 1].
    is_loss = metric == LOSS
    if is_loss:
        _cut(axes, drawn)
    few_ticks(axes, "x", 7)
    axes.set_xlabel("optimizer steps from the pre-trained model")
    axes.set_ylabel("held-out loss (nats/token)" if is_loss else _short(metric))


def _longest(
    groups: Mapping[str, Sequence[Lines]],
    names: Iterable[str],
    metric: str,
) -> int:
    """The number of points of the longest line that would be drawn."""
    longest = 0
    for name in names:
        for lines in groups[name]:
            line = lines.get(metric, [])
            longest = max(longest, len(line))
    return longest


def _one_of_each_kind(
    groups: Mapping[str, Sequence[Lines]],
    kinds: Mapping[str, tuple[str, bool]],
) -> list[str]:
    """Names to draw: every start, and of each look the method with the lowest held-out loss."""
    lowest = {}  # look -> loss and name of the best method so far
    drawn = set()
    for name, group in groups.items():
        losses = []  # the lowest of each seed
        for lines in group:
            if LOSS in lines:
                losses.append(min(loss for _, loss in lines[LOSS]))
        if not losses:
            continue

        # Starts are always drawn, because the lines of others begin at them.
        method, is_start = kinds[name]
        if is_start:
            drawn.add(name)
            continue

        # Tuples are compared by their losses, and by the names if the losses are equal.
        own = (fmean(losses), name)
        # Methods with one look cannot be told apart in a picture, so only one of them is drawn.
        kind = look(method, is_start)
        lowest[kind] = min(lowest.get(kind, own), own)

    drawn.update(name for _, name in lowest.values())
    # In the order of the runs.
    return [name for name in groups if name in drawn]


def _alike(group: Sequence[Lines], metric: str) -> list[Line]:
    """The line of each seed that has one; only the first if the seeds have different numbers of points.

    Runs that stop early have fewer points, and a mean over those that are left would jump where a run ends.
    """
    of_seeds = [lines[metric] for lines in group if metric in lines]
    lengths = {len(line) for line in of_seeds}
    if len(lengths) > 1:
        return of_seeds[:1]
    return of_seeds


def _mean_line(lines: Sequence[Line]) -> Line:
    """Mean of steps and values over seeds.

    Seeds may be measured at different steps: a run starts where its parent's best checkpoint is.
    """
    means = []
    for points in zip(*lines, strict=True):
        step = fmean([step for step, _ in points])
        value = fmean([value for _, value in points])
        means.append((step, value))
    return means


def _cut(axes: Axes, lines: Sequence[Line]) -> None:
    """End the axis lower if early losses would squash the later ones, and say so on it."""
    # The spread of losses after the first tenth of each line decides where the axis ends.
    values = []
    settled = []
    for line in lines:
        losses = [loss for _, loss in line]
        values += losses
        # At least the first loss is left out, from which the line falls.
        settled += losses[max(1, len(line) // 10) :]
    if not values:
        return

    low = min(values)
    high = max(values)
    # A quantile, because one late outlier must not count.
    settled_high = float(np.quantile(settled or values, 0.9))
    top = low + _CUT * (settled_high - low)

    # Only where it gains much of the height, and hides at most a fifth of the points.
    is_much_lower = 0 < top - low < 0.6 * (high - low)
    num_above = sum(value > top for value in values)
    if not is_much_lower or 5 * num_above > len(values):
        return

    margin = 0.05 * (top - low)
    axes.set_ylim(low - margin, top + margin)
    axes.text(
        0.99,
        0.98,
        f"clipped (max {high:.3g})",
        ha="right",
        va="top",
        fontsize="small",
        transform=axes.transAxes,
    )


def _short(metric: str) -> str:
    """A metric in words."""
    if metric == LOSS:
        return "held-out loss"
    return metric.removeprefix("eval_").replace("_", " ")
