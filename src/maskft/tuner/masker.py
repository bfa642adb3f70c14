"""How a layer applies its masks: the plain way, and the seam for other ways.

A :class:`Masker` belongs to one layer and owns everything that is computed from its scores. This one keeps nothing: it
computes mask and effective weight in every forward pass and leaves the rest to autograd. It is the reference: every
other masker must give the same outputs, gradients and masks, bit for bit.

Other maskers subclass it and join :data:`MASKERS` (``maskft.fast`` keeps the effective weight between optimizer steps,
``maskft.fsdp`` masks the rows that FSDP2 leaves on each rank). A layer takes the last one that accepts it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskft_common.errors import UserError

from ..masking import score_gradient
from . import selection

if TYPE_CHECKING:
    from .config import MaskConfig
    from .layer import MaskedLinear


class Masker:
    """Applies the active masks to the weight of one layer; the plain way.

    Attributes:
        layer: The layer.
        base_fingerprint: Fingerprint of the base model's masked weights, where memory no longer holds the unmasked
            ones (FSDP2); None: they are there.
    """

    base_fingerprint: str | None = None

    def __init__(self, layer: MaskedLinear) -> None:
        self.layer = layer
        # Adapter name -> number of the backward pass that last added the gradient of the price.
        self._priced_in: dict[str, int] = {}

    @staticmethod
    def accepts(layer: MaskedLinear) -> bool:
        """Whether this class can apply the masks of ``layer`` as they are now."""
        return True

    def linear(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Map x (..., I) to (..., O) with the masked weight; the gradient reaches the scores of trained adapters.

        Args:
            x: Input, of dtype ``dtype``.
            bias: (O,), of dtype ``dtype``, or None.
            dtype: Dtype to compute in: that of the weight, or that of autocast.
        """
        weight = self._masked_weight(dtype)
        if self.layer.is_transposed:  # Conv1D's (I, O)
            weight = weight.t()
        return F.linear(x, weight, bias)

    @torch.no_grad()
    def weight(self, dtype: torch.dtype) -> Tensor:
        """Base weight with the active masks applied; removed entries are exactly +0 (or their value). Read only."""
        return self._masked_weight(dtype)

    def mask(self, adapter_name: str, scores: Tensor | None = None) -> Tensor:
        """Hard mask of an adapter with scores, in full on every rank; bool, True = keep.

        Args:
            adapter_name: The adapter.
            scores: Its scores, gathered from all ranks; default: those of the layer.
        """
        config = self.layer.mask_configs[adapter_name]
        if scores is None:
            scores = self.layer.mask_scores[adapter_name]
        check_scores(scores, self.layer.module_name, config)
        return selection.mask_from_scores(config, scores)

    def mask_version(self, adapter_name: str) -> object:
        """A value that is equal at two calls only if the mask is, too: a key for caches of values that masks decide."""
        if adapter_name in self.layer.mask_scores:
            # Nothing here can know whether scores have changed: a new object equals no other.
            return object()
        saved = self.layer.saved_masks.get(adapter_name)
        return (id(saved), self.layer.weight.device)

    def removed(self, adapter_name: str) -> Tensor:
        """Entries of the weight in this process that the hard mask of an adapter removes, to count; bool."""
        # Through the layer, which also knows masks without scores.
        return ~self.layer.get_mask(adapter_name)

    def forget(self) -> None:
        """Drop tensors computed from scores and weights: these have changed, and not by an optimizer."""

    def refresh(self) -> None:
        """Update state that must not wait for the next forward pass: adapters, progress or mode have changed."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop the state of an adapter."""
        self._priced_in.pop(adapter_name, None)
        self.forget()

    def _masked_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight after one mask after the other, so that a weight that any of them removes is removed."""
        layer = self.layer
        check_can_mask(layer)
        weight = layer.get_base_weight()

        for name in layer.active_masks:
            removed_value = layer.removed_value(name)

            # A mask that was loaded for inference: nothing is trained.
            if name not in layer.mask_scores:
                mask = layer.get_mask(name)
                weight = selection.blend(weight, mask, removed_value)
                continue

            # Gate and slope are constants for autograd, which reaches the scores through _StraightThrough alone.
            config = layer.mask_configs[name]
            scores = check_scores(layer.mask_scores[name], layer.module_name, config)
            gate, slope = selection.gate_and_slope(
                config,
                scores.detach(),
                layer.module_name,
                layer.training,
            )
            weight = _StraightThrough.apply(
                weight,
                scores,
                gate,
                slope,
                removed_value,
                self,
                name,
            )

        # Cast last, so that the backward pass multiplies by the weight as it is stored.
        return weight.to(dtype)

    def add_price_(
        self,
        gradient: Tensor,
        scores: Tensor,
        slope: Tensor | None,
        name: str,
    ) -> Tensor:
        """Add the gradient of ``price``, to the first backward pass of an optimizer step only.

        The price does not depend on the batch: added in each of N micro-batches, it would count N times.
        """
        config = self.layer.mask_configs[name]
        is_priced = config.price > 0 and self._is_first_backward(name)
        if is_priced:
            # The relaxed number of kept weights takes the slope of a hard gate; a soft gate's has noise in it.
            slope = None if selection.has_soft_gate(config) else slope
            gradient += selection.price_gradient(config, scores, scores.numel(), slope)
        return gradient

    def _is_first_backward(self, name: str) -> bool:
        """Whether no gradient has been accumulated in the scores yet.

        A layer that is used twice in one forward pass comes here twice before autograd fills ``.grad``, so the number
        of the backward pass is kept; torch.utils.checkpoint uses the same number.
        """
        if self._has_gradient(name):
            return False

        backward_pass = torch._C._current_graph_task_id()
        if self._priced_in.get(name) == backward_pass:
            return False
        self._priced_in[name] = backward_pass
        return True

    def _has_gradient(self, name: str) -> bool:
        """Whether the scores have a gradient. Of zeros it counts as none: zero_grad(set_to_none=False) leaves it."""
        grad = self.layer.mask_scores[name].grad
        return grad is not None and bool(grad.any())


# The last one that accepts a layer applies its masks.
MASKERS: list[type[Masker]] = [Masker]


class _StraightThrough(torch.autograd.Function):
    """Effective weight of one adapter; the gate counts as its slope on the way back (Eq. 5 of the paper).

    The usual one-liner, ``weight * (hard + soft - soft.detach())``, would round the gate, and leave -0 or NaN where a
    weight is removed.
    """

    # With a separate setup_context, and a rule for vmap, torch.func's transforms accept the function.
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        scores: Tensor,
        gate: Tensor,
        slope: Tensor | None,
        removed_value: Tensor | None,
        masker: Masker,
        name: str,
    ) -> Tensor:
        return selection.blend(weight, gate, removed_value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, scores, gate, slope, removed_value, masker, name = inputs
        # Saved through autograd, whose backward pass raises if one of them was changed in place since.
        ctx.save_for_backward(weight, scores, gate, slope, removed_value)
        ctx.masker = masker
        ctx.name = name
        # Read now, because the adapter may have been replaced before the backward pass.
        ctx.ranks_by = masker.layer.mask_configs[name].ranks_by

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scores, gate, slope, removed_value = ctx.saved_tensors
        grad_weight = None
        grad_scores = None

        # The weight needs a gradient if another adapter's mask was applied to it before: W_eff = W * m1 * m2. Masks
        # that are active together are hard and remove to zero, see check_can_mask.
        if ctx.needs_input_grad[0]:
            grad_weight = grad.masked_fill(~gate, 0.0)

        # dL/ds = dL/dW_eff * (W - R) * sign(s) * slope: see selection.py, and Eq. 5 in masking.py.
        if ctx.needs_input_grad[1]:
            difference = weight
            if removed_value is not None:
                difference = weight - removed_value
            grad_scores = score_gradient(grad, difference, scores, ctx.ranks_by)
            if slope is not None:
                grad_scores = grad_scores * slope
            grad_scores = ctx.masker.add_price_(grad_scores, scores, slope, ctx.name)

        # One for each input of forward.
        return grad_weight, grad_scores, None, None, None, None, None


def check_scores(scores: Tensor, module_name: str, config: MaskConfig) -> Tensor:
    """Return ``scores``, or raise if they cannot be ranked."""
    # PEFT's low_cpu_mem_usage creates adapters on the meta device, and fills them from the file.
    if scores.device.type == "meta":
        raise UserError(f"the scores of {module_name} are still on the meta device; load or initialise them")
    # model.to(dtype) cannot do it (see Float32ParameterDict), but code that casts each parameter can.
    if scores.dtype != torch.float32:
        raise UserError(
            f"the scores of {module_name} were cast to {scores.dtype}, and masks are ranked in float32: undo the cast "
            "(TRL's trainers cast them over a base in four or eight bits; how to undo it: docs/compatibility.md)"
        )
    if config.starts_from_data:
        # Scores that wait for data are all NaN, so that the first entry is enough. A slice, because there may be none.
        first = scores.detach().view(-1)[:1]
        if bool(first.isnan().any()):
            raise UserError(
                f"the scores of {module_name} hold NaN: training diverged, or init_scores={config.init_scores!r} got "
                "no data: maskft.start_scores(model, maskft.wanda_keys(model, rows)), which maskft train does by itself"
            )
    return scores


def check_can_mask(layer: MaskedLinear) -> None:
    """Raise if the active masks of ``layer`` cannot be applied together, or not where the weight is."""
    # Hard masks that remove to zero commute, and their gradients are exact: the others' masks are constant factors.
    configs = {name: layer.mask_configs[name] for name in layer.active_masks}
    trained = [config for name, config in configs.items() if name in layer.mask_scores]
    has_soft_gates = any(selection.has_soft_gate(config) for config in trained)
    has_values = any(config.removed_value != "zero" for config in configs.values())
    if len(configs) > 1 and (has_soft_gates or has_values):
        raise UserError(
            "masks that are active together must be hard and remove to zero: activate one with noise, or whose "
            "removed_value is base, alone"
        )
    # accelerate loads offloaded weights in a hook on the base layer's forward, which a masked layer does not call.
    if layer.weight.device.type == "meta":
        raise UserError(
            f"the weight of {layer.module_name} is on the meta device: offloaded layers cannot be masked; load the "
            "model whole, without device_map"
        )
