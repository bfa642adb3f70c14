"""One pass over scores and weights on a GPU: what :mod:`.selection` does with several, bit for bit the same.

Never run on a GPU by its authors, so it is asked for: ``MASKFT_TRITON=1``. Triton's interpreter, which runs it on
CPUs, tests it (``make test-triton``); ``pytest -m gpu tests/tuner/test_triton.py`` compares and times it on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masking import RankBy

BLOCK = 4096
# Places for what is in the band: a band has about numel^(2/3) entries. With more, the caller goes another way.
_MIN_PLACES, _PLACES_OF_NUMEL = 1 << 16, 16


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    out, weight, scores, places, counts, numel, num_places, low, high, BY_SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < numel
    score = tl.load(scores + at, mask=is_there, other=0.0).to(tl.float32)
    key = tl.abs(score) if BY_SIZE else score
    is_below = (key < low) & is_there
    is_in_band = (key >= low) & (key <= high) & is_there
    value = tl.load(weight + at, mask=is_there, other=0.0)
    tl.store(out + at, tl.where(is_below, 0, value), mask=is_there)
    tl.atomic_add(counts, tl.sum(is_below.to(tl.int64)))
    tl.atomic_add(counts + 1, tl.sum(((key != key) & is_there).to(tl.int64)))
    # Blocks end in any order; each takes as many places as it has entries in the band.
    in_band = is_in_band.to(tl.int64)
    place = tl.atomic_add(counts + 2, tl.sum(in_band)) + tl.cumsum(in_band) - 1
    tl.store(places + place, at, mask=is_in_band & (place < num_places))


def split_matrix_(
    out: Tensor, weight: Tensor, scores: Tensor, low: float, high: float, rank_by: RankBy
) -> tuple[int, bool, Tensor | None]:
    """Write ``weight`` into ``out`` where the score is at least ``low``, else +0.

    Args:
        out: Where to write, contiguous, floating or bool.
        weight: As many entries; where its dtype is not that of ``out``, torch converts it first: the
            interpreter would cut off what hardware rounds.
        scores: As many entries, contiguous; compared in float32.
        low: Lower end of the band, exact in float32.
        high: Its upper end.
        rank_by: ``abs`` compares magnitudes, ``signed`` values.

    Returns:
        How many scores are below ``low``; whether one is NaN; and the flat indices (int64, ascending) of those from
        ``low`` to ``high``, None where they are too many.
    """
    numel, weight = scores.numel(), weight.to(out.dtype).contiguous()  # a mask is made of one True, expanded
    if out.dtype == torch.bool:
        out, weight = out.view(torch.uint8), weight.view(torch.uint8)
    places = torch.empty(max(_MIN_PLACES, numel // _PLACES_OF_NUMEL), dtype=torch.int64, device=scores.device)
    counts = torch.zeros(3, dtype=torch.int64, device=scores.device)
    # Triton launches on the current device, which need not be that of the scores.
    with torch.cuda.device(scores.device) if scores.is_cuda else nullcontext():
        _split[(triton.cdiv(numel, BLOCK),)](
            *(out, weight, scores, places, counts, numel, len(places), low, high),
            BY_SIZE=rank_by == "abs",
            BLOCK=BLOCK,
        )
    num_below, num_nan, num_in_band = counts.tolist()
    found = places[:num_in_band].sort().values if num_in_band <= len(places) else None
    return num_below, num_nan > 0, found
