"""Families of comparisons: the level at which all their intervals hold at once (max-T)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .statistics import Bootstrap

NUM_DRAWS = 100_000  # of the maximum: an error of 1 % in the level, at 0.05


class Noise(NamedTuple):
    """How one difference of a family varies: by the units of its task, which it shares with others, and by itself."""

    task: str
    part_N: NDArray[np.float64]  # what each unit adds to the error of the difference
    own_variance: float  # of the seeds, counted as independent of other comparisons


def noise_of(drawn: Bootstrap, task: str) -> Noise:
    """Return the noise of a bootstrapped difference."""
    block = drawn.block
    shares_N = block.weights_N / block.weights_N.sum()
    centred_N = block.diffs_SN.mean(axis=0) - block.means_S.mean()
    return Noise(task, shares_N * centred_N, drawn.seed_excess / drawn.num_seeds if drawn.num_seeds > 1 else 0.0)


def simultaneous_level(family: Sequence[Noise], alpha: float, seed: int = 0) -> float:
    """Return the level for each interval of a family at which all of them hold with probability ``1 - alpha``.

    The maximum of all |T| is drawn from the normal law with the correlations of the differences (a bootstrap of the
    items with normal multipliers, done for all comparisons of a task with the same multipliers); its quantile is the
    critical value of max-T (Westfall and Young 1993; Hothorn, Bretz and Westfall 2008,
    https://doi.org/10.1002/bimj.200810425), its tail the level. Methods that share a baseline correlate, and so less is
    paid than Bonferroni's ``alpha / m``. Seeds are too few for correlations and count as independent, which for
    normal variables is the widest case (Šidák).

    Args:
        family: One entry per comparison, at least 1.
        alpha: Probability that any interval misses, in (0, 1).
        seed: Seed of the draws.

    Returns:
        A level in [alpha / m, alpha].
    """
    if len(family) == 1:
        return alpha
    draws_RJ = np.random.default_rng(seed).standard_normal((NUM_DRAWS, len(family))) @ _root(_correlation(family)).T
    critical = float(np.quantile(np.abs(draws_RJ).max(axis=1), 1 - alpha))
    return float(min(alpha, max(alpha / len(family), 2 * stats.norm.sf(critical))))


def _correlation(family: Sequence[Noise]) -> NDArray[np.float64]:
    covariance = np.array([[_covariance(a, b) for b in family] for a in family])
    covariance += np.diag([noise.own_variance for noise in family])
    deviations = np.sqrt(np.diag(covariance))
    # Models that never differ have no correlation: independent, the widest case.
    scale = np.divide(1, deviations, out=np.zeros_like(deviations), where=deviations > 0)
    correlation = covariance * scale[:, None] * scale
    np.fill_diagonal(correlation, 1.0)
    return np.asarray(correlation)


def _covariance(a: Noise, b: Noise) -> float:
    return float(a.part_N @ b.part_N) if a.task == b.task else 0.0


def _root(correlation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return R with ``R R^T`` the correlation, which may be singular (two metrics that are the same).

    The symmetric root: there is but one, where signs and order of eigenvectors are other ones on another processor.
    """
    values, vectors = np.linalg.eigh(correlation)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)
