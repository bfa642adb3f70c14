"""Masks that are not learned, with exactly the counts of learned ones: random, by magnitude, Wanda (the baselines)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from maskft_base.errors import UserError

from ..masking import num_removed, ranking_keys
from .selection import remove_lowest_of_pool


def random_mask(shape: Sequence[int], sparsity: float, seed: int) -> Tensor:
    """Uniformly random mask with exactly ``num_removed`` entries removed (paper, baseline 6)."""
    return fixed_masks("random_mask", [torch.empty(tuple(shape), device="meta")], sparsity, seed=seed)[0]


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Remove the weights of smallest magnitude (paper, baseline 7, the "L1 mask")."""
    return fixed_masks("l1_mask", [weight], sparsity)[0]


def fixed_masks(
    kind: Literal["random_mask", "l1_mask", "wanda_mask"],
    weights: Sequence[Tensor],
    sparsity: float,
    seed: int = 0,
    counts: Sequence[int] | None = None,
    input_norms: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Masks of several weights; bool, True = keep.

    Args:
        kind: ``random_mask`` removes uniformly at random, ``l1_mask`` the smallest magnitudes, ``wanda_mask`` the
            smallest magnitudes times the norm of their input (https://arxiv.org/abs/2306.11695).
        weights: The weights to mask; of a random mask only the shapes matter.
        sparsity: Fraction removed, in [0, 1).
        seed: Seed of the random masks.
        counts: Number to remove of each matrix instead, e.g. those of a learned mask.
        input_norms: With ``wanda_mask``: per weight the L2 norm of each input feature, shape (1, I) or, for a weight
            of shape (I, O), (I, 1).
    """
    for number, weight in enumerate(weights, start=1):
        if not weight.is_meta and bool(weight.isnan().any()):
            raise UserError(
                f"the base's weights hold NaN (in matrix {number} of {len(weights)}); no {kind} of them is made"
            )
    if kind == "random_mask":
        generator = torch.Generator().manual_seed(seed)
        keys = [torch.rand(weight.numel(), generator=generator).view(weight.shape) for weight in weights]
    else:
        keys = [ranking_keys(weight).view(weight.shape) for weight in weights]
    if kind == "wanda_mask":
        keys = [key * norms for key, norms in zip(keys, input_norms, strict=True)]
    counts = [num_removed(key.numel(), sparsity) for key in keys] if counts is None else counts
    if kind == "wanda_mask":
        output_dims = [int(norms.shape[0] != 1) for norms in input_norms]
        return [_remove_lowest_per_output(*each) for each in zip(keys, counts, output_dims, strict=True)]
    return [remove_lowest_of_pool([key], count)[0] for key, count in zip(keys, counts, strict=True)]


def _remove_lowest_per_output(keys: Tensor, num: int, output_dim: int) -> Tensor:
    """Remove ``num`` entries, the same number of each output's inputs (the first outputs one more where it is uneven).

    Wanda compares a weight with the other inputs of its output only: magnitudes of different outputs have no common
    scale.
    """
    keys_OI = keys if output_dim == 0 else keys.t()
    each, extra = divmod(num, keys_OI.shape[0])
    limits_O = torch.full((keys_OI.shape[0], 1), each, device=keys.device)
    limits_O[:extra] += 1
    mask_OI = ranks_per_output(keys_OI, output_dim=0) >= limits_O
    return mask_OI if output_dim == 0 else mask_OI.t().contiguous()


def ranks_per_output(keys: Tensor, output_dim: int) -> Tensor:
    """Rank (int64, from 0) of each of ``keys`` among those of its output; ties in index order."""
    order = keys.argsort(dim=1 - output_dim, stable=True)
    places = torch.arange(keys.shape[1 - output_dim], device=keys.device)
    places = places[None] if output_dim == 0 else places[:, None]
    return torch.empty_like(order).scatter_(1 - output_dim, order, places.expand_as(order))
