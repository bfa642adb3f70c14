"""Whether two masks remove more in common than chance makes them; masks are bool, True = keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from scipy.stats import norm
from torch import Tensor

from maskft.adapter.mask_set import MaskSet
from maskft_base.errors import UserError


def compare_adapters(folders: Sequence[str | Path], confidence: float = 0.95) -> list[dict[str, Any]]:
    """Of every two adapter folders, in how much they agree: ``first``, ``second``, their counts and ``agreement``."""
    sets, names = [MaskSet.from_adapter(folder) for folder in folders], distinct_names(folders)
    rows = []
    for a, b in combinations(range(len(folders)), 2):
        pair = agreement(sets[a], sets[b], confidence)
        counts = {"num_removed_first": sets[a].num_removed, "num_removed_second": sets[b].num_removed}
        row = {"first": names[a], "second": names[b], **counts}
        rows.append({**row, **pair, "verdict": verdict(pair)})
    return rows


def distinct_names(folders: Sequence[str | Path]) -> list[str]:
    """Last parts of the paths, as many of them as tell the folders apart."""
    parts = [Path(folder).absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


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
    """Central interval of the number in common by chance, a sum of hypergeometric numbers, taken for normal.

    Args:
        counts: Of each matrix: weights, removed by the first mask, removed by the second.
        confidence: Its probability, nearly, in (0, 1).

    Returns:
        The lowest and the highest number in it.
    """
    mean, deviation = sum(n1 * n2 / n for n, n1, n2 in counts), math.sqrt(sum(map(_variance, counts)))
    reach = float(norm.isf((1 - confidence) / 2)) * deviation + 0.5  # whole numbers
    return math.ceil(mean - reach), math.floor(mean + reach)


def verdict(pair: Mapping[str, Any]) -> str:
    """An `agreement` in words."""
    if pair["num_common"] > pair["chance_high"]:
        return "more than chance"
    return "less than chance" if pair["num_common"] < pair["chance_low"] else "what chance gives"
