"""Mask Fine-Tuning (https://arxiv.org/abs/2503.22764) in plain torch: scores in, mask out, gradient straight through.

    I' = F[I; W * v(c)]               Eq. 4: v gives 1 to the entries with the highest scores c, and 0 to the others
    dL/dc = dL/d(W * v(c)) * W        Eq. 5: v counts as the identity on the way back

The scores c are trained, the weight W never is. As in the published code, scores are ranked by magnitude, v(|c|)
(edge-popup, https://arxiv.org/abs/1911.13299), so that Eq. 5 gains a factor d|c|/dc = sign(c).

A mask is a bool tensor of the weight's shape, **True = keep**. ``sparsity`` is the fraction of weights that is
*removed*, in [0, 1). Ranking happens in float32; the count is exact and ties are stable, of equal scores the first in
index order goes first (the published code has neither). ``fast/selection.py`` computes the same masks faster; other
learners are in ``tuner/selection.py``.

Shapes: a weight and its scores are (O, I) = (out_features, in_features), or (I, O) for GPT-2's ``Conv1D``.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from maskft_common.errors import NotFiniteError, UserError

# Literals, from which command lines and configurations take their choices.
RankBy = Literal["abs", "signed"]
ScoreStart = Literal["normal", "constant", "magnitude", "wanda"]


def topk_mask(
    scores: Tensor,
    sparsity: float,
    rank_by: RankBy = "abs",
) -> Tensor:
    """Keep the entries with the highest scores of one matrix and remove the rest (Eq. 4).

    Args:
        scores: Ranking values, any shape.
        sparsity: Fraction of entries to remove, in [0, 1).
        rank_by: ``abs`` ranks by magnitude (as published), ``signed`` by value.

    Returns:
        Bool mask, shape and device of ``scores``; True = keep; exactly ``num_removed`` entries are False.

    Raises:
        UserError: If ``sparsity`` is outside [0, 1), ``rank_by`` is another word, or a score is NaN.

    Example:
        >>> topk_mask(torch.tensor([0.3, -0.1, 0.2, -0.4]), sparsity=0.25)
        tensor([ True, False,  True,  True])
    """
    if rank_by not in get_args(RankBy):
        raise UserError(f"rank_by is {rank_by!r}; it must be {' or '.join(get_args(RankBy))}")
    keys = ranking_keys(scores, rank_by)
    num = num_removed(scores.numel(), sparsity)
    mask = remove_lowest(keys, num)
    return mask.view(scores.shape)


def kth_smallest(keys: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest of the flat ``keys``, counted from 1, as a tensor without dimensions."""
    # kthvalue on a GPU is refused by torch before 2.10 where algorithms must be deterministic: of equal keys it gives
    # any index. Their value, which is all that is used here, is the same.
    if keys.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return keys.sort().values[k - 1]
    return keys.kthvalue(k).values


def remove_lowest(keys: Tensor, num: int) -> Tensor:
    """Mask of the flat float32 ``keys`` that removes exactly the ``num`` lowest; of equal ones the first go first."""
    check_not_nan(keys)  # kthvalue would rank NaN above every number
    # kthvalue counts from 1, and has no zeroth value.
    if num == 0:
        return torch.ones_like(keys, dtype=torch.bool)
    cut = kth_smallest(keys, num)
    mask = keys > cut

    # So far all keys equal to the cut are removed. Only the first of them are to go, as many as are missing in `num`;
    # the others are kept. The plain way, a stable sort of all keys, would rank far more than is asked.
    num_below = int((keys < cut).sum())
    is_tie = keys == cut
    ties = is_tie.nonzero().squeeze(1)
    num_ties_removed = num - num_below
    mask[ties[num_ties_removed:]] = True
    return mask


def score_gradient(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    rank_by: RankBy = "abs",
) -> Tensor:
    """Gradient of the loss with respect to the scores, out of ``grad`` = dL/d(masked weight) (Eq. 5).

    It is nonzero at removed entries too, which is how a removed weight can come back.
    """
    gradient = grad.float() * weight
    # d|c|/dc, which torch takes as 0 at c = 0.
    if rank_by == "abs":
        gradient = gradient * torch.sign(scores)
    return gradient


def check_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` if it is a fraction removed in [0, 1), else raise :class:`UserError`."""
    # In Python a bool is an int, and False would pass for 0.
    is_bool = isinstance(sparsity, bool)
    is_number = isinstance(sparsity, int | float) and not is_bool
    if not is_number or not 0.0 <= sparsity < 1.0:
        raise UserError(
            f"sparsity is {sparsity!r}; it is the fraction of weights removed and must be in [0, 1): 0.1 removes 10 %"
        )
    return float(sparsity)


def num_removed(numel: int, sparsity: float) -> int:
    """Number of entries a mask of ``numel`` entries removes: ``round(sparsity * numel)``, as torch's pruning rounds."""
    share = check_sparsity(sparsity)
    return round(share * numel)


def ranking_keys(scores: Tensor, rank_by: RankBy = "abs") -> Tensor:
    """Values by which entries are ranked: float32, flat, in index order whatever the memory layout of ``scores``."""
    # reshape and not view: it copies where the layout of the memory is not the order of the indices.
    flat = scores.detach().reshape(-1).float()
    if rank_by == "abs":
        return flat.abs()
    # Adding 0.0 turns -0.0 into 0.0, so that equal keys have equal bits.
    return flat + 0.0


def check_not_nan(keys: Tensor) -> Tensor:
    """Return ``keys``, or raise if one is NaN, which cannot be ranked."""
    if bool(keys.isnan().any()):
        raise NotFiniteError("scores contain NaN, so they cannot be ranked")
    return keys


def initial_scores(
    weight: Tensor,
    start: ScoreStart,
    generator: torch.Generator,
    std: float = 0.02,
    value: float = 0.0,
) -> Tensor:
    """Scores to start from: float32, shape and device of ``weight``.

    Args:
        weight: The frozen weight.
        start: ``normal``: N(0, std), as published; ``constant``: ``value`` everywhere; ``magnitude``:
            :func:`spread_by_rank` of abs(weight), so that the first mask is the magnitude mask. The other starts need
            data, see ``tuner.start_scores``.
        generator: CPU generator; the draw does not depend on the device of ``weight``.
        std: Standard deviation of ``normal`` and ``magnitude``, > 0.
        value: Value of ``constant``.
    """
    # Ordered by the weight; nothing is drawn.
    if start == "magnitude":
        magnitude = weight.detach().float().abs()
        return spread_by_rank(magnitude, std)

    # On the CPU, so that the draw does not depend on the device.
    scores = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    if start == "normal":
        scores.normal_(0.0, std, generator=generator)
    else:
        scores.fill_(value)
    return scores.to(weight.device)


def spread_by_rank(keys: Tensor, std: float) -> Tensor:
    """Scores in the order of ``keys`` (ties in index order), evenly over (0, std * sqrt(12)): the lowest go first."""
    # order[r] is the index of the r-th smallest key.
    ranked = ranking_keys(keys, "signed")
    order = ranked.argsort(stable=True).cpu()
    num = len(order)
    # A uniform distribution on (0, w) has the standard deviation w / sqrt(12).
    step = std * math.sqrt(12) / num
    # In float64, because float32 cannot count beyond 2^24 entries.
    ranks = torch.arange(1, num + 1, dtype=torch.float64, device="cpu")
    values = ranks * step

    # The entry with the lowest key gets the lowest value, and so on.
    scores = torch.empty(keys.shape, dtype=torch.float32, device="cpu")
    flat = scores.view(-1)
    flat[order] = values.float()
    return scores.to(keys.device)
