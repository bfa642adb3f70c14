"""Compare results on the same items: what the differences are, how sure they are, and what may be claimed.

Results with one name and different seeds are training seeds of one method. Every other name is compared with the
baseline, task by task and metric by metric. The difference is always method - baseline, in the metric's own unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .comparable import (
    check_comparable,
    check_known,
    group_by_name,
    having,
    name_and_seed,
    quoted,
    select,
    setting_notes,
    unit_of,
)
from .schema import Result, has_items, item_weights
from .statistics import (
    Interval,
    hierarchical_bootstrap,
    holm,
    mcnemar_exact,
    required_items,
    required_seeds,
    weighted_mean,
)

SCHEMA_VERSION = 1
POWER = 0.8  # of the test that the needed numbers of items and seeds are for
MIN_RESAMPLES = 100

BETTER, WORSE, NOT_DISTINGUISHABLE = "better", "worse", "not distinguishable"

Pair = tuple[str, str, str]  # method, task, metric


@dataclass(frozen=True)
class Difference:
    """One method against the baseline, on one metric of one task.

    ``p_value`` is McNemar's exact p (``test`` "McNemar") where both sides are one result with 0/1 scores, and the
    bootstrap's otherwise; ``p_adjusted`` is Holm's over ``num_comparisons``: those of all methods on the main metrics
    of all tasks (``is_main``), or on all other metrics together. Items are won, lost and tied by their mean over the
    seeds. ``items_needed`` and ``seeds_needed`` are None where they would not help or the verdict stands without.
    """

    method: str
    baseline: str
    task: str
    metric: str
    unit: str
    higher_is_better: bool
    is_main: bool
    num_items: int
    num_seeds: int
    value: float
    baseline_value: float
    difference: float
    ci_low: float
    ci_high: float
    confidence: float
    test: str
    p_value: float
    p_adjusted: float
    num_comparisons: int
    won: int
    lost: int
    tied: int
    verdict: str
    items_needed: int | None = None
    seeds_needed: int | None = None


@dataclass(frozen=True)
class Score:
    """The value of one model in one metric of a task.

    ``stderr`` is over the items for one result, over the seeds for several; None where there is none. ``value`` is None
    where a result has none.
    """

    model: str
    task: str
    metric: str
    unit: str
    value: float | None
    stderr: float | None
    num_seeds: int


@dataclass(frozen=True)
class Comparison:
    """All differences from one baseline, with what they were computed from."""

    baseline: str
    methods: list[str]
    differences: list[Difference]
    scores: list[Score]
    notes: list[str]
    confidence: float
    num_resamples: int
    seed: int
    schema_version: int = SCHEMA_VERSION
    kind: str = "comparison"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values, in the metrics' units (fractions in [0, 1], no percent)."""
        return asdict(self)


def compare(
    results: Sequence[Result],
    baseline: str | None = None,
    *,
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """Compare every method with the baseline on the items they share.

    A method is "better" or "worse" when the interval excludes zero and the Holm-adjusted p is at most
    ``1 - confidence``, and "not distinguishable" otherwise. The interval itself is not adjusted for the number of
    comparisons.

    Args:
        results: Results of this schema (`maskft.results.schema.read_result`), at least two names.
        baseline: Name of the baseline; the first result's by default.
        tasks: Tasks to compare; all by default.
        metrics: Metrics to compare; by default all that are measured item by item.
        num_resamples: Bootstrap samples per difference, at least 100, and more for many comparisons.
        seed: Seed of the resampling.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        UserError: If there is nothing to compare, a name is unknown, or items, prompts, shots or versions differ.
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence {confidence} is outside (0, 1): 0.95 is usual")
    if seed < 0:
        raise UserError(f"seed {seed} is negative: give 0 or more")
    groups = group_by_name(results)
    baseline = next(iter(groups)) if baseline is None else baseline
    check_known("baseline", [baseline], groups)
    if len(groups) < 2:
        raise UserError(f"only {baseline!r} was given, nothing to compare it with: give results of another name too")
    tasks, item_metrics = select(results, tasks, metrics)
    check_comparable(results, tasks)
    pairs, notes = _pairs(groups, baseline, tasks, item_metrics)
    main = _main_metrics(groups[baseline][0], pairs)
    sizes = Counter(main[task] == metric for _, task, metric in pairs)
    _check_resamples(num_resamples, max(sizes.values()), confidence)
    bootstrap = partial(hierarchical_bootstrap, num_resamples=num_resamples, seed=seed, confidence=confidence)
    differences: list[Difference] = []
    for method, task, metric in pairs:
        paired = _pair_by_seed(groups[method], groups[baseline])
        is_main = main[task] == metric
        differences.append(_difference(paired, task, metric, bootstrap, is_main, sizes[is_main], confidence))
    return Comparison(
        baseline=baseline,
        methods=[name for name in groups if name != baseline],
        differences=_judge(differences),
        scores=scores(results, tasks, metrics),
        notes=notes + _seed_notes(groups, baseline, pairs) + setting_notes(results, tasks),
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )


def scores(
    results: Sequence[Result], tasks: Sequence[str] | None = None, metrics: Sequence[str] | None = None
) -> list[Score]:
    """Return the value of every model in every metric that it has, models in the order given.

    Args:
        results: Results of this schema, at least one.
        tasks: Tasks to show; all by default.
        metrics: Metrics to show; all by default.

    Raises:
        UserError: If a name is unknown, or items, prompts, shots or versions differ.
    """
    groups = group_by_name(results)
    tasks, metrics = select(results, tasks, metrics, only_items=False)
    check_comparable(results, tasks)
    shown = [(task, metric) for task, metric in product(tasks, metrics) if having(results, task, metric)]
    units = {(task, metric): unit_of(having(results, task, metric), task, metric) for task, metric in shown}
    return [
        _score(group, task, metric, units[task, metric])
        for group in groups.values()
        for task, metric in shown
        if having(group, task, metric) == group
    ]


def _score(group: Sequence[Result], task: str, metric: str, unit: str) -> Score:
    records = [result["tasks"][task]["metrics"][metric] for result in group]
    values = [record["value"] for record in records if record["value"] is not None]
    value = stderr = None
    if len(values) == len(records):
        value, stderr = weighted_mean(values) if len(group) > 1 else (values[0], records[0]["stderr"])
    return Score(group[0]["name"], task, metric, unit, value, stderr, len(group))


def _check_resamples(num_resamples: int, num_comparisons: int, confidence: float) -> None:
    # A bootstrap p is a multiple of 2 / (num_resamples + 1): with fewer, none could be significant after Holm.
    needed = max(MIN_RESAMPLES, math.ceil(4 * num_comparisons / (1 - confidence)))
    if num_resamples < needed:
        raise UserError(
            f"num_resamples {num_resamples} is too few for {num_comparisons} comparisons at confidence "
            f"{confidence}: give at least {needed}"
        )


def _pairs(
    groups: dict[str, list[Result]], baseline: str, tasks: Sequence[str], metrics: Sequence[str]
) -> tuple[list[Pair], list[str]]:
    """Return every (method, task, metric) that the method and the baseline both have, and notes of what is left out."""
    pairs: list[Pair] = []
    notes: list[str] = []
    for task, metric in product(tasks, metrics):
        measured = [name for name in groups if _is_measured(groups[name], task, metric)]
        methods = [name for name in measured if name != baseline] if baseline in measured else []
        pairs += [(method, task, metric) for method in methods]
        if measured and not methods:
            notes.append(f"{metric} on {task} is not compared, only {quoted(measured)} has it")
        elif methods and len(measured) < len(groups):
            lacking = [name for name in groups if name not in measured]
            notes.append(f"{metric} on {task} leaves out {quoted(lacking)}, without it")
    if not pairs:
        raise UserError(
            f"no method shares a task and metric with the baseline {baseline!r}: "
            f"evaluate {quoted(groups)} on the same task"
        )
    return pairs, notes


def _is_measured(group: Sequence[Result], task: str, metric: str) -> bool:
    return having(group, task, metric) == group and all(has_items(r["tasks"][task]["items"], metric) for r in group)


def _main_metrics(result: Result, pairs: Iterable[Pair]) -> dict[str, str]:
    """Return task -> its main metric: the first of a result's that is compared."""
    compared = {(task, metric) for _, task, metric in pairs}
    return {
        task: next(metric for metric in result["tasks"][task]["metrics"] if (task, metric) in compared)
        for task in {task for task, _ in compared}
    }


def _item_values(group: Sequence[Result], task: str, metric: str) -> NDArray[np.float64]:
    """Return the metric's values, one row per seed, one column per item in the order of the item ids."""
    rows: list[list[float]] = []
    for result in group:
        items = sorted(result["tasks"][task]["items"], key=_item_id)
        for item in items:
            if item[metric] is None:
                raise UserError(
                    f"{metric} on {task}: item {item['id']!r} of {name_and_seed(result)} has no value, "
                    "so there is no mean: choose other --metrics or evaluate again"
                )
        rows.append([item[metric] for item in items])
    return np.array(rows, dtype=float)


def _item_id(item: Mapping[str, Any]) -> str:
    return str(item["id"])


def _pair_by_seed(group: list[Result], baseline_group: list[Result]) -> tuple[list[Result], list[Result]]:
    """Of two sets of seeds those that both have; one result stands beside all seeds of the other.

    A single result of a seed that the baseline has is what is left of several (the others failed, say): it is paired
    with its own seed. A pre-trained model has no seed.
    """
    seeds, baseline_seeds = ([result["model"]["seed"] for result in each] for each in (group, baseline_group))
    is_one_for_all = group[0]["model"]["method"] == "pretrained" or seeds[0] not in baseline_seeds
    if len(baseline_seeds) == 1 or (len(seeds) == 1 and is_one_for_all):
        return group, baseline_group
    common = set(seeds) & set(baseline_seeds)
    if not common:
        raise UserError(
            f"{group[0]['name']!r} has seeds {quoted(seeds)} and {baseline_group[0]['name']!r} "
            f"{quoted(baseline_seeds)}: give results of the same seeds for both, or a single baseline result"
        )
    paired, with_baseline = (
        [result for result in each if result["model"]["seed"] in common] for each in (group, baseline_group)
    )
    return paired, with_baseline


def _seed_notes(groups: dict[str, list[Result]], baseline: str, pairs: Iterable[Pair]) -> list[str]:
    """Say where only a part of the seeds can be paired."""
    notes: list[str] = []
    for name in dict.fromkeys(method for method, _, _ in pairs):
        paired, with_baseline = _pair_by_seed(groups[name], groups[baseline])
        if (len(paired), len(with_baseline)) != (len(groups[name]), len(groups[baseline])):
            seeds = ", ".join(str(result["model"]["seed"]) for result in paired)
            notes.append(f"{name} is compared at seed {seeds} alone, which {baseline} has too")
    return notes


def _difference(
    paired: tuple[list[Result], list[Result]],
    task: str,
    metric: str,
    bootstrap: Callable[..., Interval],
    is_main: bool,
    num_comparisons: int,
    confidence: float,
) -> Difference:
    """Measure one difference; `_judge` adds the adjusted p and the verdict."""
    group, baseline_group = paired
    record = baseline_group[0]["tasks"][task]
    unit = unit_of([*group, *baseline_group], task, metric)
    higher_is_better = record["metrics"][metric]["higher_is_better"]
    values_SN, baseline_SN = (_item_values(each, task, metric) for each in paired)
    diffs_SN = values_SN - baseline_SN
    num_seeds, num_items = diffs_SN.shape
    if num_items < 2:
        raise UserError(f"{metric} on {task} has 1 item, too few to compare: evaluate at least 2, better hundreds")
    weights = item_weights(sorted(record["items"], key=_item_id), unit)
    interval = bootstrap(diffs_SN, weights)
    use_mcnemar = num_seeds == 1 and all(bool(np.isin(each, (0, 1)).all()) for each in (values_SN, baseline_SN))
    # Of the largest of the adjusted tests, so that what is asked for would do whatever the other comparisons show.
    items_needed, seeds_needed = _needed(diffs_SN, weights, (1 - confidence) / num_comparisons)
    gains_N = diffs_SN.mean(axis=0) * (1 if higher_is_better else -1)
    return Difference(
        method=group[0]["name"],
        baseline=baseline_group[0]["name"],
        task=task,
        metric=metric,
        unit=unit,
        higher_is_better=higher_is_better,
        is_main=is_main,
        num_items=num_items,
        num_seeds=num_seeds,
        value=weighted_mean(values_SN.mean(axis=0), weights)[0],
        baseline_value=weighted_mean(baseline_SN.mean(axis=0), weights)[0],
        difference=interval.difference,
        ci_low=interval.ci_low,
        ci_high=interval.ci_high,
        confidence=confidence,
        test="McNemar" if use_mcnemar else "bootstrap",
        p_value=mcnemar_exact(values_SN[0], baseline_SN[0]) if use_mcnemar else interval.p_value,
        p_adjusted=math.nan,
        num_comparisons=num_comparisons,
        won=int((gains_N > 0).sum()),
        lost=int((gains_N < 0).sum()),
        tied=int((gains_N == 0).sum()),
        verdict=NOT_DISTINGUISHABLE,
        items_needed=items_needed,
        seeds_needed=seeds_needed,
    )


def _needed(
    diffs_SN: NDArray[np.float64], weights: Sequence[float] | None, alpha: float
) -> tuple[int | None, int | None]:
    """Return the items and the seeds that would show the difference; None for what there already is enough of."""
    num_seeds, num_items = diffs_SN.shape
    seeds = required_seeds(diffs_SN, weights, POWER, alpha) if num_seeds > 1 else None
    items = required_items(diffs_SN.mean(axis=0), weights, POWER, alpha) if seeds is None else None
    return (items if items and items > num_items else None, seeds if seeds and seeds > num_seeds else None)


def _judge(differences: Sequence[Difference]) -> list[Difference]:
    """Adjust the p-values, of main metrics and of others, and give every difference its verdict."""
    adjusted: dict[int, float] = {}
    for is_main in (True, False):
        family = [row for row in differences if row.is_main == is_main]
        adjusted |= zip(map(id, family), holm([row.p_value for row in family]).tolist(), strict=True)
    judged: list[Difference] = []
    for row in differences:
        row = replace(row, p_adjusted=adjusted[id(row)])
        excludes_zero = row.ci_low > 0 or row.ci_high < 0
        if excludes_zero and row.p_adjusted <= 1 - row.confidence:
            verdict = BETTER if (row.difference > 0) == row.higher_is_better else WORSE
            row = replace(row, verdict=verdict, items_needed=None, seeds_needed=None)
        judged.append(row)
    return judged
