"""Naive versions of what maskft computes, written from the equations and nothing else."""

import math

import torch
from hypothesis import strategies as st

# Few different scores, how many to remove, how they are ranked.
FEW_VALUES = (
    st.lists(
        st.sampled_from([-math.inf, -2.0, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0, 2.0, 3.0, math.inf]), max_size=90
    ),
    st.integers(0, 90),
    st.sampled_from(["abs", "signed"]),
)


def topk_mask(scores, sparsity, rank_by="abs"):
    """Sort everything, remove the first round(sparsity * n)."""
    values = [abs(v) if rank_by == "abs" else v for v in scores.reshape(-1).tolist()]
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    mask = torch.ones(len(values), dtype=torch.bool)
    for i in order[: round(sparsity * len(values))]:
        mask[i] = False
    return mask.view(scores.shape)


def straight_through(weight, scores, mask, rank_by="abs"):
    """Weight times mask; on the way back the mask counts as what is ranked."""
    keys = scores.abs() if rank_by == "abs" else scores
    return (weight.float() * (mask + (keys - keys.detach()))).to(weight.dtype)


def wanda_mask(weight_OI, norms_I, num):
    """Remove the inputs with the smallest abs(weight) * norm of each output, the first outputs one more if uneven."""
    num_outputs = weight_OI.shape[0]
    mask = torch.ones_like(weight_OI, dtype=torch.bool)
    for o in range(num_outputs):
        count = num // num_outputs + (1 if o < num % num_outputs else 0)
        values = [abs(w) * n for w, n in zip(weight_OI[o].tolist(), norms_I.tolist(), strict=True)]
        for i in sorted(range(len(values)), key=lambda i: (values[i], i))[:count]:
            mask[o, i] = False
    return mask


def masked_linear(x_TI, weight_OI, scores_OI, bias_O, mask_OI, grad_TO, rank_by="abs"):
    """Output and every gradient of y = x (W * m)^T + b the mask an identity on the way back (Eq. 5)."""
    effective_OI = weight_OI * mask_OI
    y_TO = x_TI @ effective_OI.T + bias_O
    grad_x_TI = grad_TO @ effective_OI
    sign = torch.sign(scores_OI) if rank_by == "abs" else torch.ones_like(scores_OI)
    grad_scores_OI = (grad_TO.T @ x_TI) * weight_OI * sign
    return y_TO, grad_x_TI, grad_scores_OI


class SortingLinear(torch.nn.Module):
    """A masked layer that sorts its scores in every forward pass and leaves all gradients to autograd."""

    def __init__(self, linear, scores_OI, sparsity):
        super().__init__()
        self.linear, self.scores, self.sparsity = linear, torch.nn.Parameter(scores_OI.clone()), sparsity

    def forward(self, x):
        order = self.scores.detach().abs().flatten().sort(stable=True).indices
        mask = torch.ones_like(self.scores).flatten()
        mask[order[: round(self.sparsity * mask.numel())]] = 0
        mask = _StraightThrough.apply(self.scores.abs(), mask.view_as(self.scores))
        return torch.nn.functional.linear(x, self.linear.weight * mask, self.linear.bias)


class _StraightThrough(torch.autograd.Function):
    """The value of the mask, and the gradient of |scores|."""

    @staticmethod
    def forward(ctx, x, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None
