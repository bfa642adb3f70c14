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

# Entries looked at together on a CPU: few enough that what is computed from them stays in the cache.
_CHUNK_NUMEL = 1 << 19
# A pool of fewer entries is ranked without a sample.
_SAMPLED_MIN_NUMEL = 1 << 14
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    # Adding 0.0 turns -0.0 into 0.0, so that equal keys have equal bits.
    return flat.abs() if rank_by == "abs" else flat + 0.0


@torch.no_grad()
def keep_highest_(
    outs: Sequence[Tensor], weights: Sequence[Tensor], scores: Sequence[Tensor], num: int, rank_by: RankBy = "abs"
) -> None:
    """Write into ``outs`` the ``weights`` without the ``num`` that have the lowest scores of the whole pool.

    One pass over the scores instead of a sort. A sample says in which narrow band the cut must lie; the pass removes
    what is below the band and collects what is in it; those few are then ranked. Counting proves the band right; where
    it is not (a sample can be unlucky), the cut is selected from all scores. The result never depends on the sample.

    Args:
        outs: Where to write, one contiguous tensor per matrix. A removed entry is exactly +0, whatever the weight is.
        weights: The weights, any dtype; converted to the dtype of ``outs``.
        scores: Ranking values, ranked in float32.
        num: How many entries to remove. Among equal scores the first in index order (and in the order of the pool) go
            first.
        rank_by: ``abs`` ranks by magnitude, ``signed`` by value.

    Raises:
        UserError: If a score is NaN.
    """
    total = sum(s.numel() for s in scores)
    if not 0 <= num <= total:
        raise UserError(f"cannot remove {num} of {total} entries")
    if total == 0:
        return
    parts, num_left = [], -1
    band = _probable_band(scores, num, rank_by)
    if band is not None:
        parts, num_left = _split_pool_(outs, weights, scores, band, num, rank_by)
    if not 0 <= num_left <= sum(len(values) for _, values in parts):
        cut = _kth_smallest(scores, max(num, 1), rank_by)
        parts, num_left = _split_pool_(outs, weights, scores, (cut, cut), num, rank_by)
    if num_left == 0:
        return
    device = parts[0][1].device
    values = torch.cat([values.to(device) for _, values in parts])
    cut = values.kthvalue(num_left).values
    removed = values < cut
    ties = (values == cut).nonzero().squeeze(1)
    removed[ties[: num_left - int(removed.sum())]] = True
    for out, (indices, _), gone in zip(outs, parts, removed.split([len(v) for _, v in parts]), strict=True):
        out.view(-1)[indices[gone.to(indices.device)]] = 0


def _probable_band(scores: Sequence[Tensor], num: int, rank_by: RankBy) -> tuple[float, float] | None:
    """Bounds between which the ``num``-th smallest score very probably lies; None for a pool not worth sampling."""
    total = sum(s.numel() for s in scores)
    if total < _SAMPLED_MIN_NUMEL:
        return None
    # Of n entries, n^(2/3) are sampled: the sample then costs as little as ranking what lies in its band. An odd stride
    # visits every column of a matrix whose width is a power of two.
    stride = int(total ** (1 / 3)) | 1
    samples = [ranking_keys(s.detach().reshape(-1)[::stride], rank_by) for s in scores]
    sample = torch.cat([sample.to(samples[0].device) for sample in samples])
    share = num / total
    middle, spread = share * len(sample), 4 * math.sqrt(len(sample) * share * (1 - share)) + 2
    low, high = int(middle - spread), int(middle + spread)
    return (
        sample.kthvalue(low).values.item() if low >= 1 else -math.inf,
        sample.kthvalue(high).values.item() if high <= len(sample) else math.inf,
    )


def _kth_smallest(scores: Sequence[Tensor], k: int, rank_by: RankBy) -> float:
    keys = [ranking_keys(s, rank_by) for s in scores]
    if any(key.numel() and bool(key.amax().isnan()) for key in keys):
        raise NotFiniteError("scores contain NaN, so they cannot be ranked")
    return torch.cat([key.to(keys[0].device) for key in keys]).kthvalue(k).values.item()


def _split_pool_(outs, weights, scores, band, num, rank_by) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Remove what is below the band; return (indices, values) of what is in it, and how many of these are to go."""
    num_below, parts = 0, []
    for out, weight, score in zip(outs, weights, scores, strict=True):
        below, indices, values = _split_at_band_(out, weight, score, *band, rank_by)
        num_below += below
        parts.append((indices, values))
    return parts, num - num_below


def _split_at_band_(
    out: Tensor, weight: Tensor, scores: Tensor, low: float, high: float, rank_by: RankBy
) -> tuple[int, Tensor, Tensor]:
    """``out = weight`` where the score is at least ``low``, else 0.

    Returns:
        How many scores are below ``low``; and flat indices (int64) and values (float32) of those from ``low`` to
        ``high``, in index order.
    """
    scores_flat, weight_flat, out_flat = scores.detach().reshape(-1), weight.detach().reshape(-1), out.view(-1)
    numel, device, integer = scores.numel(), scores.device, _INTEGERS[out.element_size()]
    if numel == 0:
        return 0, torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device)
    chunk = min(_CHUNK_NUMEL, numel) if device.type == "cpu" else numel
    keys_buffer, sign_buffer = torch.empty(chunk, device=device), torch.empty(chunk, device=device)
    band_buffer = torch.empty(chunk, dtype=torch.bool, device=device)
    just_below = torch.nextafter(torch.tensor(low), torch.tensor(-math.inf)).to(device)
    num_below, indices, values = 0, [], []
    for start in range(0, numel, chunk):
        part = slice(start, min(start + chunk, numel))
        here = slice(0, part.stop - start)
        keys = keys_buffer[here]
        if rank_by == "abs":
            torch.abs(scores_flat[part], out=keys)
        else:
            keys = scores_flat[part].float()
        if bool(keys.amax().isnan()):
            raise NotFiniteError("scores contain NaN, so they cannot be ranked")
        source = weight_flat[part].to(out.dtype)
        in_band = torch.le(keys, high, out=band_buffer[here])
        if low == -math.inf:
            out_flat[part] = source
        else:
            # The sign bit of (just_below - key), spread over all bits, is 1...1 where an entry stays and 0 where it
            # goes. An AND leaves +0 behind, where a product would leave -0 or NaN; it is much faster than torch.where.
            stays = torch.sub(just_below, keys, out=sign_buffer[here]).view(torch.int32)
            torch.bitwise_right_shift(stays, 31, out=stays)
            torch.bitwise_and(source.view(integer), stays.to(integer), out=out_flat[part].view(integer))
            # A sum of -1, one for each that stays; exact in int32, and ten times faster than counting flags.
            num_below += len(keys) + int(stays.sum(dtype=torch.int32))
            in_band.view(torch.int8).bitwise_and_(stays.to(torch.int8))
        found = _nonzero_of_few(in_band)
        indices.append(found + start)
        values.append(keys[found])
    return num_below, torch.cat(indices), torch.cat(values)


def _nonzero_of_few(flags: Tensor) -> Tensor:
    """Indices of the few True entries of a flat bool tensor; looks at eight flags at once."""
    if len(flags) % 8:
        return flags.nonzero().squeeze(1)
    groups = flags.view(torch.int64).nonzero()
    candidates = (groups * 8 + torch.arange(8, device=flags.device)).view(-1)
    return candidates[flags[candidates]]


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
    return _highest(keys, num, "signed")


def _highest(scores: Sequence[Tensor], num: int, rank_by: RankBy) -> list[Tensor]:
    masks = [torch.empty(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    keep_highest_(masks, [s.new_ones((), dtype=torch.bool).expand(s.numel()) for s in scores], scores, num, rank_by)
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
    return _highest(scores, num_removed(sum(s.numel() for s in scores), sparsity), rank_by)


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
    num_inputs: int | None = None,
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
        num_inputs: in_features; default: the last dimension of ``weight``.
    """
    shape = weight.shape
    if kind == "normal":
        scores = torch.empty(shape).normal_(0.0, std, generator=generator)
    elif kind == "kaiming_uniform":
        bound = 1.0 / math.sqrt(num_inputs or shape[-1])
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
        rows = max(1, _CHUNK_NUMEL // max(1, scores[0].numel())) if scores.device.type == "cpu" else len(scores)
        for start in range(0, len(scores), rows):
            part = slice(start, start + rows)
            weight_gradient[part].mul_(torch.sign(scores[part]))
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
