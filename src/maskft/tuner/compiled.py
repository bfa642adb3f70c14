"""Masked layers under ``torch.compile``: the masked weight is an input of the graph and is refreshed outside of it.

Refreshing reads versions and counts that a graph cannot hold. So it is done when the graph is traced, after every
optimizer step of torch and where another adapter is activated; what loads scores or gives them a start drops the
weight, and the graph is traced again. Other writes, such as a step by hand, need ``layer.effective.forget()``.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from maskft_common.errors import UserError

from ..masking import RankBy, score_gradient
from . import learners
from .effective import add_hard_slopes
from .sharded import is_sharded

if TYPE_CHECKING:
    from .layer import MaskedLinear

_layers: WeakValueDictionary[int, MaskedLinear] = WeakValueDictionary()
_in_graphs: set[int] = set()
_numbers = itertools.count(1)


def register(layer: MaskedLinear) -> int:
    """A number by which a graph names ``layer``."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def is_supported(layer: MaskedLinear, names: list[str]) -> bool:
    """Whether one mask, hard and without a price, falls on a whole matrix; others break the graph."""
    config = layer.mask_configs[names[0]]
    is_plain = len(names) == 1 and config.removed_value == "zero"
    is_whole = not any(map(is_sharded, layer.mask_scores.values()))
    is_hard = names[0] not in layer.mask_scores or not (config.price or learners.has_soft_gate(config))
    return is_plain and is_whole and is_hard


def forward(layer: MaskedLinear, x: Tensor, bias: Tensor | None, dtype: torch.dtype, name: str) -> Tensor:
    """Map x (..., I) to (..., O) with the weight that stands ready; x and bias have the ``dtype``."""
    _refresh_at_trace(layer.number, str(dtype).removeprefix("torch."))
    weight = cast(Tensor, layer.effective.value)
    scores = layer.mask_scores[name] if name in layer.mask_scores else None
    if scores is not None and scores.requires_grad and torch.is_grad_enabled():
        slope, ranks_by = layer.effective.slopes.get(name), layer.mask_configs[name].ranks_by
        weight = cast(Tensor, _StraightThrough.apply(weight, scores, layer.weight, slope, ranks_by))
    return F.linear(x, weight.t() if layer.is_transposed else weight, bias)


class _StraightThrough(torch.autograd.Function):
    """The masked weight, whose gradient goes to the scores: ``dL/dW_eff * W * sign(scores) * slope``."""

    @staticmethod
    def forward(
        ctx: Any, masked: Tensor, scores: Tensor, weight: Tensor, slope: Tensor | None, ranks_by: RankBy
    ) -> Tensor:
        ctx.save_for_backward(scores, weight, *(() if slope is None else (slope,)))
        ctx.ranks_by = ranks_by
        return masked.view_as(masked)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, weight, *slopes = ctx.saved_tensors
        gradient = score_gradient(grad.to(torch.float32), weight, scores, ctx.ranks_by)
        return None, gradient * slopes[0] if slopes else gradient, None, None, None


@torch.compiler.assume_constant_result
def _refresh_at_trace(number: int, dtype: str) -> bool:
    """Bring the weight of a layer up to date; runs while a graph is traced, and has no part in it."""
    layer = _layers[number]
    if torch.compiler.is_exporting():
        raise UserError("a model with a mask cannot be exported; merge it first: model.merge_and_unload()")
    layer.effective.get(layer, getattr(torch, dtype))
    add_hard_slopes(layer)
    _in_graphs.add(number)
    return True


def refresh(*_: Any) -> None:
    """Bring the weights that graphs read up to date."""
    for number in list(_in_graphs):
        layer = _layers.get(number)
        if layer is None:
            _in_graphs.discard(number)
        else:
            refresh_layer(layer)


def refresh_layer(layer: MaskedLinear) -> None:
    """Bring the weight that a graph reads up to date, if one does."""
    value = layer.effective.value
    if layer.number in _in_graphs and value is not None and layer.weight.device.type != "meta":
        layer.effective.get(layer, value.dtype)
        add_hard_slopes(layer)


register_optimizer_step_post_hook(refresh)  # after the count of steps, which was registered when it was imported
