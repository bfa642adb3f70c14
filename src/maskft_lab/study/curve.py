"""Gain against forgetting: the points of every method's path, and of the models that were chosen, for a figure.

Reads what is measured already; imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.arguments import HELDOUT
from ..results.comparison import Comparison
from ..results.gains import gains_of
from ..results.schema import BEFORE, Result
from .runs import ChosenFrom, Tuned, settings_text


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
    chosen = gains_of([row for row in comparison.differences if row.task in (HELDOUT, *map(BEFORE.__add__, probes))])
    sizes: dict[str, list[int | None]] = {}
    for result in results:
        sizes.setdefault(result["name"], []).append(result["model"].get("num_bytes"))
    out = {}
    for curve in chosen:
        probe = curve["probe"]
        points = [_of_path(tuned, point, probe, base) for tuned in tunings for point in tuned.points]
        for point in curve["points"]:
            known = [size for size in sizes[point["method"]] if size]
            num_bytes = max(known) if len(known) == len(sizes[point["method"]]) else None
            points.append(point | {"label": "chosen", "num_bytes": num_bytes})
        out[probe] = {"model": results[0]["model"]["name_or_path"], **curve, "points": points}
    return out


def _of_path(tuned: Tuned, point: ChosenFrom, probe: str, base: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    (share, scale), name = point.point, point.trial.run.name
    accuracy = base[HELDOUT].get("accuracy")
    return {
        "method": name,
        "path": f"{name}, {settings_text(point.trial.settings)}" if point.trial.settings else name,
        "label": f"{share:g} of training, {scale:g} of the change",
        "share": share,
        "scale": scale,
        "rows": "held-out",
        "points_gained": point.gain if accuracy is None else 100 * (point.gain - accuracy),
        "nats_forgotten": point.values[probe]["nll"] - base[probe]["nll"],
        "num_seeds": 1,
        "is_chosen": False,
    }
