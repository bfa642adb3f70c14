"""The tuner's seam for quantised weights, over the storages of :mod:`maskft.quant.layers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..tuner.quantized import QUANTIZED_WEIGHTS, QuantizedWeight
from .layers import (
    Storage,
    is_quantised,
    storage_of,
    why_not_quantised,
)

if TYPE_CHECKING:
    from ..tuner.layer import MaskedLinear


class CodedWeight(QuantizedWeight):
    """A weight that is stored as codes, of which one is zero.

    Attributes:
        backend_name: Name of the format.
    """

    def __init__(self, layer: nn.Module) -> None:
        storage = storage_of(layer)
        # None: a layer that cannot be masked. The targets' check asks why_not, and raises before it is used.
        if storage is None:
            self.backend_name = type(layer).__name__
        else:
            self.backend_name = storage.kind

    def why_not(self, base_layer: nn.Module) -> str | None:
        """Reason why a mask cannot be written into the layer, with the way out; None: it can."""
        return why_not_quantised(base_layer)

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """Dequantised weight, shape (out_features, in_features)."""
        return _storage(base_layer).dequantise()

    def get_base_dtype(self, base_layer: nn.Module) -> torch.dtype:
        """Dtype of the dequantised weight."""
        return _storage(base_layer).dtype

    def merge_zero_codes(
        self,
        layer: MaskedLinear,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Write the code of zero where ``mask`` is False; returns these places and the codes that were there."""
        removed = ~mask
        storage = _storage(layer.base_layer)
        codes = storage.remove(removed)
        return removed, codes

    def restore(self, layer: MaskedLinear, stash: Any) -> None:
        """Put back the codes."""
        removed, codes = stash
        storage = _storage(layer.base_layer)
        # The model may have been moved since the merge.
        device = storage.codes().device
        storage.restore(removed.to(device), codes)


def _storage(layer: nn.Module) -> Storage:
    # A new object for every call: it holds no tensor, and the layer may have been moved or loaded since.
    storage = storage_of(layer)
    if storage is None:
        raise TypeError(f"{type(layer).__name__} has no storage that masks can be written into")
    return storage


def find_codes(layer: nn.Module) -> CodedWeight | None:
    """How a layer is quantised; None where its weight is a plain one."""
    # Also for a layer that masks do not support, so that the reason is given and it does not pass for a plain one.
    if not is_quantised(layer):
        return None
    return CodedWeight(layer)


QUANTIZED_WEIGHTS.append(find_codes)
