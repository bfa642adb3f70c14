"""The verdict on a learned mask: against the model that it starts from, and against the strongest control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .comparable import Groups, is_parent, pair_by_seed
from .comparison import BETTER, NOT_DISTINGUISHABLE, WORSE, Difference, Settings, Verdict
from .differences import Measured, judge, measure
from .schema import Result
from .text import brief_metric, difference_text, numbers_text, task_text

MASK = "mask"
EQUAL_TOKENS = 0.02  # share by which numbers of tokens may differ and still count as equal

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


def verdicts_on_masks(groups: Groups, rows: Sequence[tuple[Difference, Measured]], settings: Settings) -> list[Verdict]:
    """Return the verdict on each learned mask whose parent is among the models, in the metric of :func:`brief_metric`.

    All masks against their parents are a family for Holm's correction, all masks against their controls another.

    Args:
        groups: All results by name.
        rows: Differences from the baseline, judged, with what they were measured from: where the baseline is the
            parent, the same is said of it here.
        settings: As of the comparison.
    """
    shown = brief_metric([row for row, _ in rows])
    judged = {row.method: (row, measured) for row, measured in rows if (row.task, row.metric) == shown}
    baseline = rows[0][0].baseline
    known = [name for name in groups if name in judged or name == baseline]
    known.sort(key=lambda name: name != baseline)  # another model may be the same, such as one that gained nothing
    parents: dict[str, str] = {}
    controls: list[tuple[str, str]] = []
    for mask in (name for name in groups if name in known and groups[name][0]["model"]["method"] == MASK):
        others = [name for name in known if name != mask]
        parent = next((name for name in others if _all_paired(groups, mask, name, is_parent)), None)
        if parent is None and mask != baseline and _all_paired(groups, mask, baseline, _may_be_parent):
            parent = baseline
        if parent is not None:
            parents[mask] = parent
            others = [name for name in others if name != parent and _all_paired(groups, mask, name, _is_control)]
            controls += [(mask, name) for name in others]
    of_parents = _judged(groups, [pair for pair in parents.items() if pair[1] != baseline], shown, settings)
    of_controls = _judged(groups, controls, shown, settings)
    found = []
    for mask, parent in parents.items():
        against = [judged[mask] if parent == baseline else of_parents[mask, parent]]
        sign = 1 if against[0][0].higher_is_better else -1
        own = [of_controls[pair] for pair in controls if pair[0] == mask]
        against += sorted(own, key=lambda pair: -sign * pair[0].baseline_value)[:1]  # the best of them
        found.append(Verdict(against[0][0], against[1][0] if len(against) > 1 else None, _text(against)))
    return found


def _judged(
    groups: Groups, pairs: Sequence[tuple[str, str]], shown: tuple[str, str], settings: Settings
) -> dict[tuple[str, str], tuple[Difference, Measured]]:
    """Return the differences of masks from other models, as one family."""
    needed = round(4 * len(pairs) / (1 - settings.confidence))  # see Settings.with_resamples
    settings = replace(settings, num_resamples=max(settings.num_resamples, needed))
    paired = [pair_by_seed(groups[mask], groups[name], settings.fixed_seeds) for mask, name in pairs]
    family = [measure(pair, *shown, True, settings) for pair in paired]
    rows = [(row, measured) for row, (_, measured) in zip(judge(family, settings), family, strict=True)]
    return dict(zip(pairs, rows, strict=True))


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
    fingerprints = other["model"]["fingerprint"], mask["model"]["fingerprint"]
    return other["model"]["adapter"] is None and None in fingerprints


def _is_control(other: Result, mask: Result) -> bool:
    """Whether a model that is no learned mask was trained from the mask's start on as many tokens."""
    starts = [(study.get("model"), study.get("start")) if (study := r.get("study")) else None for r in (mask, other)]
    tokens, others = ((r.get("training", {}).get("complete_num_train_tokens") or 0) for r in (mask, other))
    is_as_long = tokens > 0 and abs(others - tokens) <= EQUAL_TOKENS * tokens
    return None not in starts and starts[0] == starts[1] and is_as_long and other["model"]["method"] != MASK


def _text(against: Sequence[tuple[Difference, Measured]]) -> str:
    """Return both differences and what follows, after the seeds that contradict it."""
    parts: list[str] = []
    doubts: list[str] = []
    for row, measured in against:
        unit = "points" if row.unit == "fraction" else row.unit
        tokens = "" if not parts else " (equal tokens)"
        parts.append(f"{difference_text(row, unit)} against {row.baseline}{tokens}, {row.verdict}")
        by_seed = measured.by_seed
        if row.verdict != NOT_DISTINGUISHABLE and min(by_seed) < 0 < max(by_seed):
            doubts.append(f"seeds differ in sign against {row.baseline} ({numbers_text(by_seed, row.unit)}); ")
    first, control = against[0][0], against[1][0] if len(against) > 1 else None
    outcome = (first.verdict, control.verdict if control else None)
    said = _CONCLUSIONS[outcome].format(control=control.baseline if control else "")
    seeds = f", {first.num_seeds} seeds" if first.num_seeds > 1 else ""
    return f"{''.join(doubts)}{said}. {first.method}, {first.metric} on {task_text(first)}{seeds}: {'; '.join(parts)}."
