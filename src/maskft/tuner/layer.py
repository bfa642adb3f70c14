"""A linear layer whose weight is masked by learned scores: ``y = x (W * m)^T + b``.

Between optimizer steps the mask does not change, so the effective weight ``W * m`` is computed when the scores have
changed and not in every forward pass. Under gradient accumulation the raw gradient (dL/dy)^T x is summed over the
micro-batches, and multiplied by ``W * sign(scores)`` once, in the micro-batch whose gradient the optimizer will see.

Shapes: T tokens (all leading dimensions flattened), I in_features, O out_features.
"""

from __future__ import annotations

import warnings
import weakref

import torch
import torch.nn.functional as F
from accelerate.state import GradientState
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..files import digest
from ..masking import (
    StraightThroughMask,
    initial_scores,
    keep_highest_,
    num_removed,
    score_gradient_,
    threshold_mask,
    topk_masks,
)
from .codec import decode_mask
from .config import MaskConfig
from .sharded import ShardedWeight, is_sharded, whole_masks

# Fused and 8-bit optimizers write to parameters without raising torch's version counter, so every optimizer step is
# counted, and a mask is as old as the count it was made at.
_num_optimizer_steps = 0


def _count_optimizer_step(*_) -> None:
    global _num_optimizer_steps
    _num_optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def is_distributed() -> bool:
    """Whether other processes train with this one."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# Layers that hold a sum of gradients which the optimizer has not seen yet.
_unfinished: weakref.WeakSet[MaskedLinear] = weakref.WeakSet()


class Float32ParameterDict(nn.ParameterDict):
    """Scores stay float32 under ``model.to(dtype)``: ranking casts to bfloat16 would create ties and move the mask."""

    def _apply(self, fn, recurse=True):
        before = {name: parameter.data for name, parameter in self.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, data in before.items():
            if self[name].dtype != torch.float32:
                self[name].data = data.to(self[name].device)
        return self


class MaskLayer(BaseTunerLayer):
    """Per-adapter scores and masks of one linear layer (``nn.Linear``, or GPT-2's ``Conv1D``)."""

    adapter_layer_names = ("mask_scores",)
    other_param_names = ("mask_coded", "mask_configs", "mask_pools")

    def __init__(self, base_layer: nn.Module, module_name: str):
        self.base_layer = base_layer
        self.module_name = module_name
        # Conv1D stores its weight as (I, O) and computes x W.
        self.is_transposed = isinstance(base_layer, Conv1D)
        self.mask_scores = Float32ParameterDict({})
        self.mask_coded: dict[str, Tensor] = {}
        self.mask_configs: dict[str, MaskConfig] = {}
        # Layers whose scores are ranked together: just this one, or all of the adapter's for scope="global".
        self.mask_pools: dict[str, list[MaskLayer]] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._merge_stash: dict[str, tuple[Tensor, Tensor]] = {}
        self._effective: Tensor | None = None
        self._effective_key: tuple | None = None
        self._raw_gradient: dict[str, Tensor] = {}
        # Under FSDP2: this rank's rows of the weight; they are masked there, and not in ``_effective``.
        self.sharded_weight: ShardedWeight | None = None

    def update_layer(self, adapter_name: str, config: MaskConfig, pool: list[MaskLayer]) -> None:
        """Add an adapter: fresh scores, or none when it is for inference (its mask is then loaded coded)."""
        self.mask_configs[adapter_name] = config
        pool.append(self)
        self.mask_pools[adapter_name] = pool if config.scope == "global" else [self]
        if not config.inference_mode:
            self.mask_scores[adapter_name] = nn.Parameter(self._draw_scores(config))
        # A second adapter of one configuration is a copy of the first, as trainers want of a frozen reference.
        twin = next((n for n, other in self.mask_configs.items() if other is config and n != adapter_name), None)
        if twin in self.mask_coded:
            self.mask_coded[adapter_name] = self.mask_coded[twin]
        if twin in self.mask_scores and adapter_name in self.mask_scores:
            self.mask_scores[adapter_name].data.copy_(self.mask_scores[twin].data)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _draw_scores(self, config: MaskConfig) -> Tensor:
        weight = self.get_base_layer().weight
        if weight.device.type == "meta":
            return torch.empty(weight.shape, dtype=torch.float32, device="meta")
        # Every layer draws from its own stream, so that adding or leaving out a layer does not move the others.
        stream = bytes.fromhex(digest(f"{config.mask_seed}/{self.module_name}"))
        generator = torch.Generator().manual_seed(int.from_bytes(stream[:8], "little") >> 1)
        num_inputs = weight.shape[0 if self.is_transposed else 1]
        return initial_scores(
            weight.detach(), config.init_scores, generator, config.init_std, config.init_value, num_inputs
        )

    # Masks

    def get_mask(self, adapter_name: str) -> Tensor:
        """Bool mask of ``adapter_name``, shape of the weight, True = keep."""
        if adapter_name in self.mask_scores:
            pool = self.mask_pools[adapter_name]
            scores = [layer._checked_scores(adapter_name) for layer in pool]
            return masks_from_scores(self.mask_configs[adapter_name], scores)[pool.index(self)]
        if adapter_name in self.mask_coded:
            return decode_mask(self.mask_coded[adapter_name], self.module_name).to(self.get_base_layer().weight.device)
        raise UserError(
            f"adapter {adapter_name!r} has no mask in {self.module_name}: load it with PeftModel.from_pretrained or "
            "PeftModel.load_adapter (transformers' own model.load_adapter and add_adapter cannot read masks)"
        )

    def _checked_scores(self, adapter_name: str) -> Tensor:
        scores = self.mask_scores[adapter_name]
        if scores.device.type == "meta":
            raise UserError(f"the scores of {self.module_name} are still on the meta device; load or initialise them")
        if scores.dtype != torch.float32:
            raise UserError(
                f"the scores of {self.module_name} were cast to {scores.dtype}; masks are ranked in float32, "
                "undo the cast"
            )
        return scores

    def _available(self, adapter_names: list[str]) -> list[str]:
        return [name for name in adapter_names if name in self.mask_configs]

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Base weight with the active masks applied, kept until a score or the set of adapters changes.

        Removed entries are exactly +0.0. Two active adapters remove the union of what each removes. The tensor is the
        layer's own and is overwritten after the next optimizer step.
        """
        weight = self.get_base_layer().weight
        dtype = dtype or weight.dtype
        if self._is_sharded():
            return weight.to(dtype)
        if self._effective_key != self._cache_key(self._available(self.active_adapters), dtype):
            self._refresh(dtype)
        return self._effective

    def _is_sharded(self) -> bool:
        """Whether FSDP2 holds the weight, masked already; an error if that is out of date."""
        if not any(map(is_sharded, self.mask_scores.values())):
            return False
        if self.sharded_weight is None or not self.sharded_weight.is_current(self):
            raise UserError(
                f"the sharded mask of {self.module_name} is out of date: call the whole model, not a part of it"
            )
        return True

    @staticmethod
    def optimizer_steps() -> int:
        """Optimizer steps this process has taken, of any optimizer."""
        return _num_optimizer_steps

    def _check_can_refresh(self) -> None:
        if getattr(self, "_is_replica", False):
            raise UserError(
                "masks do not work under torch.nn.DataParallel; start one process per GPU (accelerate launch; maskft "
                "train --accelerate_config multi_gpu), or show one GPU only (CUDA_VISIBLE_DEVICES=0)"
            )
        if self.get_base_layer().weight.device.type == "meta":
            raise UserError(
                f"the weight of {self.module_name} is on the meta device: offloaded layers cannot be masked; load the "
                "model whole, without device_map"
            )

    # A weight made inside torch.inference_mode() could not be used in training afterwards.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _refresh(self, dtype: torch.dtype) -> None:
        """Write the effective weights of this layer and of those ranked together with it, in place.

        A backward pass through a graph that was built before the optimizer step then fails, as it does for any weight
        that an optimizer has changed.
        """
        self._check_can_refresh()
        own_dtype = self.get_base_layer().weight.dtype
        names = self._available(self.active_adapters)
        trained = next((name for name in names if name in self.mask_scores), None)
        pool = [self] if trained is None else self.mask_pools[trained]
        weights = [layer.get_base_layer().weight.detach() for layer in pool]
        dtypes = [weight.dtype if dtype == own_dtype else dtype for weight in weights]
        for layer, weight, its_dtype in zip(pool, weights, dtypes, strict=True):
            out, names_of = layer._effective, tuple(layer._available(layer.active_adapters))
            # A graph of the same adapters is out of date; one of others (a reference model's beside it) is not.
            is_other = layer._effective_key is not None and layer._effective_key[0] != names_of
            if (
                out is None
                or is_other
                or (out.shape, out.dtype, out.device) != (weight.shape, its_dtype, weight.device)
            ):
                layer._effective = torch.empty(weight.shape, dtype=its_dtype, device=weight.device)
            layer._effective_key = None
        if trained is None:
            self._effective.copy_(weights[0])
        else:
            scores = [layer._checked_scores(trained) for layer in pool]
            write_masked_(self.mask_configs[trained], [layer._effective for layer in pool], weights, scores)
        for layer, its_dtype in zip(pool, dtypes, strict=True):
            active = layer._available(layer.active_adapters)
            for name in active:
                if name != trained:
                    layer._effective.masked_fill_(~layer.get_mask(name), 0.0)
            layer._effective_key = layer._cache_key(active, its_dtype)

    def _cache_key(self, names: list[str], dtype: torch.dtype) -> tuple:
        weight = self.get_base_layer().weight
        scores = tuple(
            (parameter.data_ptr(), parameter._version, _num_optimizer_steps if parameter.requires_grad else None)
            for name in names
            if name in self.mask_scores
            for parameter in (layer.mask_scores[name] for layer in self.mask_pools[name])
        )
        coded = tuple(id(self.mask_coded.get(name)) for name in names if name not in self.mask_scores)
        return (tuple(names), dtype, weight.data_ptr(), weight.device, weight._version, scores, coded)

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Zero the removed weights in the base layer; what was there is kept so that ``unmerge`` is bit-exact.

        Args:
            safe_merge: Refuse when the masked weight is not finite.
            adapter_names: Adapters to merge; default: the active ones.
        """
        weight = self.get_base_layer().weight
        if is_sharded(weight):
            raise UserError(
                f"{self.module_name} is sharded by FSDP and cannot be merged; save the adapter and run maskft merge"
            )
        for name in self._available(check_adapters_to_merge(self, adapter_names)):
            removed = ~self.get_mask(name)
            if safe_merge and not torch.isfinite(weight.detach().masked_fill(removed, 0.0)).all():
                raise ValueError(f"{self.module_name} has weights that are not finite after merging {name!r}")
            self._merge_stash[name] = (removed, weight.detach()[removed])
            # masked_fill_, not a product: a product would leave -0.0 behind and keep NaN.
            weight.data.masked_fill_(removed, 0.0)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo ``merge``, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            removed, values = self._merge_stash.pop(self.merged_adapters.pop())
            weight.data[removed.to(weight.device)] = values.to(weight.device, weight.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and everything kept for it."""
        pool = self.mask_pools.get(adapter_name, [])
        if self in pool:
            pool.remove(self)
        self._raw_gradient.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        for attribute in self.other_param_names:
            getattr(self, attribute).pop(adapter_name, None)
        self._effective = self._effective_key = None

    def _get_available_adapters(self) -> set[str]:
        return set(self.mask_configs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move scores, and leave them float32 whatever the base is: in bfloat16 they would tie at the cut."""
        device = device or self.get_base_layer().weight.device
        if adapter_name in self.mask_scores and torch.device("meta") not in (
            torch.device(device),
            self.mask_scores[adapter_name].device,
        ):
            self.mask_scores[adapter_name].data = self.mask_scores[adapter_name].data.to(device)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.mask_configs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A mask is not low-rank."""
        return False


# The two places where a configuration meets the algorithm.


def write_masked_(config: MaskConfig, outs: list[Tensor], weights: list[Tensor], scores: list[Tensor]) -> None:
    """Write the masked weights of one pool of matrices into ``outs``."""
    if config.selection == "topk":
        num = num_removed(sum(s.numel() for s in scores), config.sparsity)
        keep_highest_(outs, weights, scores, num, config.rank_by)
        return
    for out, weight, mask in zip(outs, weights, masks_from_scores(config, scores), strict=True):
        out.copy_(weight).masked_fill_(~mask, 0.0)


def masks_from_scores(config: MaskConfig, scores: list[Tensor]) -> list[Tensor]:
    """Masks of one pool of score matrices."""
    if is_sharded(scores[0]):
        return whole_masks(config, scores)
    if config.selection == "threshold":
        return [threshold_mask(s, config.threshold, config.rank_by) for s in scores]
    if config.scope == "global":
        return topk_masks(scores, config.sparsity, config.rank_by)
    return [topk_masks([s], config.sparsity, config.rank_by)[0] for s in scores]


class MaskedLinear(nn.Module, MaskLayer):
    """``nn.Linear`` or ``Conv1D`` with a mask; see :class:`MaskLayer`."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MaskConfig,
        pool: list[MaskLayer],
        module_name: str,
    ):
        super().__init__()
        MaskLayer.__init__(self, base_layer, module_name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, pool)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Map x (..., I) to (..., O)."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = self._available(self.active_adapters)
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        base = self.get_base_layer()
        trained = [n for n in names if n in self.mask_scores and self.mask_scores[n].requires_grad]
        if torch.is_grad_enabled() and len(trained) > 1:
            return self._forward_jointly_trained(x, names)
        dtype = base.weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
        effective = self.effective_weight(dtype)
        bias = None if base.bias is None else base.bias.to(dtype)
        if torch.is_grad_enabled() and trained:
            return _MaskedLinearFunction.apply(x, self.mask_scores[trained[0]], effective, bias, self, trained[0])
        return F.linear(x, effective.t() if self.is_transposed else effective, bias)

    def gradient_of_scores(self, name: str, raw: Tensor) -> Tensor:
        """The straight-through gradient out of the sum of (dL/dy)^T x, which is overwritten."""
        weight, scores = self.get_base_layer().weight, self.mask_scores[name]
        gradient = score_gradient_(raw, weight, scores, self.mask_configs[name].rank_by)
        for other in self._available(self.active_adapters):
            if other != name:
                # What another active mask removes does not depend on these scores.
                gradient.masked_fill_(~self.get_mask(other), 0.0)
        return gradient

    def _forward_jointly_trained(self, x: Tensor, names: list[str]) -> Tensor:
        """Several adapters trained at once: plain autograd through each mask in turn."""
        base = self.get_base_layer()
        weight = base.weight
        for name in names:
            mask = self.get_mask(name)
            if name in self.mask_scores:
                config = self.mask_configs[name]
                weight = StraightThroughMask.apply(weight, self.mask_scores[name], mask, config.rank_by)
            else:
                weight = weight.masked_fill(~mask, 0.0)
        return F.linear(x, weight.t() if self.is_transposed else weight, base.bias)

    def __repr__(self) -> str:
        return "mask." + super().__repr__()


class _MaskedLinearFunction(torch.autograd.Function):
    """Linear map with the effective weight; the gradient of the scores is accumulated raw between optimizer steps."""

    @staticmethod
    def forward(ctx, x: Tensor, scores: Tensor, effective: Tensor, bias: Tensor | None, layer: MaskedLinear, name: str):
        ctx.save_for_backward(x, scores, effective)
        ctx.layer, ctx.name = layer, name
        return F.linear(x, effective.t() if layer.is_transposed else effective, bias)

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        x, scores, effective = ctx.saved_tensors
        layer, name = ctx.layer, ctx.name
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y.matmul(effective.t() if layer.is_transposed else effective)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None, None, None
        grad_y_TO, x_TI = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
        left, right = (x_TI, grad_y_TO) if layer.is_transposed else (grad_y_TO, x_TI)
        raw = layer._raw_gradient.pop(name, None)
        if raw is None:
            raw = left.t().mm(right).to(torch.float32)
        elif left.dtype == torch.float32:
            raw.addmm_(left.t(), right)
        else:
            raw.add_(left.t().mm(right))
        state = GradientState()
        if not (state.sync_gradients or state.plugin_kwargs.get("sync_each_batch", False)):
            # More micro-batches follow before the optimizer looks: keep the sum, finish it in the last of them.
            layer._raw_gradient[name] = raw
            _unfinished.add(layer)
            return grad_x, None, None, None, None, None
        if _unfinished and not is_distributed():
            # Layers that this last micro-batch does not reach (an expert, a vision tower) have their sums to hand over.
            # Not where ranks reduce gradients: all of them would have to reach the layer, and do in a later one.
            torch.autograd.Variable._execution_engine.queue_callback(_finish_gradients)
        if layer.sharded_weight is not None:
            rank_by = layer.mask_configs[name].rank_by
            return grad_x, layer.sharded_weight.score_gradient(raw, scores, rank_by), None, None, None, None
        return grad_x, layer.gradient_of_scores(name, raw), None, None, None, None


@torch.no_grad()
def _finish_gradients() -> None:
    """At the end of a backward pass: give the optimizer the sums of the layers that it did not reach."""
    for layer in list(_unfinished):
        for name, raw in layer._raw_gradient.items():
            scores, gradient = layer.mask_scores[name], layer.gradient_of_scores(name, raw)
            scores.grad = gradient if scores.grad is None else scores.grad + gradient
        layer._raw_gradient.clear()
    _unfinished.clear()
