"""The functions of :mod:`maskft.masking`, faster and in place; masks and gradients are the same, bit for bit.

Selection is one pass over the scores instead of a sort. A sample gives a narrow band in which the cut very probably
lies; on a CPU, counting the scores below its middle makes it narrower still. The pass removes all entries below the
band and collects those inside it, and only these few are ranked. From one optimizer step to the next the band lies
around the last cut. Counting proves that a band holds the cut; if none does, the cut is selected from all scores. So
the result never depends on the sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from maskft_common.errors import UserError

from ..masking import RankBy, check_not_nan, kth_smallest, ranking_keys, remove_lowest

# Entries processed together on a CPU: few enough that intermediate values stay in the cache.
CHUNK_NUMEL = 1 << 19
# A matrix of fewer entries is ranked without a sample.
_SAMPLED_MIN_NUMEL = 1 << 14
# A band of fewer entries is narrow enough.
_NARROWED_MIN_NUMEL = 1 << 12
# Keys of a chunk are laid out in so many rows, and searched by columns: see _find_in_band.
_ROWS = 32
# Integers of the size of a float, by bytes: their bits are copied with AND.
_INTEGERS = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}


class Near(NamedTuple):
    """Where the cut was, and where to look for the next one.

    Attributes:
        cut: The latest cut.
        reach: How far from it the next one is expected.
        band: Bounds between which to look first; None: so many scores lie there that a sample is cheaper.
    """

    cut: float
    reach: float
    band: tuple[float, float] | None


def mask_without_lowest(
    scores: Tensor,
    num: int,
    rank_by: RankBy = "abs",
) -> Tensor:
    """Bool mask, True = keep, that removes the ``num`` lowest of ``scores``."""
    mask = torch.empty(
        scores.shape,
        dtype=torch.bool,
        device=scores.device,
    )
    # The mask of a matrix is the masked weight of a matrix of True, of which memory holds one entry.
    one = scores.new_ones((), dtype=torch.bool)
    ones = one.expand(scores.numel())
    keep_highest_(mask, ones, scores, num, rank_by)
    return mask


def keep_above_(
    out: Tensor,
    weight: Tensor,
    scores: Tensor,
    cut: float,
    rank_by: RankBy = "abs",
) -> None:
    """Write into ``out`` (contiguous) the ``weight``, +0 where the ranking value is not above ``cut``."""
    # _split_ keeps entries of at least its lower bound.
    low = _next_float32(cut, math.inf).item()
    # With -inf above it the band is empty, and nothing is searched.
    band = (low, -math.inf)
    _split_(out, weight, scores, band, rank_by)


@torch.no_grad()
def keep_highest_(
    out: Tensor,
    weight: Tensor,
    scores: Tensor,
    num: int,
    rank_by: RankBy = "abs",
    near: Near | None = None,
) -> Near | None:
    """Write into ``out`` the ``weight`` without the ``num`` entries that have the lowest scores.

    Args:
        out: Where to write, contiguous. A removed entry is exactly +0, whatever the weight is.
        weight: The weight, any dtype; converted to the dtype of ``out``.
        scores: Ranking values, ranked in float32.
        num: How many entries to remove. Among equal scores the first in index order go first.
        rank_by: ``abs`` ranks by magnitude, ``signed`` by value.
        near: Return value of the previous call, if scores have changed little since: saves the sample.

    Returns:
        Where to look first in the next call.

    Raises:
        UserError: If a score is NaN.
    """
    total = scores.numel()
    if not 0 <= num <= total:
        raise UserError(f"cannot remove {num} of {total} entries")
    if total == 0:
        return None

    # The first band that holds the cut: as many entries as are below it, or a few more, have to go.
    last_band = [near.band] if near and near.band else []
    for band in chain(last_band, _probable_bands(scores, num, rank_by)):
        num_below, indices, values = _split_(out, weight, scores, band, rank_by)
        if num_below <= num <= num_below + len(values):
            break
    else:
        # None does. The plain way, over all scores: the band is the cut itself, with all that tie there.
        cut = _kth_smallest(scores, max(num, 1), rank_by)
        band = (cut, cut)
        num_below, indices, values = _split_(out, weight, scores, band, rank_by)

    if num == num_below:  # no entry of the band goes, so that it shows no new cut
        return near
    # Entries below the band are gone; of those in the band, the lowest go too.
    keep = remove_lowest(values, num - num_below)
    out.view(-1)[indices[~keep]] = 0

    # The next call looks around the highest score that went.
    cut = values[~keep].amax().item()
    share = len(values) / total
    return _near(near, band, cut, share)


def _near(
    last: Near | None,
    band: tuple[float, float],
    cut: float,
    share: float,
) -> Near:
    """Where to look next, given the ``share`` of all scores that lay in the ``band`` around the ``cut``."""
    width = band[1] - band[0]
    reach = 0.4 * width
    if last is not None and math.isfinite(last.reach):
        # Three times the latest move; the band narrows slowly where the cut rests.
        move = abs(cut - last.cut)
        reach = max(3 * move, 0.8 * last.reach)
    if not 0 < reach < math.inf:
        return Near(cut, reach, None)
    # The next band would hold more than 1/256 of all scores, so that a sample costs less. Not as a quotient: the width
    # is 0 where all scores of a matrix were ranked.
    if 2 * reach * share * 256 > width:
        return Near(cut, reach, None)
    # Rounded as the keys are, which are compared in float32.
    bounds = torch.tensor([cut - reach, cut + reach], dtype=torch.float32, device="cpu")
    low, high = bounds.tolist()
    return Near(cut, reach, (low, high))


def _probable_bands(
    scores: Tensor,
    num: int,
    rank_by: RankBy,
) -> Iterator[tuple[float, float]]:
    """Bounds between which the ``num``-th smallest score very probably lies; none for a matrix not worth sampling."""
    total = scores.numel()
    if total < _SAMPLED_MIN_NUMEL:
        return
    # Of n entries, n^(2/3) are sampled: the sample then costs as little as ranking the entries in its band. An odd
    # stride (`| 1` makes it odd) visits every column of a matrix whose width is a power of two.
    stride = int(total ** (1 / 3)) | 1
    flat = scores.detach().reshape(-1)
    sample = ranking_keys(flat[::stride], rank_by)

    # The rank of the cut in the sample is binomial: the band is four standard deviations to each side.
    share = num / total
    num_sampled = len(sample)
    expected = share * num_sampled
    variance = num_sampled * share * (1 - share)
    spread = 4 * math.sqrt(variance) + 2
    first = int(expected - spread)
    last = int(expected + spread)
    # Without a bound where it would lie outside of the sample.
    low = -math.inf
    high = math.inf
    if first >= 1:
        low = kth_smallest(sample, first).item()
    if last <= num_sampled:
        high = kth_smallest(sample, last).item()

    num_in_band = (last - first) * stride
    is_bounded = -math.inf < low < high < math.inf
    is_wide = num_in_band >= _NARROWED_MIN_NUMEL and is_bounded
    if is_wide and scores.device.type == "cpu":
        # A narrower band, from the exact number of scores below the middle of this one, and from its density.
        middle = (low + high) / 2
        density = num_in_band / (high - low)
        excess = num - _num_below(scores, middle, rank_by)
        # Four standard deviations again, of the number of scores between the middle and the cut and of the density.
        error_of_number = math.sqrt(abs(excess))
        error_of_density = abs(excess) / math.sqrt(last - first)
        margin = 4 * (error_of_number + error_of_density) + _ROWS

        bounds = [
            middle + (excess - margin) / density,
            middle + (excess + margin) / density,
        ]
        # Rounded as the keys are, which are compared in float32.
        rounded = torch.tensor(bounds, dtype=torch.float32, device="cpu")
        narrow_low, narrow_high = rounded.tolist()
        yield max(low, narrow_low), min(high, narrow_high)

    # The wide band, for a caller that did not find the cut in the narrow one.
    yield low, high


def _num_below(
    scores: Tensor,
    value: float,
    rank_by: RankBy,
) -> int:
    """How many scores of a matrix rank below ``value``."""
    flat = scores.detach().reshape(-1)
    found = 0
    # One buffer for all chunks, so that it stays in the cache.
    longest = min(CHUNK_NUMEL, len(flat))
    buffer = torch.empty(longest, dtype=torch.float32, device="cpu")
    for chunk in flat.split(CHUNK_NUMEL):
        below = buffer[: len(chunk)]
        if rank_by == "abs":
            keys = torch.abs(chunk, out=below)
        else:
            keys = chunk.float()

        # The sign bit of (key - value), spread over all bits, is -1 where a key is below: a sum counts them. The plain
        # way, (keys < value).sum(), counts flags, which is ten times slower.
        differences = torch.sub(keys, value, out=below)
        signs = differences.view(torch.int32)
        torch.bitwise_right_shift(signs, 31, out=signs)
        found -= int(signs.sum(dtype=torch.int32))
    return found


def _kth_smallest(
    scores: Tensor,
    k: int,
    rank_by: RankBy,
) -> float:
    """The ``k``-th smallest ranking value, counted from 1; raises if a score is NaN."""
    keys = ranking_keys(scores, rank_by)
    check_not_nan(keys)
    return kth_smallest(keys, k).item()


def _next_float32(value: float, towards: float) -> Tensor:
    """The float32 number next to ``value``, on the CPU."""
    # With a dtype and a device, because users may have set other defaults.
    start = torch.tensor(value, dtype=torch.float32, device="cpu")
    end = torch.tensor(towards, dtype=torch.float32, device="cpu")
    return torch.nextafter(start, end)


def _split_(
    out: Tensor,
    weight: Tensor,
    scores: Tensor,
    band: tuple[float, float],
    rank_by: RankBy,
) -> tuple[int, Tensor, Tensor]:
    """``out = weight`` where the score is at least the lower bound of the ``band``, else 0.

    Returns:
        How many scores are below the band; and flat indices (int64) and values (float32) of those in it, in index
        order. A band whose bounds are in the wrong order is empty.
    """
    low, high = band
    scores_flat = scores.detach().reshape(-1)
    weight_flat = weight.detach().reshape(-1)
    out_flat = out.view(-1)
    numel = scores.numel()
    device = scores.device
    integer = _INTEGERS[weight.element_size()]

    num_below = 0
    # Each begins with an empty tensor, because torch.cat takes no empty list.
    indices = [scores_flat.new_empty(0, dtype=torch.int64)]
    values = [torch.empty(0, dtype=torch.float32, device=device)]

    # One chunk after the other on a CPU, the whole matrix on a GPU.
    chunk = numel
    if device.type == "cpu":
        chunk = min(CHUNK_NUMEL, numel)
    # Without scores, too, range() below needs a step of at least 1.
    chunk = max(1, chunk)
    keys_buffer = torch.empty(chunk, dtype=torch.float32, device=device)
    sign_buffer = torch.empty(chunk, dtype=torch.float32, device=device)
    # A key is in the band or above where it is greater than the float below the band.
    just_below = _next_float32(low, -math.inf)
    distance = just_below - high
    furthest = int(distance.view(torch.int32))
    just_below = just_below.to(device)

    for start in range(0, numel, chunk):
        # The same entries in the matrices, and in the buffers. The last chunk may be shorter.
        end = min(start + chunk, numel)
        part = slice(start, end)
        here = slice(0, end - start)
        if rank_by == "abs":
            keys = torch.abs(scores_flat[part], out=keys_buffer[here])
        else:
            keys = scores_flat[part].float()
        check_not_nan(keys.amax())  # NaN wins in amax

        # The sign bit of (just_below - key), spread over all bits, is 1...1 where an entry stays and 0 where it goes.
        # An AND leaves +0 behind, where a product would leave -0 or NaN; it is much faster than torch.where.
        differences = torch.sub(just_below, keys, out=sign_buffer[here])
        signs = differences.view(torch.int32)
        if low <= high:
            found = _find_in_band(keys, low, high, signs, furthest)
            indices.append(found + start)
            values.append(keys[found])
        if low == -math.inf:
            # Nothing is below -inf, where the difference above is NaN for a key of -inf.
            stays = signs.fill_(-1)
        else:
            stays = torch.bitwise_right_shift(signs, 31, out=signs)
        # A sum of -1, one for each that stays; exact in int32, and ten times faster than counting flags.
        minus_num_kept = int(stays.sum(dtype=torch.int32))
        num_below += len(keys) + minus_num_kept

        # The bits of the weight where an entry stays, and no bit where it goes.
        stays = stays.to(integer)
        bits = weight_flat[part].view(integer)
        if out.dtype == weight.dtype:
            out_bits = out_flat[part].view(integer)
            torch.bitwise_and(bits, stays, out=out_bits)
        else:
            # In the dtype of the weight first, which the assignment then converts.
            kept_bits = stays.bitwise_and_(bits)
            out_flat[part] = kept_bits.view(weight.dtype)
    return num_below, torch.cat(indices), torch.cat(values)


def _find_in_band(
    keys: Tensor,
    low: float,
    high: float,
    signs: Tensor,
    furthest: int,
) -> Tensor:
    """Indices of the few keys from ``low`` to ``high``, in order.

    The plain way, flags of all keys, would cost more than the rest of a refresh. So the keys are laid out in a few
    rows, and only columns that hold a key in the band are searched. ``signs`` has the bits of (the float below ``low``)
    minus each key, a difference that rounds in the order of the keys, and ``furthest`` those for ``high``: of negative
    floats, the closer one is to 0, the lower its bits are as an integer.
    """
    # The plain way, for a chunk of another size and for a band that begins at -inf, whose differences are not finite.
    if len(keys) % _ROWS or low == -math.inf:
        is_in_band = (keys >= low) & (keys <= high)
        return is_in_band.nonzero().squeeze(1)

    # A column may hold a key in the band if its lowest bits are not above those of `high`: keys below the band have
    # positive differences, whose bits are above those of all negative ones.
    num_columns = len(keys) // _ROWS
    lowest = signs.view(_ROWS, -1).amin(0)
    columns = (lowest <= furthest).nonzero().squeeze(1)
    matrix = keys.view(_ROWS, -1)
    close = matrix.index_select(1, columns)
    is_in_band = (close >= low) & (close <= high)
    row, column = is_in_band.nonzero(as_tuple=True)
    # nonzero() goes row by row, so that these indices are in order.
    return row * num_columns + columns[column]


def score_gradient_(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    rank_by: RankBy,
) -> Tensor:
    """:func:`maskft.masking.score_gradient`, written into ``grad`` (float32)."""
    grad.mul_(weight)
    if rank_by == "abs":
        grad.mul_(torch.sign(scores))
    return grad


def row_parts(matrix: Tensor) -> list[slice]:
    """Some rows at a time, few enough for the cache on a CPU; multiples of 32, where vector instructions end."""
    num_rows = len(matrix)
    if matrix.device.type == "cpu":
        numel_of_row = max(1, matrix[:1].numel())
        rows_in_cache = CHUNK_NUMEL // numel_of_row
        step = max(32, rows_in_cache // 32 * 32)
    else:
        step = max(1, num_rows)
    # The last part may be shorter, as slices end with the matrix.
    starts = range(0, num_rows, step)
    return [slice(start, start + step) for start in starts]
