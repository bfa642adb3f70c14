"""A linear layer whose weight is masked by learned scores: ``y = x (W * m)^T + b``; see :mod:`maskft.masking`.

Shapes: T tokens (all leading dimensions flattened), I in_features, O out_features; a weight is (O, I), or (I, O) in
GPT-2's ``Conv1D``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from maskft_common.errors import UserError

from ..masks.codec import decode_mask
from . import compiled, merging
from .config import MaskConfig
from .effective import EffectiveWeight, score_gradient_of
from .mixed_batch import MixedBatchCache, mixed_batch_forward
from .scores import Float32ParameterDict, check_scores, draw_scores, mask_from_scores
from .sharded import ShardedWeight, is_sharded


class MaskedLinear(nn.Module, BaseTunerLayer):
    """``nn.Linear`` or ``Conv1D`` with the masks of any number of adapters; the active ones remove their union.

    Attributes:
        mask_scores: Adapter name -> trainable float32 scores, shape of the weight; none of an adapter for inference.
        mask_coded: Adapter name -> the mask as it was loaded.
        removed_values: Adapter name -> what removed weights become, shape of the weight; none: zero.
        effective: The masked weight.
        sharded_weight: Under FSDP2, this rank's rows of the weight; they are masked there, and not in ``effective``.
        number: What the graphs of ``torch.compile`` know the layer by.
    """

    adapter_layer_names = ("mask_scores",)
    other_param_names = ("mask_coded", "mask_configs", "removed_values")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, module_name: str) -> None:
        super().__init__()
        self.base_layer, self.module_name = base_layer, module_name
        self.is_transposed = isinstance(base_layer, Conv1D)
        self.mask_scores = Float32ParameterDict({})
        self.mask_coded: dict[str, Tensor] = {}
        self.mask_configs: dict[str, MaskConfig] = {}
        self.removed_values: dict[str, Tensor] = {}
        self.effective = EffectiveWeight()
        self.mixed_batch = MixedBatchCache()
        self.sharded_weight: ShardedWeight | None = None
        self.number = compiled.register(self)
        self.merged_adapters = []
        self.merge_stash: dict[str, tuple[Tensor, Tensor]] = {}
        for name in ("in_features", "out_features", "nf", "nx"):  # which other code asks linear layers for
            if hasattr(base_layer, name):
                setattr(self, name, getattr(base_layer, name))
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.nx, base_layer.nf
        self._active_adapter = adapter_name
        self.register_load_state_dict_post_hook(_forget_weight)
        self.update_layer(adapter_name, config)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = compiled.register(self)  # a copy is another layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., I) to (..., O); ``adapter_names`` (one per row) is PEFT's for mixed batches."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        names = self.active_masks
        if self.disable_adapters or self.merged or not names:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        dtype = self.weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if torch.compiler.is_compiling() and compiled.is_supported(self, names):
            return compiled.forward(self, x, bias, dtype, names[0])
        return cast(Tensor, self._forward(x, bias, dtype, names))

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        return cast(Tensor, mixed_batch_forward(self, x, adapter_names, *args, **kwargs))

    @torch.compiler.disable
    def _forward(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype, names: list[str]) -> Tensor:
        weight = self.effective_weight(dtype)
        trained = {n: self.mask_scores[n] for n in names if n in self.mask_scores and self.mask_scores[n].requires_grad}
        if not trained or not torch.is_grad_enabled():
            return F.linear(x, weight.t() if self.is_transposed else weight, bias)
        # Of a matrix: a view made inside the function could not be changed in place, as ReLU(inplace=True) does.
        y_TO = _MaskedLinearFunction.apply(
            x.reshape(-1, x.shape[-1]), weight, bias, self, list(trained), *trained.values()
        )
        return cast(Tensor, y_TO).view(*x.shape[:-1], y_TO.shape[-1])

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Base weight with the active masks applied, removed entries exactly +0 (or base); not to be written to."""
        if not any(map(is_sharded, self.mask_scores.values())):
            return self.effective.get(self, dtype or self.weight.dtype)
        if self.sharded_weight is None or not self.sharded_weight.is_current(self):
            raise UserError(f"the sharded mask of {self.module_name} is out of date: call the model, not a part of it")
        return self.weight.to(dtype or self.weight.dtype)

    @property
    def active_masks(self) -> list[str]:
        """Names of the active adapters that mask this layer."""
        return [name for name in self.active_adapters if name in self.mask_configs]

    def get_mask(self, adapter_name: str) -> Tensor:
        """Bool mask of ``adapter_name``, shape of the weight, True = keep."""
        if adapter_name in self.mask_scores:
            config = self.mask_configs[adapter_name]
            return mask_from_scores(config, check_scores(self.mask_scores[adapter_name], self.module_name, config))
        if adapter_name in self.mask_coded:
            coded = self.mask_coded[adapter_name]
            return decode_mask(coded, self.module_name, self.weight.shape).to(self.weight.device)
        raise UserError(
            f"adapter {adapter_name!r} has no mask in {self.module_name}: load it with PeftModel.from_pretrained or "
            "PeftModel.load_adapter (transformers' own model.load_adapter and add_adapter cannot read masks)"
        )

    def removed_value(self, adapter_name: str) -> Tensor | None:
        """What a removed weight becomes, dtype and device of the weight; None: zero."""
        if adapter_name not in self.removed_values:
            return None
        value = self.removed_values[adapter_name].to(self.weight.device, self.weight.dtype)
        self.removed_values[adapter_name] = value  # moved once
        return value

    def update_layer(self, adapter_name: str, config: MaskConfig) -> None:
        """Add an adapter: fresh scores, or none when it is for inference (its mask is then loaded coded)."""
        if adapter_name in self.mask_configs:  # of an earlier model over the same base
            self.delete_adapter(adapter_name)
        self.mask_configs[adapter_name] = config
        if not config.inference_mode:
            self.mask_scores[adapter_name] = nn.Parameter(self.fresh_scores(config))
        if config.copy_of in self.mask_coded:
            self.mask_coded[adapter_name] = self.mask_coded[config.copy_of]
        if config.copy_of in self.mask_scores and adapter_name in self.mask_scores:
            self.mask_scores[adapter_name].data.copy_(self.mask_scores[config.copy_of].data)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def fresh_scores(self, config: MaskConfig) -> Tensor:
        """Scores to start from, the same at every call."""
        return draw_scores(config, merging.unmerged_weight(self), self.module_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the masked weight into the base layer; what it replaces is kept so that ``unmerge`` is bit-exact.

        Args:
            safe_merge: Refuse when the masked weight is not finite.
            adapter_names: Adapters to merge; default: the active ones.
        """
        merging.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Undo ``merge``, bit for bit."""
        merging.unmerge(self)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; graphs of ``torch.compile`` read their mask from here on."""
        super().set_adapter(adapter_names, inference_mode)
        compiled.refresh_layer(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and everything kept for it."""
        super().delete_adapter(adapter_name)
        self.effective.forget()
        self.mixed_batch.forget(adapter_name)
        self.effective.priced_at.pop(adapter_name, None)

    def _get_available_adapters(self) -> set[str]:
        return set(self.mask_configs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move scores, and leave them float32 whatever the base is: in bfloat16 they would tie at the cut."""
        target = torch.device(device or self.weight.device)
        scores = self.mask_scores[adapter_name] if adapter_name in self.mask_scores else None
        if scores is not None and "meta" not in (target.type, scores.device.type):
            scores.data = scores.data.to(target)

    def __repr__(self) -> str:
        return "mask." + super().__repr__()


def _forget_weight(layer: MaskedLinear, keys: Any) -> None:
    layer.effective.forget()


class _MaskedLinearFunction(torch.autograd.Function):
    """Linear map with the masked weight; the gradient goes straight through the masks of the trained adapters."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight: Tensor, bias: Tensor | None, layer: MaskedLinear, names: list[str], *scores: Any
    ) -> Tensor:
        ctx.save_for_backward(x_TI, weight, *scores)
        # Before the backward pass another adapter may run: TRL's reference model does.
        ctx.layer, ctx.names, ctx.active = layer, names, tuple(layer.active_masks)
        ctx.slopes = layer.effective.slopes
        return F.linear(x_TI, weight.t() if layer.is_transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight, *scores = ctx.saved_tensors
        layer, grad_x = ctx.layer, None
        if layer.sharded_weight is not None and not layer.sharded_weight.is_current(layer):
            raise UserError(
                f"the mask of {layer.module_name} changed between forward and backward, for which FSDP gathers the "
                "weight again: compute what needs the model without its mask before the forward pass"
            )
        if ctx.needs_input_grad[0]:
            grad_x = grad_y_TO.matmul(weight.t() if layer.is_transposed else weight)
        left, right = (x_TI, grad_y_TO) if layer.is_transposed else (grad_y_TO, x_TI)
        grad_scores = [
            score_gradient_of(layer, name, left.t().mm(right), s, ctx.slopes, ctx.active)
            for name, s in zip(ctx.names, scores, strict=True)
        ]
        grad_bias = grad_y_TO.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None, None, *grad_scores
