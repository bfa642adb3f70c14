"""Masks written into the weight of a layer, and taken out of it again, bit for bit."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from maskft_common.errors import UserError

from .learners import blend_
from .sharded import is_sharded

if TYPE_CHECKING:
    from .layer import MaskedLinear


def merge(layer: MaskedLinear, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Write the masked weight into the base layer; see :meth:`MaskedLinear.merge`."""
    weight = layer.weight
    if is_sharded(weight):
        raise UserError(
            f"{layer.module_name} is sharded by FSDP and cannot be merged; save the adapter and run maskft merge"
        )
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.mask_configs]
    if len({*names, *layer.merged_adapters}) > 1 and any(name in layer.removed_values for name in names):
        raise UserError("a mask whose removed_value is base is merged alone; unmerge the others, or name one adapter")
    for name in names:
        mask = layer.get_mask(name)
        merged = blend_(torch.empty_like(weight.data), weight.data, mask, layer.removed_value(name))
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"{layer.module_name} has weights that are not finite after merging {name!r}")
        layer.merge_stash[name] = (~mask, weight.data[~mask])
        weight.data.copy_(merged)
        layer.merged_adapters.append(name)


def unmerge(layer: MaskedLinear) -> None:
    """Undo :func:`merge`."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.")
    while layer.merged_adapters:
        name = layer.merged_adapters.pop()
        _put_back(layer.weight.data, *layer.merge_stash.pop(name))


def unmerged_weight(layer: MaskedLinear) -> Tensor:
    """The weight as it was before anything was merged into it."""
    weight = layer.weight.detach()
    if layer.merged:
        weight = weight.clone()
        for name in reversed(layer.merged_adapters):
            _put_back(weight, *layer.merge_stash[name])
    return weight


def _put_back(weight: Tensor, removed: Tensor, values: Tensor) -> None:
    weight[removed.to(weight.device)] = values.to(weight.device, weight.dtype)
