"""A budget of KL(base || model): the multiplier of the KL term is adapted at every step to hold KL near it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# What the running mean of KL is held near, as a multiple of the budget. With a decaying learning rate KL falls towards
# the end, so an aim within the budget would end at three quarters of it. What is beyond the budget at the end is taken
# back (change.py), which costs LoRA much of the task: an aim of 1.5 would leave too much to take back.
AIM = 1.1
# Weight of the newest step in the running mean of KL: a batch of some hundred tokens is noisy.
_NEWEST = 0.7
# Gains of the proportional and the integral part, per step and per unit of log(KL / aim).
_PROPORTIONAL = 2.0
_INTEGRAL = 0.5
# Bounds of the error. KL starts at 0, where the logarithm is unbounded.
_LOWEST_ERROR = -math.log(3.0)
_HIGHEST_ERROR = math.log(10.0)
# Largest error that counts in the integral, in both directions (anti-windup). An early overshoot lasts some twenty
# steps whatever the multiplier is: an integral that adds all of it needs the rest of the run to return, and meanwhile
# nothing is learned. Near the aim the integral is fast: a mask that sharpens moves away from the base all the time, and
# KL stays above the aim by the speed of that, divided by this gain.
_LARGEST_INTEGRATED_ERROR = 0.2
# Bounds of the logarithm of the multiplier and of its integral: factors of 1e-4 to 1. Beyond 1 the term outweighs the
# task, and what is learned is lost sooner than KL falls. What is beyond the budget then is taken back, see change.py.
_LOWEST_LOG = math.log(1e-4)
_HIGHEST_LOG = 0.0


class KLBudget:
    """Multiplier of the KL term, from the KL of each optimizer step.

    Minimising the task's loss subject to KL <= budget has the Lagrangian ``loss + multiplier * (KL - budget)``. Dual
    ascent raises the multiplier while KL is above the budget and lowers it below; alone it lags and oscillates, so a
    term proportional to the error is added (PID Lagrangian, Stooke, Achiam and Abbeel 2020,
    https://arxiv.org/abs/2007.03964). Both act on the logarithm, as in the adaptive controller of Ziegler et al. 2019
    (https://arxiv.org/abs/1909.08593, Sec. 2.2): the multiplier stays positive, and the unit of KL does not matter.

    Attributes:
        budget: Nats per token, above 0.
        aim: What KL is held near, nats per token.
        kl: Running mean of KL over the steps, nats per token.
        multiplier: Coefficient of KL in the loss of the next step; comparable with ``kl_to_base``.
    """

    def __init__(self, budget: float):
        self.budget = budget
        self.aim = AIM * budget
        self.kl = 0.0
        self._integral = 0.0
        self.multiplier = self._multiplier_at(0.0)

    def update(self, kl: float) -> None:
        """Take the KL of an optimizer step, nats per token, a mean over its tokens."""
        # An exponential moving average.
        self.kl += _NEWEST * (kl - self.kl)

        # How far the mean is from the aim, as a logarithm of their ratio.
        ratio = max(self.kl, 1e-12) / self.aim
        error = _clamp(math.log(ratio), _LOWEST_ERROR, _HIGHEST_ERROR)

        integrated_error = _clamp(
            error,
            -_LARGEST_INTEGRATED_ERROR,
            _LARGEST_INTEGRATED_ERROR,
        )
        integral = self._integral + _INTEGRAL * integrated_error
        self._integral = _clamp(integral, _LOWEST_LOG, _HIGHEST_LOG)
        self.multiplier = self._multiplier_at(error)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint; JSON keeps every bit of a float."""
        return {
            "kl": self.kl,
            "integral": self._integral,
            "multiplier": self.multiplier,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state that :meth:`state` returned."""
        self.kl = state["kl"]
        self._integral = state["integral"]
        self.multiplier = state["multiplier"]

    def _multiplier_at(self, error: float) -> float:
        return math.exp(min(self._integral + _PROPORTIONAL * error, _HIGHEST_LOG))


class MeasuredKL(NamedTuple):
    """KL(base || model) of a checkpoint on held-out rows, nats per token.

    Attributes:
        kl: KL at the part of the change that is kept.
        part: That part; 1 where the whole is within the budget, or there is no budget.
        whole: KL of the whole change.
    """

    kl: float
    part: float
    whole: float


def kl_by_step(history: Iterable[Mapping[str, Any]]) -> dict[int, MeasuredKL]:
    """Step -> what was measured there, of a run's log. Logs of earlier versions have no parts."""
    found = {}
    for row in history:
        if "eval_kl" not in row:
            continue
        kl = row["eval_kl"]
        part = row.get("eval_part", 1.0)
        whole = row.get("eval_kl_whole", kl)
        found[row["step"]] = MeasuredKL(kl, part, whole)
    return found


def excess(kl: float, budget: float | None) -> float:
    """Nats per token by which a KL exceeds a budget; 0 within it, or without a budget.

    Of two models the one with the smaller excess is better; if they are equal, as within the budget, the loss decides.
    """
    if budget is None:
        return 0.0
    if math.isnan(kl):
        return math.inf
    return max(0.0, kl - budget)


def _clamp(
    value: float,
    low: float,
    high: float,
) -> float:
    return min(max(value, low), high)
