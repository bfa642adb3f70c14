"""The algorithm of Mask Fine-Tuning, in plain torch: scores in, binary masks out, gradients straight through.

A mask is a bool tensor of the weight's shape, **True = keep**. ``sparsity`` is the fraction of weights that is
*removed*, in [0, 1). Ranking happens in float32; the count is exact under ties; equal values are removed in index
order; nothing here depends on memory layout, device or thread count.

Paper: Mask Fine-Tuning, https://arxiv.org/abs/2503.22764, Eqs. (2), (4), (5). Ranking scores as in edge-popup,
https://arxiv.org/abs/1911.13299. Differs from the published code in that the count is exact and ties are stable.

Shapes: a weight and its scores are (O, I) = (out_features, in_features), or (I, O) for GPT-2's ``Conv1D``. Nothing
below cares which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .errors import NotFiniteError, UserError

RankBy = Literal["abs", "signed"]

# Below this many scores in a pool one kthvalue call is faster than building a histogram.
_HISTOGRAM_MIN_NUMEL = 1 << 18
_NUM_BINS = 1 << 16


def check_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` if it is a fraction removed in [0, 1), else raise :class:`UserError`."""
    if not isinstance(sparsity, (int, float)) or isinstance(sparsity, bool) or not 0.0 <= sparsity < 1.0:
        raise UserError(
            f"sparsity is {sparsity!r}; it is the fraction of weights removed and must be in [0, 1): 0.1 removes 10 %"
        )
    return float(sparsity)


def num_removed(numel: int, sparsity: float) -> int:
    """Number of entries a mask of ``numel`` entries removes: ``round(sparsity * numel)``, as torch's pruning rounds."""
    return round(check_sparsity(sparsity) * numel)


def ranking_keys(scores: Tensor, rank_by: RankBy = "abs") -> Tensor:
    """Values by which entries are ranked: float32, flat, in index order whatever the memory layout of ``scores``."""
    flat = scores.detach().reshape(-1).float()
    # Adding 0.0 turns -0.0 into 0.0, so that equal scores have equal bits in the histogram below.
    return flat.abs() if rank_by == "abs" else flat + 0.0


def kth_smallest(keys: Sequence[Tensor], k: int) -> float:
    """The ``k``-th smallest value (``k`` >= 1) of the pool formed by all ``keys``, exactly.

    A histogram over the upper 16 bits of the float32 patterns finds the bin, then one selection inside that bin finds
    the value: two passes over the pool instead of a sort.

    Args:
        keys: Flat float32 tensors without NaN.
        k: Rank, from 1 to the number of entries in the pool.
    """
    if sum(key.numel() for key in keys) < _HISTOGRAM_MIN_NUMEL:
        return torch.cat([key.reshape(-1) for key in keys]).kthvalue(k).values.item()
    counts = torch.zeros(_NUM_BINS, dtype=torch.int64, device=keys[0].device)
    for key in keys:
        counts += torch.bincount(_bins(key), minlength=_NUM_BINS).to(counts.device)
    cumulative = counts.cumsum(0)
    bin_index = int(torch.searchsorted(cumulative, k))
    below = int(cumulative[bin_index - 1]) if bin_index else 0
    inside = torch.cat([key[_bins(key) == bin_index].to(counts.device) for key in keys])
    return inside.kthvalue(k - below).values.item()


def _bins(key: Tensor) -> Tensor:
    """Upper 16 bits of each float32, mapped so that a larger value never has a smaller bin (int32, 0..65535)."""
    bits = key.view(torch.int32)
    # For negative floats the magnitude bits run backwards; flipping them makes the integer order the float order.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered >> 16) + (_NUM_BINS >> 1)


def remove_lowest(keys: Sequence[Tensor], num: int) -> list[Tensor]:
    """Masks that remove the ``num`` smallest entries of the pool formed by all ``keys``.

    Args:
        keys: Flat float32 ranking values, one tensor per matrix.
        num: How many entries of the whole pool to remove.

    Returns:
        Flat bool masks, one per entry of ``keys``; True = keep; exactly ``num`` entries are False in all. Among equal
        values the first in index order (and in the order of ``keys``) are removed first.

    Raises:
        UserError: If a key is NaN.
    """
    total = sum(key.numel() for key in keys)
    if not 0 <= num <= total:
        raise UserError(f"cannot remove {num} of {total} entries")
    if any(key.numel() and bool(key.max().isnan()) for key in keys):
        raise NotFiniteError("scores contain NaN, so they cannot be ranked")
    cut = kth_smallest(keys, num) if num else -math.inf
    masks = [key > cut for key in keys]
    # Entries equal to the cut are kept, last ones first, until the count is right.
    num_missing = total - num - sum(int(mask.sum()) for mask in masks)
    for key, mask in zip(reversed(keys), reversed(masks), strict=True):
        if num_missing <= 0:
            break
        ties = (key == cut).nonzero().squeeze(1)[-num_missing:]
        mask[ties] = True
        num_missing -= len(ties)
    return masks


def topk_mask(scores: Tensor, sparsity: float, rank_by: RankBy = "abs") -> Tensor:
    """Keep the entries with the largest scores of one matrix and remove the rest (paper, Eq. 4).

    Args:
        scores: Ranking values, any shape, ranked in float32.
        sparsity: Fraction of entries to remove, in [0, 1).
        rank_by: ``abs`` ranks by magnitude (as published), ``signed`` by value.

    Returns:
        Bool mask, shape and device of ``scores``; True = keep; exactly ``num_removed`` entries are False.

    Raises:
        UserError: If ``sparsity`` is outside [0, 1) or a score is NaN.

    Example:
        >>> topk_mask(torch.tensor([0.3, -0.1, 0.2, -0.4]), sparsity=0.25)
        tensor([ True, False,  True,  True])
    """
    return topk_masks([scores], sparsity, rank_by)[0]


def topk_masks(scores: Sequence[Tensor], sparsity: float, rank_by: RankBy = "abs") -> list[Tensor]:
    """Top-k over one pool of several matrices (``scope="global"``); see :func:`topk_mask`."""
    keys = [ranking_keys(s, rank_by) for s in scores]
    num = num_removed(sum(key.numel() for key in keys), sparsity)
    return [mask.view(s.shape) for mask, s in zip(remove_lowest(keys, num), scores, strict=True)]


def threshold_mask(scores: Tensor, threshold: float, rank_by: RankBy = "signed") -> Tensor:
    """Remove every entry whose score is below ``threshold`` (paper, appendix C, global MFT: -0.035 on raw scores)."""
    keys = ranking_keys(scores, rank_by)
    if bool(keys.isnan().any()):
        raise NotFiniteError("scores contain NaN, so they cannot be compared")
    return (keys >= threshold).view(scores.shape)


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
    scope: Literal["matrix", "global"] = "matrix",
    seed: int = 0,
    counts: Sequence[int] | None = None,
    input_norms: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Masks that are not learned, with exactly the counts of learned ones.

    Args:
        kind: ``random_mask`` removes uniformly at random, ``l1_mask`` the smallest magnitudes, ``wanda_mask`` the
            smallest magnitudes times the norm of their input (https://arxiv.org/abs/2306.11695).
        weights: The weights to mask; of a random mask only the shapes matter.
        sparsity: Fraction removed, in [0, 1).
        scope: ``matrix``: of each matrix; ``global``: of all as one pool.
        seed: Seed of the random masks.
        counts: Number to remove of each matrix instead, e.g. those of a learned mask.
        input_norms: With ``wanda_mask``: per weight the L2 norm of each input feature, shape (1, I) or, for a weight
            of shape (I, O), (I, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "random_mask":
        keys = [torch.rand(weight.numel(), generator=generator) for weight in weights]
    else:
        keys = [ranking_keys(weight, "abs") for weight in weights]
    if kind == "wanda_mask":
        keys = [
            (key.view(weight.shape) * norms).reshape(-1)
            for key, weight, norms in zip(keys, weights, input_norms, strict=True)
        ]
    if counts is None and scope == "global":
        masks = remove_lowest(keys, num_removed(sum(key.numel() for key in keys), sparsity))
    else:
        counts = [num_removed(key.numel(), sparsity) for key in keys] if counts is None else counts
        if kind == "wanda_mask":
            return [
                _remove_lowest_per_output(key.view(weight.shape), count, output_dim=int(norms.shape[0] != 1))
                for key, weight, count, norms in zip(keys, weights, counts, input_norms, strict=True)
            ]
        masks = [remove_lowest([key], count)[0] for key, count in zip(keys, counts, strict=True)]
    return [mask.view(weight.shape) for mask, weight in zip(masks, weights, strict=True)]


def _remove_lowest_per_output(keys: Tensor, num: int, output_dim: int) -> Tensor:
    """Remove ``num`` entries, the same number of each output's inputs (the first outputs one more where it is uneven).

    Wanda compares a weight with the other inputs of its output only: magnitudes of different outputs have no common
    scale.
    """
    keys_OI = keys if output_dim == 0 else keys.t()
    each, extra = divmod(num, keys_OI.shape[0])
    limits_O = torch.full((keys_OI.shape[0], 1), each, device=keys.device)
    limits_O[:extra] += 1
    order_OI = keys_OI.argsort(dim=1, stable=True)
    places = torch.arange(keys_OI.shape[1], device=keys.device).expand_as(order_OI)
    ranks_OI = torch.empty_like(order_OI).scatter_(1, order_OI, places)
    mask_OI = ranks_OI >= limits_O
    return mask_OI if output_dim == 0 else mask_OI.t().contiguous()


def initial_scores(
    weight: Tensor,
    kind: Literal["normal", "kaiming_uniform", "constant", "magnitude"],
    generator: torch.Generator,
    std: float = 0.02,
    value: float = 0.0,
) -> Tensor:
    """Scores to start from: float32, shape and device of ``weight``.

    Args:
        weight: The frozen weight.
        kind: ``normal``: N(0, std), as published; ``kaiming_uniform``: U(-b, b) with b = 1/sqrt(in_features);
            ``constant``: ``value`` everywhere; ``magnitude``: the rank of abs(weight), spread evenly over
            (0, std * sqrt(12)), so that the first mask is the magnitude mask and the spread is ``std``.
        generator: CPU generator; the draw does not depend on the device of ``weight``.
        std: Standard deviation of ``normal`` and ``magnitude``, > 0.
        value: Value of ``constant``.
    """
    shape = weight.shape
    if kind == "normal":
        scores = torch.empty(shape).normal_(0.0, std, generator=generator)
    elif kind == "kaiming_uniform":
        bound = 1.0 / math.sqrt(shape[-1])
        scores = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    elif kind == "constant":
        scores = torch.full(shape, float(value))
    elif kind == "magnitude":
        order = ranking_keys(weight, "abs").argsort(stable=True)
        spread = torch.arange(1, order.numel() + 1, dtype=torch.float64) * (std * math.sqrt(12) / order.numel())
        scores = torch.empty(order.numel(), device=order.device)
        scores[order] = spread.to(order.device, torch.float32)
        scores = scores.view(shape)
    else:
        raise UserError(f"init_scores is {kind!r}; choose normal, kaiming_uniform, constant or magnitude")
    return scores.to(weight.device)


def scores_for_mask(scores: Tensor, mask: Tensor, rank_by: RankBy = "abs") -> Tensor:
    """Permute ``scores`` so that their top-k mask at the count of ``mask`` is ``mask``; the set of values is unchanged.

    Used to go on training from a saved mask whose scores were not saved.
    """
    flat, keep = scores.detach().reshape(-1).clone(), mask.reshape(-1)
    keys = ranking_keys(flat, rank_by)
    own = remove_lowest([keys], int((~keep).sum()))[0]
    wrongly_kept, wrongly_removed = (own & ~keep).nonzero().squeeze(1), (~own & keep).nonzero().squeeze(1)
    flat[wrongly_kept], flat[wrongly_removed] = flat[wrongly_removed].clone(), flat[wrongly_kept].clone()
    return flat.view(scores.shape)


def score_gradient_(weight_gradient: Tensor, weight: Tensor, scores: Tensor, rank_by: RankBy) -> Tensor:
    """Turn dL/d(effective weight) into dL/dscores, in place (paper, Eq. 5).

    ``dL/dscores = dL/dW_effective * W``, times ``sign(scores)`` where ranking is by magnitude. It is nonzero at removed
    entries too, which is how a removed weight can come back; it is zero where a score is exactly 0 under ``abs``.

    Args:
        weight_gradient: (dL/dy)^T x, float32, overwritten.
        weight: The frozen weight, unmasked.
        scores: The scores.
        rank_by: How ``scores`` are ranked.
    """
    weight_gradient.mul_(weight)
    if rank_by == "abs":
        weight_gradient.mul_(torch.sign(scores))
    return weight_gradient


class StraightThroughMask(torch.autograd.Function):
    """``weight * mask`` with the straight-through gradient for the scores behind the mask.

    forward: (weight, scores, mask, rank_by) -> weight where the mask keeps it, 0 elsewhere.
    backward: dL/dweight = dL/dout * mask; dL/dscores = dL/dout * weight [* sign(scores)].
    """

    @staticmethod
    def forward(ctx, weight: Tensor, scores: Tensor, mask: Tensor, rank_by: RankBy) -> Tensor:
        """Apply the mask; a removed entry is exactly +0.0, also where the weight is NaN or negative."""
        ctx.save_for_backward(weight, scores, mask)
        ctx.rank_by = rank_by
        return weight.masked_fill(~mask, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Pass the gradient straight through the 0/1 step."""
        weight, scores, mask = ctx.saved_tensors
        grad_weight = grad.masked_fill(~mask, 0.0) if ctx.needs_input_grad[0] else None
        grad_scores = None
        if ctx.needs_input_grad[1]:
            grad_scores = score_gradient_(grad.to(torch.float32, copy=True), weight, scores, ctx.rank_by)
        return grad_weight, grad_scores, None, None
