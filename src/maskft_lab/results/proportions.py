"""Proportions where a standard error misleads: few right, few wrong, few items on which two models differ.

Also shares of several samples per item (avg@k). Shapes: N items.
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


def proportion_interval(values: ArrayLike, clusters: ArrayLike | None = None, confidence: float = 0.95) -> Interval:
    """Return an interval of the mean of values in [0, 1] that holds at the edges and for dependent items.

    It is Wilson's score interval (1927, https://doi.org/10.1080/01621459.1927.10502953; recommended for language models
    with few items by https://arxiv.org/abs/2503.01747) with the effective number of items ``p (1 - p) / variance``, the
    variance of the mean being that between clusters (Korn and Graubard 1998, with their t for few clusters). For 0/1
    values without clusters that number is N, and the interval Wilson's own: of 0 of 300 it is [0, 0.0126]. An average
    over samples of one item brings more than one item.

    At an edge (fewer than `FEW` clusters with anything right, or anything wrong) nothing can be known of how alike the
    items of a cluster are; the number of items is then at most that of the clusters. So it is where fewer than `FEW`
    values are not the median: two samples of each item of which one is right do not make the rate known exactly.

    Args:
        values: One value in [0, 1] per item: right or wrong, or the share of its samples that are right.
        clusters: A label per item; items of one label (questions on one passage) may depend on each other.
        confidence: Coverage, in (0, 1).

    Raises:
        ValueError: If there are no values, or one is outside [0, 1].
    """
    values_N = np.asarray(values, dtype=float)
    if not values_N.size or not ((values_N >= 0) & (values_N <= 1)).all():
        raise ValueError("a proportion needs values in [0, 1], at least one")
    labels_N = np.arange(values_N.size) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    num_clusters = int(labels_N.max()) + 1
    share = float(values_N.mean())
    residuals_G = np.bincount(labels_N, values_N - share)
    variance = float(residuals_G @ residuals_G) / values_N.size**2
    effective = share * (1 - share) / variance if variance > 0 else math.inf
    if is_at_edge(values_N, labels_N) or np.count_nonzero(values_N != np.median(values_N)) < FEW:
        effective = min(effective, num_clusters)
    z = float(stats.norm.ppf((1 + confidence) / 2))
    if clusters is not None and num_clusters > 1:
        z = float(stats.t.ppf((1 + confidence) / 2, num_clusters - 1))
    return _wilson(share, effective, z)


def is_at_edge(values: ArrayLike, clusters: ArrayLike | None = None) -> bool:
    """Tell whether fewer than `FEW` items (clusters) hold anything right, or anything wrong."""
    values_N = np.asarray(values, dtype=float)
    labels_N = np.arange(values_N.size) if clusters is None else np.asarray(clusters)
    return min(np.unique(labels_N[values_N > 0]).size, np.unique(labels_N[values_N < 1]).size) < FEW


def tango_interval(won: float, lost: float, num_items: int, confidence: float = 0.95) -> Interval:
    """Return Tango's score interval of the difference of two proportions on the same items, (won - lost) / N.

    All differences are in it whose score test does not reject them. Unlike resampling it does not take a kind of item
    that was not seen for one that does not exist: without any item that differs, of 300, it is [-0.0126, 0.0126].
    Tango (1998), https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8%3C891::AID-SIM780%3E3.0.CO;2-B.

    Args:
        won: Items that only the first model has right; of shares in [0, 1] the sum of all gains, whose variance is
            then smaller than that assumed.
        lost: Items that only the second has right, or the sum of all losses.
        num_items: All items, N >= won + lost.
        confidence: Coverage, in (0, 1).
    """
    z = float(stats.norm.ppf((1 + confidence) / 2))
    difference = (won - lost) / num_items
    limit = 1 - 1e-12

    def root(sign: int, end: float) -> float:
        """Where the score is ``sign * z``, between the difference and an end; the end itself where it is nowhere."""

        def score(delta: float) -> float:
            return tango_score(won, lost, num_items, delta) - sign * z

        if abs(difference - end) < 1e-9 or score(end) * sign < 0:
            return float(np.sign(end))
        return float(optimize.brentq(score, difference, end, xtol=1e-12))

    return Interval(root(1, -limit), root(-1, limit))


def tango_score(won: float, lost: float, num_items: int, delta: float) -> float:
    """Return Tango's score (standard normal) of the hypothesis that the true difference is ``delta``, in (-1, 1)."""
    distance = won - lost - num_items * delta
    if abs(distance) < 1e-9:  # the variance may be 0 there too
        return 0.0
    a = 2 * num_items
    b = (a - won + lost) * delta - won - lost
    c = -lost * delta * (1 - delta)
    lost_share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # expected where the difference is delta
    variance = num_items * (2 * lost_share + delta * (1 - delta))
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def _wilson(share: float, num_items: float, z: float) -> Interval:
    centre = (share + z * z / (2 * num_items)) / (1 + z * z / num_items)
    half = z / (1 + z * z / num_items) * math.sqrt(share * (1 - share) / num_items + (z / (2 * num_items)) ** 2)
    # At the edges the exact bound is 0 or 1; the formula leaves some 1e-18.
    return Interval(0.0 if share == 0 else max(0.0, centre - half), 1.0 if share == 1 else min(1.0, centre + half))
