"""Compare results on the same items: what the differences are, how sure they are, and in words what may be claimed.

Results with one name and different seeds are training seeds of one method. Every other name is compared with the
baseline, task by task and metric by metric. The difference is always method - baseline, in the metric's own unit.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import numpy as np

from ..errors import UserError, did_you_mean
from .results import Result, has_items, item_weights
from .statistics import (
    hierarchical_bootstrap,
    holm,
    mcnemar_exact,
    required_items,
    required_seeds,
    weighted_mean,
)
from .text_tables import Table, latex_table, markdown_table, terminal_table

SCHEMA_VERSION = 1
POWER = 0.8  # of the test that the needed numbers of items and seeds are for
MIN_RESAMPLES = 100

BETTER, WORSE, NOT_DISTINGUISHABLE = "better", "worse", "not distinguishable"

# What must be equal for two results on one task to be comparable, besides their items.
TASK_FIELDS = {
    "version": "task version",
    "num_fewshot": "num_fewshot (shots)",
    "chat_template_hash": "chat_template_hash (prompts)",
}


# What the unit of numbers without one is taken for, by their values: one model may have no value above 1 by chance.
_GUESSED_UNITS = {"fraction", "score"}
# Packages whose version may change answers or scores; a task's own version does not tell.
_DECIDING_PACKAGES = ("lm_eval", "transformers", "torch", "maskft")


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

    def sentence(self) -> str:
        """Say it in words, claiming no more than the interval and the adjusted p support."""
        seeds = f", {self.num_seeds} seeds" if self.num_seeds > 1 else ""
        unit = " points" if self.unit == "fraction" else f" {self.unit}"
        text = (
            f"{self.method} vs {self.baseline}, {self.metric} on {self.task}{seeds}: "
            f"{_signed_text(self)}{unit} {_bounds_text(self)}, "
            f"{self.test} p {_p_text(self.p_value)}"
        )
        if self.num_comparisons > 1:
            text += f" ({_p_text(self.p_adjusted)} after Holm over {self.num_comparisons} comparisons)"
        text += f": {self.verdict}"
        if self.seeds_needed:
            text += f"; a difference of this size would need about {_round_up(self.seeds_needed):,} seeds"
        elif self.items_needed:
            about = "about" if self.num_seeds == 1 else "at least"  # the seeds' own noise comes on top
            text += f"; a difference of this size would need {about} {_round_up(self.items_needed):,} items"
        return text + "."


@dataclass(frozen=True)
class Score:
    """What a model reached in one metric of a task.

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

    def to_dict(self) -> dict:
        """Return it as JSON-able values, in the metrics' units (fractions in [0, 1], no percent)."""
        return asdict(self)

    def table(self) -> Table:
        """Return the differences as a table, fractions in percent."""
        difference = f"difference, {100 * self.confidence:g} % interval"
        columns = ("method", "task", "metric", "n", difference, "p (Holm)", "won / lost / tied", "verdict")
        rows = []
        for row in self.differences:
            rows.append(
                (
                    row.method,
                    row.task,
                    f"{row.metric} ({_unit_text(row.unit)})",
                    f"{row.num_items:,}" + (f" x {row.num_seeds} seeds" if row.num_seeds > 1 else ""),
                    f"{_signed_text(row)} {_bounds_text(row)}",
                    _p_text(row.p_adjusted),
                    f"{row.won} / {row.lost} / {row.tied}",
                    row.verdict,
                )
            )
        return Table(columns, rows)


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

    A method is "better" or "worse" when the interval excludes zero and the Holm-adjusted p is below
    ``1 - confidence``, and "not distinguishable" otherwise. The interval itself is not adjusted for the number of
    comparisons.

    Args:
        results: Results of this schema (`maskft.evaluation.results.read_result`), at least two names.
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
    groups = _group_by_name(results)
    if not groups:
        raise UserError("no results were given: give at least two")
    baseline = next(iter(groups)) if baseline is None else baseline
    _check_known("baseline", [baseline], groups)
    if len(groups) < 2:
        raise UserError(f"only {baseline!r} was given, nothing to compare it with: give results of another name too")
    tasks, item_metrics = _select(results, tasks, metrics)
    _check_comparable(results, tasks)
    pairs, notes = _pairs(groups, baseline, tasks, item_metrics)
    main = _main_metrics(groups[baseline][0], pairs)
    num_comparisons = Counter(main[task] == metric for _, task, metric in pairs)
    # A bootstrap p is a multiple of 2 / (num_resamples + 1): fewer could not stay below the level after Holm.
    needed = max(MIN_RESAMPLES, math.ceil(4 * max(num_comparisons.values()) / (1 - confidence)))
    if num_resamples < needed:
        raise UserError(
            f"num_resamples {num_resamples} is too few for {max(num_comparisons.values())} comparisons at confidence "
            f"{confidence}: give at least {needed}"
        )
    differences = []
    for method, task, metric in pairs:
        is_main = main[task] == metric
        row = _difference(
            groups[method],
            groups[baseline],
            task,
            metric,
            is_main=is_main,
            num_comparisons=num_comparisons[is_main],
            num_resamples=num_resamples,
            seed=seed,
            confidence=confidence,
        )
        differences.append(row)
    return Comparison(
        baseline=baseline,
        methods=[name for name in groups if name != baseline],
        differences=_judge(differences),
        scores=scores(results, tasks, metrics),
        notes=notes + _setting_notes(results) + _package_notes(results),
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )


def scores(
    results: Sequence[Result], tasks: Sequence[str] | None = None, metrics: Sequence[str] | None = None
) -> list[Score]:
    """Return what every model reached in every metric that it has, models in the order given.

    Args:
        results: Results of this schema, at least one.
        tasks: Tasks to show; all by default.
        metrics: Metrics to show; all by default.

    Raises:
        UserError: If a name is unknown, or items, prompts, shots or versions differ.
    """
    groups = _group_by_name(results)
    if not groups:
        raise UserError("no results were given: give at least one")
    tasks, metrics = _select(results, tasks, metrics, only_items=False)
    _check_comparable(results, tasks)
    out = []
    for task, metric in product(tasks, metrics):
        having = [result for result in results if metric in result["tasks"].get(task, {}).get("metrics", {})]
        if having:
            unit = _unit([having], task, metric)
            out += [_score(name, group, task, metric, unit) for name, group in groups.items()]
    order = list(groups)
    return sorted((score for score in out if score is not None), key=lambda score: order.index(score.model))


def cross_domain_table(scores: Sequence[Score]) -> Table:
    """Return a row per model, a column per metric of a task, cells ``value ± standard error``; fractions in percent.

    A model that has a metric of one task at some of its seeds only counts as without.
    """
    tasks = list(dict.fromkeys(score.task for score in scores))
    units = {(score.task, score.metric): score.unit for score in scores}
    units = dict(sorted(units.items(), key=lambda entry: tasks.index(entry[0][0])))  # a task's metrics side by side
    columns = ("model", *(f"{task} {metric} ({_unit_text(unit)})" for (task, metric), unit in units.items()))
    rows: dict[str, dict] = {}
    for score in scores:
        label = score.model + (f" ({score.num_seeds} seeds)" if score.num_seeds > 1 else "")
        rows.setdefault(label, {})[score.task, score.metric] = _score_text(score)
    return Table(columns, [(label, *(cells.get(column, "–") for column in units)) for label, cells in rows.items()])


def render_scores(scores: Sequence[Score], output_format: str) -> str:
    """Return scores alone as text in one of `FORMATS`: one model has nothing to be compared with."""
    if output_format == "json":
        record = {"schema_version": SCHEMA_VERSION, "kind": "scores", "scores": [asdict(score) for score in scores]}
        return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    draw = {"terminal": terminal_table, "markdown": markdown_table, "latex": latex_table}[output_format]
    return draw(cross_domain_table(scores)).rstrip("\n") + "\n"


def render(comparison: Comparison, output_format: str) -> str:
    """Return a comparison as text in one of `FORMATS`."""
    return FORMATS[output_format](comparison)


def _to_terminal(comparison: Comparison) -> str:
    tables = map(terminal_table, _tables(comparison))
    return "\n".join([*tables, *_sentences(comparison)]) + "\n"


def _to_markdown(comparison: Comparison) -> str:
    reached, differences = map(markdown_table, _tables(comparison))
    return "\n".join([reached, "", differences, "", *(f"- {line}" for line in _sentences(comparison))]) + "\n"


def _to_latex(comparison: Comparison) -> str:
    reached, differences = map(latex_table, _tables(comparison))
    return "\n".join([*(f"% {line}" for line in _sentences(comparison)), reached, "", differences]) + "\n"


def _tables(comparison: Comparison) -> tuple[Table, Table]:
    return cross_domain_table(comparison.scores), comparison.table()


def _to_json(comparison: Comparison) -> str:
    return json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS = {"terminal": _to_terminal, "markdown": _to_markdown, "latex": _to_latex, "json": _to_json}


def _sentences(comparison: Comparison) -> list[str]:
    lines = [row.sentence() for row in comparison.differences]
    lines += [f"Note: {note}." for note in comparison.notes]
    lines.append(
        f"Differences are method - {comparison.baseline}, with {100 * comparison.confidence:g} % intervals of "
        f"{comparison.num_resamples:,} bootstrap samples; ± is one standard error, over items or several seeds."
    )
    return lines


def _group_by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each name in the order of their seeds; the names in the order given."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["name"], []).append(result)
    for name, group in groups.items():
        seeds = [result["model"]["seed"] for result in group]
        for index, seed in enumerate(seeds):
            if len(group) > 1 and (seed is None or seed in seeds[:index]):
                raise UserError(
                    f"{len(group)} results are named {name!r}, and not with different seeds (seed {seed}): "
                    "give each file once, and other models other names"
                )
        training = dict.fromkeys(result["model"]["method"] for result in group)
        if len(training) > 1:
            raise UserError(
                f"results named {name!r} are of different methods ({_join(training)}), so not seeds of one: "
                "give them different names"
            )
        group.sort(key=lambda result: result["model"]["seed"] or 0)
    return groups


def _check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"unknown {what} {name!r}{did_you_mean(name, known)}: the results have {_join(known)}")


def _select(
    results: Sequence[Result], tasks: Sequence[str] | None, metrics: Sequence[str] | None, only_items: bool = True
) -> tuple[list[str], list[str]]:
    """Return the tasks and metrics asked for, or all that any result has, in the order of their appearance."""
    all_tasks = list(dict.fromkeys(task for result in results for task in result["tasks"]))
    _check_known("task", tasks or [], all_tasks)
    tasks = list(dict.fromkeys(tasks or all_tasks))
    records = [result["tasks"][task] for task in tasks for result in results if task in result["tasks"]]
    all_metrics = list(
        dict.fromkeys(
            metric
            for record in records
            for metric in record["metrics"]
            if not only_items or has_items(record["items"], metric)
        )
    )
    _check_known("metric", metrics or [], all_metrics)
    return tasks, list(dict.fromkeys(metrics or all_metrics))


def _check_comparable(results: Sequence[Result], tasks: Sequence[str]) -> None:
    """Refuse results that were not measured alike, naming in one line all that differs from the first result."""
    problems = []
    for task in tasks:
        first, *others = (result for result in results if task in result["tasks"])
        for other in others:
            problems += [
                f"{task}: {problem} ({_label(first)} and {_label(other)})"
                for problem in _task_mismatches(first["tasks"][task], other["tasks"][task])
            ]
    if problems:
        raise UserError(
            f"these results cannot be compared, they were not measured alike: {'; '.join(problems)}: "
            "evaluate them with the same data and settings, or choose other --tasks"
        )


def _task_mismatches(a: dict, b: dict) -> list[str]:
    # What put prompts into a template elsewhere, if anything did, is not known and not the judge's concern.
    unknown = {"chat_template_hash"} if a.get("outputs_from_file") or b.get("outputs_from_file") else set()
    found = [
        f"different {what}, {a[key]} and {b[key]}"
        for key, what in TASK_FIELDS.items()
        if key not in unknown and a[key] != b[key]
    ]
    settings_a, settings_b = a.get("generation_kwargs"), b.get("generation_kwargs")
    if settings_a and settings_b and settings_a != settings_b:
        found.append(f"different generation_kwargs, {settings_a} and {settings_b}")
    items_a = {item["id"]: item for item in a["items"]}
    items_b = {item["id"]: item for item in b["items"]}
    only = next((item_id for item_id in [*items_a, *items_b] if (item_id in items_a) != (item_id in items_b)), None)
    if only is not None:
        found.append(f"different items, {len(items_a)} and {len(items_b)} of them, {only!r} in one only")
    elif a["items_fingerprint"] != b["items_fingerprint"]:
        found.append("different prompts or references of the same items")
    for name in a["metrics"].keys() & b["metrics"].keys():
        metric_a, metric_b = a["metrics"][name], b["metrics"][name]
        for key in ("unit", "higher_is_better"):
            if metric_a[key] != metric_b[key] and {metric_a[key], metric_b[key]} != _GUESSED_UNITS:
                found.append(f"different {key} of {name}, {metric_a[key]} and {metric_b[key]}")
    if only is None:
        counts = (
            (item_id, item.get("num_tokens"), items_b[item_id].get("num_tokens")) for item_id, item in items_a.items()
        )
        found += [f"different num_tokens (tokenizers?), {x} and {y} in item {i!r}" for i, x, y in counts if x != y][:1]
    return found


def _setting_notes(results: Sequence[Result]) -> list[str]:
    """Name the settings that are not the same in all results: allowed, but the reader should know."""
    notes = []
    for key in dict.fromkeys(key for result in results for key in result["settings"]):
        values = {_label(result): result["settings"].get(key) for result in results}
        if any(value != next(iter(values.values())) for value in values.values()):
            listed = ", ".join(f"{value} for {label}" for label, value in values.items())
            notes.append(f"the results differ in the setting {key}: {listed}")
    return notes


def _package_notes(results: Sequence[Result]) -> list[str]:
    """Name the packages whose versions are not the same in all results."""
    notes = []
    for package in _DECIDING_PACKAGES:
        versions = {_label(result): result["environment"]["packages"].get(package) for result in results}
        if len(set(versions.values())) > 1:
            listed = ", ".join(f"{package} {version} for {label}" for label, version in versions.items())
            notes.append(f"the results were made with different versions: {listed}")
    return notes


def _unit(groups: Iterable[Sequence[Result]], task: str, metric: str) -> str:
    """Return the unit of a metric in all of these results."""
    units = {result["tasks"][task]["metrics"][metric]["unit"] for group in groups for result in group}
    return "score" if units == _GUESSED_UNITS else units.pop()


def _pairs(
    groups: dict[str, list[Result]], baseline: str, tasks: Sequence[str], metrics: Sequence[str]
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Return every (method, task, metric) that the method and the baseline both have, and notes of what is left out."""
    pairs, notes = [], []
    for task in tasks:
        for metric in metrics:
            having = [name for name in groups if _is_measured(groups[name], task, metric)]
            methods = [name for name in having if name != baseline] if baseline in having else []
            pairs += [(method, task, metric) for method in methods]
            if having and not methods:
                notes.append(f"{metric} on {task} is not compared, only {_join(having)} has it")
            elif methods and len(having) < len(groups):
                lacking = [name for name in groups if name not in having]
                notes.append(f"{metric} on {task} leaves out {_join(lacking)}, without it")
    if not pairs:
        raise UserError(
            f"no method shares a task and metric with the baseline {baseline!r}: "
            f"evaluate {_join(groups)} on the same task"
        )
    return pairs, notes


def _main_metrics(result: Result, pairs: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """Return task -> its main metric: the first of a result's that is compared."""
    compared = {(task, metric) for _, task, metric in pairs}
    return {
        task: next(metric for metric in result["tasks"][task]["metrics"] if (task, metric) in compared)
        for task in {task for task, _ in compared}
    }


def _is_measured(group: Sequence[Result], task: str, metric: str) -> bool:
    records = [result["tasks"].get(task) for result in group]
    return all(record and metric in record["metrics"] and has_items(record["items"], metric) for record in records)


def _item_values(group: Sequence[Result], task: str, metric: str) -> np.ndarray:
    """Return the metric's values, one row per seed, one column per item in the order of the item ids."""
    rows = []
    for result in group:
        items = sorted(result["tasks"][task]["items"], key=lambda item: item["id"])
        for item in items:
            if item[metric] is None:
                raise UserError(
                    f"{metric} on {task}: item {item['id']!r} of {_label(result)} has no value, so there is no mean: "
                    "choose other --metrics or evaluate again"
                )
        rows.append([item[metric] for item in items])
    return np.array(rows, dtype=float)


def _pair_by_seed(group: Sequence[Result], baseline_group: Sequence[Result]) -> None:
    """Refuse two sets of seeds that cannot be paired: each seed with its own, or all with one result."""
    seeds, baseline_seeds = ([result["model"]["seed"] for result in each] for each in (group, baseline_group))
    if len(seeds) > 1 and len(baseline_seeds) > 1 and seeds != baseline_seeds:
        raise UserError(
            f"{group[0]['name']!r} has seeds {_join(seeds)} and {baseline_group[0]['name']!r} {_join(baseline_seeds)}: "
            "give results of the same seeds for both, or a single baseline result"
        )


def _difference(
    group: list[Result],
    baseline_group: list[Result],
    task: str,
    metric: str,
    *,
    is_main: bool,
    num_comparisons: int,
    num_resamples: int,
    seed: int,
    confidence: float,
) -> Difference:
    """Measure one difference; `_judge` adds the adjusted p and the verdict."""
    _pair_by_seed(group, baseline_group)
    record = baseline_group[0]["tasks"][task]
    unit, higher_is_better = _unit((group, baseline_group), task, metric), record["metrics"][metric]["higher_is_better"]
    values, baseline_values = (_item_values(each, task, metric) for each in (group, baseline_group))
    diffs_SN = values - baseline_values
    num_seeds, num_items = diffs_SN.shape
    if num_items < 2:
        raise UserError(f"{metric} on {task} has 1 item, too few to compare: evaluate at least 2, better hundreds")
    weights = item_weights(sorted(record["items"], key=lambda item: item["id"]), unit)
    interval = hierarchical_bootstrap(diffs_SN, weights, num_resamples, seed, confidence)
    is_binary = np.isin(values, (0, 1)).all() and np.isin(baseline_values, (0, 1)).all()
    use_mcnemar = is_binary and num_seeds == 1
    # Of the largest of the adjusted tests, so that what is asked for would do whatever the other comparisons show.
    alpha = (1 - confidence) / num_comparisons
    seeds_needed = required_seeds(diffs_SN, weights, POWER, alpha) if num_seeds > 1 else None
    items_needed = required_items(diffs_SN.mean(axis=0), weights, POWER, alpha) if seeds_needed is None else None
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
        value=weighted_mean(values.mean(axis=0), weights)[0],
        baseline_value=weighted_mean(baseline_values.mean(axis=0), weights)[0],
        difference=interval.difference,
        ci_low=interval.ci_low,
        ci_high=interval.ci_high,
        confidence=confidence,
        test="McNemar" if use_mcnemar else "bootstrap",
        p_value=mcnemar_exact(values[0], baseline_values[0]) if use_mcnemar else interval.p_value,
        p_adjusted=math.nan,
        num_comparisons=num_comparisons,
        won=int((gains_N > 0).sum()),
        lost=int((gains_N < 0).sum()),
        tied=int((gains_N == 0).sum()),
        verdict=NOT_DISTINGUISHABLE,
        # A number that is already there (few items that all agree) would be no advice.
        items_needed=items_needed if items_needed and items_needed > num_items else None,
        seeds_needed=seeds_needed if seeds_needed and seeds_needed > num_seeds else None,
    )


def _judge(differences: Sequence[Difference]) -> list[Difference]:
    """Adjust the p-values, of main metrics and of others, and give every difference its verdict."""
    adjusted = {}
    for is_main in (True, False):
        family = [row for row in differences if row.is_main == is_main]
        adjusted |= zip(map(id, family), holm([row.p_value for row in family]).tolist(), strict=True)
    judged = []
    for row in differences:
        row = replace(row, p_adjusted=adjusted[id(row)])
        excludes_zero = row.ci_low > 0 or row.ci_high < 0
        if excludes_zero and row.p_adjusted <= 1 - row.confidence:
            verdict = BETTER if (row.difference > 0) == row.higher_is_better else WORSE
            row = replace(row, verdict=verdict, items_needed=None, seeds_needed=None)
        judged.append(row)
    return judged


def _score(name: str, group: Sequence[Result], task: str, metric: str, unit: str) -> Score | None:
    """Return the score of one model, None where a seed of it lacks the metric."""
    records = [result["tasks"].get(task, {}).get("metrics", {}).get(metric) for result in group]
    if None in records:
        return None
    values, value, stderr = [record["value"] for record in records], None, None
    if None not in values:
        value, stderr = weighted_mean(values) if len(group) > 1 else (values[0], records[0]["stderr"])
    return Score(name, task, metric, unit, value, stderr, len(group))


def _score_text(score: Score) -> str:
    """Return a score's cell in a table."""
    if score.value is None:
        return "no value"
    scale, digits = _scale(score.unit), _min_digits(score.unit)
    error = "" if score.stderr is None else f" ± {scale * score.stderr:.{digits}f}"
    return f"{scale * score.value:.{digits}f}{error}"


def _scale(unit: str) -> float:
    return 100.0 if unit == "fraction" else 1.0


def _unit_text(unit: str) -> str:
    return "%" if unit == "fraction" else unit


def _min_digits(unit: str) -> int:
    return 1 if unit == "fraction" else 4


def _digits(row: Difference) -> int:
    """Return how many decimals show the difference and its bounds without rounding one of them to zero."""
    digits = _min_digits(row.unit)
    smallest = min((abs(x) * _scale(row.unit) for x in (row.difference, row.ci_low, row.ci_high) if x), default=1.0)
    while smallest < 0.5 * 10**-digits and digits < 8:
        digits += 1
    return digits


def _signed_text(row: Difference) -> str:
    return f"{_rounded(row.difference, row):+.{_digits(row)}f}"


def _bounds_text(row: Difference) -> str:
    return f"[{_rounded(row.ci_low, row):.{_digits(row)}f}, {_rounded(row.ci_high, row):.{_digits(row)}f}]"


def _rounded(value: float, row: Difference) -> float:
    return round(_scale(row.unit) * value, _digits(row)) + 0.0  # + 0.0: no minus before zero


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}"


def _round_up(number: int) -> int:
    """Round up to two significant digits: 2871 items are "about 2,900"."""
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step


def _label(result: Result) -> str:
    seed = result["model"]["seed"]
    return repr(result["name"]) + ("" if seed is None else f" seed {seed}")


def _join(names: Iterable) -> str:
    return ", ".join(map(repr, names))
