"""Which results may be compared, and what the reader must know where they were not measured alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import UserError, did_you_mean
from .schema import Result, has_items

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
# Those that score a task, and the tasks of lm-eval whose names begin with its.
_SCORING_PACKAGES = {
    "minerva_math": ("math-verify", "sympy", "antlr4-python3-runtime"),
    "ifeval": ("langdetect", "nltk"),
    "alpaca_eval": ("alpaca_eval",),
}


def group_by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
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
                f"results named {name!r} are of different methods ({quoted(training)}), so not seeds of one: "
                "give them different names"
            )
        group.sort(key=lambda result: result["model"]["seed"] or 0)
    return groups


def check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a name that no result has."""
    for name in names:
        if name not in known:
            raise UserError(f"unknown {what} {name!r}{did_you_mean(name, known)}: the results have {quoted(known)}")


def select(
    results: Sequence[Result], tasks: Sequence[str] | None, metrics: Sequence[str] | None, only_items: bool = True
) -> tuple[list[str], list[str]]:
    """Return the tasks and metrics asked for, or all that any result has, in the order of their appearance."""
    all_tasks = list(dict.fromkeys(task for result in results for task in result["tasks"]))
    check_known("task", tasks or [], all_tasks)
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
    check_known("metric", metrics or [], all_metrics)
    return tasks, list(dict.fromkeys(metrics or all_metrics))


def check_comparable(results: Sequence[Result], tasks: Sequence[str]) -> None:
    """Refuse results that were not measured alike, naming in one line all that differs from the first result."""
    problems = []
    for task in tasks:
        first, *others = (result for result in results if task in result["tasks"])
        for other in others:
            problems += [
                f"{task}: {problem} ({name_and_seed(first)} and {name_and_seed(other)})"
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


def setting_notes(results: Sequence[Result], tasks: Sequence[str]) -> list[str]:
    """Name settings and package versions that are not the same in all results: allowed, but the reader should know."""
    notes = []
    for key in dict.fromkeys(key for result in results for key in result["settings"]):
        if values := _if_different(results, [result["settings"].get(key) for result in results]):
            notes.append(f"the results differ in the setting {key}: {values}")
    scored = [name for name in _SCORING_PACKAGES if any(task.startswith(name) for task in tasks)]
    scoring = [package for name in scored for package in _SCORING_PACKAGES[name]]
    for package in (*_DECIDING_PACKAGES, *scoring):
        if values := _if_different(results, [result["environment"]["packages"].get(package) for result in results]):
            notes.append(f"the results were made with different versions of {package}: {values}")
    return notes


def _if_different(results: Sequence[Result], values: list) -> str:
    """Return the value of each result where they are not all the same, and otherwise nothing."""
    if all(value == values[0] for value in values):
        return ""
    return ", ".join(f"{value} for {name_and_seed(result)}" for result, value in zip(results, values, strict=True))


def unit_of(groups: Iterable[Sequence[Result]], task: str, metric: str) -> str:
    """Return the unit of a metric in all of these results."""
    units = {result["tasks"][task]["metrics"][metric]["unit"] for group in groups for result in group}
    return "score" if units == _GUESSED_UNITS else units.pop()


def name_and_seed(result: Result) -> str:
    """Return what a message calls a result."""
    seed = result["model"]["seed"]
    return repr(result["name"]) + ("" if seed is None else f" seed {seed}")


def quoted(names: Iterable) -> str:
    """Return names for a message."""
    return ", ".join(map(repr, names))
