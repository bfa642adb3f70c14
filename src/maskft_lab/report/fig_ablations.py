"""A metric against one varied setting of the mask (Figs 3, 6, 7, 8, 10 and 11), from the results of a study."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from ..analysis.runs import BEST, MASK, TrainedRun, parent_of
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
_ALL = ("mask_layers_to_transform", "max_train_samples")  # settings whose default is all there is
_OF_THE_PAPER = ("mask_layers_to_transform", "mask_sparsity", "max_train_samples")
# Settings that are not what an ablation varies: repetition, and what is written when.
_NOT_VARIED = ("seed", "mask_seed", "eval_steps", "save_steps", "logging_steps", "keep_last", "report_to")


class SeedMean(NamedTuple):
    """Mean of a metric over the seeds of one method; its error is over seeds where there are several, else items."""

    mean: float
    stderr: float | None
    num_seeds: int


class Line(NamedTuple):
    """A metric against a setting, all else being ``fixed``, and that of the models under these masks."""

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
    masks = [run for run in runs if run.method == MASK and BEST in run.results]
    names = dict.fromkeys(name for run in masks for name in run.settings if name not in _NOT_VARIED)
    varied = [name for name in names if len({_key(run.settings.get(name)) for run in masks}) > 1]
    units = {
        (task, metric): values["unit"]
        for run in masks
        for task, record in run.results[BEST]["tasks"].items()
        for metric, values in record["metrics"].items()
    }
    return [
        Ablation(name, *place, unit, lines)
        for name in varied
        for place, unit in units.items()
        if (lines := _lines([run for run in masks if _value(run, *place)], runs, [name, *varied], place))
    ]


def _lines(
    masks: Sequence[TrainedRun], runs: Sequence[TrainedRun], varied: Sequence[str], place: tuple[str, str]
) -> list[Line]:
    """Lines against the first of the varied settings: one for each choice of the others that has two points."""
    setting = varied[0]
    others = [name for name in varied if name != setting]
    groups: dict[tuple[str, str], dict[str, list[TrainedRun]]] = {}
    for run in masks:
        start = parent.name if (parent := parent_of(run, runs)) else run.base
        fixed = _key({name: run.settings.get(name) for name in others})
        value = _key(run.settings.get(setting))
        groups.setdefault((start, fixed), {}).setdefault(value, []).append(run)
    has_one_start = len({start for start, _ in groups}) == 1
    lines = []
    for (start, fixed), points in groups.items():
        if len(points) < 2:
            continue
        parents = {run.start: parent_of(run, runs) for members in points.values() for run in members}
        starts = [run for run in parents.values() if run and _value(run, *place)]
        ordered = sorted(((json.loads(value), _mean(members, place)) for value, members in points.items()), key=_order)
        fixed_here = json.loads(fixed) | ({} if has_one_start else {"start": start})
        lines.append(Line(fixed_here, ordered, _mean(starts, place) if starts else None))
    return lines


def ablation_chart(setting: str | None, evidence: Evidence) -> Chart:
    """One metric per panel against one setting; None: against each that the paper does not vary."""
    found = [
        each
        for each in ablations_of(evidence.runs)
        if (each.setting == setting if setting else each.setting not in _OF_THE_PAPER)
    ]
    if not found:
        raise NotComputed(f"no two evaluated masks of this study differ in {setting or 'one other setting'} alone")
    lines = [line for each in found for line in each.lines]
    # Settings that are equal in all lines are left out of their names.
    varied = {name for line in lines for name in line.fixed if len({_key(o.fixed.get(name)) for o in lines}) > 1}
    looks = looks_in_turn(_fixed_text(line.fixed, varied) for line in lines)
    table = [
        (
            f"{test_name(evidence, each.task)}/{each.metric}",
            f"{_name(each.setting)}: {value_text(value, each.setting)}",
            _fixed_text(line.fixed, set(line.fixed)),
            *(number(point.mean), number(point.stderr), str(point.num_seeds)),
        )
        for each in found
        for line in each.lines
        for value, point in line.points
    ]
    text = (
        "Test measures of learned masks, all else as the line says. Bars are one standard error, over seeds where "
        "there are several, else over items; the dashed line is the model under these masks. Points are not verdicts: "
        "those are above, paired by item and seed."
    )
    panels = [
        Panel(
            f"{each.metric} on {test_name(evidence, each.task)}",
            partial(_draw, found=each, looks=looks, varied=varied),
        )
        for each in found
    ]
    columns = ("measure", "setting", "other settings", "mean", "standard error", "seeds")
    under = [Entry("the model under the mask", "muted", "--")] if any(line.start for line in lines) else []
    return Chart(text, panels, Table(columns, table), [*looks.values(), *under])


def _draw(axes: Axes, found: Ablation, looks: Mapping[str, Entry], varied: Collection[str]) -> None:
    points = sorted((point for line in found.lines for point in line.points), key=_order)
    values = list(dict.fromkeys(value_text(value, found.setting) for value, _ in points))
    has_groups = any(isinstance(value, list) for value, _ in points)  # of layers, which no line connects
    scale = 100.0 if found.unit == "fraction" else 1.0
    for line in found.lines:
        entry = looks[_fixed_text(line.fixed, varied)]
        x = [values.index(value_text(value, found.setting)) for value, _ in line.points]
        # No bar where there is no error: None is NaN.
        y, errors = scale * np.array([(point.mean, point.stderr) for _, point in line.points], dtype=float).T
        style: dict[str, Any] = {"color": COLOURS[entry.colour], "marker": entry.marker, "elinewidth": 0.8}
        axes.errorbar(x, y, errors, linestyle="none" if has_groups else "-", capsize=2, **style)
        if line.start:
            axes.axhline(scale * line.start.mean, color=COLOURS["muted"], linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(values)), list(map(plain, values)), rotation=20 if max(map(len, values)) > 8 else 0)
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set_xlabel(plain(_name(found.setting)))
    axes.set_ylabel(plain(f"{found.metric} ({unit_text(found.unit)})"))


def value_text(value: Any, setting: str = "") -> str:
    """A setting's value for an axis; layers 0, 1, 2, 3 as 0-3, none of layers and rows as ``all``."""
    if value is None:
        return "all" if setting in _ALL else "default"
    is_range = isinstance(value, list) and len(value) > 1 and isinstance(value[0], int)
    if is_range and value == list(range(value[0], value[0] + len(value))):
        return f"{value[0]}-{value[-1]}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _mean(runs: Sequence[TrainedRun], place: tuple[str, str]) -> SeedMean:
    found = [record for run in runs if (record := _value(run, *place))]
    mean, stderr = weighted_mean([record["value"] for record in found])
    return SeedMean(mean, found[0]["stderr"] if len(found) == 1 else stderr, len(found))


def _value(run: TrainedRun, task: str, metric: str) -> Mapping[str, Any] | None:
    """The metric of a run's result, where it has a value."""
    result = run.results.get(BEST, {"tasks": {}})
    record = result["tasks"].get(task, {"metrics": {}})["metrics"].get(metric)
    return record if record and record["value"] is not None else None


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _order(point: tuple[Any, Any]) -> tuple:
    """None (all rows, all layers, the default) last; lists by length, then by value."""
    value = point[0]
    if isinstance(value, list):
        return (0, len(value), [str(each).zfill(6) for each in value])
    return (2, 0, []) if value is None else (1, value if isinstance(value, int | float) else 0, [str(value)])


def _name(setting: str) -> str:
    return _NAMES.get(setting, setting)


def _fixed_text(fixed: Mapping[str, Any], names: Collection[str]) -> str:
    """The settings of a line that are named and are not at their defaults."""
    texts = [
        f"{_name(n)} {value_text(value, n)}"
        for n, value in fixed.items()
        if n in names and (value is not None or n in _ALL)
    ]
    return ", ".join(texts) or "learned mask"
