"""The verdict on a learned mask: against the model that it starts from, and against the strongest control."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .comparable import Groups, is_measured, is_parent, pair_by_seed
from .comparison import (
    BETTER,
    MAX_RESAMPLES,
    NOT_DISTINGUISHABLE,
    WORSE,
    Difference,
    MaskVerdict,
    Place,
    Settings,
)
from .differences import Measured, judge, measure
from .proportions import FEW
from .schema import BEFORE, Result, run_identity
from .words import (
    PRINTED_AS_ZERO,
    difference_text,
    is_alike,
    numbers_text,
    points_or_unit,
    scale_and_digits,
    task_text,
    unit_text,
)

MASK = "mask"
EQUAL_TOKENS = 0.02  # share by which numbers of tokens may differ and still count as equal
FLOOR = 0.01  # accuracies below it, or above 1 - it, of fewer than `FEW` items of a kind, tell nothing

Row = tuple[Difference, Measured]
Pair = tuple[str, str]  # names of a mask and of the model beside it

# The conclusion from both verdicts: (against the parent, against the control) -> a sentence about {control}.
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

# The same in two parts, for a control that is compared in another metric than the parent.
_OF_PARENT = {
    BETTER: "the mask improves the model it starts from",
    NOT_DISTINGUISHABLE: "no improvement of the model it starts from is shown",
    WORSE: "the mask makes the model it starts from worse",
}
_OF_CONTROL = {
    BETTER: "{control} is behind the mask in {metric}",
    NOT_DISTINGUISHABLE: "{control} is not distinguishable from the mask in {metric}",
    WORSE: "{control} is ahead of the mask in {metric}",
}

# The parts of a verdict's text that `reworded` keeps.
_DOUBTS = re.compile(r"(seeds differ in sign against .+? \([-+., \d]+\); )+")
_REASON = re.compile(r" \(by [^:]+: (?P<reason>[^()]+)\)[.;] ")


class Kin(NamedTuple):
    """The models beside each learned mask of a comparison."""

    parents: dict[str, str]  # mask -> the model that it starts from
    controls: list[Pair]


def brief_metric(differences: Sequence[Difference]) -> Place:
    """Return the task and metric that represent a comparison where there is room for one.

    The trained task goes before probes of earlier abilities, a metric that is not 0 for all models before one that is,
    accuracy before other metrics, and main metrics before others.
    """
    # An exact match that no model ever gets right says nothing about any of them.
    # Chosen from the values of all models, and not from the sign of any difference, so the choice favours nobody.
    not_all_zero: set[Place] = set()
    for row in differences:
        if row.value or row.baseline_value:
            not_all_zero.add(row.place)

    def order(row: Difference) -> tuple[bool, ...]:
        # False sorts before True.
        is_probe = row.task.startswith(BEFORE)
        is_all_zero = row.place not in not_all_zero
        is_other_metric = row.metric != "accuracy"
        return is_probe, is_all_zero, is_other_metric, not row.is_main

    first = min(differences, key=order)
    return first.place


def verdicts_on_masks(
    groups: Groups,
    rows: Sequence[Row],
    settings: Settings,
) -> list[MaskVerdict]:
    """Return the verdict on each learned mask whose parent is among the models.

    The metric is that of :func:`brief_metric`. Where it cannot tell a mask from its parent (`silence`: nothing is
    right, everything is, or the answers are the same) the loss of the same task decides, and the verdict says so. A
    control that is ahead of such a mask in the first metric is named as that: a loss that is lower than the control's
    would hide it.

    All masks against their parents are a family for Holm's correction (where the table has them, that of the table),
    all masks against their controls another.

    Args:
        groups: All results by name.
        rows: Differences from the baseline, judged, with their samples. They are used again if the baseline is the
            parent or the mask, so that the verdict agrees with the table.
        settings: As of the comparison.
    """
    differences = [difference for difference, _ in rows]
    task, metric = brief_metric(differences)
    baseline = differences[0].baseline

    # Differences from the baseline on this task, by method and metric, and the models that have the metric.
    # The metric of the verdict, and the others of its task: the loss may have to decide.
    from_baseline: dict[tuple[str, str], Row] = {}
    known = {baseline}
    for row in rows:
        difference, _ = row
        if difference.task != task:
            continue
        from_baseline[difference.method, difference.metric] = row
        if difference.metric == metric:
            known.add(difference.method)
    kin = _kin(groups, known, baseline)

    def against_parents(metrics: Mapping[str, str]) -> dict[str, Row]:
        """Return each mask against its parent, in the metric of the mask."""
        # Differences from the baseline are judged already, in the family of the table. Of a mask that is the baseline
        # the table has its parent minus the mask.
        pairs: list[Pair] = []
        for mask, parent in kin.parents.items():
            if baseline not in (mask, parent):
                pairs.append((mask, parent))
        judged = _judged(
            groups,
            pairs,
            task,
            metrics,
            settings,
        )
        found: dict[str, Row] = {}
        for mask, parent in kin.parents.items():
            if parent == baseline:
                found[mask] = from_baseline[mask, metrics[mask]]
            elif mask == baseline:
                difference, measured = from_baseline[parent, metrics[mask]]
                found[mask] = (difference.mirrored(), measured.mirrored())
            else:
                found[mask] = judged[mask, parent]
        return found

    # First by the metric of the comparison, the same for all masks.
    metrics = dict.fromkeys(kin.parents, metric)
    of_parents = against_parents(metrics)

    # Where the metric cannot tell a mask from its parent, the loss decides. All masks are judged again then, because
    # they are one family, whose p-values and intervals depend on each other.
    # Two looks at the data, but hardly two chances of a false claim: the first look claimed nothing, and could hardly
    # have claimed anything, since fewer than `FEW` items were right (or wrong), or none differed.
    reasons: dict[str, str] = {}
    for mask, (difference, _) in of_parents.items():
        beside = [kin.parents[mask]]
        for of_mask, control in kin.controls:
            if of_mask == mask:
                beside.append(control)
        loss = _loss_of(rows, groups, task, mask, beside)
        reason = silence(difference)
        if loss is not None and reason is not None:
            metrics[mask] = loss
            reasons[mask] = reason
    if reasons:
        of_parents = against_parents(metrics)

    # The strongest control is chosen by its result. Holm's correction over all controls pays for the choice.
    # A family apart from that of the parents: each of the two statements has its own error of at most alpha.
    metrics_of_controls = dict(metrics)
    if reasons:
        # This look claims nothing in a mask's favour, so that it adds no chance to praise one by mistake.
        by_first_metric = _judged(
            groups,
            kin.controls,
            task,
            dict.fromkeys(kin.parents, metric),
            settings,
        )
        for (mask, _), (difference, _) in by_first_metric.items():
            if difference.verdict == WORSE:
                metrics_of_controls[mask] = metric
    of_controls = _judged(
        groups,
        kin.controls,
        task,
        metrics_of_controls,
        settings,
    )

    verdicts: list[MaskVerdict] = []
    for mask in kin.parents:
        controls: list[Row] = []
        for pair in kin.controls:
            of_mask, _ = pair
            # A control that lacks the metric in one of its results was not judged.
            if of_mask == mask and pair in of_controls:
                controls.append(of_controls[pair])
        verdict = _verdict(of_parents[mask], controls, reasons.get(mask))
        verdicts.append(verdict)
    return verdicts


def _verdict(
    of_parent: Row,
    controls: Sequence[Row],
    reason: str | None,
) -> MaskVerdict:
    """Return the verdict on one mask.

    Args:
        of_parent: The mask minus its parent.
        controls: The mask minus each of its controls; may be none.
        reason: Why the loss decides; None where it does not.
    """
    strongest = _strongest(controls)
    against = [of_parent]
    control: Difference | None = None
    if strongest is not None:
        control, _ = strongest
        against.append(strongest)

    parent, _ = of_parent
    text = _text(against, reason)
    return MaskVerdict(parent, control, text)


def _strongest(controls: Sequence[Row]) -> Row | None:
    """Return the control with the best value; None without controls."""

    def strength(row: Row) -> float:
        # Rows are masks minus controls, so the control's own value is that of the baseline.
        difference, _ = row
        sign = 1 if difference.higher_is_better else -1
        return sign * difference.baseline_value

    return max(controls, key=strength, default=None)


def silence(row: Difference) -> str | None:
    """Return why an accuracy cannot tell two models apart; None where it can, or where it does.

    Two models that have nothing right, or everything, may still differ; so may two that answer every item alike.
    """
    # Only accuracies have a floor and a ceiling. One that shows a difference does tell the two models apart.
    if row.unit != "fraction" or row.verdict != NOT_DISTINGUISHABLE:
        return None

    # Both conditions: below 1 % of 10,000 items there may be dozens that are right, and they can tell models apart.
    higher = max(row.value, row.baseline_value)
    lower = min(row.value, row.baseline_value)
    num_right = higher * row.num_items
    num_wrong = (1 - lower) * row.num_items
    is_at_floor = higher < FLOOR and num_right < FEW
    is_at_ceiling = lower > 1 - FLOOR and num_wrong < FEW
    if is_at_floor or is_at_ceiling:
        # As the tables write them: two values that are printed alike are named once.
        scale, digits = scale_and_digits(row.unit)
        unit = unit_text(row.unit)
        value = f"{scale * row.value:.{digits}f} {unit}"
        other = f"{scale * row.baseline_value:.{digits}f} {unit}"
        if value == other:
            return f"{row.metric} is {value} of both"
        return f"{row.metric} is {value} and {other}"

    if is_alike(row):
        return f"{row.metric} is the same on all {row.num_items:,} items"
    return None


def _loss_of(
    rows: Sequence[Row],
    groups: Groups,
    task: str,
    mask: str,
    beside: Sequence[str],
) -> str | None:
    """Return the first metric of the task that is not a share and that a mask and all models beside it have.

    A control without it would leave the verdict, which would then be about weaker controls, or about none.
    """
    for row, _ in rows:
        if row.task != task or row.unit == "fraction":
            continue
        if all(_have(groups, (mask, name), task, row.metric) for name in beside):
            return row.metric
    return None


# The models beside a mask


def _kin(
    groups: Groups,
    known: set[str],
    baseline: str,
) -> Kin:
    """Return the parent and the controls of each learned mask, among the models with the metric of the verdict.

    A mask without a parent is left out: nothing can be said about it.

    Args:
        groups: All results by name.
        known: Names of the models that have the metric.
        baseline: Name of the comparison's baseline.
    """
    names = [name for name in groups if name in known]
    # Another model may have the same weights, such as one that gained nothing: the baseline is looked at first.
    names.sort(key=lambda name: name != baseline)

    kin = Kin({}, [])
    for mask in groups:
        first = groups[mask][0]
        is_learned = first["model"]["method"] == MASK
        if mask not in known or not is_learned:
            continue

        # The model with the fingerprint of the mask's weights; without fingerprints, the baseline if it may be it.
        others = [name for name in names if name != mask]
        parents = [name for name in others if _all_paired(groups, mask, name, is_parent)]
        # Several models may have the weights of the parent. The baseline is the first of them, if it is one.
        if parents:
            parent = parents[0]
        elif mask != baseline and _all_paired(groups, mask, baseline, _may_be_parent):
            parent = baseline
        else:
            continue

        kin.parents[mask] = parent
        for name in others:
            # The parent has its own verdict, whatever it was trained on.
            if name != parent and _all_paired(groups, mask, name, _is_control):
                kin.controls.append((mask, name))
    return kin


def _judged(
    groups: Groups,
    pairs: Sequence[Pair],
    task: str,
    metrics: Mapping[str, str],
    settings: Settings,
) -> dict[Pair, Row]:
    """Return the differences of masks from other models, as one family, each in the metric of its mask.

    Args:
        groups: All results by name.
        pairs: Masks, each with another model; pairs of which one lacks the metric are left out.
        task: Task of the verdict.
        metrics: Mask -> the metric that decides.
        settings: As of the comparison.
    """
    with_metric: list[Pair] = []
    for pair in pairs:
        mask, _ = pair
        if _have(groups, pair, task, metrics[mask]):
            with_metric.append(pair)

    # Pairs of masks and controls may be more than the differences of the table, for which the number of resamples was
    # chosen. As many as `Settings.with_resamples` demands, which would raise where the user chose fewer, or where more
    # than MAX_RESAMPLES are needed. With too few the smallest p may not pass Holm's first step: that loses claims, and
    # makes no false ones.
    alpha = 1 - settings.confidence
    needed = round(4 * len(with_metric) / alpha)
    affordable = min(needed, MAX_RESAMPLES)
    num_resamples = max(settings.num_resamples, affordable)
    settings = replace(settings, num_resamples=num_resamples)

    family: list[Row] = []
    for mask, name in with_metric:
        paired = pair_by_seed(
            groups[mask],
            groups[name],
            settings.fixed_seeds,
        )
        row = measure(
            paired,
            task,
            metrics[mask],
            is_main=True,
            settings=settings,
        )
        family.append(row)

    # One call: the p-values of a family are adjusted together, and its intervals are simultaneous.
    differences = judge(family, settings)
    judged: dict[Pair, Row] = {}
    for pair, difference, row in zip(with_metric, differences, family, strict=True):
        _, measured = row
        judged[pair] = (difference, measured)
    return judged


def _have(
    groups: Groups,
    pair: Pair,
    task: str,
    metric: str,
) -> bool:
    """Whether all results of a pair have a metric, with a value per item."""
    return all(is_measured(groups[name], task, metric) for name in pair)


def _all_paired(
    groups: Groups,
    mask: str,
    name: str,
    is_so: Callable[[Result, Result], bool],
) -> bool:
    """Whether a relation between another model's result and the mask's holds at all seeds that both have.

    A parent may be one result beside all seeds of its masks. A control may not: the influence of its seed is unknown.

    Args:
        groups: All results by name.
        mask: Name of the mask.
        name: Name of the other model.
        is_so: The relation: (result of the other model, result of the mask) -> whether it holds.
    """
    of_mask = groups[mask]
    of_other = groups[name]
    # Seed by seed: the parent of seed 1 is not that of seed 2, though both have one name.
    by_seed = {result["model"]["seed"]: result for result in of_mask}
    pairs: list[tuple[Result, Result]] = []
    for result in of_other:
        # Only seeds that both have can be compared.
        seed = result["model"]["seed"]
        if seed in by_seed:
            pairs.append((result, by_seed[seed]))

    may_be_single = is_so is not _is_control
    if not pairs and len(of_other) == 1 and may_be_single:
        (single,) = of_other
        pairs = [(single, result) for result in of_mask]

    # `all` holds for no pairs, too.
    if not pairs:
        return False
    return all(is_so(other, result) for other, result in pairs)


def _may_be_parent(other: Result, mask: Result) -> bool:
    """Whether a mask may have been trained over a model: one of their fingerprints is not known."""
    of_other = other["model"]
    of_mask = mask["model"]
    if of_other["adapter"] is not None:
        return False
    return of_other["fingerprint"] is None or of_mask["fingerprint"] is None


def _is_control(other: Result, mask: Result) -> bool:
    """Whether a model that is not a learned mask was trained from the mask's start on as many tokens."""
    # Another learned mask is a rival, not a control.
    if other["model"]["method"] == MASK:
        return False

    if not _have_one_start(other, mask):
        return False

    # Both count from the pre-trained model on, so the tokens of the common start are in both.
    num_tokens = _tokens_of(mask)
    # Until the end of both runs, whichever checkpoint was kept: both could spend as much.
    difference = abs(_tokens_of(other) - num_tokens)
    return num_tokens > 0 and difference <= EQUAL_TOKENS * num_tokens


def _have_one_start(a: Result, b: Result) -> bool:
    """Whether the models of two runs of studies were trained from the same run, or from the same base model."""
    study_a = a.get("study")
    study_b = b.get("study")
    # Outside of a study the start is not known.
    if not study_a or not study_b:
        return False

    start_a = study_a.get("start")
    start_b = study_b.get("start")
    if start_a is None and start_b is None:
        return _is_one_base(study_a.get("model"), study_b.get("model"))
    if start_a is None or start_b is None:
        return False
    # By their hashes: the method may have been renamed between the two trainings. The hash is of the base model too.
    return run_identity(start_a) == run_identity(start_b)


def _is_one_base(a: Any, b: Any) -> bool:
    """Whether two names are of one base model: a local copy is named by its folder, and a model of the hub in full."""
    if a == b:
        return True
    # Two whole names are never one model, though they end alike: two users of the hub may have a model of one name.
    last_of_a = str(a).rpartition("/")[2]
    last_of_b = str(b).rpartition("/")[2]
    return str(a) == last_of_b or str(b) == last_of_a


def _tokens_of(result: Result) -> int:
    """Return the tokens of a run until its end, from the pre-trained model on; 0 if they are not known."""
    training = result.get("training", {})
    return training.get("complete_num_train_tokens") or 0


# The words


def _text(
    against: Sequence[Row],
    reason: str | None,
) -> str:
    """Return the words of a verdict, after the seeds that contradict it."""
    # Where seeds point in both directions, the mean may be that of one outlier: their differences come first.
    doubts = ""
    for row, measured in against:
        by_seed = measured.by_seed
        is_claimed = row.verdict != NOT_DISTINGUISHABLE
        # With one seed there is one difference, which has one sign. What would be printed as zero has none: items that
        # cancel each other leave some 1e-18.
        differ_in_sign = min(by_seed) <= -PRINTED_AS_ZERO and max(by_seed) >= PRINTED_AS_ZERO
        if is_claimed and differ_in_sign:
            doubts += f"seeds differ in sign against {row.baseline} ({numbers_text(by_seed, row.unit)}); "

    parent, *controls = [row for row, _ in against]
    control = controls[0] if controls else None
    return doubts + _conclusion(parent, control, reason)


def reworded(verdict: MaskVerdict) -> str:
    """Return a verdict in the words of this version: published ones keep their numbers, and their doubts."""
    # Doubts and reason were computed from items, which a published comparison does not have: its text is all there is.
    # `match` begins at the start of the text: doubts come first, as `_text` writes them.
    doubts = _DOUBTS.match(verdict.text)
    reason = _REASON.search(verdict.text)

    said = _conclusion(
        verdict.parent,
        verdict.control,
        reason["reason"] if reason else None,
    )
    if doubts:
        return doubts[0] + said
    return said


def _conclusion(
    parent: Difference,
    control: Difference | None,
    reason: str | None,
) -> str:
    """Return the conclusion, then the differences from parent and control."""
    # The conclusion, the reason where the loss decides, then the numbers.
    because = ""
    if reason:
        because = f" (by {parent.metric}: {reason})"
    # A verdict without a control has None in the place of the second one.
    if control is None:
        said = _CONCLUSIONS[parent.verdict, None] + because
    elif control.metric != parent.metric:
        # The reason is about the parent's metric.
        template = _OF_CONTROL[control.verdict]
        of_control = template.format(control=_named(control, parent), metric=control.metric)
        said = f"{_OF_PARENT[parent.verdict]}{because}; {of_control}"
    else:
        template = _CONCLUSIONS[parent.verdict, control.verdict]
        said = template.format(control=_named(control, parent)) + because

    measure = f"{parent.method}, {parent.metric} on {task_text(parent)}"
    if parent.num_seeds > 1:
        measure += f", {parent.num_seeds} seeds"

    of_parent = difference_text(parent, points_or_unit(parent.unit))
    parts = f"{of_parent} against {parent.baseline}, {parent.verdict}"
    if control is not None:
        beside = difference_text(control, points_or_unit(control.unit))
        if control.metric != parent.metric:
            beside = f"{control.metric} {beside}"
        parts += f"; {beside} against {control.baseline} (equal tokens), {control.verdict}"
    return f"{said}. {measure}: {parts}."


def _named(control: Difference, parent: Difference) -> str:
    """Return the name of a control, with its number of seeds where it is not that of the parent.

    A run that failed leaves fewer, and what is said of the control is then said of these alone.
    """
    if control.num_seeds == parent.num_seeds:
        return control.baseline
    plural = "s" if control.num_seeds > 1 else ""
    return f"{control.baseline} ({control.num_seeds} seed{plural})"
