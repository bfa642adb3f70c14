"""Arithmetic on weights that keeps every bit of the entries it does not change."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def lerp(
    start: Tensor,
    end: Tensor,
    share: float,
    out: Tensor | None = None,
) -> Tensor:
    """``start + share * (end - start)``, bit for bit ``start`` or ``end`` where there is nothing to mix.

    ``torch.lerp`` computes -0.0 + share * 0.0 = +0.0 for two entries of -0.0, and NaN for two equal infinities. Weights
    dequantised from GGUF hold many -0.0, and fingerprints compare bits.

    Args:
        start: Weights for a share of 0.
        end: Weights for a share of 1; shape, dtype and device of ``start``.
        share: In [0, 1].
        out: Where the result goes; may be ``start`` or ``end``. Default: a new tensor.

    Returns:
        The result: ``start`` for a share of 0, ``end`` for a share of 1, and else ``start`` where the two are equal.
    """
    if out is None:
        out = torch.empty_like(start)
    # Copies, which keep every bit; `start + 1 * (end - start)` would round.
    if share == 0:
        return out.copy_(start)
    if share == 1:
        return out.copy_(end)

    # Compared before anything is written: out may be one of the two.
    is_equal = start == end
    if out is start:
        start = start.clone()
    torch.lerp(start, end, share, out=out)  # noqa: TID251
    # Equal entries are taken from start, with every bit.
    return torch.where(is_equal, start, out, out=out)


@torch.no_grad()
def write_part(
    parameter: Tensor,
    start: Tensor,
    end: Tensor,
    part: float,
) -> None:
    """Write ``lerp(start, end, part)`` into a parameter, computed in float32: bfloat16 would round the difference.

    Args:
        parameter: Where it goes.
        start: Its value for a part of 0; shape of ``parameter``, on any device.
        end: Its value for a part of 1; shape of ``parameter``, on any device.
        part: In [0, 1].
    """
    start = start.to(parameter.device).float()
    end = end.to(parameter.device).float()
    # Not through `data`: the version of a tensor tells a masked layer that its scores have changed.
    parameter.copy_(lerp(start, end, part))
