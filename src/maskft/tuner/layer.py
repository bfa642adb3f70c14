"""A linear layer whose weight is masked by learned scores: ``y = x (W * m)^T + b``; see :mod:`maskft.masking`.

Shapes: T tokens (all leading dimensions flattened), I in_features, O out_features; a weight is (O, I), or (I, O) in
GPT-2's ``Conv1D``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from maskft_common.errors import UserError

from .adapter_files import adapter_files
from .config import MaskConfig
from .masker import MASKERS, Masker
from .mixed_batch import MixedBatchCache, check_rows, mixed_batch_forward
from .quantized import QuantizedWeight, find_quantized_weight
from .scores import Float32ParameterDict, draw_scores
from .selection import blend


class SavedMask(Protocol):
    """A mask that was loaded, in whatever form its file has."""

    def mask(self, shape: torch.Size) -> Tensor:
        """The mask; bool, True = keep; raises if its shape is not ``shape``."""


class MaskedLinear(nn.Module, BaseTunerLayer):
    """``nn.Linear`` or ``Conv1D`` with the masks of any number of adapters; the active ones remove their union.

    Attributes:
        base_layer: The layer that is masked; its weight is frozen.
        module_name: Its name in the unwrapped model.
        is_transposed: Whether the weight is (I, O).
        mask_scores: Adapter name -> trainable float32 scores, shape of the weight. An adapter that was loaded for
            inference may have none.
        saved_masks: Adapter name -> the mask as it was loaded; used where there are no scores.
        mask_configs: Adapter name -> configuration.
        removed_values: Adapter name -> values that removed weights take, shape of the weight; missing: zero.
        masker: Applies the masks, and owns everything that is computed from the scores.
        mixed_batch: State kept between batches whose rows use different masks.
        place: Parent module and attribute name, by which the layer knows another tuner's layer over it; None: unknown.
    """

    # Read by BaseTunerLayer: the trainable parameters of an adapter, and the other dictionaries with a key per adapter.
    # delete_adapter removes the key from all of them.
    adapter_layer_names = ("mask_scores",)
    other_param_names = ("saved_masks", "mask_configs", "removed_values")
    quantization_backend: QuantizedWeight | None

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MaskConfig,
        module_name: str,
    ) -> None:
        super().__init__()
        _warn_about_hooks(base_layer)
        self.base_layer = base_layer
        self.module_name = module_name
        self.is_transposed = isinstance(base_layer, Conv1D)
        self.quantization_backend = find_quantized_weight(base_layer)

        self.mask_scores = Float32ParameterDict()
        self.saved_masks: dict[str, SavedMask] = {}
        self.mask_configs: dict[str, MaskConfig] = {}
        self.removed_values: dict[str, Tensor] = {}
        self.mixed_batch = MixedBatchCache()
        # Read through the property `masker`, which replaces it when another class becomes responsible.
        self.cached_masker: Masker | None = None
        # Weak, because the parent holds this layer: a strong reference would be a cycle.
        self.place: tuple[weakref.ref[nn.Module], str] | None = None

        # BaseTunerLayer declares it as a class attribute, and each layer needs a list for itself.
        self.merged_adapters = []
        # Adapter name -> (removed entries, bool; their values, in row order; old codes of a quantised weight or None).
        self._merge_stash: dict[str, tuple[Tensor, Tensor, Any]] = {}

        # Other code asks linear layers for their sizes: torch's names, and those of Conv1D, which has no others.
        for name in ("in_features", "out_features", "nf", "nx"):
            if hasattr(base_layer, name):
                size = getattr(base_layer, name)
                setattr(self, name, size)
        if isinstance(base_layer, Conv1D):
            self.in_features = base_layer.nx
            self.out_features = base_layer.nf

        # Before update_layer, which makes the scores of active adapters trainable.
        self._active_adapter = adapter_name
        # Compiled graphs do not compare versions of tensors, so that loaded scores have to drop the kept weight.
        self.register_load_state_dict_post_hook(_forget)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MaskConfig) -> None:
        """Add an adapter with fresh scores; an adapter of which only the mask is loaded, for inference, gets none.

        Args:
            adapter_name: Name of the adapter; an adapter of that name is replaced.
            config: Its configuration.
        """
        if adapter_name in self.mask_configs:  # left by an earlier PeftModel over the same base
            self.delete_adapter(adapter_name)
        self.mask_configs[adapter_name] = config

        # Scores take 4 bytes a weight: an adapter that is only applied does without them, unless its file holds scores.
        needs_scores = not config.inference_mode or adapter_files().loads_scores
        if needs_scores:
            scores = self.fresh_scores(config)
            self.mask_scores[adapter_name] = nn.Parameter(scores)

        # The frozen reference of preference training starts as a copy of the adapter that is trained.
        source = config.copy_of  # "" for every other adapter, which is in neither dictionary
        if source in self.saved_masks:
            self.saved_masks[adapter_name] = self.saved_masks[source]
        if source in self.mask_scores and adapter_name in self.mask_scores:
            scores_of_source = self.mask_scores[source].data
            self.mask_scores[adapter_name].data.copy_(scores_of_source)

        # As PEFT's layers do: it sets requires_grad of the new scores.
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def fresh_scores(self, config: MaskConfig) -> Tensor:
        """Scores to start from; the same at every call."""
        weight = self.get_unmerged_weight()
        return draw_scores(config, weight, self.module_name)

    # Weights

    def get_base_weight(self) -> Tensor:
        """Weight of the base layer, dequantised if need be; masks that are merged are in it. Do not write to it."""
        if self.quantization_backend is not None:
            return self.quantization_backend.get_base_weight(self.base_layer)
        # PEFT takes `.data`. A detached tensor also shares the version counter of the parameter, which caches compare.
        weight = cast(Tensor, self.base_layer.weight)
        return weight.detach()

    def get_unmerged_weight(self) -> Tensor:
        """Weight of the base layer as it was before any mask was merged into it. Do not write to it."""
        weight = self.get_base_weight()
        if not self.merged:
            return weight

        # A copy, because the layer itself stays merged.
        weight = weight.clone()
        # Latest merge first: where masks overlap, only the first one merged saw the original values.
        for name in reversed(self.merged_adapters):
            removed, values, _ = self._merge_stash[name]
            _put_back(weight, removed, values)
        return weight

    def get_masked_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Base weight with the active masks applied; removed entries are exactly +0 (or their value). Read only.

        Args:
            dtype: Dtype of the result; default: that of the base weight.
        """
        if dtype is None:
            dtype = self.get_base_weight().dtype
        return self.masker.weight(dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Masked weight minus base weight of one adapter, in the shape of the weight.

        Merging does not add it: W + (0 - W) is NaN for an infinite W, and rounds where removed entries have a value.
        """
        weight = self.get_unmerged_weight()
        mask = self.get_mask(adapter_name)
        masked = blend(weight, mask, self.removed_value(adapter_name))
        return masked - weight

    def get_mask(self, adapter_name: str) -> Tensor:
        """Hard mask of an adapter; bool, shape of the weight, True = keep.

        Raises:
            UserError: If the adapter has neither scores nor a loaded mask here, or its scores are NaN.
        """
        # Scores first: an adapter that is trained further has both, and only its scores are current.
        if adapter_name in self.mask_scores:
            return self.masker.mask(adapter_name)
        if adapter_name in self.saved_masks:
            # Not self.weight.shape: packed codes of a quantised weight have another one.
            shape = self.get_base_weight().shape
            mask = self.saved_masks[adapter_name].mask(shape)
            return mask.to(self.weight.device)
        raise UserError(
            f"adapter {adapter_name!r} has no mask in {self.module_name}: load it with PeftModel.from_pretrained or "
            "PeftModel.load_adapter (transformers' own model.load_adapter and add_adapter cannot read masks)"
        )

    def removed_value(self, adapter_name: str) -> Tensor | None:
        """Values that removed weights take, dtype and device of the weight; None: zero."""
        if adapter_name not in self.removed_values:
            return None
        value = self.removed_values[adapter_name]
        # A tensor that is created inside torch.inference_mode() could not be trained with afterwards.
        with torch.inference_mode(False):
            value = value.to(self.weight.device, self.get_base_dtype())
        # Kept, so that it is moved once.
        self.removed_values[adapter_name] = value
        return value

    # Forward

    @property
    def active_masks(self) -> list[str]:
        """Names of the active adapters that mask this layer."""
        return [name for name in self.active_adapters if name in self.mask_configs]

    @property
    def masker(self) -> Masker:
        """Applies the masks: the last class in ``MASKERS`` that accepts the layer as it is now."""
        # Looked up at every call: sharding, torch.func's transforms and maskft.fast.disable() change the answer.
        kind = next(kind for kind in reversed(MASKERS) if kind.accepts(self))
        # The exact class: FastMasker and ShardedMasker are subclasses of those that they replace.
        if type(self.cached_masker) is not kind:
            self.cached_masker = kind(self)
        return self.cached_masker

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., I) to (..., O).

        Args:
            x: Input.
            *args: Passed on to the base layer where no mask applies.
            **kwargs: The same. ``adapter_names``, one per row, is PEFT's argument for batches of several adapters.
        """
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)

        # The order of PEFT's LoRA layer: disabled adapters win over names, names over active adapters.
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        if adapter_names is not None:
            return cast(Tensor, mixed_batch_forward(self, x, adapter_names, *args, **kwargs))
        # The base layer's weight is masked already, or is not to be masked.
        if self.merged or not self.active_masks:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))

        # The dtype that the base layer would compute in. Autocast casts inside F.linear, which is too late for maskers
        # that save x for a backward pass of their own. It leaves float64 as it is.
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
        elif self.quantization_backend is not None:
            # As quantised layers do: int8 and GGUF dequantise to float32, in models of bfloat16 too.
            dtype = x.dtype
        else:
            dtype = self.get_base_dtype()

        # F.linear takes one dtype, and the bias of a quantised layer may have another.
        bias = self.bias
        if bias is not None:
            bias = bias.to(dtype)
        return self.masker.linear(x, bias, dtype)

    def get_base_dtype(self) -> torch.dtype:
        """Dtype that the base layer computes in, without autocast."""
        if self.quantization_backend is not None:
            return self.quantization_backend.get_base_dtype(self.base_layer)
        return self.weight.dtype

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Check if the arguments are compatible with the state of the layer."""
        # torch's mark of DataParallel's copies, in which a ParameterDict such as mask_scores is empty.
        if getattr(self, "_is_replica", False):
            raise UserError(
                "masks do not work under torch.nn.DataParallel; start one process per GPU (accelerate launch; maskft "
                "train --accelerate_config multi_gpu), or show one GPU only (CUDA_VISIBLE_DEVICES=0)"
            )
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is not None:
            check_rows(x, adapter_names)

    def train(self, mode: bool = True) -> MaskedLinear:
        """Set the training mode, in which some gates are soft."""
        super().train(mode)
        self.masker.refresh()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLinear:
        """Move or cast the layer, and drop the tensors computed from its weight.

        ``model.to(torch.bfloat16).to(torch.float32)`` rounds a weight, raises no version, and often leaves it at the
        address it had before, so that caches would find nothing changed.
        """
        # Before and not after: torch swaps the tensors of torchao, and of other types that wrap tensors, which it
        # refuses for a tensor with a weak reference to it, such as these hold.
        self.masker.forget()
        self.mixed_batch.forget_tensors()
        super()._apply(fn, recurse)
        return self

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the masked weight into the base layer; keep the overwritten values, so that ``unmerge`` is bit-exact.

        Args:
            safe_merge: Raise if the masked weight is not finite.
            adapter_names: Adapters to merge; default: the active ones.

        Raises:
            UserError: If the weight is sharded, another tuner's layer is over this one, an adapter has no mask here, or
                a mask that gives removed weights a value would be merged together with others.
            ValueError: With ``safe_merge``, if the masked weight is not finite.
        """
        # PEFT's warnings about adapters that are merged already.
        check_adapters_to_merge(self, adapter_names)
        for name in self.check_merge(safe_merge, adapter_names):
            mask = self.get_mask(name)
            # With the masks that were merged before.
            weight = self.get_base_weight()

            # Kept for unmerge. PEFT's way, a delta that is added and subtracted again, would not restore an infinite
            # weight, nor a weight that two masks remove.
            removed = ~mask
            values = weight[removed]
            if self.quantization_backend is not None:
                # `weight` is a dequantised copy, and what counts are the codes.
                codes = self.quantization_backend.merge_zero_codes(self, mask)
            else:
                codes = None
                # In place: `weight` shares the memory of the base layer's parameter.
                merged = blend(weight, mask, self.removed_value(name))
                weight.copy_(merged)
            self._merge_stash[name] = (removed, values, codes)
            self.merged_adapters.append(name)
            # Writing codes does not raise the version of a weight, which caches compare.
            self.masker.forget()

    def check_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> list[str]:
        """Names of the adapters that :meth:`merge` would merge; raises what it would raise, and writes nothing.

        A model calls it for all layers before it merges the first one, so that an error leaves it as it was.
        """
        if hasattr(self.weight, "full_tensor"):  # a DTensor
            raise UserError(
                f"{self.module_name} is sharded by FSDP and cannot be merged; save the adapter and run maskft merge"
            )
        self.check_not_wrapped()

        # Not all adapters mask all layers; PEFT names those of the whole model.
        wanted = self.active_adapters if adapter_names is None else adapter_names
        # Each once: a second merge would keep zeros in place of the values that unmerge puts back.
        wanted = dict.fromkeys(wanted)
        names = [name for name in wanted if name in self.mask_configs and name not in self.merged_adapters]
        # With values in place of zeros the result would depend on the order of merging.
        together = {*names, *self.merged_adapters}
        has_values = any(name in self.removed_values for name in together)
        if names and len(together) > 1 and has_values:
            raise UserError(
                "a mask whose removed_value is base is merged alone; unmerge the others, or name one adapter"
            )

        for name in names:
            # A mask that was loaded was checked then, and decoding it takes time.
            is_loaded = name in self.saved_masks and name not in self.mask_scores
            if not is_loaded:
                self.get_mask(name)
        if safe_merge:
            merged = self.get_base_weight()
            for name in names:
                mask = self.get_mask(name)
                merged = blend(merged, mask, self.removed_value(name))
                if not torch.isfinite(merged).all():
                    raise ValueError(f"{self.module_name} has weights that are not finite after merging {name!r}")
        return names

    def unmerge(self) -> None:
        """Undo ``merge``, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return

        # Latest first, see get_unmerged_weight.
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            removed, values, codes = self._merge_stash.pop(name)
            if self.quantization_backend is not None:
                self.quantization_backend.restore(self, codes)
            else:
                _put_back(self.get_base_weight(), removed, values)
            self.masker.forget()

    def check_not_wrapped(self) -> None:
        """Raise if another tuner's layer is over this one, such as a LoRA over the mask.

        Such a layer merges into the same weight, and PEFT merges it first: the mask would remove parts of its update.
        """
        if self.place is None:
            return

        # The weak reference gives None if the model is gone. In the parent is this layer, a tuner layer around it, or,
        # after an unload, the base layer, which is not a tuner layer.
        parent, name = self.place
        outer = getattr(parent(), name, self)
        if outer is not self and isinstance(outer, BaseTunerLayer):
            if outer.merged:  # PEFT has just merged it: leave the weight as it was before the call
                outer.unmerge()
            raise UserError(
                f"{self.module_name} has an adapter of another kind over its mask ({type(outer).__module__}), and "
                "merging would write that adapter below the mask: merge the mask first, with merge_and_unload of a "
                "model without the other adapter, and apply that adapter to the merged model"
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a mask's delta is sparse and has full rank."""
        return False

    # Adapters

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters."""
        super().set_adapter(adapter_names, inference_mode)
        # Compiled graphs read a weight that was computed for the adapters before.
        self.masker.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and everything kept for it."""
        super().delete_adapter(adapter_name)
        self.masker.delete_adapter(adapter_name)
        self.mixed_batch.forget(adapter_name)

    def _get_available_adapters(self) -> set[str]:
        # PEFT's way looks at adapter_layer_names only, and an adapter that was loaded as a mask has no scores.
        return set(self.mask_configs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move scores to the device of the base layer.

        PEFT also casts them to its dtype. Scores stay float32: in bfloat16 they would tie at the cut.
        """
        if adapter_name not in self.mask_scores:
            return
        scores = self.mask_scores[adapter_name]
        target = torch.device(device or self.weight.device)
        # A tensor on the meta device has no data to move.
        if "meta" not in (target.type, scores.device.type):
            scores.data = scores.data.to(target)

    def __getstate__(self) -> dict[str, Any]:
        """State for ``copy.deepcopy`` and ``pickle``, without the three attributes that belong to this object alone."""
        state = dict(self.__dict__)
        # It holds this layer; __setstate__ creates another.
        state["cached_masker"] = None
        # It holds a weak reference; MaskModel.__setstate__ sets that of the copy.
        state["place"] = None
        # Its keys are ids of objects of this layer.
        state["mixed_batch"] = MixedBatchCache()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The property creates a masker. Not at the first forward pass: torch.compile cannot create it while it traces.
        _ = self.masker

    def __repr__(self) -> str:
        return "mask." + super().__repr__()

    def extra_repr(self) -> str:
        """Shows how the base weight is quantised."""
        return quantization_extra_repr(self)


def _warn_about_hooks(base_layer: nn.Module) -> None:
    """Warn where hooks will be ignored, as PEFT's SHiRA does: forward takes the base's weight, not its forward."""
    hooks = (
        base_layer._forward_hooks,
        base_layer._forward_pre_hooks,
        base_layer._backward_hooks,
        base_layer._backward_pre_hooks,
    )
    if any(hooks):
        warnings.warn(
            "One of the layers that are masked has forward or backward (pre) hooks, which the masked layer ignores: it "
            "does not call the base layer. Set the hooks on the same path after the mask is applied."
        )


def _forget(layer: MaskedLinear, incompatible_keys: Any) -> None:
    """Hook that torch calls after load_state_dict."""
    layer.masker.forget()


def _put_back(weight: Tensor, removed: Tensor, values: Tensor) -> None:
    """Write kept values over removed entries, also after the model was moved or cast."""
    removed = removed.to(weight.device)
    weight[removed] = values.to(weight.device, weight.dtype)
