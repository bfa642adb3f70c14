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
    """A method that ranks weights once, before any training; ``maskft train --method`` takes its name.

    Attributes:
        keys: (weight, statistic, generator) -> ranking values in the shape of the weight; the lowest are removed. The
            statistic is measured on training rows: None, or what one of the next two asks for.
        of_inputs: The statistic is the L2 norm of each input of the weight; weights are then compared within an output,
            whose scale they share.
        of_gradients: The statistic is the gradient of the loss with respect to the weight, float32, in its shape.
    """

    keys: Callable[[Tensor, Tensor | None, torch.Generator], Tensor]
    of_inputs: bool = False
    of_gradients: bool = False


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
    gradients: Sequence[Tensor] = (),
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
        gradients: Where it looks at gradients: per weight that of the loss, in its shape.
    """
    for number, weight in enumerate(weights, start=1):
        if not weight.is_meta and not bool(weight.isfinite().all()):
            raise UserError(
                f"the base's weights hold NaN or inf (in matrix {number} of {len(weights)}), so {kind} cannot be made; "
                "check the base model"
            )
    made = FIXED_MASKS[kind]
    generator = torch.Generator().manual_seed(seed)
    statistics: Sequence[Tensor | None] = [None] * len(weights)
    if made.of_inputs:
        statistics = input_norms
    elif made.of_gradients:
        statistics = gradients
    keys = [made.keys(weight, seen, generator) for weight, seen in zip(weights, statistics, strict=True)]
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
