"""The value of every model in every metric, with its error, or its interval at an edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from .comparable import check_comparable, group_by_name, having, select, unit_of
from .comparison import Score
from .proportions import is_at_edge, proportion_interval
from .schema import Result, cluster_ids, has_items, item_weights
from .statistics import weighted_mean


def scores(
    results: Sequence[Result],
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    fixed_seeds: bool = False,
) -> list[Score]:
    """Return the value of every model in every metric that it has, models in the order given.

    Args:
        results: Results of this schema, at least one.
        tasks: Tasks to show; all by default.
        metrics: Metrics to show; all by default.
        fixed_seeds: Errors are over items, of the mean over the seeds; by default over several seeds.

    Raises:
        UserError: If a name is unknown, or items, prompts, shots or versions differ.
    """
    groups = group_by_name(results)
    tasks, metrics = select(results, tasks, metrics, only_items=False)
    check_comparable(results, tasks)
    shown = [(task, metric) for task, metric in product(tasks, metrics) if having(results, task, metric)]
    units = {(task, metric): unit_of(having(results, task, metric), task, metric) for task, metric in shown}
    return [
        _score(group, task, metric, units[task, metric], fixed_seeds)
        for group in groups.values()
        for task, metric in shown
        if having(group, task, metric) == group
    ]


def _score(group: Sequence[Result], task: str, metric: str, unit: str, fixed_seeds: bool) -> Score:
    records = [result["tasks"][task]["metrics"][metric] for result in group]
    values = [record["value"] for record in records if record["value"] is not None]
    test_set = group[0]["tasks"][task].get("data_file")
    score = Score(group[0]["name"], task, metric, unit, None, None, len(group), test_set=test_set)
    if len(values) < len(records):
        return score  # of a seed that has no value there is no mean

    value, stderr = weighted_mean(values) if len(group) > 1 else (values[0], records[0]["stderr"])
    is_over_items = fixed_seeds and len(group) > 1
    is_share = unit == "fraction"
    values_N = _mean_items(group, task, metric) if is_over_items or is_share else None
    items = group[0]["tasks"][task]["items"]
    clusters = None if values_N is None else cluster_ids(items)
    if is_over_items:  # the error over items (clusters) of the mean over seeds
        stderr = None
        if values_N is not None:
            over_items = weighted_mean(values_N, item_weights(items, unit), clusters)[1]
            stderr = over_items if math.isfinite(over_items) else None
    score = replace(score, value=value, stderr=stderr)
    if not is_share or values_N is None:
        return score
    interval = proportion_interval(values_N, clusters)
    return replace(score, low=interval.low, high=interval.high, is_at_edge=is_at_edge(values_N, clusters))


def _mean_items(group: Sequence[Result], task: str, metric: str) -> NDArray[np.float64] | None:
    """Return the items' means over the seeds, in the order of the first result; None where it has no items."""
    tables = [result["tasks"][task]["items"] for result in group]
    if not all(has_items(items, metric) for items in tables):
        return None
    by_id = [{item["id"]: item[metric] for item in items} for items in tables]
    return np.asarray(np.mean([[row[item["id"]] for item in tables[0]] for row in by_id], axis=0))
