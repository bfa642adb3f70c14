"""Maps of masks for a page: what is removed of each matrix, entry by entry where it fits, else block by block."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_BYTES = 400_000  # of all maps in a page, before base64


def mask_maps(masks: Mapping[str, Any], max_bytes: int = MAX_BYTES) -> list[dict[str, Any]]:
    """Maps of all matrices of a mask (name -> bool tensor, True = keep), all at one size of blocks.

    Returns:
        Per matrix ``name``, ``shape``, ``block`` (side in entries), ``size`` (rows and columns of blocks), ``share``
        removed in [0, 1], ``high`` (largest share of a block), and ``data``, base64: for blocks of one entry a bit
        each, 1 = removed, rows one after another; else a byte each, 255 = ``high``.
    """
    arrays = {name: ~np.asarray(mask) for name, mask in masks.items()}
    block = block_side([array.shape for array in arrays.values()], max_bytes)
    return [{"name": name, **_map(removed, block)} for name, removed in arrays.items()]


def block_side(shapes: list[tuple[int, ...]], max_bytes: int) -> int:
    """Smallest side of a block, in entries, with which the maps of matrices of these shapes take ``max_bytes``."""
    if sum(rows * columns for rows, columns in shapes) <= 8 * max_bytes:
        return 1
    block = 2
    while sum(math.ceil(rows / block) * math.ceil(columns / block) for rows, columns in shapes) > max_bytes:
        block += max(1, block // 8)
    return block


def _map(removed: np.ndarray, block: int) -> dict[str, Any]:
    shares = _block_shares(removed, block)
    high = float(shares.max())
    data = np.packbits(removed) if block == 1 else np.round(255 * shares / (high or 1.0)).astype(np.uint8)
    return {
        "shape": list(removed.shape),
        "block": block,
        "size": list(shares.shape),
        "share": float(removed.mean()),
        "high": high,
        "data": base64.b64encode(data.tobytes()).decode(),
    }


def _block_shares(removed: np.ndarray, block: int) -> np.ndarray:
    """Share removed of each block; those at the right and lower edge may be smaller."""
    rows, columns = (np.arange(0, size, block) for size in removed.shape)
    sums = np.add.reduceat(np.add.reduceat(removed.astype(np.int64), rows, axis=0), columns, axis=1)
    heights, widths = (np.diff([*starts, size]) for starts, size in zip((rows, columns), removed.shape, strict=True))
    return sums / np.outer(heights, widths)


def maps_of_adapter(folder: str, max_bytes: int = MAX_BYTES) -> list[dict[str, Any]]:
    """Maps of a saved mask."""
    from maskft.adapter.mask_set import MaskSet  # torch: a report of results without adapters takes seconds without it

    return mask_maps(MaskSet.from_adapter(folder), max_bytes)
