"""One difference measured (values, bootstrap, edges), and the verdicts of a family of them.

Shapes: S seeds, N items, U units that are drawn (items, or clusters of items).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from maskft_common.errors import UserError

from .comparable import Paired, name_and_seed, unit_of
from .comparison import BETTER, NOT_DISTINGUISHABLE, WORSE, Difference, Settings
from .families import noise_of, simultaneous_level
from .proportions import FEW, Interval, tango_interval
from .schema import Result, cluster_ids, item_weights
from .statistics import Block, Bootstrap, as_block, holm, mcnemar_exact, mean_over_seeds, weighted_mean


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
        return np.asarray(self.values_SN - self.baseline_SN)

    def block(self) -> Block:
        """Return the differences of the units that are drawn; fixed seeds are no units, their mean is meant."""
        diffs_SN = self.diffs_SN.mean(axis=0, keepdims=True) if self.has_fixed_seeds else self.diffs_SN
        return as_block(diffs_SN, self.weights, self.clusters)

    @property
    def is_binary(self) -> bool:
        """Whether exact tests of right and wrong hold: 0/1 scores of independent items, one result per side."""
        is_single = self.diffs_SN.shape[0] == 1 and self.clusters is None
        return is_single and all(bool(np.isin(each, (0, 1)).all()) for each in (self.values_SN, self.baseline_SN))


class Measured:
    """A difference and how sure it is, before it is judged beside others.

    Args:
        sample: The values of both sides.
        unit: Of the values.
        num_resamples: Bootstrap samples.
        seed: Seed of the resampling.
    """

    def __init__(self, sample: Sample, unit: str, num_resamples: int, seed: int):
        self.sample = sample
        self.unit = unit
        self.drawn = Bootstrap(sample.block(), num_resamples, seed)
        # Where no item differs, resampling takes the difference for exactly known.
        self.is_at_edge = unit == "fraction" and np.count_nonzero(mean_over_seeds(self.drawn.block.diffs_SN)) < FEW

    @property
    def by_seed(self) -> list[float]:
        """The difference of each seed."""
        return [weighted_mean(row, self.sample.weights)[0] for row in self.sample.diffs_SN]

    def interval(self, confidence: float) -> Interval:
        """Return the unadjusted interval; of shares it ends where a difference of shares does, at -1 and 1.

        It is the bootstrap's, but for shares of which fewer than `FEW` items differ: resampling never draws a kind of
        item that was not seen, and covers in 55 to 92 % there. Of right and wrong it is then Tango's; of other shares
        the wider of both.
        """
        low, high = self.drawn.interval(confidence)
        if self.is_at_edge:
            edge = tango_interval(*_won_and_lost(self.drawn.block), confidence)
            low, high = edge if self.sample.is_binary else (min(edge.low, low), max(edge.high, high))
        # The stretched resamples of few seeds go beyond it.
        return Interval(max(-1.0, low), min(1.0, high)) if self.unit == "fraction" else Interval(low, high)

    def p_value(self, confidence: float) -> float:
        """Return the two-sided p of "no difference": exact for right and wrong."""
        if self.sample.is_binary:
            return mcnemar_exact(self.sample.values_SN[0], self.sample.baseline_SN[0])
        return self.drawn.p_value(confidence)


def _won_and_lost(block: Block) -> tuple[float, float, int]:
    """Return the sums of gains and of losses over the units, each counted by its weight, and the number of units."""
    num_units = block.weights_N.size
    shares_U = block.weights_N * num_units / block.weights_N.sum()
    gains_U = mean_over_seeds(block.diffs_SN) * shares_U
    return float(gains_U[gains_U > 0].sum()), float(-gains_U[gains_U < 0].sum()), num_units


def sample_of(paired: Paired, task: str, metric: str, has_fixed_seeds: bool = False) -> Sample:
    """Return the values of two sets of seeds in one metric of a task.

    Raises:
        UserError: If an item has no value, or there are too few.
    """
    values_SN, baseline_SN = (item_values(each, task, metric) for each in paired)
    num_items = values_SN.shape[1]
    if num_items < 2:
        raise UserError(f"{metric} on {task} has 1 item, too few to compare: evaluate at least 2, better hundreds")
    items = sorted(paired[1][0]["tasks"][task]["items"], key=itemgetter("id"))
    clusters = cluster_ids(items)
    if clusters and len(set(clusters)) == 1:
        raise UserError(f"{metric} on {task}: all {num_items} items are of one cluster, {clusters[0]!r}: give several")
    weights = item_weights(items, unit_of([*paired[0], *paired[1]], task, metric))
    return Sample(task, values_SN, baseline_SN, weights, clusters, has_fixed_seeds)


def item_values(group: Sequence[Result], task: str, metric: str) -> NDArray[np.float64]:
    """Return the metric's values, one row per seed, one column per item in the order of the item ids."""
    rows: list[list[float]] = []
    for result in group:
        items = sorted(result["tasks"][task]["items"], key=itemgetter("id"))
        for item in items:
            if item[metric] is None:
                raise UserError(
                    f"{metric} on {task}: item {item['id']!r} of {name_and_seed(result)} has no value, "
                    "so there is no mean: choose other --metrics or evaluate again"
                )
        rows.append([item[metric] for item in items])
    return np.array(rows, dtype=float)


def measure(paired: Paired, task: str, metric: str, is_main: bool, settings: Settings) -> tuple[Difference, Measured]:
    """Measure the difference in a metric of a task."""
    sample = sample_of(paired, task, metric, settings.fixed_seeds)
    unit = unit_of([*paired[0], *paired[1]], task, metric)
    record = paired[1][0]["tasks"][task]
    measured = Measured(sample, unit, settings.num_resamples, settings.seed)
    names = (paired[0][0]["name"], paired[1][0]["name"])
    row = difference_of(names, measured, metric, record["metrics"][metric]["higher_is_better"], is_main)
    return replace(row, test_set=record.get("data_file")), measured


def difference_of(
    names: tuple[str, str], measured: Measured, metric: str, higher_is_better: bool, is_main: bool
) -> Difference:
    """Return a difference without interval, p and verdict, which depend on its family: `judge` adds them.

    Args:
        names: Of the method and of the baseline.
        measured: The difference.
        metric: Its name.
        higher_is_better: Of the metric.
        is_main: Whether it is one of the family of main metrics.
    """
    sample = measured.sample
    sign = 1 if higher_is_better else -1
    gains_N = sign * mean_over_seeds(sample.diffs_SN)
    num_seeds = sample.diffs_SN.shape[0]
    return Difference(
        method=names[0],
        baseline=names[1],
        task=sample.task,
        metric=metric,
        unit=measured.unit,
        higher_is_better=higher_is_better,
        is_main=is_main,
        num_items=gains_N.size,
        num_seeds=num_seeds,
        value=weighted_mean(sample.values_SN.mean(axis=0), sample.weights)[0],
        baseline_value=weighted_mean(sample.baseline_SN.mean(axis=0), sample.weights)[0],
        difference=measured.drawn.difference,
        test="McNemar" if sample.is_binary else "bootstrap",
        won=int((gains_N > 0).sum()),
        lost=int((gains_N < 0).sum()),
        tied=int((gains_N == 0).sum()),
        num_identical=int((sample.diffs_SN == 0).all(axis=0).sum()),
        num_clusters=measured.drawn.block.weights_N.size if sample.clusters else None,
        by_seed=measured.by_seed if num_seeds > 1 and sample.has_fixed_seeds else None,
    )


def judge(family: Sequence[tuple[Difference, Measured]], settings: Settings) -> list[Difference]:
    """Give the differences of one family their intervals, p-values and verdicts.

    A method is better or worse where Holm's p is at most ``1 - confidence`` and the unadjusted interval excludes zero.
    The simultaneous interval never says another thing than the verdict. Where nothing is claimed it is widened to hold
    zero. Holm's procedure goes step by step and can claim a sign that intervals of one level cannot: such an interval
    is cut at zero, open there, and tells the sign and no more. Signs and intervals that are not cut each hold together
    with probability ``confidence``; signs and magnitudes in one statement would need wider intervals.

    Args:
        family: Differences with what they were measured from.
        settings: Confidence, and the seed of the draws for the simultaneous level.
    """
    confidence = settings.confidence
    alpha = 1 - confidence
    if not family:
        return []
    p_values = [measured.p_value(confidence) for _, measured in family]
    adjusted = holm(p_values).tolist()
    noises = [noise_of(measured.drawn, row.task) for row, measured in family]
    level = simultaneous_level(noises, alpha, settings.seed)
    judged: list[Difference] = []
    for index, (row, measured) in enumerate(family):
        low, high = measured.interval(confidence)
        all_low, all_high = measured.interval(1 - level) if level < alpha else (low, high)
        is_claimed = adjusted[index] <= alpha and (low > 0 or high < 0)
        is_cut = is_claimed and all_low <= 0 <= all_high
        if not is_claimed:
            all_low = min(all_low, 0.0)
            all_high = max(all_high, 0.0)
        elif row.difference > 0:
            all_low = max(all_low, 0.0)
        else:
            all_high = min(all_high, 0.0)
        won = BETTER if (row.difference > 0) == row.higher_is_better else WORSE
        judged.append(
            replace(
                row,
                ci_low=all_low,
                ci_high=all_high,
                confidence=confidence,
                p_value=p_values[index],
                p_adjusted=adjusted[index],
                num_comparisons=len(family),
                verdict=won if is_claimed else NOT_DISTINGUISHABLE,
                unadjusted_low=low,
                unadjusted_high=high,
                is_cut_at_zero=is_cut,
            )
        )
    return judged
