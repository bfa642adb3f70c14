"""Compare results on the same items: what the differences are, how sure they are, and what may be claimed.

Results with one name and different seeds are training seeds of one method. Every other name is compared with the
baseline, task by task and metric by metric. The difference is always method - baseline, in the metric's own unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product

from maskft_base.errors import UserError

from .comparable import (
    check_comparable,
    check_known,
    group_by_name,
    having,
    quoted,
    select,
    setting_notes,
    unit_of,
)
from .comparison import Comparison, Difference
from .differences import Measured, Paired, Sample, describe, judge, sample_of
from .schema import Result, has_items
from .scores import AVERAGE, averaged_metrics, scores

MIN_RESAMPLES = 100

Pair = tuple[str, str, str]  # method, task, metric


def compare(
    results: Sequence[Result],
    baseline: str | None = None,
    *,
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    margin: float | None = None,
    fixed_seeds: bool = False,
) -> Comparison:
    """Compare every method with the baseline on the items they share.

    A method is "better" or "worse" when the interval of the difference excludes zero and the Holm-adjusted p is at most
    ``1 - confidence``, and "not distinguishable" otherwise. Families are the main metrics of all tasks, all other
    metrics, and the averages over tasks. Beside each interval stands one that holds together with the family's.

    Args:
        results: Results of this schema (`maskft_lab.results.schema.read_result`), at least two names.
        baseline: Name of the baseline; the first result's by default.
        tasks: Tasks to compare; all by default.
        metrics: Metrics to compare; by default all that are measured item by item.
        num_resamples: Bootstrap samples per difference, at least 100, and more for many comparisons.
        seed: Seed of the resampling.
        confidence: Coverage of the intervals, in (0, 1).
        margin: A difference that does not matter, > 0, in the unit of the metrics: of fractions 0.01 is one point.
            Equivalence is tested for fractions, or for all metrics where none is one.
        fixed_seeds: Claim something about these trained models, averaged over their seeds: intervals are over items
            alone and say nothing about other training seeds. By default seeds are drawn as items are.

    Raises:
        UserError: If there is nothing to compare, a name is unknown, or items, prompts, shots or versions differ.
    """
    _check_numbers(confidence, seed, margin)
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
    rows: list[tuple[Difference, Measured]] = []
    for method, task, metric in pairs:
        paired = _pair_by_seed(groups[method], groups[baseline])
        rows.append(_measure(paired, [(task, metric)], main[task] == metric, num_resamples, seed, fixed_seeds))
    averaged = averaged_metrics(results, tasks, item_metrics)
    others = [name for name in groups if name != baseline and averaged]
    averages = [
        _measure(_pair_by_seed(groups[name], groups[baseline]), averaged, True, num_resamples, seed, fixed_seeds)
        for name in others
    ]
    margin_unit = _margin_unit([row for row, _ in rows], margin)
    families = [[pair for pair in rows if pair[0].is_main == is_main] for is_main in (True, False)]
    judged = [judge(family, confidence, margin, margin_unit, seed) for family in (*families, averages)]
    places = {(row.method, row.task, row.metric): row for row in (*judged[0], *judged[1])}
    return Comparison(
        baseline=baseline,
        methods=[name for name in groups if name != baseline],
        differences=[places[pair] for pair in pairs],
        scores=scores(results, tasks, metrics, fixed_seeds),
        notes=notes + _seed_notes(groups, baseline, pairs) + setting_notes(results, tasks),
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
        averages=judged[2],
        fixed_seeds=fixed_seeds,
    )


def main_samples(
    results: Sequence[Result],
    baseline: str | None = None,
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
) -> list[tuple[str, str, Sample]]:
    """Return the main metric of every task for the first method beside the baseline: label, unit, values.

    Raises:
        UserError: If there are not two names, or they cannot be compared.
    """
    groups = group_by_name(results)
    baseline = next(iter(groups)) if baseline is None else baseline
    check_known("baseline", [baseline], groups)
    others = [name for name in groups if name != baseline]
    if not others:
        raise UserError(f"only {baseline!r} was given: a pilot needs results of two models on the same items")
    groups = {name: groups[name] for name in (baseline, others[0])}
    chosen = [result for group in groups.values() for result in group]
    tasks, metrics = select(chosen, tasks, metrics)
    check_comparable(chosen, tasks)
    pairs, _ = _pairs(groups, baseline, tasks, metrics)
    main = _main_metrics(groups[baseline][0], pairs)
    paired = _pair_by_seed(groups[others[0]], groups[baseline])
    return [
        (f"{metric} on {task}", unit_of(chosen, task, metric), sample_of(paired, task, metric))
        for _, task, metric in pairs
        if main[task] == metric
    ]


def _measure(
    paired: Paired,
    metrics: Sequence[tuple[str, str]],
    is_main: bool,
    num_resamples: int,
    seed: int,
    fixed_seeds: bool,
) -> tuple[Difference, Measured]:
    """Measure the difference in a metric of a task, or in the average over several, which have the same unit."""
    samples = [sample_of(paired, task, metric, fixed_seeds) for task, metric in metrics]
    task, metric = metrics[0]
    unit = unit_of([*paired[0], *paired[1]], task, metric)
    higher_is_better = paired[1][0]["tasks"][task]["metrics"][metric]["higher_is_better"]
    if len(metrics) > 1:
        task, metric = AVERAGE.format(len(metrics)), "main metric"
    measured = Measured(samples, unit, num_resamples, seed)
    return describe(paired, measured, (task, metric), higher_is_better, is_main), measured


def _check_numbers(confidence: float, seed: int, margin: float | None) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence {confidence} is outside (0, 1): 0.95 is usual")
    if seed < 0:
        raise UserError(f"seed {seed} is negative: give 0 or more")
    if margin is None:
        return
    if not (math.isfinite(margin) and margin > 0):
        raise UserError(f"margin {margin} is no difference above 0: 0.01 is one point of an accuracy")
    if confidence <= 0.5:
        raise UserError(f"confidence {confidence} is too low for a margin: give more than 0.5, 0.95 is usual")


def _margin_unit(rows: Sequence[Difference], margin: float | None) -> str:
    """Return the unit that the margin is meant in."""
    units = dict.fromkeys(row.unit for row in rows)
    if margin is not None and "fraction" in units and margin >= 1:
        raise UserError(f"margin {margin} is no fraction below 1: one point is 0.01")
    if margin is not None and "fraction" not in units and len(units) > 1:
        raise UserError(f"margin {margin} could be in {quoted(units)}: choose --metrics of one unit")
    return "fraction" if "fraction" in units else next(iter(units))


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
