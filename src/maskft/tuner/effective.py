"""The masked weight of a layer, kept from one optimizer step to the next: in between, no mask changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from .scores import check_scores, write_masked_
from .steps import optimizer_steps

if TYPE_CHECKING:
    from .layer import MaskedLinear


class EffectiveWeight:
    """The base weight of one layer with its active masks applied, made anew when any of these has changed.

    Attributes:
        value: The weight, removed entries exactly +0; None before the first forward pass. It is overwritten after the
            next optimizer step: a backward pass through an older graph then fails, as it does for any weight that an
            optimizer has changed.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._key: tuple[Any, ...] | None = None

    def forget(self) -> None:
        """Free the weight."""
        self.value = self._key = None

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
    """Write the effective weights of ``layer`` and of those ranked together with it, in place."""
    ranked = next((name for name in layer.active_masks if name in layer.mask_scores), None)
    pool = [layer] if ranked is None else layer.mask_pools[ranked]
    weights = [member.weight.detach() for member in pool]
    dtypes = [weight.dtype if dtype == layer.weight.dtype else dtype for weight in weights]
    outs = [
        member.effective._buffer(weight, its_dtype, tuple(member.active_masks))
        for member, weight, its_dtype in zip(pool, weights, dtypes, strict=True)
    ]
    if ranked is None:
        outs[0].copy_(weights[0])
    else:
        scores = [check_scores(member.mask_scores[ranked], member.module_name) for member in pool]
        write_masked_(layer.mask_configs[ranked], outs, weights, scores)
    for member, out, its_dtype in zip(pool, outs, dtypes, strict=True):
        for name in member.active_masks:
            if name != ranked:
                out.masked_fill_(~member.get_mask(name), 0.0)
        member.effective._key = _key(member, its_dtype)


def _key(layer: MaskedLinear, dtype: torch.dtype) -> tuple[Any, ...]:
    """What an effective weight is made of: equal keys, equal weights."""
    weight, names = layer.weight, tuple(layer.active_masks)
    scores = tuple(
        (s.data_ptr(), s._version, optimizer_steps() if s.requires_grad else None)
        for name in names
        if name in layer.mask_scores
        for s in (member.mask_scores[name] for member in layer.mask_pools[name])
    )
    coded = tuple(id(layer.mask_coded.get(name)) for name in names if name not in layer.mask_scores)
    return names, dtype, weight.data_ptr(), weight.device, weight._version, scores, coded


def _check_can_refresh(layer: MaskedLinear) -> None:
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
