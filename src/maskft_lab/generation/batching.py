"""Batches of similar length, and padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that a batch too large for memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(rows: Sequence[Sequence[int]], value: int, device, side: str = "right") -> tuple[Tensor, Tensor]:
    """Pad rows of token ids to one length; returns ids (B, T) and the attention mask (B, T), both int64."""
    width = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), width), value, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids_BT[index, where] = torch.tensor(list(row), dtype=torch.long)
        mask_BT[index, where] = 1
    return ids_BT.to(device), mask_BT.to(device)
