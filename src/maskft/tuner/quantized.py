"""The seam for quantised base weights: how a layer reads them, and how a mask is merged into their codes.

A linear layer of floats needs nothing of this. ``maskft.quant`` registers the kinds that it supports.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layer import MaskedLinear


class QuantizedWeight(QuantizationBackend):
    """One kind of quantised linear layer; becomes ``layer.quantization_backend``.

    PEFT's backends requantise a merged weight. A mask writes zeros only, so it can be exact: the codes of removed
    weights become the code of zero, and scales stay.
    """

    # PEFT's description of a backend: the kind of layer that it is for, and whether adapters can be merged into it.
    layer_type = "linear"
    supports_merge = True

    def why_not(self, base_layer: nn.Module) -> str | None:
        """Reason why a layer of this kind cannot be masked, or None; checked before anything is replaced."""
        return None

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """Dequantised weight, (O, I), in the dtype that the layer computes in."""
        raise NotImplementedError

    def get_base_dtype(self, base_layer: nn.Module) -> torch.dtype:
        """Dtype of :meth:`get_base_weight`."""
        # The plain way, which dequantises the whole weight for it; kinds that know the dtype override it.
        weight = self.get_base_weight(base_layer)
        return weight.dtype

    def merge_zero_codes(self, layer: MaskedLinear, mask: Tensor) -> object:
        """Write zeros where ``mask`` (bool, (O, I), True = keep) is False; returns the stash for :meth:`restore`."""
        raise NotImplementedError

    def restore(self, layer: MaskedLinear, stash: object) -> None:
        """Undo :meth:`merge_zero_codes`, bit for bit."""
        raise NotImplementedError


# (base layer) -> how it is quantised, or None if it is not of the kind that the function knows. Not PEFT's
# resolve_quantization_backend: its backends quantise a merged weight again.
QUANTIZED_WEIGHTS: list[Callable[[nn.Module], QuantizedWeight | None]] = []


def find_quantized_weight(base_layer: nn.Module) -> QuantizedWeight | None:
    """How a linear layer is quantised; None: it is not, or in a way that no registered function knows."""
    for find in QUANTIZED_WEIGHTS:
        found = find(base_layer)
        if found is not None:
            return found
    return None


def keep_codes(model: nn.Module) -> Callable[[], None]:
    """Keep bitsandbytes from repacking its four-bit layers on a CPU; call it before a model's first forward pass.

    Their first forward pass in eval mode repacks the codes for an AVX-512 kernel, and rounds the scales to bfloat16: a
    mask that is put over the model afterwards finds another base than it was trained over. Training then goes on with
    that kernel, which has no backward pass: the gradient of all layers below is lost, and torch only warns (seen with
    bitsandbytes 0.50). An evaluation before or between training steps is such a pass. Without the repacking, evaluation
    is slower.

    Returns:
        A function that undoes it.
    """
    changed: list[Any] = []  # torch types attributes of modules as Tensor | Module
    for module in model.modules():
        # The layer's own switch, which is read at every forward pass; layers of other libraries do not have it.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            changed.append(module)
    _switch_kernel(changed, False)
    # Not a function inside this one: it is pickled with the model.
    return partial(_switch_kernel, changed, True)


def _switch_kernel(layers: list[Any], is_on: bool) -> None:
    for layer in layers:
        layer.support_avx512bf16_for_cpu = is_on
