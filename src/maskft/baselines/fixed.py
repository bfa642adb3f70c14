"""Masks that are not learned, with exactly the counts of learned ones: random, by magnitude, Wanda (the baselines)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskft_common.errors import UserError

from ..fast.selection import mask_without_lowest
from ..masking import num_removed, ranking_keys

# (weight, statistic, generator) -> ranking values.
Keys = Callable[[Tensor, Tensor | None, torch.Generator], Tensor]


@dataclass(frozen=True)
class FixedMask:
    """A method that ranks weights once, before any training; ``maskft train --method`` takes its name.

    Attributes:
        keys: (weight, statistic, generator) -> ranking values in the shape of the weight; the lowest are removed. The
            statistic is measured on training rows, as one of the next two attributes says; None if neither is set.
        of_inputs: The statistic is the L2 norm of each input of the weight; weights are then compared within an output,
            whose scale they share.
        of_gradients: The statistic is the gradient of the loss with respect to the weight, float32, in its shape.
    """

    keys: Keys
    of_inputs: bool = False
    of_gradients: bool = False


def _random(
    weight: Tensor,
    norms: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    # On the CPU, whatever the device of the weight is: a seed gives the same mask on every machine.
    keys = torch.rand(weight.numel(), generator=generator, dtype=torch.float32, device=generator.device)
    return keys.view(weight.shape)


def _magnitude(
    weight: Tensor,
    norms: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    keys = ranking_keys(weight).view(weight.shape)
    if norms is None:
        return keys
    # Wanda: the norms broadcast over the outputs.
    return keys * norms


# A method of yours joins them: docs/learners.md has SNIP as the example.
FIXED_MASKS = {
    "random_mask": FixedMask(_random),
    "l1_mask": FixedMask(_magnitude),
    # https://arxiv.org/abs/2306.11695
    "wanda_mask": FixedMask(_magnitude, of_inputs=True),
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

    Returns:
        One mask per weight, in its shape.

    Raises:
        UserError: If a weight is not finite.
    """
    # NaN compares with nothing, so a rank among NaN would be arbitrary.
    for number, weight in enumerate(weights, start=1):
        # On the meta device there are no values; only the shape of the weight matters for a random mask.
        if weight.is_meta:
            continue
        if not bool(weight.isfinite().all()):
            raise UserError(
                f"the base's weights hold NaN or inf (in matrix {number} of {len(weights)}), so {kind} cannot be made; "
                "check the base model"
            )

    method = FIXED_MASKS[kind]
    statistics: Sequence[Tensor | None] = [None] * len(weights)
    if method.of_inputs:
        statistics = input_norms
    elif method.of_gradients:
        statistics = gradients

    if counts is None:
        counts = []
        for weight in weights:
            counts.append(num_removed(weight.numel(), sparsity))

    # One stream of random numbers for all matrices, in their order.
    generator = torch.Generator().manual_seed(seed)
    masks = []
    # One matrix after another: the values of all together would take four bytes a weight.
    for weight, statistic, count in zip(weights, statistics, counts, strict=True):
        keys = method.keys(weight, statistic, generator)
        if method.of_inputs:
            # Within each output, as Wanda does. Norms of shape (1, I) go with a weight of shape (O, I).
            output_dim = 0 if statistic.shape[0] == 1 else 1
            mask = _remove_lowest_per_output(keys, count, output_dim)
        else:
            # Within the whole matrix. "signed": the keys are ranked as they are, not by their absolute value.
            mask = mask_without_lowest(keys, count, "signed")
        masks.append(mask)
    return masks


def _remove_lowest_per_output(
    keys: Tensor,
    num: int,
    output_dim: int,
) -> Tensor:
    """Remove ``num`` entries, the same number of each output's inputs (the first outputs one more where it is uneven).

    Wanda compares a weight with the other inputs of its output only: those of others have another scale.
    """
    num_outputs = keys.shape[output_dim]
    num_each, num_extra = divmod(num, num_outputs)
    # How many entries each output loses.
    limits_O = torch.full(
        (num_outputs,),
        num_each,
        device=keys.device,
    )
    limits_O[:num_extra] += 1

    # Shaped to broadcast over the inputs.
    limits = limits_O.unsqueeze(1 - output_dim)
    ranks = ranks_per_output(keys, output_dim)
    return ranks >= limits


def ranks_per_output(keys: Tensor, output_dim: int) -> Tensor:
    """Rank (int64, from 0) of each of ``keys`` among those of its output; ties in index order.

    Args:
        keys: Ranking values of a matrix.
        output_dim: Its dimension of outputs: 0, or 1 where the weight is stored transposed.
    """
    input_dim = 1 - output_dim
    order = keys.argsort(dim=input_dim, stable=True)

    # 0, 1, 2, ... along the inputs, the same for every output.
    num_inputs = keys.shape[input_dim]
    places = torch.arange(num_inputs, device=keys.device)
    places = places.unsqueeze(output_dim)
    places = places.expand_as(order)

    # The inverse permutation: the entry that is sorted to place r gets rank r.
    ranks = torch.empty_like(order)
    return ranks.scatter_(input_dim, order, places)
