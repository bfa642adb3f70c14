"""Successive halving: many candidates for a short time, the better of them for longer.

Jamieson and Talwalkar, https://arxiv.org/abs/1502.07943. Here every rung trains from scratch: the learning rate falls
to zero at the end of each length, and a run that went on from there would have another schedule than one as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def rung_sizes(num_candidates: int, factor: int) -> list[int]:
    """Number of candidates of each rung; the best of the last one, which has at most ``factor``, wins.

    >>> rung_sizes(12, 3), rung_sizes(2, 3)
    ([12, 4, 2], [2])
    """
    sizes = [num_candidates]
    while (left := math.ceil(sizes[-1] / factor)) > 1:
        sizes.append(left)
    return sizes


def rungs(num_candidates: int, factor: int, whole: float, shortest: float) -> list[tuple[int, float]]:
    """Number of candidates and length of each rung: ``factor`` times as long as the one before, the last is whole.

    Args:
        num_candidates: How many there are at first.
        factor: Of a rung's candidates, one in ``factor`` goes on.
        whole: Length of the last rung, in any unit.
        shortest: Length below which no rung may be; a rung that would be is left out, and the last one has more
            candidates.

    >>> rungs(12, 3, whole=90, shortest=1), rungs(12, 3, whole=90, shortest=30)
    ([(12, 10.0), (4, 30.0), (2, 90.0)], [(12, 30.0), (4, 90.0)])
    """
    sizes = rung_sizes(num_candidates, factor)
    while len(sizes) > 1 and whole / factor ** (len(sizes) - 1) < shortest:
        sizes.pop()
    return [(size, whole / factor ** (len(sizes) - 1 - rung)) for rung, size in enumerate(sizes)]


def survivors(losses: Sequence[float], factor: int) -> list[int]:
    """Indices of the one in ``factor`` with the lowest losses, in their order; of equal ones the first.

    An infinite loss, of a run that failed, survives only where all are infinite, and then the first of them alone.

    >>> survivors([3.0, 1.0, math.inf, 2.0], 2), survivors([math.inf, math.inf], 2)
    ([1, 3], [0])
    """
    order = sorted(range(len(losses)), key=losses.__getitem__)[: math.ceil(len(losses) / factor)]
    return sorted(index for index in order if math.isfinite(losses[index])) or order[:1]
