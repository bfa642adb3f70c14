"""Gain against forgetting: each method's gain on the test, and its loss on probes of earlier abilities.

The figure has three parts, each in the room of what it reads:

- here, `gains_of`: one point for each method of a comparison, on test rows, with simultaneous intervals;
- ``maskft_lab.study.path`` (`curves`): the points of every method's path (rates, checkpoints, scales, budgets), on
  held-out rows, written beside the summary as ``curve-STUDY-PROBE.json``;
- ``maskft_lab.report.fig_gain``: draws either. A point is an object with ``method``, ``points_gained`` and
  ``nats_forgotten``; all other keys are optional. ``budget`` is the KL to the base that training was allowed
  (``kl_budget``, nats per token): it is drawn as a dotted line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .comparison import Difference
from .schema import BEFORE
from .words import task_text


def gains_of(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """The curve of each probe of earlier abilities, with one point for each method; none where there is no probe.

    The gain is that in the first metric of the test that is a fraction, else in the first. Forgetting is measured by
    the probe's loss, where it has one: an ability that is gone has no accuracy left to differ in.
    """
    tests = [row for row in differences if not row.task.startswith(BEFORE)]
    tests.sort(key=lambda row: row.unit != "fraction")
    gains = {row.method: row for row in tests if (row.task, row.metric) == (tests[0].task, tests[0].metric)}
    probes: dict[str, list[Difference]] = {}
    for row in differences:
        if row.task.startswith(BEFORE) and row.method in gains:
            probes.setdefault(row.task, []).append(row)
    curves = []
    for task, rows in probes.items():
        finest = min(rows, key=lambda row: row.unit == "fraction")
        points = [_point(gains[row.method], row) for row in rows if row.metric == finest.metric]
        units = {"unit": _unit(tests[0]), "forgotten_unit": _unit(finest)}
        curves.append({"task": task_text(tests[0]), "probe": task.removeprefix(BEFORE), **units, "points": points})
    return curves


def _point(gain: Difference, kept: Difference) -> dict[str, Any]:
    gained, gained_ends = _scaled(gain, 1 if gain.higher_is_better else -1)
    forgotten, forgotten_ends = _scaled(kept, -1 if kept.higher_is_better else 1)
    has_intervals = gain.num_seeds != 2 or gain.by_seed is not None  # over two seeds they are wider than any picture
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


def _scaled(row: Difference, sign: int) -> tuple[float, list[float]]:
    scale = sign * (100.0 if row.unit == "fraction" else 1.0)
    return scale * row.difference, sorted([scale * row.ci_low, scale * row.ci_high])


def _unit(row: Difference) -> str:
    return "points" if row.unit == "fraction" else row.unit.removesuffix("/token")
