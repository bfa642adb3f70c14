"""Many masks over one base: what several remove together, and whether two agree more than chance makes them.

Sets are of what is REMOVED: a union removes what any of its masks removes. Masks are bool, True = keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import hypergeom, norm
from torch import Tensor

from maskft_base.errors import UserError

OPERATIONS = {
    "union": "remove what any of the masks removes",
    "intersect": "remove what all of the masks remove",
    "vote": "remove what at least --at_least of the masks remove (default: more than half)",
    "minus": "remove what the first mask removes and no other does",
}
# Above this variance the number in common is as good as normal.
_NORMAL_VARIANCE = 400.0


def combine(operation: str, masks: Sequence[Tensor], at_least: int | None = None) -> Tensor:
    """One mask from several of one matrix.

    Args:
        operation: One of ``OPERATIONS``.
        masks: Bool masks of one shape, True = keep; for ``minus`` the first is what is left.
        at_least: With ``vote``: by how many masks a weight must be removed, from 1 to their number; default: the
            smallest majority.

    Returns:
        Bool mask of the same shape.

    Raises:
        UserError: If ``operation`` is none of these or ``at_least`` is out of its range.
    """
    if operation not in OPERATIONS:
        raise UserError(f"no operation {operation!r}; there are {', '.join(OPERATIONS)}")
    if len(masks) < 2:
        raise UserError(f"{operation} needs two masks or more, and there is {len(masks)}")
    if operation == "minus":
        removed_by_others = ~masks[1]
        for mask in masks[2:]:
            removed_by_others |= ~mask
        return masks[0] | removed_by_others
    votes = {"union": 1, "intersect": len(masks), "vote": num_votes(len(masks), at_least)}[operation]
    removed_by = torch.zeros(masks[0].shape, dtype=torch.int16, device=masks[0].device)
    for mask in masks:
        removed_by += ~mask
    return removed_by < votes


def num_votes(num_masks: int, at_least: int | None) -> int:
    """By how many of so many masks a weight must be removed, where ``at_least`` were asked for."""
    votes = num_masks // 2 + 1 if at_least is None else at_least
    if not 1 <= votes <= num_masks:
        raise UserError(f"at_least is {votes} and there are {num_masks} masks; give a number from 1 to {num_masks}")
    return votes


def agreement(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], confidence: float = 0.95
) -> dict[str, float | int | None]:
    """What two masks remove in common, against two masks of the same counts per matrix whose places are random.

    Under chance the common number in a matrix of N weights, n1 and n2 removed, is hypergeometric: mean n1 n2 / N,
    variance n1 n2 (N - n1)(N - n2) / (N^2 (N - 1)). More than that says that the places depend on something that both
    masks share: the data, but also the magnitude of the weights, or an equal random start of the scores
    (``mask_seed``). Only modules that both cover count; sparsities may differ.

    Args:
        first: Module name -> bool mask, True = keep.
        second: Another one.
        confidence: Share of chance's numbers between ``chance_low`` and ``chance_high``, in (0, 1).

    Returns:
        ``num_common`` removed by both, ``expected``, ``chance_low``, ``chance_high``, ``z_score`` (None without
        variance), ``jaccard``, ``jaccard_expected`` (of the expected number), ``num_modules``.

    Raises:
        UserError: If the masks have no module in common, or shapes differ.
    """
    names = sorted(first.keys() & second.keys())
    if not names:
        raise UserError("two masks that cover no common module cannot agree; compare masks of the same layers")
    common, counts = 0, []
    for name in names:
        a, b = ~first[name], ~second[name]
        if a.shape != b.shape:
            raise UserError(f"{name} has shape {tuple(a.shape)} and {tuple(b.shape)}; the masks have other base models")
        counts.append((a.numel(), int(a.sum()), int(b.sum())))
        common += int((a & b).sum())
    expected = sum(n1 * n2 / n for n, n1, n2 in counts)
    variance = sum(map(_variance, counts))
    removed = sum(n1 + n2 for _, n1, n2 in counts)
    low, high = chance_interval(counts, confidence)
    return {
        "num_common": common,
        "expected": expected,
        "chance_low": low,
        "chance_high": high,
        "z_score": (common - expected) / math.sqrt(variance) if variance else None,
        "jaccard": common / (removed - common) if removed else 1.0,
        "jaccard_expected": expected / (removed - expected) if removed else 1.0,
        "num_modules": len(names),
    }


def _variance(counts: tuple[int, int, int]) -> float:
    n, n1, n2 = counts
    return n1 * n2 * (n - n1) * (n - n2) / (n**2 * max(n - 1, 1))


def chance_interval(counts: Sequence[tuple[int, int, int]], confidence: float = 0.95) -> tuple[int, int]:
    """Central interval of the number in common by chance: a sum of hypergeometric numbers, one of each matrix.

    Args:
        counts: Of each matrix: weights, removed by the first mask, removed by the second.
        confidence: Its probability at least (nearly, where the numbers are large and taken for normal), in (0, 1).

    Returns:
        The lowest and the highest number in it.
    """
    mean = sum(n1 * n2 / n for n, n1, n2 in counts)
    deviation, tail = math.sqrt(sum(map(_variance, counts))), (1 - confidence) / 2
    if deviation**2 > _NORMAL_VARIANCE:
        reach = float(norm.isf(tail)) * deviation
        return round(mean - reach), round(mean + reach)
    first, chances = 0, np.ones(1)
    for n, n1, n2 in counts:
        centre, reach = n1 * n2 / n, 10 * math.sqrt(_variance((n, n1, n2))) + 10
        low, high = max(0, n1 + n2 - n, math.floor(centre - reach)), min(n1, n2, math.ceil(centre + reach))
        chances = np.convolve(chances, hypergeom.pmf(np.arange(low, high + 1), n, n1, n2))
        first += low
    below = np.cumsum(chances) / chances.sum()
    return first + int(np.searchsorted(below, tail)), first + int(np.searchsorted(below, 1 - tail))


def verdict(pair: Mapping[str, Any]) -> str:
    """An `agreement` in words."""
    if pair["num_common"] > pair["chance_high"]:
        return "more than chance"
    return "less than chance" if pair["num_common"] < pair["chance_low"] else "what chance gives"
