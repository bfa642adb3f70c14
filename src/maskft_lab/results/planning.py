"""What a comparison could see, before it is run: the minimum detectable effect of so many items and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from maskft_base.errors import UserError

from .differences import POWER, Sample
from .statistics import Bootstrap, weighted_mean


class Spread(NamedTuple):
    """Variances of a difference: per item, shared by the seeds; per item of one seed; between seeds."""

    item: float
    interaction: float = 0.0
    seed: float = 0.0


@dataclass(frozen=True)
class Row:
    """One plan: the smallest true difference that is claimed with the power asked for; None where none is."""

    what: str
    unit: str
    num_items: int
    num_seeds: int
    num_comparisons: int
    effect: float | None


@dataclass(frozen=True)
class Plan:
    """Several plans, what they assume, and the test they are for."""

    rows: list[Row]
    assumptions: list[str]
    power: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values, fractions in [0, 1]."""
        return {"schema_version": 1, "kind": "plan", **asdict(self)}


def detectable_effect(
    spread: Spread, num_items: int, num_seeds: int = 1, alpha: float = 0.05, power: float = POWER
) -> float:
    """Return the minimum detectable effect of a paired comparison, by the normal approximation, with t for the seeds.

    The same model as `statistics.required_seeds`, solved for the difference: ``d^2 = t^2 (seed + interaction / N) / S +
    z^2 item / N``; one seed makes a claim about that pair of models, and ``seed`` does not enter. With equal weights it
    is Eq. 9 of https://arxiv.org/abs/2411.00640 for paired items.

    Args:
        spread: Variances per item and per seed, in the unit of the metric, squared.
        num_items: N, at least 2.
        num_seeds: S, at least 1.
        alpha: Two-sided level; of m comparisons ``alpha / m``, what Holm asks of the first.
        power: Probability that a difference of this size is seen, in (0, 1).
    """
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    if num_seeds == 1:
        return float(z * math.sqrt((spread.item + spread.interaction) / num_items))
    t = stats.t.ppf(1 - alpha / 2, num_seeds - 1) + stats.t.ppf(power, num_seeds - 1)
    between = spread.seed + spread.interaction / num_items
    return float(math.sqrt(t**2 * between / num_seeds + z**2 * spread.item / num_items))


def detectable_share(num_items: int, discordance: float, alpha: float = 0.05, power: float = POWER) -> float | None:
    """Return the minimum detectable difference of two accuracies by McNemar's exact test.

    Args:
        num_items: N.
        discordance: Share of the items that exactly one of the two models has right, in (0, 1].
        alpha: Two-sided level.
        power: As in `detectable_effect`.

    Returns:
        The difference, or None if not even items that all go one way show it with this power.
    """

    def lacking(difference: float) -> float:
        return mcnemar_power(num_items, discordance, difference, alpha) - power

    if lacking(discordance) < 0:
        return None
    return float(optimize.brentq(lacking, 0.0, discordance, xtol=1e-6))


def mcnemar_power(num_items: int, discordance: float, difference: float, alpha: float = 0.05) -> float:
    """Return the probability that McNemar's exact test rejects, summed over the number of items that differ."""
    spread = 8 * math.sqrt(num_items * discordance * (1 - discordance)) + 8
    lowest, highest = (round(num_items * discordance + side * spread) for side in (-1, 1))
    counts_M = np.arange(max(1, lowest), min(num_items, highest) + 1)
    critical_M = stats.binom.ppf(alpha / 2, counts_M, 0.5)
    critical_M -= 2 * stats.binom.cdf(critical_M, counts_M, 0.5) > alpha
    win = (1 + difference / discordance) / 2
    rejected_M = stats.binom.cdf(critical_M, counts_M, win) + stats.binom.sf(counts_M - critical_M - 1, counts_M, win)
    rejected_M[critical_M < 0] = 0
    return float(stats.binom.pmf(counts_M, num_items, discordance) @ np.minimum(1, rejected_M))


def spread_of(sample: Sample) -> Spread:
    """Return the variances that a pilot shows: two models on some items, with one or several seeds."""
    num_items, block = sample.diffs_SN.shape[1], sample.block()
    if sample.diffs_SN.shape[0] == 1:
        error = weighted_mean(block.diffs_SN[0], block.weights_N)[1]
        return Spread(num_items * error**2)
    drawn = Bootstrap([block], num_resamples=1)
    return Spread(num_items * drawn.item_variance, num_items * drawn.interaction, drawn.seed_excess)


def plan_from_rates(
    num_items: Sequence[int],
    num_seeds: Sequence[int],
    num_comparisons: int,
    base_rate: float | None,
    discordance: float | None,
    seed_sd: float,
    power: float = POWER,
    confidence: float = 0.95,
) -> Plan:
    """Return plans of comparing accuracies, from what is believed of them.

    Args:
        num_items: Numbers of items to plan with.
        num_seeds: Numbers of training seeds to plan with.
        num_comparisons: Comparisons of the family.
        base_rate: Accuracy of the baseline, in (0, 1).
        discordance: Share of the items that exactly one model has right; by default that of models whose answers are
            independent, ``2 p (1 - p)``, which is the widest case.
        seed_sd: Standard deviation between seeds of the difference, as a fraction; used with several seeds.
        power: As in `detectable_effect`.
        confidence: Of the comparison, in (0, 1).

    Raises:
        UserError: If neither rate is given, or a number is out of range.
    """
    if discordance is None:
        if base_rate is None:
            raise UserError("a plan needs --base_rate or --discordance, or results of a pilot: give one")
        _check_share("base_rate", base_rate)
        discordance = 2 * base_rate * (1 - base_rate)
        assumed = f"base rate {100 * base_rate:g} %, and answers of the two models that are independent: "
        assumed += f"{100 * discordance:.3g} % of the items differ (models that start from one parent differ on fewer)"
    else:
        _check_share("discordance", discordance)
        assumed = f"{100 * discordance:.3g} % of the items are right in exactly one of the two models"
    if not 0 <= seed_sd < 1:
        raise UserError(f"seed_sd {seed_sd} is outside [0, 1): one point is 0.01")
    _check(num_items, num_seeds, num_comparisons, power, confidence)
    alpha = (1 - confidence) / num_comparisons
    rows: list[Row] = []
    for items, seeds in product(num_items, num_seeds):
        if seeds == 1:
            effect = detectable_share(items, discordance, alpha, power)
        else:
            effect = detectable_effect(Spread(discordance, 0.0, seed_sd**2), items, seeds, alpha, power)
        rows.append(Row("accuracy", "fraction", items, seeds, num_comparisons, effect))
    assumptions = [assumed]
    if max(num_seeds) > 1:
        assumptions.append(
            f"seeds of the difference with a standard deviation of {100 * seed_sd:g} points, and items alike for all"
        )
    return Plan(rows, assumptions, power, confidence)


def plan_from_pilot(
    samples: Sequence[tuple[str, str, Sample]],
    num_items: Sequence[int] | None,
    num_seeds: Sequence[int],
    num_comparisons: int,
    power: float = POWER,
    confidence: float = 0.95,
) -> Plan:
    """Return plans with the variances of results that are there.

    Args:
        samples: Name, unit and values of each pilot; clusters and several answers per item are part of its variance.
        num_items: As in `plan_from_rates`; by default those of the pilot, and two and four times as many.
        num_seeds: As in `plan_from_rates`.
        num_comparisons: As in `plan_from_rates`.
        power: As in `detectable_effect`.
        confidence: Of the comparison, in (0, 1).

    Raises:
        UserError: If a number is out of range, or the pilot shows no variance.
    """
    rows: list[Row] = []
    assumptions: list[str] = []
    for what, unit, sample in samples:
        seeds_there, items_there = sample.diffs_SN.shape
        chosen = list(num_items or [items_there, 2 * items_there, 4 * items_there])
        _check(chosen, num_seeds, num_comparisons, power, confidence)
        spread = spread_of(sample)
        if spread == Spread(0.0):
            raise UserError(
                f"{what}: the pilot's models never differ, which says nothing about others: give other ones"
            )
        if max(num_seeds) > 1 and seeds_there == 1:
            raise UserError(
                f"{what}: a pilot of one seed says nothing about {max(num_seeds)} seeds: give several, or 1"
            )
        assumptions.append(f"{what}: variances of the pilot, {items_there:,} items and {seeds_there} seeds")
        alpha = (1 - confidence) / num_comparisons
        rows += [
            Row(what, unit, items, seeds, num_comparisons, detectable_effect(spread, items, seeds, alpha, power))
            for items, seeds in product(chosen, num_seeds)
        ]
    return Plan(rows, assumptions, power, confidence)


def _check_share(what: str, share: float) -> None:
    if not 0 < share < 1:
        raise UserError(f"{what} {share} is outside (0, 1): give a fraction, 0.45 for 45 %")


def _check(
    num_items: Sequence[int], num_seeds: Sequence[int], num_comparisons: int, power: float, confidence: float
) -> None:
    if min(num_items) < 2 or min(num_seeds) < 1 or num_comparisons < 1:
        raise UserError(
            f"items {min(num_items)}, seeds {min(num_seeds)}, comparisons {num_comparisons}: give at least 2, 1 and 1"
        )
    if not (0.5 <= power < 1 and 0 < confidence < 1):
        raise UserError(f"power {power} and confidence {confidence}: give 0.5 to 1 and 0 to 1; 0.8 and 0.95 are usual")
