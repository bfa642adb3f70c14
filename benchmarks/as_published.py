"""The method as its paper and its authors' description have it: the scores are sorted in every forward pass.

Written from the equations (2), (4), (5); the slow side of the benchmarks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, sparsity: float) -> Tensor:
        """1 for the highest scores, 0 for the rest, by sorting."""
        # Stable, so that equal scores are removed in the order of their places, as ours are.
        num_removed = round(sparsity * scores.numel())
        order = scores.flatten().sort(stable=True).indices
        mask = torch.ones_like(scores)
        mask.view(-1)[order[:num_removed]] = 0.0
        return mask

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Straight through."""
        return grad, None


class SortingMaskedLinear(nn.Module):
    """``y = x (W * m)^T + b`` with the mask computed in every forward pass.

    Args:
        linear: The layer to mask; its weight is frozen.
        sparsity: Fraction removed; the scores start as N(0, 0.02).
    """

    def __init__(self, linear: nn.Linear, sparsity: float):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.sparsity = sparsity
        self.scores = nn.Parameter(torch.randn_like(linear.weight) * 0.02)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Map x (..., I) to (..., O)."""
        # Every forward pass sorts again, also under gradient accumulation, when the scores have not changed.
        mask_OI = _TopK.apply(self.scores.abs(), self.sparsity)
        return F.linear(x_TI, self.linear.weight * mask_OI, self.linear.bias)
