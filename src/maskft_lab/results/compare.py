"""Compare results on the same items: what the differences are, how sure they are, and what may be claimed.

Results with one name and different seeds are training seeds of one method. Every other name is compared with the
baseline, task by task and metric by metric. The difference is always method - baseline, in the metric's own unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product

from maskft_common.errors import UserError

from .comparable import (
    Groups,
    check_comparable,
    check_known,
    group_by_name,
    having,
    pair_by_seed,
    quoted,
    seed_notes,
    select,
    setting_notes,
)
from .comparison import Comparison, Settings
from .differences import judge, measure
from .schema import Result, has_items
from .scores import scores
from .verdict import verdicts_on_masks

Pair = tuple[str, str, str]  # method, task, metric


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
    looks = settings.looks
    settings = settings.of_one_look()
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
    settings = settings.with_resamples(max(sizes.values()))
    others = [name for name in groups if name != baseline]
    paired = {name: pair_by_seed(groups[name], groups[baseline], settings.fixed_seeds) for name in others}
    rows = [measure(paired[name], task, metric, main[task] == metric, settings) for name, task, metric in pairs]
    families = [[pair for pair in rows if pair[0].is_main == is_main] for is_main in (True, False)]
    places = {(row.method, row.task, row.metric): row for family in families for row in judge(family, settings)}
    differences = [places[pair] for pair in pairs]
    notes += [
        f"{name} and {baseline} differ on no item: are they one model, such as a mask that removes nothing?"
        for name in dict.fromkeys(row.method for row in differences)
        if all(row.num_identical == row.num_items for row in differences if row.method == name)
    ]
    if looks > 1:
        notes.insert(0, f"judged as one of {looks} looks: each at {100 * settings.confidence:.4g} % (Bonferroni)")
    return Comparison(
        baseline=baseline,
        methods=others,
        differences=differences,
        scores=scores(results, tasks, metrics, settings.fixed_seeds),
        notes=notes + seed_notes({name: paired[name] for name, _, _ in pairs}, groups) + setting_notes(results),
        confidence=settings.confidence,
        num_resamples=settings.num_resamples,
        seed=settings.seed,
        fixed_seeds=settings.fixed_seeds,
        verdicts=verdicts_on_masks(
            groups, [(row, measured) for row, (_, measured) in zip(differences, rows, strict=True)], settings
        ),
    )


def _pairs(groups: Groups, baseline: str, tasks: Sequence[str], metrics: Sequence[str]) -> tuple[list[Pair], list[str]]:
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
