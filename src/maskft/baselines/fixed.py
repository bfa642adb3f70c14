"""Masks that are not learned, with exactly the counts of learned ones: random, by magnitude, Wanda (the baselines)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskft_common.errors import UserError

from ..fast.selection import mask_without_lowest
from ..masking import num_removed, ranking_keys


@dataclass(frozen=True)
class FixedMask:
    """What ``maskft train --method`` names.

    Attributes:
        keys: (weight, L2 norm of each of its inputs or None, generator) -> ranking values, of which the lowest go.
        of_inputs: Whether it looks at the inputs; weights are then compared within an output, whose scale they share.
    """

    keys: Callable[[Tensor, Tensor | None, torch.Generator], Tensor]
    of_inputs: bool = False


def _random(weight: Tensor, norms: Tensor | None, generator: torch.Generator) -> Tensor:
    return torch.rand(weight.numel(), generator=generator).view(weight.shape)


def _magnitude(weight: Tensor, norms: Tensor | None, generator: torch.Generator) -> Tensor:
    keys = ranking_keys(weight).view(weight.shape)
    return keys if norms is None else keys * norms


FIXED_MASKS = {
    "random_mask": FixedMask(_random),
    "l1_mask": FixedMask(_magnitude),
    "wanda_mask": FixedMask(_magnitude, of_inputs=True),  # https://arxiv.org/abs/2306.11695
}


def fixed_masks(
    kind: str,
    weights: Sequence[Tensor],
    sparsity: float,
    seed: int = 0,
    counts: Sequence[int] | None = None,
    input_norms: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Masks of several weights; bool, True = keep.

    Args:
        kind: One of ``FIXED_MASKS``.
        weights: The weights to mask; of a random mask only the shapes matter.
        sparsity: Fraction removed, in [0, 1).
        seed: Seed of the random masks.
        counts: Number to remove of each matrix instead, e.g. those of a learned mask.
        input_norms: Where it looks at inputs: per weight the L2 norm of each input, shape (1, I) or, for a weight
            of shape (I, O), (I, 1).
    """
    for number, weight in enumerate(weights, start=1):
        if not weight.is_meta and not bool(weight.isfinite().all()):
            raise UserError(
                f"the base's weights hold NaN or inf (in matrix {number} of {len(weights)}), so {kind} cannot be made; "
                "check the base model"
            )
    made, generator = FIXED_MASKS[kind], torch.Generator().manual_seed(seed)
    norms = input_norms if made.of_inputs else [None] * len(weights)
    keys = [made.keys(weight, norm, generator) for weight, norm in zip(weights, norms, strict=True)]
    counts = [num_removed(key.numel(), sparsity) for key in keys] if counts is None else counts
    if made.of_inputs:
        output_dims = [int(norm.shape[0] != 1) for norm in input_norms]
        return [_remove_lowest_per_output(*each) for each in zip(keys, counts, output_dims, strict=True)]
    return [mask_without_lowest(key, count, "signed") for key, count in zip(keys, counts, strict=True)]


def _remove_lowest_per_output(keys: Tensor, num: int, output_dim: int) -> Tensor:
    """Remove ``num`` entries, the same number of each output's inputs (the first outputs one more where it is uneven).

    Wanda compares a weight with the other inputs of its output only: those of others have another scale.
    """
    each, extra = divmod(num, keys.shape[output_dim])
    limits_O = torch.full((keys.shape[output_dim],), each, device=keys.device)
    limits_O[:extra] += 1
    return ranks_per_output(keys, output_dim) >= limits_O.unsqueeze(1 - output_dim)


def ranks_per_output(keys: Tensor, output_dim: int) -> Tensor:
    """Rank (int64, from 0) of each of ``keys`` among those of its output; ties in index order."""
    order = keys.argsort(dim=1 - output_dim, stable=True)
    places = torch.arange(keys.shape[1 - output_dim], device=keys.device)
    places = places[None] if output_dim == 0 else places[:, None]
    return torch.empty_like(order).scatter_(1 - output_dim, order, places.expand_as(order))
