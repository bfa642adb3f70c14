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
    # The same checks as for a comparison: a table invites to compare its rows.
    groups = group_by_name(results)
    tasks, metrics = select(results, tasks, metrics, only_items=False)
    check_comparable(results, tasks)

    # The columns of the table.
    units: dict[tuple[str, str], str] = {}
    for task, metric in product(tasks, metrics):
        measured = having(results, task, metric)
        if measured:
            units[task, metric] = unit_of(measured, task, metric)

    # A model that has a metric at some of its seeds only counts as without.
    out: list[Score] = []
    for group in groups.values():
        for (task, metric), unit in units.items():
            if having(group, task, metric) == group:
                score = _score(group, task, metric, unit, fixed_seeds)
                out.append(score)
    return out


def _score(
    group: Sequence[Result],
    task: str,
    metric: str,
    unit: str,
    fixed_seeds: bool,
) -> Score:
    """Return the value of one model in one metric, with its error, or its interval at an edge, where there is one."""
    num_seeds = len(group)
    first = group[0]
    task_record = first["tasks"][task]
    score = Score(
        model=first["name"],
        task=task,
        metric=metric,
        unit=unit,
        value=None,
        stderr=None,
        num_seeds=num_seeds,
        test_set=task_record.get("data_file"),
    )
    values: list[float] = []
    for result in group:
        value_or_none = result["tasks"][task]["metrics"][metric]["value"]
        if value_or_none is not None:
            values.append(value_or_none)
    if len(values) < num_seeds:
        return score  # one seed without a value, and there is no mean

    # One result has its own error, over items; of several seeds it is that over the seeds.
    if num_seeds == 1:
        value = values[0]
        stderr = task_record["metrics"][metric]["stderr"]
    else:
        # Over seeds, and on these items: all seeds have the same ones, so the noise that seeds have in common is not in
        # it. An interval of a difference has both parts (`Bootstrap`).
        value, stderr = weighted_mean(values)

    # Items are read only where they are needed: for the interval of a share, and for errors over items.
    is_share = unit == "fraction"
    is_over_items = fixed_seeds and num_seeds > 1
    values_N = None
    clusters = None
    items = task_record["items"]
    if is_share or is_over_items:
        # Averaged over the seeds, so the interval below is over items, and does not contain the spread between seeds.
        values_N = _mean_items(group, task, metric)
    if values_N is not None:
        clusters = cluster_ids(items)

    # The error over items (clusters) of the mean over seeds; None for a summary of the task, and for one item.
    if is_over_items:
        stderr = None
        if values_N is not None:
            weights = item_weights(items, unit)
            _, over_items = weighted_mean(values_N, weights, clusters)
            if math.isfinite(over_items):
                stderr = over_items

    score = replace(score, value=value, stderr=stderr)
    if not is_share or values_N is None:
        return score
    interval = proportion_interval(values_N, clusters)
    return replace(
        score,
        low=interval.low,
        high=interval.high,
        is_at_edge=is_at_edge(values_N, clusters),
    )


def _mean_items(
    group: Sequence[Result],
    task: str,
    metric: str,
) -> NDArray[np.float64] | None:
    """Return the items' means over the seeds, in the order of the first result; None where it has no items."""
    of_seeds = [result["tasks"][task]["items"] for result in group]
    if not all(has_items(items, metric) for items in of_seeds):
        return None

    # By id, because files may have the same items in different orders.
    ids = [item["id"] for item in of_seeds[0]]
    values_SN: list[list[float]] = []
    for items in of_seeds:
        by_id = {item["id"]: item[metric] for item in items}
        values_N = [by_id[each] for each in ids]
        values_SN.append(values_N)
    means_N = np.mean(values_SN, axis=0)
    return np.asarray(means_N)
