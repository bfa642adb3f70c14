"""Compare results on the same items: differences, their uncertainty, and the claims that they support.

Results with one name and different seeds are training seeds of one method. Every other name is compared with the
baseline, task by task and metric by metric. The difference is always method - baseline, in the metric's own unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

from maskft_common.errors import UserError

from .comparable import (
    Groups,
    Paired,
    check_comparable,
    check_known,
    group_by_name,
    is_measured,
    pair_by_seed,
    quoted,
    seed_notes,
    select,
    setting_notes,
    without_missing_values,
)
from .comparison import Comparison, Difference, Settings
from .differences import judge, measure
from .schema import Result
from .scores import scores
from .verdict import Row, verdicts_on_masks

Pair = tuple[str, str, str]  # method, task, metric


def compare_measured(
    results: Sequence[Result],
    baseline: str | None = None,
    *,
    settings: Settings | None = None,
) -> Comparison:
    """As :func:`compare`, without the metrics that lack the value of an item; a note names each.

    Raises:
        UserError: As :func:`compare`.
    """
    measured, missing = without_missing_values(results)
    comparison = compare(measured, baseline, settings=settings)
    return replace(comparison, notes=[*missing, *comparison.notes])


def compare(
    results: Sequence[Result],
    baseline: str | None = None,
    *,
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    settings: Settings | None = None,
) -> Comparison:
    """Compare every method with the baseline on the items they share.

    A method is "better" or "worse" when the unadjusted interval of the difference excludes zero and the Holm-adjusted p
    is at most ``1 - confidence``, and "not distinguishable" otherwise. Families are the main metrics of all tasks, and
    all other metrics. The interval that is shown is simultaneous over the family.

    Args:
        results: Results of this schema (`maskft_lab.results.schema.read_result`), at least two names.
        baseline: Name of the baseline; the first result's by default.
        tasks: Tasks to compare; all by default.
        metrics: Metrics to compare; by default all that are measured item by item.
        settings: Confidence, resamples, and whether seeds are fixed.

    Raises:
        UserError: If there is nothing to compare, a name is unknown, or items, prompts, shots or versions differ.
    """
    settings = settings or Settings()
    # From here on the confidence is that of one look, which every interval and verdict uses.
    num_looks = settings.looks
    settings = settings.of_one_look()

    # Who is compared.
    groups = group_by_name(results)
    if baseline is None:
        baseline = next(iter(groups))
    check_known("baseline", [baseline], groups)
    if len(groups) < 2:
        raise UserError(f"only {baseline!r} was given, nothing to compare it with: give results of another name too")
    others = [name for name in groups if name != baseline]

    # In which metrics. Each task has one main metric; Holm's correction needs resamples for the larger family.
    tasks, item_metrics = select(results, tasks, metrics)
    check_comparable(results, tasks)
    pairs, notes = _pairs(groups, baseline, tasks, item_metrics)
    main = _main_metrics(groups[baseline][0], pairs)
    num_main = 0
    for _, task, metric in pairs:
        if main[task] == metric:
            num_main += 1
    # One number of resamples for both families, so that all differences are drawn alike.
    largest_family = max(num_main, len(pairs) - num_main)
    settings = settings.with_resamples(largest_family)

    # Measured one by one, then judged as families.
    paired: dict[str, Paired] = {}
    # Paired once for all metrics: which seeds are common does not depend on the metric.
    for name in others:
        paired[name] = pair_by_seed(
            groups[name],
            groups[baseline],
            settings.fixed_seeds,
        )
    rows: list[Row] = []
    for name, task, metric in pairs:
        row = measure(
            paired[name],
            task,
            metric,
            main[task] == metric,
            settings,
        )
        rows.append(row)
    rows = _with_verdicts(rows, settings)
    differences = [difference for difference, _ in rows]

    # Notes for the reader beside the numbers.
    notes += _identical_notes(differences, baseline)
    if num_looks > 1:
        # First, because a page shows two notes.
        percent = 100 * settings.confidence
        notes.insert(0, f"judged as one of {num_looks} looks: each at {percent:.4g} % (Bonferroni)")
    # Of methods without a metric in common with the baseline nothing is noted.
    compared = {name: paired[name] for name, _, _ in pairs}
    notes += seed_notes(compared, groups)
    notes += setting_notes(results)

    return Comparison(
        baseline=baseline,
        methods=others,
        differences=differences,
        scores=scores(results, tasks, metrics, settings.fixed_seeds),
        notes=notes,
        confidence=settings.confidence,
        num_resamples=settings.num_resamples,
        seed=settings.seed,
        fixed_seeds=settings.fixed_seeds,
        verdicts=verdicts_on_masks(groups, rows, settings),
    )


def _with_verdicts(
    rows: Sequence[Row],
    settings: Settings,
) -> list[Row]:
    """Return the rows in their order with verdicts; main metrics are one family, all other metrics another."""
    # Two families, so that many secondary metrics do not weaken the claims about the main ones.
    judged: dict[Pair, Difference] = {}
    for is_main in (True, False):
        family: list[Row] = []
        for difference, measured in rows:
            if difference.is_main == is_main:
                family.append((difference, measured))
        for difference in judge(family, settings):
            judged[_pair_of(difference)] = difference

    # In the order of the rows again.
    out: list[Row] = []
    for difference, measured in rows:
        pair = _pair_of(difference)
        out.append((judged[pair], measured))
    return out


def _pair_of(difference: Difference) -> Pair:
    return difference.method, difference.task, difference.metric


def _identical_notes(
    differences: Sequence[Difference],
    baseline: str,
) -> list[str]:
    """Note the methods that answer every item as the baseline does."""
    notes: list[str] = []
    methods = dict.fromkeys(row.method for row in differences)
    for name in methods:
        of_method = [row for row in differences if row.method == name]
        # In all metrics: of a model that only answers alike, the loss still differs.
        is_identical = all(row.num_identical == row.num_items for row in of_method)
        if is_identical:
            notes.append(
                f"{name} and {baseline} differ on no item: are they one model, such as a mask that removes nothing?"
            )
    return notes


def _pairs(
    groups: Groups,
    baseline: str,
    tasks: Sequence[str],
    metrics: Sequence[str],
) -> tuple[list[Pair], list[str]]:
    """Return every (method, task, metric) that the method and the baseline both have, and notes on those left out."""
    pairs: list[Pair] = []
    notes: list[str] = []
    for task, metric in product(tasks, metrics):
        measured: list[str] = []
        for name, group in groups.items():
            if is_measured(group, task, metric):
                measured.append(name)
        methods: list[str] = []
        if baseline in measured:
            methods = [name for name in measured if name != baseline]
        for method in methods:
            pairs.append((method, task, metric))

        # A metric that only some models have is compared between these, and the reader is told which lack it.
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


def _main_metrics(
    result: Result,
    pairs: Iterable[Pair],
) -> dict[str, str]:
    """Return task -> its main metric: the first of a result's that is compared."""
    # A result lists its metrics with the main one first; the user may have asked for others only.
    main: dict[str, str] = {}
    compared = {(task, metric) for _, task, metric in pairs}
    tasks = {task for task, _ in compared}
    for task in tasks:
        metrics = result["tasks"][task]["metrics"]
        of_task = [metric for metric in metrics if (task, metric) in compared]
        main[task] = of_task[0]
    return main
