"""Gain against forgetting: each method's gain on the test, and its loss on probes of earlier abilities.

The figure has three parts, each in the room whose data it reads:

- here, `gains_of`: one point for each method of a comparison, on test rows, with simultaneous intervals;
- ``maskft_lab.study.path`` (`curves`): the points of every method's path (rates, checkpoints, scales, budgets), on
  held-out rows, written beside the summary as ``curve-STUDY-PROBE.json``;
- ``maskft_lab.report.fig_gain``: draws either. A point is an object with ``method``, ``points_gained`` and
  ``nats_forgotten``; all other keys are optional. ``budget`` is the limit on the KL to the base during training
  (``kl_budget``, nats per token): it is drawn as a dotted line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .comparison import Difference
from .schema import BEFORE
from .words import is_alike, task_text


def gains_of(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """Return the curve of each probe of earlier abilities, with one point for each method; empty without a probe.

    The gain is that in the first metric of the test that is a fraction, else in the first. Forgetting is measured by
    the loss of the probe, if it has one: when an ability is lost, accuracies no longer differ.
    """
    # Names of probes begin with ``before: ``, all other tasks are tests.
    tests: list[Difference] = []
    of_probes: list[Difference] = []
    for row in differences:
        if row.task.startswith(BEFORE):
            of_probes.append(row)
        else:
            tests.append(row)
    if not tests:
        return []

    # `min` takes the first of equals, and False is less than True: the first fraction, else the first of all.
    test = min(tests, key=lambda row: row.unit != "fraction")
    gains = {row.method: row for row in tests if row.place == test.place}

    # A point needs both coordinates: methods without the metric of the test are left out.
    probes: dict[str, list[Difference]] = {}
    for row in of_probes:
        if row.method in gains:
            rows_of_probe = probes.setdefault(row.task, [])
            rows_of_probe.append(row)

    curves = []
    for task, rows in probes.items():
        # The other way round: the first metric that is not a fraction.
        probe = min(rows, key=lambda row: row.unit == "fraction")
        points: list[dict[str, Any]] = []
        for row in rows:
            if row.metric == probe.metric:
                points.append(_point(gains[row.method], row))

        curve = {
            "task": task_text(test),
            "probe": task.removeprefix(BEFORE),
            "unit": _unit(test),
            "forgotten_unit": _unit(probe),
            "points": points,
        }
        curves.append(curve)
    return curves


def _point(
    gain: Difference,
    kept: Difference,
) -> dict[str, Any]:
    """Return the point of a method, from its differences on the test and on a probe."""
    # Above 0: the method is better on the test, and worse on the probe.
    # Differences are method minus baseline in the metric's own direction. Here both axes have a fixed direction.
    gain_sign = 1 if gain.higher_is_better else -1
    loss_sign = -1 if kept.higher_is_better else 1
    gained, gained_ends = _scaled(gain, gain_sign)
    forgotten, forgotten_ends = _scaled(kept, loss_sign)

    # Intervals over two seeds are wider than any picture, unless the seeds are fixed (`by_seed`) and only items drawn.
    has_intervals = gain.num_seeds != 2 or gain.by_seed is not None
    return {
        "method": gain.method,
        "path": gain.method,
        "rows": "test",
        "points_gained": gained,
        "nats_forgotten": forgotten,
        "points_gained_interval": gained_ends if has_intervals else None,
        "nats_forgotten_interval": forgotten_ends if has_intervals else None,
        "accuracy": gain.value if gain.unit == "fraction" else None,
        "num_seeds": gain.num_seeds,
        "is_chosen": True,
    }


def _scaled(
    row: Difference,
    sign: int,
) -> tuple[float, list[float] | None]:
    """Return a difference and its interval, shares in points; ``sign`` -1 turns both around.

    Two models that agree on every item have no interval, as in tables.
    """
    # Points for shares, as in tables.
    scale = 100.0 if row.unit == "fraction" else 1.0
    scale = sign * scale
    if is_alike(row):
        return 0.0, None
    ends = [scale * row.ci_low, scale * row.ci_high]
    ends.sort()  # a negative sign swaps them
    return scale * row.difference, ends


def _unit(row: Difference) -> str:
    if row.unit == "fraction":
        return "points"
    return row.unit.removesuffix("/token")
