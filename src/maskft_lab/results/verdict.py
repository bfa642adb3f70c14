"""The verdict on a learned mask: against the model that it starts from, and against the strongest control."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .comparable import Groups, is_parent, pair_by_seed
from .comparison import BETTER, NOT_DISTINGUISHABLE, WORSE, Difference, MaskVerdict, Settings
from .differences import Measured, judge, measure
from .proportions import FEW
from .schema import BEFORE, Result
from .words import difference_text, is_alike, numbers_text, points_or_unit, scale_and_digits, task_text, unit_text

MASK = "mask"
EQUAL_TOKENS = 0.02  # share by which numbers of tokens may differ and still count as equal
FLOOR = 0.01  # accuracies below it, or above 1 - it, of fewer than `FEW` items of a kind, tell nothing

Row = tuple[Difference, Measured]
Pair = tuple[str, str]  # names of a mask and of the model beside it

# What follows: (against the parent, against the control) -> a sentence about {control}.
_CONCLUSIONS = {
    (BETTER, BETTER): "the mask improves the model it starts from, and more than {control} does",
    (BETTER, NOT_DISTINGUISHABLE): "the mask improves the model it starts from, not distinguishably from {control}",
    (BETTER, WORSE): "the mask improves the model it starts from; {control} improves it more",
    (NOT_DISTINGUISHABLE, BETTER): "no improvement of the model it starts from is shown; {control} is behind the mask",
    (
        NOT_DISTINGUISHABLE,
        NOT_DISTINGUISHABLE,
    ): "no improvement is shown over the model it starts from, nor over {control}",
    (NOT_DISTINGUISHABLE, WORSE): "no improvement of the model it starts from is shown; {control} is ahead of the mask",
    (WORSE, BETTER): "the mask makes the model it starts from worse; {control} makes it worse still",
    (WORSE, NOT_DISTINGUISHABLE): "the mask makes the model it starts from worse",
    (WORSE, WORSE): "the mask makes the model it starts from worse; {control} is ahead of the mask",
    (BETTER, None): "the mask improves the model it starts from; no control with equal tokens is known",
    (NOT_DISTINGUISHABLE, None): "no improvement is shown, and no control with equal tokens is known",
    (WORSE, None): "the mask makes the model it starts from worse",
}

_DOUBTS = re.compile(r"(seeds differ in sign against .+? \([-+., \d]+\); )+")
_REASON = re.compile(r" \(by [^:]+: (?P<reason>[^()]+)\)\. ")


class Kin(NamedTuple):
    """The models beside each learned mask of a comparison."""

    parents: dict[str, str]  # mask -> the model that it starts from
    controls: list[Pair]


def brief_metric(differences: Sequence[Difference]) -> tuple[str, str]:
    """Return task and metric that stand for a comparison where there is room for one.

    What was trained for goes before probes of earlier abilities, accuracy before other metrics; all 0 says nothing.
    """
    not_all_zero = {(row.task, row.metric) for row in differences if row.value or row.baseline_value}

    def order(row: Difference) -> tuple[bool, ...]:
        is_silent = (row.task, row.metric) not in not_all_zero
        return row.task.startswith(BEFORE), is_silent, row.metric != "accuracy", not row.is_main

    first = min(differences, key=order)
    return first.task, first.metric


def verdicts_on_masks(groups: Groups, rows: Sequence[Row], settings: Settings) -> list[MaskVerdict]:
    """Return the verdict on each learned mask whose parent is among the models.

    The metric is that of :func:`brief_metric`. Where it cannot tell a mask from its parent (`silence`: nothing is
    right, everything is, or the answers are the same) the loss of the same task decides, and the verdict says so.

    All masks against their parents are a family for Holm's correction, all masks against their controls another.

    Args:
        groups: All results by name.
        rows: Differences from the baseline, judged, with what they were measured from: where the baseline is the
            parent, the same is said of it here.
        settings: As of the comparison.
    """
    task, metric = brief_metric([row for row, _ in rows])
    baseline = rows[0][0].baseline
    from_baseline = {(row.method, row.metric): (row, measured) for row, measured in rows if row.task == task}
    known = {method for method, of in from_baseline if of == metric} | {baseline}
    kin = _kin(groups, known, baseline)

    def against_parents(metrics: Mapping[str, str]) -> dict[str, Row]:
        others = [(mask, parent) for mask, parent in kin.parents.items() if parent != baseline]
        found = _judged(groups, others, task, metrics, settings)
        return {
            mask: from_baseline[mask, metrics[mask]] if parent == baseline else found[mask, parent]
            for mask, parent in kin.parents.items()
        }

    metrics = dict.fromkeys(kin.parents, metric)
    of_parents = against_parents(metrics)

    reasons: dict[str, str] = {}
    for mask, (row, _) in of_parents.items():
        loss = _loss_of(rows, task, mask, kin.parents[mask])
        reason = silence(row)
        if loss is not None and reason is not None:
            metrics[mask] = loss
            reasons[mask] = reason
    if reasons:
        of_parents = against_parents(metrics)

    of_controls = _judged(groups, kin.controls, task, metrics, settings)
    verdicts = []
    for mask in kin.parents:
        against = [of_parents[mask]]
        own = [of_controls[pair] for pair in kin.controls if pair[0] == mask]
        if own:
            sign = 1 if against[0][0].higher_is_better else -1
            against.append(max(own, key=lambda row: sign * row[0].baseline_value))
        control = against[1][0] if own else None
        verdicts.append(MaskVerdict(against[0][0], control, _text(against, reasons.get(mask))))
    return verdicts


def silence(row: Difference) -> str | None:
    """Return why an accuracy cannot tell two models apart; None where it can, or where it does.

    Two models that have nothing right, or everything, may still differ; so may two that answer every item alike.
    """
    if row.unit != "fraction" or row.verdict != NOT_DISTINGUISHABLE:
        return None
    shares = (row.value, row.baseline_value)
    is_at_floor = max(shares) < FLOOR and max(shares) * row.num_items < FEW
    is_at_ceiling = min(shares) > 1 - FLOOR and (1 - min(shares)) * row.num_items < FEW
    scale, digits = scale_and_digits(row.unit)
    value, other = (f"{scale * share:.{digits}f} {unit_text(row.unit)}" for share in shares)
    if is_at_floor or is_at_ceiling:
        return f"{row.metric} is {value} of both" if value == other else f"{row.metric} is {value} and {other}"
    if is_alike(row):
        return f"{row.metric} is the same on all {row.num_items:,} items"
    return None


def _loss_of(rows: Sequence[Row], task: str, mask: str, parent: str) -> str | None:
    """Return the first metric of the task that is no share and that both models were measured in."""
    baseline = rows[0][0].baseline
    has = {(row.method, row.metric) for row, _ in rows if row.task == task}
    for row, _ in rows:
        is_measured = all(name == baseline or (name, row.metric) in has for name in (mask, parent))
        if row.task == task and row.unit != "fraction" and is_measured:
            return row.metric
    return None


# The models beside a mask


def _kin(groups: Groups, known: set[str], baseline: str) -> Kin:
    """Return the parent and the controls of each learned mask, among the models with the metric of the verdict."""
    names = [name for name in groups if name in known]
    # Another model may have the same weights, such as one that gained nothing: the baseline is looked at first.
    names.sort(key=lambda name: name != baseline)

    kin = Kin({}, [])
    for mask in (name for name in groups if name in known and groups[name][0]["model"]["method"] == MASK):
        others = [name for name in names if name != mask]
        parent = next((name for name in others if _all_paired(groups, mask, name, is_parent)), None)
        if parent is None and mask != baseline and _all_paired(groups, mask, baseline, _may_be_parent):
            parent = baseline
        if parent is None:
            continue
        kin.parents[mask] = parent
        for name in others:
            if name != parent and _all_paired(groups, mask, name, _is_control):
                kin.controls.append((mask, name))
    return kin


def _judged(
    groups: Groups, pairs: Sequence[Pair], task: str, metrics: Mapping[str, str], settings: Settings
) -> dict[Pair, Row]:
    """Return the differences of masks from other models, as one family, each in the metric of its mask."""
    pairs = [pair for pair in pairs if _have(groups, pair, task, metrics[pair[0]])]
    needed = round(4 * len(pairs) / (1 - settings.confidence))  # see Settings.with_resamples
    settings = replace(settings, num_resamples=max(settings.num_resamples, needed))
    family = []
    for mask, name in pairs:
        paired = pair_by_seed(groups[mask], groups[name], settings.fixed_seeds)
        family.append(measure(paired, task, metrics[mask], True, settings))
    rows = judge(family, settings)
    return {pair: (row, measured) for pair, row, (_, measured) in zip(pairs, rows, family, strict=True)}


def _have(groups: Groups, pair: Pair, task: str, metric: str) -> bool:
    """Whether all results of a pair have a metric: a control may lack the loss that decides."""
    results = [result for name in pair for result in groups[name]]
    return all(metric in result["tasks"].get(task, {"metrics": {}})["metrics"] for result in results)


def _all_paired(groups: Groups, mask: str, name: str, is_so: Callable[[Result, Result], bool]) -> bool:
    """Whether something holds of another model's results and the mask's at all seeds that both have.

    A parent may be one result beside all seeds of its masks; how much the seed of a control matters is not known.
    """
    by_seed = {result["model"]["seed"]: result for result in groups[mask]}
    pairs = [(other, by_seed[seed]) for other in groups[name] if (seed := other["model"]["seed"]) in by_seed]
    if len(groups[name]) == 1 and not pairs and is_so is not _is_control:
        pairs = [(groups[name][0], result) for result in groups[mask]]
    return bool(pairs) and all(is_so(other, result) for other, result in pairs)


def _may_be_parent(other: Result, mask: Result) -> bool:
    """Whether nothing is known that says that a mask was not made on a model."""
    fingerprints = (other["model"]["fingerprint"], mask["model"]["fingerprint"])
    return other["model"]["adapter"] is None and None in fingerprints


def _is_control(other: Result, mask: Result) -> bool:
    """Whether a model that is no learned mask was trained from the mask's start on as many tokens."""
    start = _start_of(mask)
    if other["model"]["method"] == MASK or start is None or start != _start_of(other):
        return False
    tokens = _tokens_of(mask)
    return tokens > 0 and abs(_tokens_of(other) - tokens) <= EQUAL_TOKENS * tokens


def _start_of(result: Result) -> tuple[Any, Any] | None:
    """Return the base model and the run from which a model of a study was trained."""
    study = result.get("study")
    return (study.get("model"), study.get("start")) if study else None


def _tokens_of(result: Result) -> int:
    return result.get("training", {}).get("complete_num_train_tokens") or 0


# The words


def _text(against: Sequence[Row], reason: str | None) -> str:
    """Return the words of a verdict, after the seeds that contradict it."""
    doubts = ""
    for row, measured in against:
        by_seed = measured.by_seed
        if row.verdict != NOT_DISTINGUISHABLE and min(by_seed) < 0 < max(by_seed):
            doubts += f"seeds differ in sign against {row.baseline} ({numbers_text(by_seed, row.unit)}); "
    control = against[1][0] if len(against) > 1 else None
    return doubts + _conclusion(against[0][0], control, reason)


def reworded(verdict: MaskVerdict) -> str:
    """Return a verdict in the words of this version: published ones keep their numbers, and their doubts."""
    doubts = _DOUBTS.match(verdict.text)
    reason = _REASON.search(verdict.text)
    said = _conclusion(verdict.parent, verdict.control, reason["reason"] if reason else None)
    return (doubts[0] if doubts else "") + said


def _conclusion(parent: Difference, control: Difference | None, reason: str | None) -> str:
    """Return the conclusion, then the differences from parent and control."""
    said = _CONCLUSIONS[parent.verdict, control.verdict if control else None]
    said = said.format(control=control.baseline if control else "")
    if reason:
        said += f" (by {parent.metric}: {reason})"
    seeds = f", {parent.num_seeds} seeds" if parent.num_seeds > 1 else ""
    measure = f"{parent.method}, {parent.metric} on {task_text(parent)}{seeds}"

    unit = points_or_unit(parent.unit)
    parts = f"{difference_text(parent, unit)} against {parent.baseline}, {parent.verdict}"
    if control is not None:
        parts += f"; {difference_text(control, unit)} against {control.baseline} (equal tokens), {control.verdict}"
    return f"{said}. {measure}: {parts}."
