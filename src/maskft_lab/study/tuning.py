"""Tuning a method of a study: which settings are tried, and which of them the held-out rows choose.

The rows are those held out from the training data, never those that a study reports on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from maskft_common.errors import UserError

from ..evaluation.arguments import HELDOUT
from .recipe import Choice, Method, Options, TimesParent
from .runs import ChosenFrom, Look, PointValues, StudyRun, Trial, Tuned


def points_of(trials: Sequence[Trial], base: PointValues) -> list[ChosenFrom]:
    """All points of the finished trials of a method; ``base``: the same sets of rows of the model before training."""
    out = []
    for trial in trials:
        for point, values in trial.heldout.points.items() if trial.heldout else ():
            if any(value is None for metrics in values.values() for value in metrics.values()):
                continue  # it diverged
            own, lost = values[HELDOUT], [name for name in values if name != HELDOUT and "nll" in values[name]]
            gain = own["accuracy"] if "accuracy" in own else base[HELDOUT]["nll"] - own["nll"]
            rises = [values[name]["nll"] - base[name]["nll"] for name in lost]
            out.append(ChosenFrom(trial, point, gain, sum(rises) / len(rises) if rises else 0.0, values))
    return out


def choose(points: Sequence[ChosenFrom], best_gain: float, rule: Choice) -> ChosenFrom:
    """The point with the least forgetting that gains enough, or with the most gain that forgets little enough.

    Where no point does, the one that comes nearest.

    Args:
        points: Those of one method.
        best_gain: The best of any method.
        rule: The constraint.
    """
    if rule.accuracy_at_least is not None:
        enough = [each for each in points if each.gain >= rule.accuracy_at_least * best_gain]
        return min(enough, key=_least_forgetting) if enough else min(points, key=_most_gain)
    little = [each for each in points if each.forgetting <= rule.forgetting_at_most]
    return min(little, key=_most_gain) if little else min(points, key=_least_forgetting)


def _least_forgetting(point: ChosenFrom) -> tuple[float, ...]:
    return point.forgetting, -point.gain, point.values[HELDOUT]["nll"]


def _most_gain(point: ChosenFrom) -> tuple[float, ...]:
    return -point.gain, point.forgetting, point.values[HELDOUT]["nll"]


def tune(method: Method, own: Options, parent: Options, run_of: Callable[[Options], StudyRun], look: Look) -> Tuned:
    """Try every combination of the values; the lowest held-out loss wins.

    Args:
        method: The method, which has a ``tune``.
        own: Its options of ``maskft train``, defaults included.
        parent: Those of the run that it starts from.
        run_of: Makes the run that tries settings.
        look: Held-out loss of a run; None where it is not finished.
    """
    if method.tune and own.get("eval_strategy") == "no":
        raise UserError(f"method {method.name!r}: tune chooses by held-out loss, and eval_strategy is no; drop that")
    if "num_train_epochs" in method.tune and (_number(own.get("max_steps")) or 0) > 0:
        raise UserError(f"method {method.name!r}: max_steps decides the length, and tune is of num_train_epochs")
    tried = [(settings, run_of(settings)) for settings in _grid(method, parent)]
    trials = [Trial(settings, run, look(run)) for settings, run in tried]
    losses = [trial.heldout.loss for trial in trials if trial.heldout]
    is_settled = len(losses) == len(trials)
    return Tuned(trials, trials[losses.index(min(losses)) if is_settled else 0], is_settled)


def _grid(method: Method, parent: Options) -> list[Options]:
    """Every combination of the values to try."""
    lists = {}
    for option, values in method.tune.items():
        if isinstance(values, TimesParent):
            base = _number(parent.get(option))
            if not base:
                raise UserError(
                    f"method {method.name!r}: tune.{option} is given as times_parent, and {method.start!r} has none; "
                    "give the values"
                )
            values = [float(f"{factor * base:.6g}") for factor in values.times_parent]
        lists[option] = values
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None
