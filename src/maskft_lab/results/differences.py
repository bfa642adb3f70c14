"""One difference measured (values, bootstrap, edges), and the verdicts of a family of them.

Shapes: S seeds, N items, U units that are drawn (items, or clusters of items).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from maskft_common.errors import UserError

from .comparable import Paired, name_and_seed, unit_of
from .comparison import BETTER, NOT_DISTINGUISHABLE, WORSE, Difference, Settings
from .families import Noise, noise_of, simultaneous_level
from .proportions import FEW, Interval, tango_interval
from .schema import Item, Result, cluster_ids, item_weights
from .statistics import (
    Block,
    Bootstrap,
    as_block,
    holm,
    mcnemar_exact,
    mean_over_seeds,
    weighted_mean,
)


@dataclass(frozen=True)
class Sample:
    """The values of a method and of the baseline in one metric of one task."""

    task: str
    values_SN: NDArray[np.float64]
    baseline_SN: NDArray[np.float64]
    weights: list[float] | None
    clusters: list[str] | None
    has_fixed_seeds: bool = False  # these models are meant, not the seeds they are a sample of

    @property
    def diffs_SN(self) -> NDArray[np.float64]:
        """Method - baseline; a single result is paired with all seeds of the other."""
        # A single result is one row, which numpy broadcasts.
        return np.asarray(self.values_SN - self.baseline_SN)

    def block(self) -> Block:
        """Return the differences of the units that are drawn; fixed seeds are not drawn, but averaged."""
        diffs_SN = self.diffs_SN
        if self.has_fixed_seeds:
            # One row: the bootstrap then draws items only.
            diffs_SN = diffs_SN.mean(axis=0, keepdims=True)
        return as_block(diffs_SN, self.weights, self.clusters)

    @property
    def is_binary(self) -> bool:
        """Whether exact tests of right and wrong hold: 0/1 scores of independent items, one result per side."""
        num_seeds = self.diffs_SN.shape[0]
        if num_seeds > 1 or self.clusters is not None:
            return False
        # One row on each side, which can be stacked: several seeds have returned above.
        both = np.stack([self.values_SN, self.baseline_SN])
        is_0_or_1 = np.isin(both, (0, 1))
        return bool(is_0_or_1.all())


class Measured:
    """A difference and how sure it is, before it is judged beside others.

    Args:
        sample: The values of both sides.
        unit: Of the values.
        num_resamples: Bootstrap samples.
        seed: Seed of the resampling.
    """

    def __init__(
        self,
        sample: Sample,
        unit: str,
        num_resamples: int,
        seed: int,
    ):
        self.sample = sample
        self.unit = unit
        block = sample.block()
        # Drawn once: intervals of all levels are read from the same resamples.
        self.drawn = Bootstrap(block, num_resamples, seed)

        # Where few or no items differ, resampling takes the difference for nearly or exactly known.
        diffs_U = mean_over_seeds(block.diffs_SN)
        num_differing = np.count_nonzero(diffs_U)
        self.is_at_edge = unit == "fraction" and num_differing < FEW

    @property
    def by_seed(self) -> list[float]:
        """The difference of each seed."""
        means: list[float] = []
        for diffs_N in self.sample.diffs_SN:
            # Without clusters, which change the error and not the mean.
            mean, _ = weighted_mean(diffs_N, self.sample.weights)
            means.append(mean)
        return means

    def mirrored(self) -> Measured:
        """Return it with the two sides exchanged, for its differences of seeds; the resamples stay."""
        other = copy(self)
        other.sample = replace(self.sample, values_SN=self.sample.baseline_SN, baseline_SN=self.sample.values_SN)
        return other

    def interval(self, confidence: float) -> Interval:
        """Return the unadjusted interval; that of a difference of shares is within [-1, 1].

        It is the bootstrap's, except for shares of which fewer than `FEW` items differ: resampling never draws a kind
        of item that was not seen, and covers in 55 to 92 % there. For right and wrong it is then Tango's interval; for
        other shares the wider bounds of both.
        """
        # Tango's interval below does not know of seeds: for several of them it only widens the bootstrap's, which does.
        low, high = self.drawn.interval(confidence)
        if self.is_at_edge:
            won, lost, num_units = _won_and_lost(self.drawn.block)
            edge = tango_interval(won, lost, num_units, confidence)
            if self.sample.is_binary:
                low, high = edge
            else:
                # Tango's interval assumes independent 0/1 scores, and these are not.
                # The wider of both covers at least as often as either.
                low = min(edge.low, low)
                high = max(edge.high, high)
        if self.unit == "fraction":
            # The stretched resamples of few seeds go beyond these ends.
            low = max(-1.0, low)
            high = min(1.0, high)
        return Interval(low, high)

    def p_value(self, confidence: float) -> float:
        """Return the two-sided p of "no difference": exact for right and wrong.

        Args:
            confidence: To which the resamples are stretched, in (0, 1), see `Bootstrap.p_value`.
        """
        if self.sample.is_binary:
            # One row on each side: a binary sample is of one seed.
            (values_N,) = self.sample.values_SN
            (baseline_N,) = self.sample.baseline_SN
            return mcnemar_exact(values_N, baseline_N)
        return self.drawn.p_value(confidence)


def _won_and_lost(block: Block) -> tuple[float, float, int]:
    """Return the sums of gains and of losses over the units, each counted by its weight, and the number of units."""
    num_units = block.weights_N.size
    # Relative to the mean weight, so that they sum to the number of units, as Tango's interval needs.
    relative_weights_U = block.weights_N * num_units / block.weights_N.sum()
    diffs_U = mean_over_seeds(block.diffs_SN)
    gains_U = diffs_U * relative_weights_U
    won = gains_U[gains_U > 0].sum()
    lost = -gains_U[gains_U < 0].sum()
    return float(won), float(lost), num_units


def sample_of(
    paired: Paired,
    task: str,
    metric: str,
    has_fixed_seeds: bool = False,
) -> Sample:
    """Return the values of two sets of seeds in one metric of a task.

    Args:
        paired: Results of the method and of the baseline, see `comparable.pair_by_seed`.
        task: The task.
        metric: Its metric.
        has_fixed_seeds: Whether the claim is about these models and not about other seeds.

    Raises:
        UserError: If an item has no value, or there are too few items or clusters.
    """
    of_method, of_baseline = paired
    values_SN = item_values(of_method, task, metric)
    baseline_SN = item_values(of_baseline, task, metric)
    num_items = values_SN.shape[1]
    # One item has no spread: nothing can be resampled.
    if num_items < 2:
        raise UserError(f"{metric} on {task} has 1 item, too few to compare: evaluate at least 2, better hundreds")

    # Weights and clusters are the same in all results: `check_comparable` raises where they are not.
    items = _items_by_id(of_baseline[0], task)
    clusters = cluster_ids(items)
    if clusters and len(set(clusters)) == 1:
        raise UserError(f"{metric} on {task}: all {num_items} items are of one cluster, {clusters[0]!r}: give several")

    unit = unit_of([*of_method, *of_baseline], task, metric)
    weights = item_weights(items, unit)
    return Sample(
        task=task,
        values_SN=values_SN,
        baseline_SN=baseline_SN,
        weights=weights,
        clusters=clusters,
        has_fixed_seeds=has_fixed_seeds,
    )


def item_values(
    group: Sequence[Result],
    task: str,
    metric: str,
) -> NDArray[np.float64]:
    """Return the metric's values, one row per seed, one column per item in the order of the item ids.

    Raises:
        UserError: If an item has no value.
    """
    rows: list[list[float]] = []
    for result in group:
        items = _items_by_id(result, task)
        # The mean of the others would be of items that may be the easy ones.
        for item in items:
            if item[metric] is None:
                raise UserError(
                    f"{metric} on {task}: item {item['id']!r} of {name_and_seed(result)} has no value, "
                    "so there is no mean: choose other --tasks or --metrics, or evaluate again"
                )
        rows.append([item[metric] for item in items])
    return np.array(rows, dtype=float)


def _items_by_id(result: Result, task: str) -> list[Item]:
    """Return the items of a task in the order of their ids, which is the same in all results."""
    items = result["tasks"][task]["items"]
    return sorted(items, key=itemgetter("id"))


def measure(
    paired: Paired,
    task: str,
    metric: str,
    is_main: bool,
    settings: Settings,
) -> tuple[Difference, Measured]:
    """Measure the difference in a metric of a task.

    Args:
        paired: Results of the method and of the baseline, see `comparable.pair_by_seed`.
        task: The task.
        metric: Its metric.
        is_main: Whether the difference is one of the family of main metrics.
        settings: Resamples, their seed, and whether the training seeds are fixed.

    Returns:
        The difference, not yet judged, and its measurements.

    Raises:
        UserError: If an item has no value, or there are too few items or clusters.
    """
    of_method, of_baseline = paired
    sample = sample_of(paired, task, metric, settings.fixed_seeds)
    unit = unit_of([*of_method, *of_baseline], task, metric)
    measured = Measured(sample, unit, settings.num_resamples, settings.seed)

    record = of_baseline[0]["tasks"][task]
    method = of_method[0]["name"]
    baseline = of_baseline[0]["name"]
    higher_is_better = record["metrics"][metric]["higher_is_better"]
    row = difference_of(
        (method, baseline),
        measured,
        metric,
        higher_is_better,
        is_main,
    )
    return replace(row, test_set=record.get("data_file")), measured


def difference_of(
    names: tuple[str, str],
    measured: Measured,
    metric: str,
    higher_is_better: bool,
    is_main: bool,
) -> Difference:
    """Return a difference without interval, p and verdict, which depend on its family: `judge` adds them.

    Args:
        names: Of the method and of the baseline.
        measured: The difference.
        metric: Its name.
        higher_is_better: Of the metric.
        is_main: Whether it is one of the family of main metrics.
    """
    method, baseline = names
    sample = measured.sample
    num_seeds = sample.diffs_SN.shape[0]
    # Over the seeds first, all alike, then over the items by their weights.
    values_N = sample.values_SN.mean(axis=0)
    baseline_N = sample.baseline_SN.mean(axis=0)
    # Both means are linear in the values, so their difference is that of the pairs up to rounding. Only the error needs
    # the pairs.
    value, _ = weighted_mean(values_N, sample.weights)
    baseline_value, _ = weighted_mean(baseline_N, sample.weights)

    # Above 0 where the method is better on an item.
    sign = 1 if higher_is_better else -1
    gains_N = sign * mean_over_seeds(sample.diffs_SN)
    # At every seed: seeds that cancel each other are a tie, but not identical.
    is_identical_N = (sample.diffs_SN == 0).all(axis=0)

    num_clusters = None
    # With clusters, they are the units of the block.
    if sample.clusters:
        num_clusters = measured.drawn.block.weights_N.size
    by_seed = None
    # None for seeds that are drawn: this field also says that seeds are fixed.
    if num_seeds > 1 and sample.has_fixed_seeds:
        by_seed = measured.by_seed

    return Difference(
        method=method,
        baseline=baseline,
        task=sample.task,
        metric=metric,
        unit=measured.unit,
        higher_is_better=higher_is_better,
        is_main=is_main,
        num_items=gains_N.size,
        num_seeds=num_seeds,
        value=value,
        baseline_value=baseline_value,
        difference=measured.drawn.difference,
        test="McNemar" if sample.is_binary else "bootstrap",
        won=int((gains_N > 0).sum()),
        lost=int((gains_N < 0).sum()),
        tied=int((gains_N == 0).sum()),
        num_identical=int(is_identical_N.sum()),
        num_clusters=num_clusters,
        by_seed=by_seed,
    )


def judge(
    family: Sequence[tuple[Difference, Measured]],
    settings: Settings,
) -> list[Difference]:
    """Give the differences of one family their intervals, p-values and verdicts.

    A method is better or worse where Holm's p is at most ``1 - confidence`` and the unadjusted interval excludes zero.
    The simultaneous interval always agrees with the verdict. Where nothing is claimed it is widened to hold zero.
    Holm's procedure goes step by step and can claim a sign that intervals of one level cannot: such an interval is cut
    at zero, open there, and tells the sign only. All signs together hold with probability ``confidence``, and so do all
    intervals that are not cut; signs and magnitudes in one statement would need wider intervals.

    Args:
        family: Differences with the samples that they were measured from.
        settings: Confidence, and the seed of the draws for the simultaneous level.
    """
    if not family:
        return []

    confidence = settings.confidence
    alpha = 1 - confidence

    # Holm's correction decides which differences are claimed, max-T how wide their intervals are.
    # Every p-value of the family is needed before any can be adjusted.
    p_values: list[float] = []
    noises: list[Noise] = []
    for row, measured in family:
        p_values.append(measured.p_value(confidence))
        noises.append(noise_of(measured.drawn, row.task))
    # Holm's procedure controls the probability of any false claim. That it also controls false signs is proved for
    # independent differences (Shaffer 1980; Finner 1999, https://doi.org/10.1214/aos/1018031111). For methods with a
    # common baseline ``python -m benchmarks intervals`` counts them.
    adjusted = holm(p_values).tolist()
    # The noise of the differences, not their values, decides the level, so it may be computed before the claims.
    level = simultaneous_level(noises, alpha, settings.seed)

    judged: list[Difference] = []
    for index, (row, measured) in enumerate(family):
        # Of this difference by itself, and simultaneous with all others of the family.
        unadjusted = measured.interval(confidence)
        simultaneous = unadjusted
        # Equal for one comparison, or for differences that always vary together.
        if level < alpha:
            simultaneous = measured.interval(1 - level)

        # Both, because p and interval are computed differently and may disagree at the limit.
        excludes_zero = unadjusted.low > 0 or unadjusted.high < 0
        is_claimed = adjusted[index] <= alpha and excludes_zero
        is_cut = is_claimed and simultaneous.low <= 0 <= simultaneous.high
        shown = _agreeing(simultaneous, row.difference, is_claimed)

        verdict = NOT_DISTINGUISHABLE
        if is_claimed:
            # A loss is better where the difference is below zero.
            is_better = (row.difference > 0) == row.higher_is_better
            verdict = BETTER if is_better else WORSE
        with_verdict = replace(
            row,
            ci_low=shown.low,
            ci_high=shown.high,
            confidence=confidence,
            p_value=p_values[index],
            p_adjusted=adjusted[index],
            num_comparisons=len(family),
            verdict=verdict,
            unadjusted_low=unadjusted.low,
            unadjusted_high=unadjusted.high,
            is_cut_at_zero=is_cut,
        )
        judged.append(with_verdict)
    return judged


def _agreeing(
    interval: Interval,
    difference: float,
    is_claimed: bool,
) -> Interval:
    """Return an interval that agrees with its verdict: without a claim it holds zero, with one it ends there."""
    # Widening can only raise the coverage. Cutting at zero lowers it, so a cut interval promises the sign alone.
    low, high = interval
    if not is_claimed:
        low = min(low, 0.0)
        high = max(high, 0.0)
    elif difference > 0:
        low = max(low, 0.0)
    else:
        high = min(high, 0.0)
    return Interval(low, high)
