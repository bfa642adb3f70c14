"""The masked weight of a layer, kept from one optimizer step to the next: in between, no mask changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from maskft_base.errors import UserError

from . import learners
from .config import MaskConfig
from .scores import check_scores, mask_from_scores, write_masked_
from .selection import score_gradient_, write_signed_
from .steps import optimizer_steps

if TYPE_CHECKING:
    from .layer import MaskedLinear


class EffectiveWeight:
    """The base weight of one layer with its active masks applied, made anew when any of these has changed.

    Attributes:
        value: The weight, removed entries exactly +0 (or their removed value); None before the first forward pass. It
            is overwritten after the next optimizer step: a backward pass through an older graph then fails, as it does
            for any weight that an optimizer has changed.
        slopes: Adapter name -> slope of its gate, of those trained with one that is not 1; made with ``value``.
        priced_at: Adapter name -> count of optimizer steps at which the price was last added to its gradient.
        signed: Adapter name -> what weight * sign(scores) is made of, and this, if kept; see :func:`_signed_weight`.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.slopes: dict[str, Tensor] = {}
        self.priced_at: dict[str, int] = {}
        self.signed: dict[str, tuple[tuple[int, ...], Tensor | None]] = {}
        self._key: tuple[Any, ...] | None = None

    def forget(self) -> None:
        """Free the weight."""
        self.value = self._key = None
        self.slopes, self.signed = {}, {}

    def get(self, layer: MaskedLinear, dtype: torch.dtype) -> Tensor:
        """The up-to-date weight of ``layer``, which owns this object."""
        if self._key != _key(layer, dtype):
            _check_can_refresh(layer)
            _refresh(layer, dtype)
        assert self.value is not None
        return self.value

    def _buffer(self, weight: Tensor, dtype: torch.dtype, names: tuple[str, ...]) -> Tensor:
        """Where to write: the old value, unless it is of other adapters, whose graph may still need it."""
        old = self.value
        same = old is not None and (old.shape, old.dtype, old.device) == (weight.shape, dtype, weight.device)
        if not same or (self._key is not None and self._key[0] != names):
            self.value = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self._key = None
        assert self.value is not None
        return self.value


# A weight made inside torch.inference_mode() could not be used in training afterwards.
@torch.inference_mode(False)
@torch.no_grad()
def _refresh(layer: MaskedLinear, dtype: torch.dtype) -> None:
    """Write the effective weight of ``layer`` in place."""
    ranked = next((name for name in layer.active_masks if name in layer.mask_scores), None)
    weight, own = layer.weight.detach(), layer.effective
    out = own._buffer(weight, dtype, tuple(layer.active_masks))
    own.slopes = {}
    if ranked is None:
        out.copy_(weight)
    else:
        _write(layer, ranked, out, weight)
    for name in layer.active_masks:
        if name != ranked:
            learners.blend_(out, out, layer.get_mask(name), layer.removed_value(name))
        if name in layer.mask_scores and layer.mask_scores[name].requires_grad:
            slope = learners.hard_slope(layer.mask_configs[name], layer.mask_scores[name])
            if slope is not None:
                own.slopes[name] = slope
    own._key = _key(layer, dtype)


def _write(layer: MaskedLinear, name: str, out: Tensor, weight: Tensor) -> None:
    """Write the weight with one adapter's gate."""
    config = layer.mask_configs[name]
    scores = check_scores(layer.mask_scores[name], layer.module_name, config)
    if learners.is_soft(config, layer.training):
        noise = learners.draw_noise(config, layer.module_name, scores.shape, scores.device)
        gate, layer.effective.slopes[name] = learners.soft_gate(config, scores, noise)
        learners.blend_(out, weight, gate, layer.removed_value(name))
    elif config.removed_value == "base":
        learners.blend_(out, weight, mask_from_scores(config, scores), layer.removed_value(name))
    else:
        write_masked_(config, out, weight, scores)


def score_gradient_of(layer: MaskedLinear, name: str, grad_weight: Tensor, scores: Tensor) -> Tensor:
    """Gradient of the scores of one adapter from that of the masked weight, float32, which is overwritten.

    dL/dW_eff * (W - removed value) * slope, and once per optimizer step the gradient of the price.
    """
    config = layer.mask_configs[name]
    if layer.sharded_weight is not None:
        gradient: Tensor = layer.sharded_weight.score_gradient(grad_weight, cast(Any, scores), config.ranks_by)
    else:
        value = layer.removed_value(name)
        signed = _signed_weight(layer, name, scores) if is_signed_weight_kept(config) else None
        if signed is not None:
            gradient = grad_weight.mul_(signed)
        else:
            weight = layer.weight if value is None else layer.weight - value
            gradient = score_gradient_(grad_weight, weight, scores, config.ranks_by)
        if name in layer.effective.slopes:
            gradient.mul_(layer.effective.slopes[name])
        for other in layer.active_masks:
            if other != name:  # what another mask removes does not depend on these scores
                gradient.masked_fill_(~layer.get_mask(other), 0.0)
    if config.price and layer.effective.priced_at.get(name) != optimizer_steps():  # not in every micro-batch of a step
        layer.effective.priced_at[name] = optimizer_steps()
        gradient.add_(learners.price_gradient(config, scores, scores.numel()))
    return gradient


def is_signed_weight_kept(config: MaskConfig) -> bool:
    """Whether weight * sign(scores) is kept on a CPU where steps have several micro-batches."""
    return config.ranks_by == "abs" and config.removed_value == "zero"


def _signed_weight(layer: MaskedLinear, name: str, scores: Tensor) -> Tensor | None:
    """Product of weight and sign(scores), on a CPU where steps have several micro-batches; None: not kept.

    A product of the gradient with it reads two matrices in the place of three, at the speed of the memory. The result
    is bit for bit that of :func:`maskft.tuner.selection.score_gradient_`, because a sign changes no other bit. Without
    accumulation nothing is kept, and on a GPU memory is dearer than these passes.
    """
    if scores.device.type != "cpu":
        return None
    weight, scores = layer.weight.detach(), scores.detach()
    made_of = (scores.data_ptr(), scores._version, weight.data_ptr(), weight._version, optimizer_steps())
    known, signed = layer.effective.signed.get(name, ((), None))
    if known != made_of:
        if signed is None:  # so far no step has had a second backward pass
            layer.effective.signed[name] = (made_of, None)
            return None
    elif signed is not None:
        return signed
    if signed is None or (signed.shape, signed.dtype) != (weight.shape, weight.dtype):
        signed = torch.empty_like(weight)
    write_signed_(signed, weight, scores)
    layer.effective.signed[name] = (made_of, signed)
    return signed


def _key(layer: MaskedLinear, dtype: torch.dtype) -> tuple[Any, ...]:
    """What an effective weight is made of: equal keys, equal weights."""
    weight, names = layer.weight, tuple(layer.active_masks)
    scores = tuple(
        (s.data_ptr(), s._version, optimizer_steps() if s.requires_grad else None)
        for s in (layer.mask_scores[name] for name in names if name in layer.mask_scores)
    )
    coded = tuple(id(layer.mask_coded.get(name)) for name in names if name not in layer.mask_scores)
    phases = [learners.phase(layer.mask_configs[n], layer.training) for n in names if n in layer.mask_scores]
    return names, dtype, weight.data_ptr(), weight.device, weight._version, scores, coded, *phases


def _check_can_refresh(layer: MaskedLinear) -> None:
    configs = [layer.mask_configs[name] for name in layer.active_masks]
    if len(configs) > 1 and any(c.removed_value == "base" or learners.has_soft_gate(c) for c in configs):
        raise UserError(
            "masks that are active together must be hard and remove to zero: activate one with noise, or whose "
            "removed_value is base, alone"
        )
    if getattr(layer, "_is_replica", False):
        raise UserError(
            "masks do not work under torch.nn.DataParallel; start one process per GPU (accelerate launch; maskft "
            "train --accelerate_config multi_gpu), or show one GPU only (CUDA_VISIBLE_DEVICES=0)"
        )
    if layer.weight.device.type == "meta":
        raise UserError(
            f"the weight of {layer.module_name} is on the meta device: offloaded layers cannot be masked; load the "
            "model whole, without device_map"
        )
