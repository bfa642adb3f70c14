"""Masked layers under ``torch.compile``: the masked weight is an input of the graph and is refreshed outside of it.

Refreshing reads versions and counts that a graph cannot hold. So it is done when the graph is traced, after every
optimizer step of torch, and when adapters, progress or training mode change. Loading scores or giving them a start
drops the weight, and the graph is traced again. Other writes, such as a step by hand, need ``layer.masker.forget()``.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from maskft_common.errors import UserError

from ..masking import RankBy, score_gradient

if TYPE_CHECKING:
    from .masker import FastMasker

# All maskers by their numbers, while their layers live.
_maskers: WeakValueDictionary[int, FastMasker] = WeakValueDictionary()
# The numbers of those whose weight a graph reads.
_in_graphs: set[int] = set()
_numbers = itertools.count(1)


def register(masker: FastMasker) -> int:
    """A number by which a graph names ``masker``: a graph can hold numbers, not objects."""
    # Never used again: a graph may live longer than the layer that it was traced with.
    number = next(_numbers)
    _maskers[number] = masker
    return number


def is_in_graph(masker: FastMasker) -> bool:
    """Whether a graph reads the weight of ``masker``."""
    return masker.number in _in_graphs


def is_supported(masker: FastMasker, names: list[str]) -> bool:
    """Whether the masked weight can be an input of a graph: one mask; if it has scores, no price, and float weights.

    The gradient of a price is added once per optimizer step, which a graph cannot count. That of the scores reads the
    weight of the layer, which a quantised one has as codes.
    """
    if len(names) != 1:
        return False
    name = names[0]
    layer = masker.layer
    # A mask that was loaded for inference has no gradient.
    if name not in layer.mask_scores:
        return True
    return not layer.mask_configs[name].price and layer.quantization_backend is None


def linear(
    masker: FastMasker,
    x: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    """Map x (..., I) to (..., O) with the weight that is up to date; x and bias have the ``dtype``."""
    layer = masker.layer
    # The arguments of a function whose result is a constant have to be constants: numbers and text. The training mode
    # is among them so that the graph depends on it.
    dtype_name = str(dtype).removeprefix("torch.")
    _refresh_at_trace(masker.number, dtype_name, layer.training)
    weight = cast(Tensor, masker.value)

    # The plain way would compute the masked weight here. A graph cannot: selection reads numbers off the scores, so
    # the graph takes the weight as it is, and only the way back to the scores is a part of it.
    scores = layer.mask_scores[name] if name in layer.mask_scores else None
    if scores is not None and scores.requires_grad and torch.is_grad_enabled():
        masked = _StraightThrough.apply(
            weight,
            scores,
            layer.weight,
            masker.slopes.get(name),
            layer.removed_values.get(name),
            layer.mask_configs[name].ranks_by,
        )
        weight = cast(Tensor, masked)
    # F.linear takes (O, I); GPT-2's Conv1D stores (I, O).
    if layer.is_transposed:
        weight = weight.t()
    return F.linear(x, weight, bias)


class _StraightThrough(torch.autograd.Function):
    """The masked weight, whose gradient goes to the scores: ``dL/dW_eff * (W - R) * sign(scores) * slope``."""

    @staticmethod
    def forward(
        ctx: Any,
        masked: Tensor,
        scores: Tensor,
        weight: Tensor,
        slope: Tensor | None,
        removed_value: Tensor | None,
        ranks_by: RankBy,
    ) -> Tensor:
        # save_for_backward of a graph takes no None. The order is that in which backward() takes them out.
        optional = [tensor for tensor in (slope, removed_value) if tensor is not None]
        ctx.save_for_backward(scores, weight, *optional)
        ctx.has_slope = slope is not None
        ctx.ranks_by = ranks_by
        # A view: torch treats an input that is returned as it is in a special way.
        return masked.view_as(masked)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, weight, *optional = ctx.saved_tensors
        slope = optional.pop(0) if ctx.has_slope else None
        # The removed value, if there is one, is all that is left.
        difference = weight - optional[0] if optional else weight
        grad = grad.to(torch.float32)
        gradient = score_gradient(grad, difference, scores, ctx.ranks_by)
        if slope is not None:
            gradient = gradient * slope
        # One value for each argument of forward(); only the scores have a gradient.
        return None, gradient, None, None, None, None


@torch.compiler.assume_constant_result
def _refresh_at_trace(
    number: int,
    dtype: str,
    is_training: bool,
) -> bool:
    """Bring the weight of a layer up to date; runs while a graph is traced, and is not part of it."""
    if torch.compiler.is_exporting():
        raise UserError("a model with a mask cannot be exported; merge it first: model.merge_and_unload()")

    masker = _maskers[number]
    masker.weight(getattr(torch, dtype))
    masker.add_hard_slopes()
    # From now on the weight is refreshed after every optimizer step.
    _in_graphs.add(number)
    return True


def refresh_graphs() -> None:
    """Bring the weights that graphs read up to date."""
    # A copy, because the loop removes entries.
    for number in list(_in_graphs):
        masker = _maskers.get(number)
        if masker is None:  # its layer is gone
            _in_graphs.discard(number)
        else:
            masker.refresh()
