"""The masked weight of a layer, kept from one optimizer step to the next: in between, no mask changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from maskft_common.errors import UserError

from . import learners
from .config import MaskConfig
from .scores import check_scores, mask_from_scores, write_masked_
from .selection import Near, row_parts, score_gradient_
from .steps import optimizer_steps

if TYPE_CHECKING:
    from .layer import MaskedLinear


class EffectiveWeight:
    """The base weight of one layer with its active masks applied, made anew when any of these has changed.

    Attributes:
        value: The weight, removed entries exactly +0 (or their removed value); None before the first forward pass. It
            is overwritten after the next optimizer step: a backward pass through an older graph then fails, as it does
            for any weight that an optimizer has changed.
        slopes: Adapter name -> slope of its gate, if that is soft or in a graph; others are made in the backward pass.
        priced_at: Adapter name -> count of optimizer steps at which the price was last added to its gradient.
        near: Adapter name -> where its cut is looked for first.
        kept: Adapter name -> what a factor of its gradient is made of, and this, if kept; see :func:`_kept_factor`.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.slopes: dict[str, Tensor] = {}
        self.priced_at: dict[str, int] = {}
        self.near: dict[str, Near | None] = {}
        self.kept: dict[str, tuple[tuple[object, ...], Tensor | None]] = {}
        self._key: tuple[Any, ...] | None = None

    def forget(self) -> None:
        """Free the weight."""
        self.value = self._key = None
        self.slopes, self.kept = {}, {}

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
    own._key = _key(layer, dtype)


@torch.inference_mode(False)
def add_hard_slopes(layer: MaskedLinear) -> None:
    """Make the slopes that a graph reads."""
    for name in layer.active_masks:
        if name in layer.mask_scores and name not in layer.effective.slopes:
            slope = learners.hard_slope(layer.mask_configs[name], layer.mask_scores[name].detach())
            layer.effective.slopes |= {} if slope is None else {name: slope}


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
        near = layer.effective.near
        near[name] = write_masked_(config, out, weight, scores, near.get(name))


def score_gradient_of(
    layer: MaskedLinear,
    name: str,
    grad_weight: Tensor,
    scores: Tensor,
    slopes_of: Mapping[str, Tensor],
    active: Sequence[str],
) -> Tensor:
    """Gradient of the scores of one adapter, float32: dL/dW_eff * (W - removed value) * slope.

    ``grad_weight`` may be overwritten; scores, slopes and active masks are those of the forward pass. The
    gradient of the price is added once per optimizer step: of its backward passes, to the first.
    """
    config, own, scores = layer.mask_configs[name], layer.effective, scores.detach()
    is_priced = config.price > 0 and own.priced_at.get(name) != optimizer_steps()  # not in every micro-batch of a step
    if is_priced:
        own.priced_at[name] = optimizer_steps()
    if layer.sharded_weight is not None:
        out: Tensor = layer.sharded_weight.score_gradient(grad_weight.float(), cast(Any, scores), config.ranks_by)
        return out.add_(learners.price_gradient(config, scores, scores.numel())) if is_priced else out
    out = grad_weight if grad_weight.dtype == torch.float32 else torch.empty_like(grad_weight, dtype=torch.float32)
    weight, value, kept = layer.weight.detach(), layer.removed_value(name), _kept_factor(layer, name, scores)
    signed, slopes = (kept, None) if _has_signed_weight(config) else (None, slopes_of.get(name, kept))
    others = [~layer.get_mask(other) for other in active if other != name]
    for part in row_parts(scores):
        gradient, some = out[part], scores[part]
        if out is not grad_weight:
            gradient.copy_(grad_weight[part])
        if signed is not None:
            gradient.mul_(signed[part])
        else:
            difference = weight[part] if value is None else weight[part] - value[part]
            score_gradient_(gradient, difference, some, config.ranks_by)
        slope = learners.hard_slope(config, some) if slopes is None else slopes[part]
        if slope is not None:
            gradient.mul_(slope)
        for other in others:  # what another mask removes does not depend on these scores
            gradient.masked_fill_(other[part], 0.0)
        if is_priced:
            slope = None if learners.has_soft_gate(config) else slope
            gradient.add_(learners.price_gradient(config, some, scores.numel(), slope))
    return out


def _has_signed_weight(config: MaskConfig) -> bool:
    return config.ranks_by == "abs" and config.removed_value == "zero"


def _kept_factor(layer: MaskedLinear, name: str, scores: Tensor) -> Tensor | None:
    """Product of weight and sign(scores), or slope of the gate, where steps have several micro-batches; None: not kept.

    A product of the gradient with it reads two matrices in the place of three, at the speed of the memory. The result
    is bit for bit that of :func:`maskft.tuner.selection.score_gradient_`, because a sign changes no other bit. Without
    accumulation nothing is kept on a CPU; on a GPU, where memory is dearer than these passes, slopes alone are.
    """
    config, weight, is_on_cpu = layer.mask_configs[name], layer.weight.detach(), scores.device.type == "cpu"
    is_signed = _has_signed_weight(config)
    is_wanted = is_on_cpu if is_signed else learners.hard_slope(config, scores[:1]) is not None
    if not is_wanted:
        return None
    versions = (scores.data_ptr(), scores._version, weight.data_ptr(), weight._version, optimizer_steps())
    made_of = (*versions, *learners.phase(config, layer.training))
    known, factor = layer.effective.kept.get(name, ((), None))
    if known == made_of and factor is not None:
        return factor
    if known != made_of and factor is None and is_on_cpu:  # so far no step has had a second backward pass
        layer.effective.kept[name] = (made_of, None)
        return None
    like = weight if is_signed else scores
    if factor is None or (factor.shape, factor.dtype) != (like.shape, like.dtype):
        factor = torch.empty_like(like)
    for part in row_parts(scores):
        if is_signed:
            torch.mul(weight[part], torch.sign(scores[part]), out=factor[part])
        else:
            factor[part] = cast(Tensor, learners.hard_slope(config, scores[part]))
    layer.effective.kept[name] = (made_of, factor)
    return factor


def _key(layer: MaskedLinear, dtype: torch.dtype) -> tuple[Any, ...]:
    """What an effective weight is made of: equal keys, equal weights."""
    weight, names = layer.weight, tuple(layer.active_masks)
    scores = tuple(
        (s.data_ptr(), _version(s), optimizer_steps() if s.requires_grad else None)
        for s in (layer.mask_scores[name] for name in names if name in layer.mask_scores)
    )
    coded = tuple(id(layer.mask_coded.get(name)) for name in names if name not in layer.mask_scores)
    phases = [learners.phase(layer.mask_configs[n], layer.training) for n in names if n in layer.mask_scores]
    return names, dtype, weight.data_ptr(), weight.device, _version(weight), scores, coded, *phases


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _check_can_refresh(layer: MaskedLinear) -> None:
    configs = {name: layer.mask_configs[name] for name in layer.active_masks}
    is_soft = any(learners.has_soft_gate(c) for name, c in configs.items() if name in layer.mask_scores)
    if len(configs) > 1 and (is_soft or any(c.removed_value == "base" for c in configs.values())):
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
