"""What :mod:`maskft.masking` defines, faster and in place: bit for bit the same masks and gradients.

Selection is one pass over the scores instead of a sort. A sample says in which narrow band the cut must lie (on a CPU,
counting what is below the middle of the band makes it narrower still); the pass removes what is below the band and
collects what is in it; those few are then ranked. Counting proves the band right; where it is not (a sample can be
unlucky), the cut is selected from all scores. The result never depends on the sample.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maskft_base.errors import UserError

from ..masking import RankBy, check_not_nan, num_removed, ranking_keys, remove_lowest

# Entries looked at together on a CPU: few enough that what is computed from them stays in the cache.
CHUNK_NUMEL = 1 << 19
# A pool of fewer entries is ranked without a sample.
_SAMPLED_MIN_NUMEL = 1 << 14
# A band of fewer entries is narrow enough.
_NARROWED_MIN_NUMEL = 1 << 12
# Entries of a chunk that are looked at as one when few are looked for.
_ROWS = 32
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def topk_masks(scores: Sequence[Tensor], sparsity: float, rank_by: RankBy = "abs") -> list[Tensor]:
    """The masks of :func:`maskft.masking.topk_masks`."""
    return remove_lowest_of_pool(scores, num_removed(sum(s.numel() for s in scores), sparsity), rank_by)


def remove_lowest_of_pool(scores: Sequence[Tensor], num: int, rank_by: RankBy = "abs") -> list[Tensor]:
    """Bool masks, True = keep, that remove the ``num`` lowest of the pool of all ``scores``."""
    masks = [torch.empty(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    keep_highest_(masks, [s.new_ones((), dtype=torch.bool).expand(s.numel()) for s in scores], scores, num, rank_by)
    return masks


@torch.no_grad()
def keep_highest_(
    outs: Sequence[Tensor], weights: Sequence[Tensor], scores: Sequence[Tensor], num: int, rank_by: RankBy = "abs"
) -> None:
    """Write into ``outs`` the ``weights`` without the ``num`` that have the lowest scores of the whole pool.

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
    for band in _probable_bands(scores, num, rank_by):
        in_band, num_left = _split_pool_(outs, weights, scores, band, num, rank_by)
        if 0 <= num_left <= sum(len(values) for _, values in in_band):
            break
    else:
        cut = _kth_smallest(scores, max(num, 1), rank_by)
        in_band, num_left = _split_pool_(outs, weights, scores, (cut, cut), num, rank_by)
    if num_left == 0:
        return
    device = in_band[0][1].device
    keep = remove_lowest(torch.cat([values.to(device) for _, values in in_band]), num_left)
    for out, (indices, _), kept in zip(outs, in_band, keep.split([len(v) for _, v in in_band]), strict=True):
        out.view(-1)[indices[~kept.to(indices.device)]] = 0


def _probable_bands(scores: Sequence[Tensor], num: int, rank_by: RankBy) -> Iterator[tuple[float, float]]:
    """Bounds between which the ``num``-th smallest score very probably lies; none for a pool not worth sampling."""
    total = sum(s.numel() for s in scores)
    if total < _SAMPLED_MIN_NUMEL:
        return
    # Of n entries, n^(2/3) are sampled: the sample then costs as little as ranking what lies in its band. An odd stride
    # visits every column of a matrix whose width is a power of two.
    stride = int(total ** (1 / 3)) | 1
    samples = [ranking_keys(s.detach().reshape(-1)[::stride], rank_by) for s in scores]
    sample = torch.cat([sample.to(samples[0].device) for sample in samples])
    share = num / total
    middle, spread = share * len(sample), 4 * math.sqrt(len(sample) * share * (1 - share)) + 2
    first, last = int(middle - spread), int(middle + spread)
    low = sample.kthvalue(first).values.item() if first >= 1 else -math.inf
    high = sample.kthvalue(last).values.item() if last <= len(sample) else math.inf
    num_in_band = (last - first) * stride
    is_wide = num_in_band >= _NARROWED_MIN_NUMEL and -math.inf < low < high < math.inf
    if is_wide and scores[0].device.type == "cpu":
        yield _narrowed(scores, num, low, high, num_in_band, last - first, rank_by)
    yield low, high


def _narrowed(
    scores: Sequence[Tensor], num: int, low: float, high: float, num_in_band: int, num_sampled: int, rank_by: RankBy
) -> tuple[float, float]:
    """A narrower band, from the exact number of scores below the middle of a wider one and its density."""
    middle, density = (low + high) / 2, num_in_band / (high - low)
    excess = num - sum(_num_below(score, middle, rank_by) for score in scores)
    # What lies between the middle and the cut is counted with the error of the sampled density, and with its own.
    margin = 4 * (math.sqrt(abs(excess)) + abs(excess) / math.sqrt(num_sampled)) + _ROWS
    bounds = [middle + (excess - margin) / density, middle + (excess + margin) / density]
    narrow_low, narrow_high = torch.tensor(bounds, dtype=torch.float32).tolist()  # keys are compared in float32
    return max(low, narrow_low), min(high, narrow_high)


def _num_below(scores: Tensor, value: float, rank_by: RankBy) -> int:
    """How many scores of a matrix rank below ``value``."""
    flat, found = scores.detach().reshape(-1), 0
    buffer = torch.empty(min(CHUNK_NUMEL, len(flat)), dtype=torch.float32)
    for chunk in flat.split(CHUNK_NUMEL):
        below = buffer[: len(chunk)]
        keys = torch.abs(chunk, out=below) if rank_by == "abs" else chunk.float()
        signs = torch.sub(keys, value, out=below).view(torch.int32)
        found -= int(torch.bitwise_right_shift(signs, 31, out=signs).sum(dtype=torch.int32))
    return found


def _kth_smallest(scores: Sequence[Tensor], k: int, rank_by: RankBy) -> float:
    keys = torch.cat([ranking_keys(s, rank_by).to(scores[0].device) for s in scores])
    check_not_nan(keys)
    return keys.kthvalue(k).values.item()


def _split_pool_(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    scores: Sequence[Tensor],
    band: tuple[float, float],
    num: int,
    rank_by: RankBy,
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Remove what is below the band; return (indices, values) of what is in it, and how many of these are to go."""
    in_band = []
    for out, weight, score in zip(outs, weights, scores, strict=True):
        num_below, indices, values = _split_matrix_(out, weight, score, *band, rank_by)
        num -= num_below
        in_band.append((indices, values))
    return in_band, num


def _split_matrix_(
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
    if _uses_triton(device):
        from .triton_split import split_matrix_

        num_below, has_nan, found = split_matrix_(out_flat, weight_flat, scores_flat, low, high, rank_by)
        check_not_nan(torch.tensor(math.nan if has_nan else 0.0))
        if found is not None:
            return num_below, found, ranking_keys(scores_flat[found], rank_by)
    chunk = min(CHUNK_NUMEL, numel) if device.type == "cpu" else numel
    keys_buffer, sign_buffer = torch.empty(chunk, device=device), torch.empty(chunk, device=device)
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
        check_not_nan(keys.amax())
        source = weight_flat[part].to(out.dtype)
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
        found = _find_in_band(keys, low, high, sign_buffer[here])
        indices.append(found + start)
        values.append(keys[found])
    return num_below, torch.cat(indices), torch.cat(values)


def _uses_triton(device: torch.device) -> bool:
    """Whether one kernel takes the place of several passes; asked for, as only an interpreter has run it."""
    return device.type == "cuda" and os.environ.get("MASKFT_TRITON") == "1"


def _find_in_band(keys: Tensor, low: float, high: float, scratch: Tensor) -> Tensor:
    """Indices of the few keys from ``low`` to ``high``, in order; ``scratch``, as large as ``keys``, is written to.

    Flags of all keys would cost more than all the rest of a refresh, so the keys are laid out in a few rows, and only
    columns in which one lies close to the middle of the band are looked at.
    """
    if len(keys) % _ROWS or math.isinf(low) or math.isinf(high):
        return ((keys >= low) & (keys <= high)).nonzero().squeeze(1)
    middle = (low + high) / 2
    reach = (high - low) / 2 * 1.001 + abs(middle) * 2**-22 + 2**-126  # float32 rounds differences, and the middle
    distances = torch.sub(keys, middle, out=scratch).abs_().view(_ROWS, -1)
    columns = (distances.amin(0) <= reach).nonzero().squeeze(1)
    close = keys.view(_ROWS, -1)[:, columns]
    row, column = ((close >= low) & (close <= high)).nonzero(as_tuple=True)
    return row * (len(keys) // _ROWS) + columns[column]


def score_gradient_(grad: Tensor, weight: Tensor, scores: Tensor, rank_by: RankBy) -> Tensor:
    """:func:`maskft.masking.score_gradient`, written into ``grad`` (float32)."""
    if rank_by == "signed":
        return grad.mul_(weight)
    for part, sign in _signs(scores.detach()):
        grad[part].mul_(weight[part]).mul_(sign)
    return grad


def write_signed_(out: Tensor, weight: Tensor, scores: Tensor) -> None:
    """Write weight * sign(scores), which is exact in any dtype, into ``out``."""
    for part, sign in _signs(scores.detach()):
        torch.mul(weight[part], sign, out=out[part])


def _signs(scores: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a matrix at a time, few enough for the cache on a CPU, and the signs of their scores, float32."""
    rows = max(1, CHUNK_NUMEL // max(1, scores[0].numel())) if scores.device.type == "cpu" else len(scores)
    buffer = torch.empty_like(scores[:rows], dtype=torch.float32)  # written to again: new memory would cost more
    for start in range(0, len(scores), rows):
        part = slice(start, start + rows)
        yield part, torch.sign(scores[part], out=buffer[: len(scores[part])])
