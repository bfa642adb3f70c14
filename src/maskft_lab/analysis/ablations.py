"""A metric against one varied setting of the mask (Figs 3, 6, 7, 8, 10 and 11), from result files only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from maskft_base.errors import UserError

from ..results.schema import Result
from ..results.statistics import weighted_mean
from .runs import BEST, MASK, TrainedRun, parent_of

# Settings that are not what an ablation varies: repetition, and what is written when.
_NOT_VARIED = ("seed", "mask_seed", "eval_steps", "save_steps", "logging_steps", "keep_last", "report_to")


def varied_settings(runs: Sequence[TrainedRun]) -> list[str]:
    """Settings that are not equal in all runs, in the order of their appearance."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _NOT_VARIED)
    return [name for name in names if len({_key(run.settings.get(name)) for run in runs}) > 1]


def mean_of(results: Sequence[Result], task: str, metric: str) -> dict[str, Any]:
    """Mean of a metric over the seeds of one method.

    Returns:
        ``mean`` in the metric's unit; ``stderr``, over seeds where there are several, else over items, as
        ``stderr_over`` says; ``num_seeds``.
    """
    found = [result["tasks"][task]["metrics"][metric] for result in results]
    values = [each["value"] for each in found]
    if None in values:
        raise UserError(f"{task}/{metric} of {results[0]['name']!r} has no value; evaluate it again")
    if len(values) == 1:
        return {"mean": values[0], "stderr": found[0]["stderr"], "stderr_over": "items", "num_seeds": 1}
    mean, stderr = weighted_mean(values)
    return {"mean": mean, "stderr": stderr, "stderr_over": "seeds", "num_seeds": len(values)}


def lines_of(runs: Sequence[TrainedRun], setting: str, task: str, metric: str) -> list[dict]:
    """Lines of a metric against a setting: one line for each choice of the other varied settings.

    Args:
        runs: All runs; those of a learned mask with a result are the points.
        setting: What is varied.
        task: Name of a task.
        metric: Name of one of its metrics.

    Returns:
        Per line with two points or more: ``fixed``, the other varied settings; ``points`` in the order of their value,
        each with ``value`` and `mean_of`; ``start``: `mean_of` the models under these masks (the dashed line).
    """
    masks = [run for run in runs if run.method == MASK and _has(run, task)]
    others = [name for name in varied_settings(masks) if name != setting]
    groups: dict[str, dict[str, list[TrainedRun]]] = {}
    for run in masks:
        fixed, value = _key({name: run.settings.get(name) for name in others}), _key(run.settings.get(setting))
        groups.setdefault(fixed, {}).setdefault(value, []).append(run)
    lines = []
    for fixed, points in groups.items():
        if len(points) < 2:
            continue
        ordered = sorted(((json.loads(value), members) for value, members in points.items()), key=_order)
        parents = {run.start: parent_of(run, runs) for members in points.values() for run in members}
        start_results = [run.results[BEST] for run in parents.values() if run and _has(run, task)]
        lines.append(
            {
                "fixed": json.loads(fixed),
                "points": [
                    {"value": value, **mean_of([run.results[BEST] for run in members], task, metric)}
                    for value, members in ordered
                ],
                "start": mean_of(start_results, task, metric) if start_results else None,
            }
        )
    return lines


def ablations_of(runs: Sequence[TrainedRun]) -> dict[str, Any]:
    """Lines of every metric against every varied setting; runs of a study were measured on the same items.

    Raises:
        UserError: If no two masks differ in one setting alone.
    """
    masks = [run for run in runs if run.method == MASK and BEST in run.results]
    units = {
        (task, metric): values["unit"]
        for run in masks
        for task, record in run.results[BEST]["tasks"].items()
        for metric, values in record["metrics"].items()
    }
    found = [
        {"setting": name, "task": task, "metric": metric, "unit": unit, "lines": lines}
        for name in varied_settings(masks)
        for (task, metric), unit in units.items()
        if (lines := lines_of(runs, name, task, metric))
    ]
    if not found:
        raise UserError(
            "no two evaluated masks differ in one setting alone: an ablation needs a grid, such as mask.mask_sparsity "
            "in a study's recipe"
        )
    return {"ablations": found}


def _has(run: TrainedRun, task: str) -> bool:
    return BEST in run.results and task in run.results[BEST]["tasks"]


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _order(point: tuple[Any, list]) -> tuple:
    """None (all rows, all layers, the default) last; lists by length, then by value."""
    value = point[0]
    if isinstance(value, list):
        return (0, len(value), [str(each).zfill(6) for each in value])
    return (2, 0, []) if value is None else (1, value if isinstance(value, int | float) else 0, [str(value)])
