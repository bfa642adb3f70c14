"""Gain against forgetting: the points of every method's path, and of the models that were chosen, for a figure.

Reads what is measured already; imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.arguments import HELDOUT
from ..results.comparison import Comparison, Difference
from ..results.schema import BEFORE, Result
from .tuning import ChosenFrom, Tuned, settings_text


def curves(
    tunings: Sequence[Tuned], results: Sequence[Result], comparison: Comparison, base: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """Probe -> content of its curve file.

    Points of a path are of the seeds and rows that choose; chosen points of the test, means over their seeds, with
    simultaneous intervals.

    Args:
        tunings: Methods with the points that were measured.
        results: Of the chosen models, on the test.
        comparison: Of these with the base model.
        base: What the points' rows say of the base model: set -> metric -> value.
    """
    probes = [name for name, metrics in base.items() if name != HELDOUT and "nll" in metrics]
    gains = {row.method: row for row in comparison.differences if (row.task, row.metric) == _main(comparison)}
    out = {}
    for probe in probes:
        task = f"{BEFORE}{probe}"
        lost = {row.method: row for row in comparison.differences if (row.task, row.metric) == (task, "nll")}
        points = [_of_path(tuned, point, probe, base) for tuned in tunings for point in tuned.points]
        points += [_chosen(gains[name], lost[name], results) for name in gains if name in lost]
        model = results[0]["model"]["name_or_path"]
        task, metric = _main(comparison)
        unit = "points" if metric == "accuracy" else "nats"
        out[probe] = {"model": model, "task": task, "probe": probe, "unit": unit, "points": points}
    return out


def _main(comparison: Comparison) -> tuple[str, str]:
    """Task and metric of the gain: accuracy where answers are checked."""
    found = [(row.task, row.metric) for row in comparison.differences if row.task == HELDOUT]
    return (HELDOUT, "accuracy") if (HELDOUT, "accuracy") in found else (HELDOUT, "nll")


def _of_path(tuned: Tuned, point: ChosenFrom, probe: str, base: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    own, (share, scale) = point.values[HELDOUT], point.point
    metric = "accuracy" if "accuracy" in own else "nll"
    gain = 100 * (own[metric] - base[HELDOUT][metric]) if metric == "accuracy" else base[HELDOUT][metric] - own[metric]
    name = tuned.trials[0].runs[0].name
    return {
        "method": name,
        "path": f"{name}, {settings_text(point.trial.settings)}" if point.trial.settings else name,
        "label": f"{share:g} of training, {scale:g} of the change",
        "share": share,
        "scale": scale,
        "rows": "held-out",
        "points_gained": gain,
        "nats_forgotten": point.values[probe]["nll"] - base[probe]["nll"],
        "num_seeds": len(point.trial.runs),
        "is_chosen": False,
    }


def _chosen(gain: Difference, lost: Difference, results: Sequence[Result]) -> dict[str, Any]:
    scale = 100 if gain.unit == "fraction" else -1  # a lower loss is a gain
    sizes = [r["model"].get("num_bytes") for r in results if r["name"] == gain.method]
    return {
        "method": gain.method,
        "path": gain.method,
        "label": "chosen",
        "rows": "test",
        "points_gained": scale * gain.difference,
        "nats_forgotten": lost.difference,
        "points_gained_interval": sorted([scale * gain.ci_low, scale * gain.ci_high]),
        "nats_forgotten_interval": [lost.ci_low, lost.ci_high],
        "num_seeds": gain.num_seeds,
        "num_bytes": max(size for size in sizes if size is not None) if all(sizes) else None,
        "is_chosen": True,
    }
