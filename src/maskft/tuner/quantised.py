"""Masks over layers whose weight bitsandbytes holds in 8 or 4 bits: they fall on what it stands for, as floats.

bitsandbytes is imported by what loaded the model, and by nothing here until there is such a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from maskft_base.errors import UserError

from .config import MaskConfig
from .layer import MaskedLinear


class MaskedQuantisedLinear(MaskedLinear):
    """A layer of bitsandbytes, masked on its dequantised weight.

    It computes with that weight also where nothing is masked, so that a comparison shows the mask alone: an 8-bit layer
    of bitsandbytes would round its inputs too, and a 4-bit one changes its scales on some CPUs.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, pool: list[MaskedLinear], module_name: str
    ) -> None:
        self.quantisation = quantisation(base_layer)
        super().__init__(base_layer, adapter_name, config, pool, module_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., I) to (..., O), computed in the dtype that a 4-bit layer names, else in that of x."""
        is_autocast = torch.is_autocast_enabled(x.device.type)
        asked = getattr(self.get_base_layer(), "compute_dtype", None) or x.dtype
        dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else asked
        if self.active_masks and not self.disable_adapters:
            self.undo_cast()
            y = super().forward(x.to(dtype))
        else:
            y = F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        return y if is_autocast else y.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """What the weight stands for, a new tensor at each call."""
        return dequantised(self.get_base_layer())

    def undo_cast(self) -> None:
        """Make scores float32 again that a trainer has cast, as TRL's do with all that trains over a quantised base.

        It comes before training: what was cast is the start, and is known exactly unless it was made of data.
        """
        cast_ones = [name for name, scores in self.mask_scores.items() if scores.dtype != torch.float32]
        for name in cast_ones:
            for member in self.mask_pools[name]:
                scores, fresh = member.mask_scores[name], member.fresh_scores(member.mask_configs[name])
                is_start = torch.equal(fresh.to(scores.device, scores.dtype), scores.data)
                scores.data = fresh.to(scores.device) if is_start else scores.data.to(torch.float32)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: what is merged has to be weights of floats."""
        raise UserError(
            f"{self.module_name} is held as {self.quantisation}: a mask is merged into full-precision weights; "
            "save the adapter and run maskft merge on it with the unquantised base"
        )


def quantisation(module: nn.Module) -> str | None:
    """How the weight of a layer is held: ``int8``, ``nf4`` or ``fp4``; None: as floats, or in a way not known here."""
    weight: Any = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Int8Params" and weight.dtype == torch.int8:
        return "int8"
    state = getattr(weight, "quant_state", None)
    return cast(str, state.quant_type) if kind == "Params4bit" and state is not None else None


def dequantised(module: nn.Module) -> Tensor:
    """The weight of a quantised layer, a new tensor of shape (O, I); float32 of an 8-bit one, else as it was loaded.

    Raises:
        UserError: If bitsandbytes has laid the weight out for inference, which rounds its scales and is not undone.
    """
    weight: Any = module.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise UserError(
            "bitsandbytes has repacked 4-bit weights for this CPU, as it does when a model first runs in evaluation "
            "mode: load the model again and put the mask on before it runs"
        )
    return dequantize_bnb_weight(weight, state=getattr(module, "state", None))


def described(kinds: Iterable[str | None]) -> str | None:
    """How the weights of several layers are held, in words, such as ``nf4`` or ``float, int8``; None: all as floats."""
    names = sorted({kind or "float" for kind in kinds})
    return None if names in ([], ["float"]) else ", ".join(names)
