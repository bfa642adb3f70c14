"""Proportions where a standard error misleads: few right, few wrong, few items on which two models differ.

Also shares of several samples per item (avg@k). Shapes: N items, G clusters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

# Below so many items of a kind (right, wrong, won or lost) the normal approximation and the bootstrap are not used.
FEW = 10


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def proportion_interval(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Return an interval of the mean of values in [0, 1] that holds at the edges and for dependent items.

    It is Wilson's score interval (1927, https://doi.org/10.1080/01621459.1927.10502953; recommended for language models
    with few items by https://arxiv.org/abs/2503.01747) with the effective number of items ``p (1 - p) / variance``, the
    variance of the mean being that between clusters (Korn and Graubard 1998, with their t for few clusters). For 0/1
    values without clusters that number is N, and the interval Wilson's own: of 0 of 300 it is [0, 0.0126]. An average
    over samples of one item brings more than one item.

    At an edge (fewer than `FEW` clusters with anything right, or anything wrong) the data cannot tell how alike the
    items of a cluster are; the effective number of items is then at most that of the clusters. The same holds if fewer
    than `FEW` values differ from the median: one right answer of two for each item does not tell the rate exactly.

    Args:
        values: One value in [0, 1] per item: right or wrong, or the share of its samples that are right.
        clusters: A label per item; items of one label (questions on one passage) may depend on each other.
        confidence: Coverage, in (0, 1).

    Raises:
        ValueError: If there are no values, or one is outside [0, 1].
    """
    values_N = np.asarray(values, dtype=float)
    is_share_N = (values_N >= 0) & (values_N <= 1)
    if not values_N.size or not is_share_N.all():
        raise ValueError("a proportion needs values in [0, 1], at least one")

    # Without clusters each item is one.
    labels_N = np.arange(values_N.size)
    if clusters is not None:
        clusters_N = np.asarray(clusters)
        _, labels_N = np.unique(clusters_N, return_inverse=True)
    num_clusters = int(labels_N.max()) + 1

    # The variance of the mean: residuals are summed within a cluster first, since they may depend on each other there.
    share = float(values_N.mean())
    # Without the factor G / (G - 1) of G clusters, so that for 0/1 values without clusters the effective number is
    # exactly N and the interval exactly Wilson's.
    residuals_G = np.bincount(labels_N, values_N - share)
    variance = float(residuals_G @ residuals_G) / values_N.size**2

    # The number of independent 0/1 items whose mean would have this variance.
    # Infinite without any variance: the limits below then decide, or else the interval has no width.
    effective_num = math.inf
    if variance > 0:
        effective_num = share * (1 - share) / variance
    # Few values that are not the median mean that the variance was estimated from a few items.
    num_not_median = np.count_nonzero(values_N != np.median(values_N))
    if is_at_edge(values_N, labels_N) or num_not_median < FEW:
        effective_num = min(effective_num, num_clusters)

    # The variance between few clusters is itself uncertain, which the t distribution covers.
    tail = (1 + confidence) / 2
    if clusters is not None and num_clusters > 1:
        # As Korn and Graubard do, with one degree of freedom less than there are clusters.
        z = float(stats.t.ppf(tail, num_clusters - 1))
    else:
        z = float(stats.norm.ppf(tail))
    return _wilson(share, effective_num, z)


def is_at_edge(values: ArrayLike, clusters: ArrayLike | None = None) -> bool:
    """Tell whether fewer than `FEW` items (clusters) hold anything right, or anything wrong."""
    values_N = np.asarray(values, dtype=float)
    if clusters is None:
        labels_N = np.arange(values_N.size)
    else:
        labels_N = np.asarray(clusters)

    # A share between 0 and 1 has something right and something wrong.
    num_with_right = np.unique(labels_N[values_N > 0]).size
    num_with_wrong = np.unique(labels_N[values_N < 1]).size
    return min(num_with_right, num_with_wrong) < FEW


def tango_interval(
    won: float,
    lost: float,
    num_items: int,
    confidence: float = 0.95,
) -> Interval:
    """Return Tango's score interval of the difference of two proportions on the same items, (won - lost) / N.

    It holds all differences that the score test does not reject. Resampling takes a kind of item that was not seen for
    one that does not exist; this does not: without any item that differs, of 300, it is [-0.0126, 0.0126].
    Tango (1998), https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8%3C891::AID-SIM780%3E3.0.CO;2-B.

    Args:
        won: Items that only the first model has right; of shares in [0, 1] the sum of all gains, whose variance is
            then smaller than that assumed.
        lost: Items that only the second has right, or the sum of all losses.
        num_items: All items, N >= won + lost.
        confidence: Coverage, in (0, 1).
    """
    tail = (1 + confidence) / 2
    z = float(stats.norm.ppf(tail))
    difference = (won - lost) / num_items
    # The interval inverts the score test: its bounds are the differences at which the test just does not reject. There
    # is no closed form, so they are found numerically.
    limit = 1 - 1e-12  # at -1 and 1 the variance of the score is 0

    def root(sign: int, end: float) -> float:
        """Return the difference between the observed one and ``end`` at which the score is ``sign * z``.

        Without such a difference the interval reaches the end of the range, -1 or 1.
        """

        # Zero where the score is ``sign * z``.
        def score(delta: float) -> float:
            return tango_score(won, lost, num_items, delta) - sign * z

        # brentq needs scores of opposite signs at both ends; at the observed difference Tango's score is 0.
        is_at_end = abs(difference - end) < 1e-9
        if is_at_end or score(end) * sign < 0:
            return float(np.sign(end))
        return float(optimize.brentq(score, difference, end, xtol=1e-12))

    # The score falls as the hypothesised difference rises: it is z at the lower bound.
    low = root(1, -limit)
    high = root(-1, limit)
    return Interval(low, high)


def tango_score(
    won: float,
    lost: float,
    num_items: int,
    delta: float,
) -> float:
    """Return Tango's score (standard normal) of the hypothesis that the true difference is ``delta``, in (-1, 1).

    Args:
        won: Items that only the first model has right, or the sum of its gains.
        lost: Items that only the second has right, or the sum of the losses.
        num_items: All items.
        delta: The hypothesised difference of the two proportions.
    """
    distance = won - lost - num_items * delta
    if abs(distance) < 1e-9:  # the variance may be 0 there too
        return 0.0

    # The share of lost items if the difference is delta, by maximum likelihood: the larger root of a x^2 + b x + c.
    a = 2 * num_items
    b = (a - won + lost) * delta - won - lost
    c = -lost * delta * (1 - delta)
    discriminant = max(0.0, b * b - 4 * a * c)
    root = math.sqrt(discriminant)
    lost_share = (root - b) / (2 * a)

    variance_of_item = 2 * lost_share + delta * (1 - delta)
    variance = num_items * variance_of_item
    # Rounding may leave none at the ends of the range, where any distance rejects.
    if variance <= 0:
        return math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _wilson(
    share: float,
    num_items: float,
    z: float,
) -> Interval:
    """Return Wilson's score interval; ``num_items`` may be a fraction, or infinite."""
    # With infinitely many items all three corrections are 0, and the interval is the share alone.
    shrinkage = 1 + z * z / num_items
    # Between the share and one half, the closer to one half the fewer items there are.
    shift = z * z / (2 * num_items)
    centre = (share + shift) / shrinkage
    variance = share * (1 - share) / num_items
    correction = (z / (2 * num_items)) ** 2
    half = z / shrinkage * math.sqrt(variance + correction)
    # At the edges the exact bound is 0 or 1; the formula leaves some 1e-18.
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return Interval(low, high)
