"""Which results may be compared, and notes for the reader where they were not measured alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from maskft_common.errors import UserError, did_you_mean

from .schema import Result, TaskRecord, has_items, is_finite

Groups = dict[str, list[Result]]  # name -> its results, by seed
Paired = tuple[Sequence[Result], Sequence[Result]]  # the seeds of a method and of the baseline, one for one

# Units that are guessed from the values where the metric names none: by luck, one model may have no value above 1.
_GUESSED_UNITS = {"fraction", "score"}
# A score above this beside a fraction is taken for a percentage: ratings of 0 to 10 are common, and by luck below 1.
_LARGEST_RATING = 10

# Keys of a task whose values must be the same in all results, and their names in messages.
_ALIKE = {
    "version": "task version",
    "num_fewshot": "num_fewshot (shots)",
    "chat_template_hash": "chat_template_hash (prompts)",
    "generation_kwargs": "generation_kwargs",
}
# Packages whose version may change answers or scores without a change of the task's own version.
_DECIDING_PACKAGES = (
    "lm_eval",
    "transformers",
    "torch",
    "maskft",
    "math-verify",
    "langdetect",
    "alpaca_eval",
)


def group_by_name(results: Sequence[Result]) -> Groups:
    """Return the results of each name in the order of their seeds; the names in the order given.

    Raises:
        UserError: If there are none, or results of one name are not seeds of one method.
    """
    if not results:
        raise UserError("no results were given: give at least one")
    groups: Groups = {}
    for result in results:
        group = groups.setdefault(result["name"], [])
        group.append(result)

    for name, group in groups.items():
        # Several results of one name are seeds, and an average over them must not count one twice.
        seeds = _seeds_of(group)
        for index, seed in enumerate(seeds):
            is_distinct = seed is not None and seed not in seeds[:index]
            if len(group) > 1 and not is_distinct:
                raise UserError(
                    f"{len(group)} results are named {name!r}, and not with different seeds (seed {seed}): "
                    "give each file once, and other models other names (NAME=PATH)"
                )
        methods = {result["model"]["method"]: None for result in group}
        if len(methods) > 1:
            raise UserError(
                f"results named {name!r} are of different methods ({quoted(methods)}), not seeds of one: "
                "give them different names"
            )
        # A mask, and a half of its change.
        scales = [result["model"].get("scale", 1.0) for result in group]
        if any(scale != scales[0] for scale in scales):
            raise UserError(
                f"results named {name!r} have different parts of a change (scale {quoted(scales)}), and are not seeds "
                "of one method: give them different names"
            )

        # Seeds are paired by their place in this order. A single result may have no seed.
        group.sort(key=lambda result: result["model"]["seed"] or 0)
    return groups


def pair_by_seed(
    group: list[Result],
    baseline_group: list[Result],
    fixed_seeds: bool = False,
) -> Paired:
    """Return the results of the seeds that both have.

    Two single results are paired whatever their seeds: the claim is then about these two models.

    A single result is paired with all seeds of the other if it does not depend on a seed (an untrained model, or the
    model that all of the others start from), or if seeds are fixed. Otherwise the noise of its own seed would be
    ignored: of equal methods one in ten would be called different with three seeds, one in four with six.

    Raises:
        UserError: If the two have no seed in common.
    """
    # Before seeds are looked at: of single results the seed may be unknown, or different.
    if len(group) == len(baseline_group) == 1:
        return group, baseline_group

    # Which side has one result, if any has: its own seed counts as no noise.
    # If both have several results, neither is single, and this choice has no effect.
    single = baseline_group
    others = group
    if len(group) == 1:
        single = group
        others = baseline_group
    is_single = len(single) == 1
    if is_single:
        if fixed_seeds or _is_without_seed(single[0], others):
            return group, baseline_group

    seeds = _seeds_of(group)
    baseline_seeds = _seeds_of(baseline_group)
    # Pairs share the seed, and with it the order of the data: an effect on both sides cancels in the difference.
    common = set(seeds) & set(baseline_seeds)
    if not common and is_single:
        raise UserError(
            f"{name_and_seed(single[0])} is one result beside {len(others)} seeds of {others[0]['name']!r}, and how "
            "much its own seed matters is not known: give results of the same seeds for both, or claim something about "
            "these models only (--fixed_seeds)"
        )
    if not common:
        raise UserError(
            f"{group[0]['name']!r} has seeds {quoted(seeds)} and {baseline_group[0]['name']!r} "
            f"{quoted(baseline_seeds)}: give results of the same seeds for both"
        )

    # Both groups are in the order of their seeds, so that these are one for one.
    of_method = _with_seeds(group, common)
    of_baseline = _with_seeds(baseline_group, common)
    return of_method, of_baseline


def _seeds_of(group: Sequence[Result]) -> list[int | None]:
    """Return the seed of each result."""
    return [result["model"]["seed"] for result in group]


def _with_seeds(
    group: Sequence[Result],
    seeds: set[int | None],
) -> list[Result]:
    """Return those of the results that have one of the seeds."""
    out: list[Result] = []
    for result in group:
        if result["model"]["seed"] in seeds:
            out.append(result)
    return out


def _is_without_seed(result: Result, others: Sequence[Result]) -> bool:
    """Whether no seed shaped a model, as far as it differs from the others."""
    model = result["model"]
    if model["method"] == "pretrained":
        return True
    # Evaluated outside of a study: a note asks the reader whether a seed shaped it (`seed_notes`).
    if model["method"] is None and model["seed"] is None:
        return True
    return all(is_parent(result, other) for other in others)


def is_parent(parent: Result, mask: Result) -> bool:
    """Tell whether an adapter was evaluated on the weights that ``parent`` is."""
    of_parent = parent["model"]
    of_mask = mask["model"]
    if of_parent["adapter"] is not None or of_mask["adapter"] is None:
        return False
    # Null where weights were not hashed: two nulls are not the same weights.
    fingerprint = of_parent["fingerprint"]
    return fingerprint is not None and fingerprint == of_mask["fingerprint"]


def seed_notes(
    paired: Mapping[str, Paired],
    groups: Groups,
) -> list[str]:
    """Note seeds over several base models or without a pair, and one result of unknown origin beside many."""
    notes: list[str] = []
    for name, group in groups.items():
        # Not an error: one base model may have two names, its folder and that of the hub.
        all_bases = [result.get("training", {}).get("base") for result in group]
        bases = dict.fromkeys(base for base in all_bases if base is not None)
        if len(bases) > 1:
            notes.append(f"the seeds of {name} are over several base models ({quoted(bases)}): is it one model?")

    for name, (of_method, of_baseline) in paired.items():
        baseline = of_baseline[0]["name"]
        num_given = len(groups[name]) + len(groups[baseline])
        num_paired = len(of_method) + len(of_baseline)
        # Fewer than were given: seeds that the other lacks were left out.
        if num_paired < num_given:
            seeds_of_method = _seeds_of(of_method)
            seeds = ", ".join(str(seed) for seed in seeds_of_method)
            notes.append(f"{name} is compared at seed {seeds} only, which {baseline} has too")

        # Different lengths: one result beside several seeds. Its method is null where no study wrote it.
        single, others = sorted((of_method, of_baseline), key=len)
        is_without_method = single[0]["model"]["method"] is None
        if len(single) != len(others) and is_without_method:
            notes.append(
                f"{single[0]['name']} is one result beside {len(others)} seeds, which is right for a model that no "
                "seed has shaped, such as a pre-trained one"
            )
    # Each once: one baseline beside several methods would be noted for each of them.
    return list(dict.fromkeys(notes))


def check_known(
    what: str,
    names: Iterable[str],
    known: Iterable[str],
) -> None:
    """Raise for a name that no result has.

    Args:
        what: Kind of name, for the message: ``task``, ``metric``, ``baseline``.
        names: Names that were asked for.
        known: Names that results have.

    Raises:
        UserError: If one of the names is not known.
    """
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"unknown {what} {name!r}{hint}: the results have {quoted(known)}")


def select(
    results: Sequence[Result],
    tasks: Sequence[str] | None,
    metrics: Sequence[str] | None,
    only_items: bool = True,
) -> tuple[list[str], list[str]]:
    """Return the tasks and metrics asked for, or all that any result has, in the order of their appearance.

    Args:
        results: The results.
        tasks: Tasks asked for; None: all.
        metrics: Metrics asked for; None: all.
        only_items: Leave out metrics that are summaries of a task and have no value per item.

    Raises:
        UserError: If no result has a task or metric that was asked for.
    """
    # Dictionaries for their keys: sets do not keep the order.
    all_tasks: dict[str, None] = {}
    for result in results:
        all_tasks |= dict.fromkeys(result["tasks"])
    check_known("task", tasks or [], all_tasks)
    tasks = list(dict.fromkeys(tasks or all_tasks))

    all_metrics: dict[str, None] = {}
    for task in tasks:
        for result in results:
            record = result["tasks"].get(task)
            if record is None:
                continue
            for metric in record["metrics"]:
                if not only_items or has_items(record["items"], metric):
                    all_metrics[metric] = None
    check_known("metric", metrics or [], all_metrics)
    return tasks, list(dict.fromkeys(metrics or all_metrics))


def check_comparable(
    results: Sequence[Result],
    tasks: Sequence[str],
) -> None:
    """Raise for results that were not measured alike, with each one's differences from an earlier result in one line.

    Args:
        results: Results of any names.
        tasks: Tasks that at least one of them has.

    Raises:
        UserError: If items, prompts, shots, versions, units or directions of a task differ.
    """
    problems: list[str] = []
    for task in tasks:
        # Not the first alone: it may lack a version, or shots, in which two others differ.
        alike: list[Result] = []
        for result in results:
            if task not in result["tasks"]:
                continue
            for other in alike:
                mismatches = list(
                    _mismatches(
                        other["tasks"][task],
                        result["tasks"][task],
                    )
                )
                # One report for a result: beside others it would often repeat the same.
                if mismatches:
                    names = f"{name_and_seed(other)} and {name_and_seed(result)}"
                    problems += [f"{task}: {mismatch} ({names})" for mismatch in mismatches]
                    break
            else:
                alike.append(result)
    if problems:
        raise UserError(
            f"these results cannot be compared, they were not measured alike: {'; '.join(problems)}: "
            "evaluate them with the same data and settings, or choose other --tasks"
        )


def _mismatches(a: TaskRecord, b: TaskRecord) -> Iterator[str]:
    """Return all differences in how a task was measured."""
    for key, label in _ALIKE.items():
        x = a.get(key)
        y = b.get(key)
        # A missing value is not known, and may be equal. Only for a chat template does it mean that none was used.
        # Files of other programs leave some of these out.
        is_unknown = x is None or y is None
        if key == "chat_template_hash":
            is_unknown = False
            # The prompts are those that the models got, templates applied: where they are equal, as those of plain
            # text are, another template has changed nothing.
            if a["items_fingerprint"] == b["items_fingerprint"]:
                continue
        if x != y and not is_unknown:
            yield f"different {label}, {x} and {y}"

    yield from _item_mismatches(a, b)

    # Metrics that only one of them has are not compared, so they are no problem.
    for name in a["metrics"]:
        if name not in b["metrics"]:
            continue
        metric_a = a["metrics"][name]
        metric_b = b["metrics"][name]

        unit_a = metric_a["unit"]
        unit_b = metric_b["unit"]
        # Both units were guessed, and only one model has values above 1.
        are_guessed = {unit_a, unit_b} == _GUESSED_UNITS
        if unit_a != unit_b and not are_guessed:
            yield f"different unit of {name}, {unit_a} and {unit_b}"

        is_higher_a = metric_a["higher_is_better"]
        is_higher_b = metric_b["higher_is_better"]
        if is_higher_a != is_higher_b:
            yield f"different higher_is_better of {name}, {is_higher_a} and {is_higher_b}"

        if are_guessed:
            highest_a = _highest(a, name)
            highest_b = _highest(b, name)
            # A rating of up to 10 may have been below 1 everywhere by chance. Above that, one of the two is in percent.
            low, high = sorted([highest_a, highest_b])
            if high > _LARGEST_RATING:
                yield f"{name} goes up to {low:g} in one and up to {high:g} in the other (percent?)"


def _highest(task: TaskRecord, metric: str) -> float:
    """Return the highest value of a metric among the items; 0 if none has one."""
    values = [item.get(metric) for item in task["items"]]
    finite = [value for value in values if is_finite(value)]
    return max(finite, default=0.0)


def _item_mismatches(a: TaskRecord, b: TaskRecord) -> Iterator[str]:
    """Return the differences between the items of a task, of each kind the first."""
    items_a = {item["id"]: item for item in a["items"]}
    items_b = {item["id"]: item for item in b["items"]}
    # Without the same items nothing else can be compared item by item, so this is the only report.
    if items_a.keys() != items_b.keys():
        in_one = items_a.keys() ^ items_b.keys()
        # The first of them in the order of the files, since a set has none.
        names_in_one = [name for name in [*items_a, *items_b] if name in in_one]
        first = names_in_one[0]
        yield f"different items, {len(items_a)} and {len(items_b)} of them, {first!r} in one only"
        return

    # The ids are the same, so it is their prompts or references that differ.
    if a["items_fingerprint"] != b["items_fingerprint"]:
        yield "different prompts or references of the same items"

    # Both decide how items are weighted and drawn, which is done once for all models.
    labels = {"num_tokens": "num_tokens (tokenizers?)", "cluster_id": "cluster_id"}
    for key, label in labels.items():
        for name, item in items_a.items():
            x = item.get(key)
            y = items_b[name].get(key)
            if x != y:
                yield f"different {label}, {x} and {y} in item {name!r}"
                break


def setting_notes(results: Sequence[Result]) -> list[str]:
    """Name settings and package versions that are not the same in all results: allowed, but the reader should know."""
    notes: list[str] = []

    # Settings that any of them has.
    keys: dict[str, None] = {}
    for result in results:
        keys |= dict.fromkeys(result["settings"])
    for key in keys:
        values = [result["settings"].get(key) for result in results]
        text = _if_different(results, values)
        if text:
            notes.append(f"the results differ in the setting {key}: {text}")

    packages_of_results = [result["environment"]["packages"] for result in results]
    for package in _DECIDING_PACKAGES:
        versions = [packages.get(package) for packages in packages_of_results]
        text = _if_different(results, versions)
        if text:
            notes.append(f"the results were made with different versions of {package}: {text}")
    return notes


def _if_different(
    results: Sequence[Result],
    values: Sequence[Any],
) -> str:
    """Return the value of each result where they are not all the same, and otherwise nothing."""
    if all(value == values[0] for value in values):
        return ""
    texts: list[str] = []
    for result, value in zip(results, values, strict=True):
        texts.append(f"{value} for {name_and_seed(result)}")
    return ", ".join(texts)


def having(
    results: Iterable[Result],
    task: str,
    metric: str,
) -> list[Result]:
    """Return those of the results that have a metric of a task."""
    out: list[Result] = []
    for result in results:
        record = result["tasks"].get(task)
        if record is not None and metric in record["metrics"]:
            out.append(result)
    return out


def is_measured(
    group: Sequence[Result],
    task: str,
    metric: str,
) -> bool:
    """Whether all results of a group have a metric, with a value per item."""
    # At every seed: a mean over some of them would be paired with other seeds.
    if having(group, task, metric) != group:
        return False
    of_task = [result["tasks"][task] for result in group]
    return all(has_items(record["items"], metric) for record in of_task)


def unit_of(
    results: Iterable[Result],
    task: str,
    metric: str,
) -> str:
    """Return the unit of a metric in all of these results, at least one, which `check_comparable` accepts."""
    units: set[str] = set()
    for result in results:
        record = result["tasks"][task]
        units.add(record["metrics"][metric]["unit"])
    # A value above 1 in any result shows that it is not a fraction.
    # Otherwise there is one unit, as `check_comparable` has made sure.
    if units == _GUESSED_UNITS:
        return "score"
    return units.pop()


def name_and_seed(result: Result) -> str:
    """Return a result's name for a message."""
    name = repr(result["name"])
    seed = result["model"]["seed"]
    return name if seed is None else f"{name} seed {seed}"


def quoted(names: Iterable[object]) -> str:
    """Return names for a message."""
    return ", ".join(map(repr, names))


def without_missing_values(results: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """Results without the metrics that lack the value of an item, with a note on each.

    The mean over the other items would be of the easy ones, so `compare` raises. A study and its report have no other
    --metrics to choose, and would have no comparison at all for one model whose loss was not finite: they call
    :func:`~maskft_lab.results.compare.compare_measured`.
    """
    kept: list[Result] = []
    notes: list[str] = []
    for result in results:
        tasks = {}
        for task, record in result["tasks"].items():
            metrics = {}
            for name, metric in record["metrics"].items():
                # Without a value per item it is a summary of the task, which is shown and not compared.
                if metric["value"] is None and has_items(record["items"], name):
                    notes.append(
                        f"{name} on {task} of {name_and_seed(result)} is not compared: an item has no value, as where "
                        "a loss is not finite"
                    )
                else:
                    metrics[name] = metric
            tasks[task] = record | {"metrics": metrics}
        kept.append(result | {"tasks": tasks})
    return kept, notes
