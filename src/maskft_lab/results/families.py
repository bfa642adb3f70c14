"""Families of comparisons: the level at which all their intervals hold at once (max-T).

Shapes: N units, R draws, J comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .statistics import Bootstrap

NUM_DRAWS = 100_000  # of the maximum: an error of 1 % in the level, at 0.05
MAX_CHUNK_DRAWS = 2**22  # draws x comparisons held at once: 34 MB, where 300 comparisons at once would take 0.7 GB
_CHUNK_ROWS = 64  # a chunk has a multiple of so many draws


class Noise(NamedTuple):
    """How one difference of a family varies: by the units of its task, which it shares with others, and by itself."""

    task: str
    part_N: NDArray[np.float64]  # contribution of each unit to the error of the difference
    own_variance: float  # of the seeds, counted as independent of other comparisons


def noise_of(drawn: Bootstrap, task: str) -> Noise:
    """Return the noise of a bootstrapped difference.

    Args:
        drawn: The difference.
        task: Its task; differences on one task share its units.
    """
    block = drawn.block
    # The difference is a weighted mean over units, so its error is the sum of these parts.
    shares_N = block.weights_N / block.weights_N.sum()
    # Averaged over the seeds, whose own part is ``own_variance``.
    diffs_N = block.diffs_SN.mean(axis=0)
    centred_N = diffs_N - block.means_S.mean()
    part_N = shares_N * centred_N

    # Only the excess: the spread between seeds that items explain is in the parts already.
    own_variance = 0.0
    if drawn.num_seeds > 1:
        own_variance = drawn.seed_excess / drawn.num_seeds
    return Noise(task, part_N, own_variance)


def simultaneous_level(
    family: Sequence[Noise],
    alpha: float,
    seed: int = 0,
) -> float:
    """Return the level for each interval of a family at which all of them hold with probability ``1 - alpha``.

    The maximum of all |T| is drawn from the normal law with the correlations of the differences (a bootstrap of the
    items with normal multipliers, done for all comparisons of a task with the same multipliers); its quantile is the
    critical value of max-T (Westfall and Young 1993; Hothorn, Bretz and Westfall 2008,
    https://doi.org/10.1002/bimj.200810425), and the tail beyond it the level. Methods that share a baseline correlate,
    which makes the level higher than Bonferroni's ``alpha / m``. Seeds are too few for correlations and count as
    independent. For normal variables independence is the widest case (Šidák); beside the items' correlations it is the
    wide side if seeds correlate with the same sign, as they do where methods share a baseline.

    Args:
        family: One entry per comparison, at least 1.
        alpha: Probability that any interval misses, in (0, 1).
        seed: Seed of the draws.

    Returns:
        A level in [alpha / m, alpha].
    """
    num_comparisons = len(family)
    # Without a draw, so that a single comparison has exactly the level that was asked for.
    if num_comparisons == 1:
        return alpha

    # All intervals hold together where the largest of the |T| is below the critical value.
    root_JJ = _root(_correlation(family))
    maxima_R = _maxima(root_JJ, seed)
    critical = float(np.quantile(maxima_R, 1 - alpha))
    # Only the level is taken from the normal law. Each interval is then read from its own resamples, stretched to this
    # level (`Measured.interval`).
    level = 2 * stats.norm.sf(critical)

    # The draws have an error; these bounds hold exactly.
    lowest = alpha / num_comparisons  # Bonferroni
    return float(min(alpha, max(lowest, level)))


def _maxima(root_JJ: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Return the largest |T| of each draw, shape (R,)."""
    num_comparisons = len(root_JJ)
    rng = np.random.default_rng(seed)
    maxima_R = np.empty(NUM_DRAWS)

    # In chunks, which give the numbers of one large product: the generator fills a matrix row by row, and each row of
    # a product is summed by itself, in the same order as long as a chunk leaves no few rows over (hence the multiple).
    chunk = MAX_CHUNK_DRAWS // num_comparisons // _CHUNK_ROWS * _CHUNK_ROWS
    chunk = max(_CHUNK_ROWS, chunk)
    for start in range(0, NUM_DRAWS, chunk):
        stop = min(start + chunk, NUM_DRAWS)
        # Normal draws with the correlations of the differences: independent ones times a root of the correlations.
        independent_RJ = rng.standard_normal((stop - start, num_comparisons))
        draws_RJ = independent_RJ @ root_JJ.T
        maxima_R[start:stop] = np.abs(draws_RJ, out=draws_RJ).max(axis=1)
    return maxima_R


def _correlation(family: Sequence[Noise]) -> NDArray[np.float64]:
    """Return the correlations of the differences, shape (J, J)."""
    num_comparisons = len(family)
    covariance_JJ = np.empty((num_comparisons, num_comparisons))
    # On one task, differences share their units. Over seeds only the variances are added, on the diagonal.
    for row, a in enumerate(family):
        for column, b in enumerate(family):
            covariance_JJ[row, column] = _covariance(a, b)
    own_variances_J = [noise.own_variance for noise in family]
    covariance_JJ += np.diag(own_variances_J)
    variances_J = np.diag(covariance_JJ)
    deviations_J = np.sqrt(variances_J)

    # Models that never differ have deviation 0 and no correlation. They get a scale of 0, which makes them independent
    # of all others, the widest case. `where` leaves them out of the division, which would warn.
    scale_J = np.divide(
        1,
        deviations_J,
        out=np.zeros_like(deviations_J),
        where=deviations_J > 0,
    )
    correlation_JJ = covariance_JJ * scale_J[:, None] * scale_J
    # On the diagonal, models that never differ have 0 after scaling, and others nearly 1 after rounding.
    np.fill_diagonal(correlation_JJ, 1.0)
    return np.asarray(correlation_JJ)


def _covariance(a: Noise, b: Noise) -> float:
    # Tasks have different items, whose noise is independent.
    if a.task != b.task:
        return 0.0
    # Unit by unit: all differences of a task have the same items in the same order, and the same clusters
    # (`check_comparable`, `item_values`).
    return float(a.part_N @ b.part_N)


def _root(correlation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return R with ``R R^T`` the correlation, which may be singular (two metrics that are the same).

    R is the symmetric root, of which there is only one. Others would depend on the signs and the order of eigenvectors,
    which differ between processors.
    """
    # Not Cholesky, which fails for a singular matrix.
    values, vectors = np.linalg.eigh(correlation)
    # Rounding may leave eigenvalues of a singular matrix slightly below 0.
    roots = np.sqrt(np.maximum(values, 0))
    root = (vectors * roots) @ vectors.T
    return np.asarray(root)
