"""A metric against one varied setting of the mask (Figs 3, 6, 7, 8, 10 and 11), from the results of a study."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from ..analysis.runs import BEST, MASK, TrainedRun, parent_of
from ..results.comparison import Place
from ..results.statistics import weighted_mean
from ..results.tables import Table
from ..results.words import unit_text
from .charts import COLOURS, Chart, Entry, Panel, plain
from .evidence import Evidence, NotComputed, test_name
from .methods import looks_in_turn, number

_NAMES = {
    "mask_layers_to_transform": "masked layers",
    "mask_sparsity": "share removed",
    "max_train_samples": "training rows",
    "learning_rate": "learning rate of the scores",
    "start": "mask of",
}
_ALL = ("mask_layers_to_transform", "max_train_samples")  # settings whose default means all
_OF_THE_PAPER = ("mask_layers_to_transform", "mask_sparsity", "max_train_samples")
# No ablation varies these: seeds, and the times at which something is measured or written.
_NOT_VARIED = (
    "seed",
    "mask_seed",
    "eval_steps",
    "save_steps",
    "logging_steps",
    "keep_last",
    "report_to",
)


class SeedMean(NamedTuple):
    """Mean of a metric over the seeds of one method; its error is over seeds where there are several, else items."""

    mean: float
    stderr: float | None
    num_seeds: int


class Line(NamedTuple):
    """A metric against a setting, with all others ``fixed``; ``start`` is the metric of the models under the masks."""

    fixed: Mapping[str, Any]
    points: Sequence[tuple[Any, SeedMean]]  # by the value of the setting
    start: SeedMean | None


class Ablation(NamedTuple):
    """One metric of a task against one setting."""

    setting: str
    task: str
    metric: str
    unit: str
    lines: Sequence[Line]


def ablations_of(runs: Sequence[TrainedRun]) -> list[Ablation]:
    """Every metric against every setting in which two evaluated masks differ, all else being equal."""
    # Learned masks alone, as in the ablations of the paper.
    masks = [run for run in runs if run.method == MASK and BEST in run.results]

    # All settings and all metrics that any mask has. Dictionaries instead of sets, to keep the order.
    names = {}  # name of a setting -> None
    units = {}  # task and metric -> unit
    for run in masks:
        names |= dict.fromkeys(run.settings)
        tasks = run.results[BEST]["tasks"]
        for task, record in tasks.items():
            for metric, values in record["metrics"].items():
                units[task, metric] = values["unit"]

    # Settings in which masks differ.
    varied = []
    for name in names:
        if name in _NOT_VARIED:
            continue
        values_of_name = {_key(run.settings.get(name)) for run in masks}
        if len(values_of_name) > 1:
            varied.append(name)

    # Each setting against each metric, with the other settings fixed. For many pairs no line has two points.
    ablations = []
    for name in varied:
        others = [other for other in varied if other != name]
        for place, unit in units.items():
            # Other masks may have been evaluated on other tasks.
            measured = [run for run in masks if _value(run, place)]
            lines = _lines(measured, runs, name, others, place)
            if lines:
                task, metric = place
                ablations.append(Ablation(name, task, metric, unit, lines))
    return ablations


def _lines(
    masks: Sequence[TrainedRun],
    runs: Sequence[TrainedRun],
    setting: str,
    others: Sequence[str],
    place: Place,
) -> list[Line]:
    """Lines against a setting: one for each choice of the other varied settings that has two points."""
    # Start and other settings -> value of the setting -> runs. Values as JSON, because a list cannot be a key.
    groups = {}
    for run in masks:
        parent = parent_of(run, runs)
        # By the name of the parent, which all its seeds have: seeds are averaged, starts are not.
        start = parent.name if parent else run.base
        other_settings = {name: run.settings.get(name) for name in others}
        fixed = _key(other_settings)
        value = _key(run.settings.get(setting))
        points = groups.setdefault((start, fixed), {})
        points.setdefault(value, []).append(run)
    all_starts = {start for start, _ in groups}

    lines = []
    for (start, fixed), points in groups.items():
        # One value of the setting shows no effect of it.
        if len(points) < 2:
            continue

        # The models under the masks, each once: the masks of one seed share theirs.
        parents = {}  # id of a run, None for the base model -> the run
        for members in points.values():
            for run in members:
                parent = parent_of(run, runs)
                # By the parent's own id: the masks may know it by different names.
                parents[parent.id if parent else None] = parent
        starts = []
        for parent in parents.values():
            if parent and _value(parent, place):
                starts.append(parent)

        # One point per value of the setting: the mean over the runs that have it, which differ in their seeds.
        means = []
        for text, members in points.items():
            value = json.loads(text)
            mean = _mean(members, place)
            means.append((value, mean))
        means.sort(key=_order)

        # The start is named only where lines differ in it.
        settings = json.loads(fixed)
        if len(all_starts) > 1:
            settings["start"] = start
        mean_of_starts = _mean(starts, place) if starts else None
        lines.append(Line(settings, means, mean_of_starts))
    return lines


def ablation_chart(setting: str | None, evidence: Evidence) -> Chart:
    """One metric per panel against one setting; None: against each that the paper does not vary.

    Raises:
        NotComputed: If no two evaluated masks differ in the setting alone.
    """
    # All ablations of the study, of which a figure shows one setting or the rest.
    ablations = ablations_of(evidence.runs)
    if setting:
        found = [ablation for ablation in ablations if ablation.setting == setting]
    else:
        found = [ablation for ablation in ablations if ablation.setting not in _OF_THE_PAPER]
    if not found:
        what = setting or "one other setting"
        raise NotComputed(f"no two evaluated masks of this study differ in {what} alone")

    # The lines of all panels share one legend. Settings that are equal in all of them are left out of their names.
    lines = []
    for ablation in found:
        lines += ablation.lines
    varied = set()
    for line in lines:
        for name in line.fixed:
            values = {_key(other.fixed.get(name)) for other in lines}
            if len(values) > 1:
                varied.add(name)
    looks = looks_in_turn(_fixed_text(line.fixed, varied) for line in lines)

    # A panel for each metric; the table has the same points.
    panels = []
    rows = []
    for ablation in found:
        test = test_name(evidence, ablation.task)
        # Not a lambda, which would draw the last ablation of the loop in every panel.
        draw = partial(_draw, found=ablation, looks=looks, varied=varied)
        panels.append(Panel(f"{ablation.metric} on {test}", draw))
        rows += _cells(ablation, test)
    table = Table(("measure", "setting", "other settings", "mean", "standard error", "seeds"), rows)

    text = (
        "Test measures of learned masks, all else as the line says. Bars are one standard error, over seeds where "
        "there are several, else over items; the dashed line is the model under these masks. Points are not verdicts: "
        "those are above, paired by item and seed."
    )
    legend = list(looks.values())
    if any(line.start for line in lines):
        legend.append(Entry("the model under the mask", "muted", "--"))
    return Chart(text, panels, table, legend)


def _cells(
    ablation: Ablation,
    test: str,
) -> list[tuple[str, ...]]:
    """The rows of the table for one ablation, with all settings of each line."""
    rows: list[tuple[str, ...]] = []
    for line in ablation.lines:
        all_fixed = _fixed_text(line.fixed, set(line.fixed))
        for value, point in line.points:
            row = (
                f"{test}/{ablation.metric}",
                f"{_name(ablation.setting)}: {value_text(value, ablation.setting)}",
                all_fixed,
                number(point.mean),
                number(point.stderr),
                str(point.num_seeds),
            )
            rows.append(row)
    return rows


def _draw(
    axes: Axes,
    found: Ablation,
    looks: Mapping[str, Entry],
    varied: Collection[str],
) -> None:
    # All lines share one axis, so the values of all of them are sorted together.
    points = []
    for line in found.lines:
        points += line.points
    points.sort(key=_order)

    # Values are names on the axis, at equal distances: settings may be lists, None or numbers of any size.
    texts = [value_text(value, found.setting) for value, _ in points]
    values = list(dict.fromkeys(texts))
    # Groups of layers have no order, so no line connects their points.
    has_groups = any(isinstance(value, list) for value, _ in points)

    scale = 100.0 if found.unit == "fraction" else 1.0  # shares are shown in points
    for line in found.lines:
        texts_of_line = [value_text(value, found.setting) for value, _ in line.points]
        # A line need not have all values.
        x = [values.index(text) for text in texts_of_line]
        means = []
        errors = []
        for _, point in line.points:
            means.append(point.mean)
            errors.append(point.stderr)

        name = _fixed_text(line.fixed, varied)
        entry = looks[name]
        # An error of None becomes NaN, for which matplotlib draws no bar.
        heights = scale * np.array(means, dtype=float)
        bars = scale * np.array(errors, dtype=float)
        axes.errorbar(
            x,
            heights,
            bars,
            linestyle="none" if has_groups else "-",
            capsize=2,
            color=COLOURS[entry.colour],
            marker=entry.marker,
            elinewidth=0.8,
        )

        # The model under these masks, which has no value of the setting.
        if line.start:
            axes.axhline(
                scale * line.start.mean,
                color=COLOURS["muted"],
                linestyle="--",
                linewidth=0.8,
            )

    # Long labels overlap unless they are turned.
    labels = [plain(value) for value in values]
    longest = max(len(value) for value in values)
    rotation = 20 if longest > 8 else 0  # degrees
    axes.set_xticks(range(len(labels)), labels, rotation=rotation)
    # Values are at 0, 1, 2, ..., with 0.4 of a step on both sides.
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set_xlabel(plain(_name(found.setting)))
    axes.set_ylabel(plain(f"{found.metric} ({unit_text(found.unit)})"))


def value_text(value: Any, setting: str = "") -> str:
    """A setting's value for an axis: layers 0, 1, 2, 3 as 0-3; None as ``all`` for layers and rows."""
    if value is None:
        return "all" if setting in _ALL else "default"
    if not isinstance(value, list):
        return str(value)

    # Consecutive layers as a range.
    if len(value) > 1 and isinstance(value[0], int):
        first = value[0]
        consecutive = list(range(first, first + len(value)))
        if value == consecutive:
            return f"{first}-{value[-1]}"
    return ", ".join(map(str, value))


def _mean(runs: Sequence[TrainedRun], place: Place) -> SeedMean:
    """The mean over runs of which at least one has a value."""
    found = []
    for run in runs:
        record = _value(run, place)
        if record is not None:
            found.append(record)

    # Over seeds alone: all have the same items, whose common noise is not in this error.
    mean, stderr = weighted_mean([record["value"] for record in found])
    if len(found) == 1:
        # One seed has no error over seeds, so that over items is shown.
        stderr = found[0]["stderr"]
    return SeedMean(mean, stderr, len(found))


def _value(
    run: TrainedRun,
    place: Place,
) -> Mapping[str, Any] | None:
    """The record of a metric in a run's result; None if it has no value."""
    if BEST not in run.results:
        return None
    task, metric = place
    tasks = run.results[BEST]["tasks"]
    if task not in tasks:
        return None
    record = tasks[task]["metrics"].get(metric)
    if record is None or record["value"] is None:
        return None
    return record


def _key(value: Any) -> str:
    """A value as text, because lists and dictionaries cannot be keys."""
    return json.dumps(value, sort_keys=True)


def _order(point: tuple[Any, Any]) -> tuple:
    """Sort key: lists by length, then by value; then numbers and texts; None (all rows or layers, the default) last.

    The first part of a key separates the types: Python does not compare a list with a number.
    """
    value, _ = point
    if isinstance(value, list):
        # Filled with zeros, so that texts of numbers are in the order of the numbers.
        filled = [str(each).zfill(6) for each in value]
        return (0, len(value), filled)
    if value is None:
        return (2, 0, [])
    size = value if isinstance(value, int | float) else 0
    return (1, size, [str(value)])


def _name(setting: str) -> str:
    return _NAMES.get(setting, setting)


def _fixed_text(
    fixed: Mapping[str, Any],
    names: Collection[str],
) -> str:
    """The settings of a line among ``names``, without those that were left at their defaults."""
    texts = []
    for name, value in fixed.items():
        is_default = value is None and name not in _ALL
        if name in names and not is_default:
            texts.append(f"{_name(name)} {value_text(value, name)}")
    return ", ".join(texts) or "learned mask"
