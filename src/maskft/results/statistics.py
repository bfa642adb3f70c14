"""Paired statistics: intervals and tests for the difference of two models on the same items.

Everything works on differences, one per item: ``diffs = method - baseline``. With several training seeds they are a
matrix, one row per seed. Shapes: S seeds, N items, R bootstrap resamples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

MAX_CHUNK_COUNTS = 2**21  # resamples x items held at once: about 50 MB, whatever the numbers of resamples and items


class Interval(NamedTuple):
    """A mean difference, its confidence interval, and the two-sided p-value of "no difference"."""

    difference: float
    ci_low: float
    ci_high: float
    p_value: float


def weighted_mean(values: ArrayLike, weights: ArrayLike | None = None) -> tuple[float, float]:
    """Return ``sum(w * x) / sum(w)`` over the items and its standard error.

    The weights are random too (an item brings its own number of tokens), so this is a ratio of two means, and its error
    is that of its linearisation: the standard error of the mean of ``w * (x - ratio) / mean(w)``. With equal weights
    it is the usual ``sd / sqrt(n)`` (sd with n - 1). It is NaN for a single item.
    """
    values_N = np.asarray(values, dtype=float)
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, dtype=float)
    mean = float(values_N @ weights_N / weights_N.sum())
    if values_N.size < 2:
        return mean, math.nan
    residuals_N = weights_N * (values_N - mean) / weights_N.mean()
    # The residuals have mean 0 by construction, so their variance needs no second centring.
    return mean, float(np.sqrt(residuals_N @ residuals_N / (values_N.size - 1) / values_N.size))


def hierarchical_bootstrap(
    diffs_SN: ArrayLike,
    weights: ArrayLike | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Bootstrap the mean difference over training seeds and items by resampling both.

    Every seed is evaluated on the same items, so seeds and items are resampled independently of each other (rows and
    columns of the matrix), not items anew within each seed: an item that is easy for one seed is easy for the others.
    With one row, only items are resampled and the result speaks of that one pair of models.

    The interval is the percentile interval of the resamples after two corrections, without which a percentile interval
    of three seeds covers the truth 75 times in 100. Deviations are stretched for the small sample (`_stretch`),
    separately for seeds (three of them: 2.7-fold) and items (100 of them: 1.7 %). And the seeds keep only their excess
    variance: that part of the spread between seeds which the finite number of items explains is already in the items'
    resampling. In simulations with 2 to 10 seeds, from no to only seed variance, a 95 % interval covered in 91 to 97 %.

    Percentile and not BCa, because the differences of 0/1 scores are mostly ties: there BCa's bias term, the share of
    resamples below the estimate, is a count on a coarse grid.

    The p-value is twice the smaller share of resamples at or beyond zero, and never below ``2 ** (1 - k)`` for k items
    that differ, the smallest two-sided p that a sign test on k items can give: no bootstrap may be surer than that.
    With several seeds it is not below that of a t-test over the seeds' differences either: the stretch fits the
    resamples to one confidence, and further out, where Holm's correction looks, three seeds have no resamples.

    Args:
        diffs_SN: Differences, one row per seed, one column per item, at least 2.
        weights: One weight > 0 per item (tokens, for nats/token); the resampled value is then the ratio
            ``sum(w * d) / sum(w)``, which is the difference of the two models' token-weighted means.
        num_resamples: Number of bootstrap samples.
        seed: Seed of the resampling. The same seed resamples the same items, so swapping the models flips the signs.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        Difference, interval and p-value.

    Raises:
        ValueError: If the shapes or values do not allow a bootstrap.
    """
    diffs_SN = np.asarray(diffs_SN, dtype=float)
    if diffs_SN.ndim != 2 or diffs_SN.shape[0] < 1 or diffs_SN.shape[1] < 2:
        raise ValueError(f"differences of shape {diffs_SN.shape}: a bootstrap needs seeds x items, at least 2 items")
    num_seeds, num_items = diffs_SN.shape
    weights_N = np.ones(num_items) if weights is None else np.asarray(weights, dtype=float)
    if weights_N.shape != (num_items,) or not (weights_N > 0).all():
        raise ValueError(f"weights of shape {weights_N.shape} for {num_items} items: give one weight > 0 per item")
    if not np.isfinite(diffs_SN).all():
        raise ValueError("a difference is NaN or infinite: leave no item without a value")

    rng = np.random.default_rng(seed)
    item_stretch = _stretch(num_items, confidence)
    observed_S = diffs_SN @ weights_N / weights_N.sum()
    difference = float(observed_S.mean())
    num_differing = np.count_nonzero(diffs_SN.mean(axis=0))
    smallest_p = float(2.0 ** (1 - num_differing))
    if num_seeds > 1:
        between, interaction, _ = _variance_components(diffs_SN, weights_N)
        excess = max(0.0, 1 - interaction / between) if between > 0 else 0.0
        seed_stretch = _stretch(num_seeds, confidence) * math.sqrt(excess)
        smallest_p = max(smallest_p, _t_p_value(difference, between / num_seeds, num_seeds - 1))
    weighted_NS = (diffs_SN * weights_N).T
    resampled_R = np.empty(num_resamples)
    chunk = max(1, MAX_CHUNK_COUNTS // num_items)
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        counts_RN = _resample_counts(rng, rows, num_items)
        ratios_RS = (counts_RN @ weighted_NS) / (counts_RN @ weights_N)[:, None]
        ratios_RS = observed_S + item_stretch * (ratios_RS - observed_S)
        shares_RS = np.full((rows, num_seeds), 1 / num_seeds)
        if num_seeds > 1:
            drawn_RS = _resample_counts(rng, rows, num_seeds) / num_seeds
            shares_RS += seed_stretch * (drawn_RS - shares_RS)
        resampled_R[start : start + rows] = (shares_RS * ratios_RS).sum(axis=1)

    low, high = np.quantile(resampled_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    beyond = min((resampled_R <= 0).sum(), (resampled_R >= 0).sum())
    p_value = max(2 * (beyond + 1) / (num_resamples + 1), smallest_p)
    return Interval(difference, float(low), float(high), float(min(1.0, p_value)))


def mcnemar_exact(a: ArrayLike, b: ArrayLike) -> float:
    """Return the exact two-sided p-value of McNemar's test for two rows of 0/1 scores on the same items.

    Only items on which exactly one of the two is right count; under "no difference" each is a fair coin.
    """
    diffs = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    won, lost = int((diffs > 0).sum()), int((diffs < 0).sum())
    return float(stats.binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return Holm-adjusted p-values in the order given: comparing each with alpha keeps the family's error <= alpha."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(p_values.size, 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    return adjusted


def required_items(
    diffs: ArrayLike, weights: ArrayLike | None = None, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Return how many items a paired test needs to see the observed mean difference.

    Normal approximation: ``(z(1 - alpha/2) + z(power))^2 * variance / difference^2``. The observed difference is itself
    uncertain, so take this as an order of magnitude.

    Args:
        diffs: One difference per item, at least 2.
        weights: One weight > 0 per item, as in `hierarchical_bootstrap`.
        power: Probability of seeing a true difference of this size, in (0, 1).
        alpha: Two-sided level of the test, in (0, 1).

    Returns:
        Number of items, or None if the difference is zero (no number of items shows it).
    """
    difference, stderr = weighted_mean(diffs, weights)
    if difference == 0:
        return None
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    needed = np.size(diffs) * (z * stderr / difference) ** 2
    return max(2, math.ceil(needed)) if math.isfinite(needed) else None


def required_seeds(
    diffs_SN: ArrayLike, weights: ArrayLike | None = None, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Return how many training seeds are needed to see the observed mean difference on the same items.

    More seeds shrink the variance between seeds, not the one that comes from the choice of items.

    Args:
        diffs_SN: Differences, one row per seed (at least 2), one column per item.
        weights: One weight > 0 per item, as in `hierarchical_bootstrap`.
        power: Probability of seeing a true difference of this size, in (0, 1).
        alpha: Two-sided level of the test, in (0, 1).

    Returns:
        Number of seeds (at least 2), or None if no number suffices: the difference is zero or lost in the item noise.
    """
    diffs_SN = np.asarray(diffs_SN, dtype=float)
    weights_N = np.ones(diffs_SN.shape[1]) if weights is None else np.asarray(weights, dtype=float)
    difference, _ = weighted_mean(diffs_SN.mean(axis=0), weights_N)
    between, _, item_variance = _variance_components(diffs_SN, weights_N)
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    room = (difference / z) ** 2 - item_variance  # what the variance between seeds, divided by their number, may be
    if room <= 0 or not math.isfinite(between / room):
        return None
    num_seeds = max(2, math.ceil(between / room))

    def is_enough(num_seeds: int) -> bool:
        t = stats.t.ppf(1 - alpha / 2, num_seeds - 1) + stats.t.ppf(power, num_seeds - 1)
        return bool(between / num_seeds * (t / z) ** 2 <= room)

    while not is_enough(num_seeds):  # the normal approximation is a few seeds short: t(S - 1) has wider tails
        num_seeds += 1
    return int(num_seeds)


def _variance_components(diffs_SN: NDArray[np.float64], weights_N: NDArray[np.float64]) -> tuple[float, float, float]:
    """Split the noise of a difference over at least 2 seeds and 2 items into three variances.

    Returns:
        The variance between the seeds' differences; the part of it that is seed-item interaction (which items a seed
        happens to win), and would vanish with more items; and the variance of the mean difference due to items alone.
    """
    num_seeds, num_items = diffs_SN.shape
    means_S = diffs_SN @ weights_N / weights_N.sum()
    residuals_SN = weights_N * (diffs_SN - means_S[:, None]) / weights_N.mean()
    shared_N = residuals_SN.mean(axis=0)
    interaction = ((residuals_SN - shared_N) ** 2).sum() / ((num_seeds - 1) * (num_items - 1) * num_items)
    item = shared_N @ shared_N / ((num_items - 1) * num_items) - interaction / num_seeds
    return float(means_S.var(ddof=1)), float(interaction), float(max(0.0, item))


def _t_p_value(difference: float, variance: float, freedom: int) -> float:
    """Return the two-sided p of a t-test; ``variance`` is that of the difference, known from ``freedom + 1`` seeds."""
    if variance == 0:
        return 0.0 if difference else 1.0
    return float(2 * stats.t.sf(abs(difference) / math.sqrt(variance), freedom))


def _stretch(num_units: int, confidence: float) -> float:
    """Return the factor that makes bootstrap deviations of a mean of ``num_units`` as wide as a t interval.

    A resampled mean has variance ``(n - 1) / n`` times the unbiased estimate, and percentiles take the estimated
    variance for the true one: hence ``sqrt(n / (n - 1)) * t(n - 1) / z``. It goes to 1 for many units. The same
    correction as Hesterberg's expanded percentile interval (https://arxiv.org/abs/1411.5279), applied to the deviations
    instead of the level, because resamples of three units have no percentiles far out.
    """
    tail = (1 + confidence) / 2
    return float(math.sqrt(num_units / (num_units - 1)) * stats.t.ppf(tail, num_units - 1) / stats.norm.ppf(tail))


def _resample_counts(rng: np.random.Generator, rows: int, num_units: int) -> NDArray[np.float64]:
    """Return how often each unit is drawn in each of ``rows`` resamples with replacement, shape (rows, num_units)."""
    drawn = rng.integers(num_units, size=(rows, num_units))
    drawn += num_units * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * num_units).reshape(rows, num_units).astype(float)
