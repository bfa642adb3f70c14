"""All charts of a study in the order of a report; for one whose data is not there, the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from maskft_base.errors import UserError

from .charts import Chart, Missing
from .evidence import MASK, Evidence
from .fig_ablations import ablation_charts
from .fig_cost import cost_chart
from .fig_curves import methods_chart, overview_chart, scores_chart
from .fig_forgetting import forgetting_chart
from .fig_landscape import landscape_chart
from .fig_masks import mask_charts
from .fig_theory import bound_chart, curvature_chart
from .fig_verdict import verdict_chart

T = TypeVar("T")
Charts = list[Chart | Missing]
PAPER_FIGURES = (1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)  # 2 is a drawing of the method

_STUDY = "maskft study RECIPE.yaml"
# Setting that an ablation varies -> figures, and what a recipe's grid must hold.
_ABLATIONS = {
    "mask_layers_to_transform": ((3, 8), "layers", "mask.mask_layers_to_transform: [[0, 1], [2, 3]]"),
    "mask_sparsity": ((6, 10), "share removed", "mask.mask_sparsity: [0.05, 0.1, 0.2]"),
    "max_train_samples": ((7, 11), "training rows", "mask.max_train_samples: [500, 1000, 2000]"),
}


def charts_of(evidence: Evidence) -> dict[str, Charts]:
    """Section of a report -> its charts."""
    return {
        "verdict": _verdict(evidence),
        "curves": _curves(evidence),
        "ablations": _ablations(evidence),
        "masks": _masks(evidence),
        "landscape": [
            _of_array(evidence, "landscape", landscape_chart, "fig05_12_landscape", "Loss landscape", (5, 12))
        ],
        "cost": [
            _of_array(evidence, "curvature", curvature_chart, "eq16_18_curvature", "Curvature"),
            _of_array(evidence, "bound", bound_chart, "table07_bound", "Generalisation bound"),
            _cost(evidence),
        ],
    }


def select_charts(evidence: Evidence, wanted: Sequence[str]) -> Charts:
    """The charts of these figure numbers or keys, such as ``5`` or ``masks_effects``.

    Raises:
        UserError: If there is no such chart, or its data is missing.
    """
    everything = [chart for charts in charts_of(evidence).values() for chart in charts]
    chosen: Charts = []
    for word in wanted:
        found = [c for c in everything if word == c.key or (word.isdecimal() and int(word) in c.numbers)]
        if not found:
            known = ", ".join([*map(str, PAPER_FIGURES), *(chart.key for chart in everything)])
            raise UserError(f"--only: no figure {word!r}; there are {known}")
        # One number may stand for several charts; those that cannot be drawn do not matter where another can.
        chosen += [chart for chart in found if isinstance(chart, Chart)] or found
    for chart in chosen:
        if isinstance(chart, Missing):
            raise UserError(f"{chart.title} cannot be drawn: {chart.reason}; {chart.command}")
    return list({chart.key: chart for chart in chosen}.values())


def place_of(evidence: Evidence) -> str:
    """The study's folder for a command line; without the folders above it where it was named from the root."""
    folder = evidence.folder
    return shlex.quote(folder.name if folder.is_absolute() else str(folder))


def _verdict(evidence: Evidence) -> Charts:
    if not evidence.comparison:
        return []
    forgetting = forgetting_chart(evidence.comparison, evidence.methods)
    verdict = verdict_chart(evidence.comparison, evidence.methods)
    return [verdict] if forgetting is None else [verdict, forgetting]


def _of_array(
    evidence: Evidence, what: str, draw: Callable[[Mapping], Chart], key: str, title: str, numbers: tuple[int, ...] = ()
) -> Chart | Missing:
    if what in evidence.arrays:
        return _drawn(what, lambda: draw(evidence.arrays[what]))
    return _missing(evidence, what, key, title, numbers)


def _missing(evidence: Evidence, what: str, key: str, title: str, numbers: tuple[int, ...]) -> Missing:
    reason, place = evidence.reasons[what], place_of(evidence)
    if not any(run.models for run in evidence.runs):
        reason, place = f"{reason}, and published results hold no models; it is made where the study ran", "STUDY"
    return Missing(key, title, reason, f"maskft analyze {place} --what {what}", numbers)


def _drawn(what: str, make: Callable[[], Chart]) -> Chart:
    """The chart of an array; what is not as it should be is an error that names the file, also when it is drawn."""
    chart = _guarded(what, make)
    panels = [
        replace(panel, draw=lambda axes, panel=panel: _guarded(what, lambda: panel.draw(axes)))
        for panel in chart.panels
    ]
    return replace(chart, panels=panels)


def _guarded(what: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{what}.json is not as maskft analyze writes it ({problem}): compute it again") from error


def _curves(evidence: Evidence) -> Charts:
    charts: Charts = []
    if "curves" in evidence.arrays:
        charts.append(overview_chart(evidence))
    else:
        reason = evidence.reasons["curves"]
        charts.append(Missing("fig01_curves", "Held-out measures against steps", reason, _STUDY, (1,)))
    if evidence.trained:
        charts.append(methods_chart(evidence.trained))
    if evidence.accounts:
        charts.append(scores_chart(evidence))
    return charts


def _ablations(evidence: Evidence) -> Charts:
    record = evidence.arrays.get("ablations", {"ablations": []})
    charts: Charts = list(ablation_charts(record))
    varied = {each["setting"] for each in record["ablations"]}
    for setting, (numbers, name, grid) in _ABLATIONS.items():
        if setting not in varied:
            reason = f"no two evaluated masks of this study differ in {setting} alone; the recipe needs a grid, {grid}"
            command = _STUDY
            key = f"fig{numbers[0]:02d}_{numbers[1]:02d}_{setting}"
            charts.append(Missing(key, f"Ablation: {name}", reason, command, numbers))
    return charts


def _masks(evidence: Evidence) -> Charts:
    if "masks" not in evidence.arrays:
        return [_missing(evidence, "masks", "fig13_heads", "Where masks remove", (13, 14))]
    names = {run.id: f"{run.name}, seed {run.seed}" for run in evidence.runs}
    record = evidence.arrays["masks"]
    renamed = {
        **record,
        "masks": {names.get(key, key): each for key, each in record["masks"].items()},
        "agreement": [
            pair | {side: names.get(pair[side], pair[side]) for side in ("first", "second")}
            for pair in record["agreement"]
        ],
    }
    order = [name.removesuffix(" (best)") for name in evidence.masks]  # that of the verdict
    masks = [run for run in evidence.runs if run.method == MASK]
    masks.sort(key=lambda run: order.index(run.name) if run.name in order else len(order))
    learned = [names[run.id] for run in masks]
    drawn = _guarded("masks", lambda: mask_charts(renamed, learned))
    charts: Charts = [_drawn("masks", lambda chart=chart: chart) for chart in drawn]
    if not any(13 in chart.numbers for chart in charts):
        reason = "no mask covers Q, K and V of one layer; mask_target_modules must hold q_proj, k_proj and v_proj"
        charts.append(Missing("fig13_heads", "Share removed by attention head", reason, _STUDY, (13, 14)))
    return charts


def _cost(evidence: Evidence) -> Chart | Missing:
    if "cost" not in evidence.arrays:
        return Missing("fig04_09_cost", "Cost", evidence.reasons["cost"], _STUDY, (4, 9))
    baseline = evidence.comparison.baseline if evidence.comparison else ""
    return cost_chart(evidence.arrays["cost"], _short_names(evidence.methods), baseline.removesuffix(" (best)"))


def _short_names(methods: Mapping[str, tuple[str | None, bool]]) -> dict[str, tuple[str | None, bool]]:
    return {name.removesuffix(" (best)"): kind for name, kind in methods.items()}
