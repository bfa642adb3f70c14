"""The fast way to apply masks: the masked weight is kept from one optimizer step to the next.

In between no mask changes, so that under gradient accumulation nothing is computed twice. Selection works in place
(see ``selection.py``), and the gradient of the scores is one pass over a few rows at a time. Outputs, gradients and
masks are those of :class:`maskft.tuner.Masker`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdRef

from ..masking import num_removed
from ..tuner import selection
from ..tuner.masker import Masker, check_can_mask, check_scores
from . import compiled
from .selection import (
    Near,
    keep_above_,
    keep_highest_,
    mask_without_lowest,
    row_parts,
    score_gradient_,
)
from .steps import num_optimizer_steps

if TYPE_CHECKING:
    from ..tuner.config import MaskConfig
    from ..tuner.layer import MaskedLinear

# Everything that a cached tensor depends on: equal keys, equal tensors.
Key = tuple[object, ...]

# Settings on which the gates of all learners depend besides the scores. They and a learner's own options change while a
# layer is in use: the progress at every step, and a callback may set any of the others.
_OF_ALL_GATES = ("selection", "rank_by", "mask_seed", "progress")


@cache
def _settings_of_gate(options: tuple[str, ...]) -> Callable[[MaskConfig], Key]:
    """A function that reads these settings and a learner's options from a configuration, in one call of C."""
    return attrgetter(*_OF_ALL_GATES, *options)


class FastMasker(Masker):
    """Keeps the masked weight of one layer, and makes it again when something it depends on has changed.

    Attributes:
        value: The masked weight, removed entries exactly +0 (or their value); None before the first forward pass. It is
            overwritten by the first forward pass after an optimizer step or a change of an option: a backward pass
            through an older graph then fails, as it does for any weight that an optimizer has changed.
        slopes: Adapter name -> slope of its gate, if that is soft or read by a compiled graph; others are computed in
            the backward pass.
        number: The name of this object in graphs of ``torch.compile``.
    """

    def __init__(self, layer: MaskedLinear) -> None:
        super().__init__(layer)
        self.value: Tensor | None = None
        self.slopes: dict[str, Tensor] = {}
        self.number = compiled.register(self)
        # Of the weight in `value`; None: it is not up to date.
        self._key: Key | None = None
        # How often the weight was computed.
        self._num_computed = 0
        # Adapter name -> (count of optimizer steps, backward pass) at which the price was last added to its gradient.
        self._priced_at: dict[str, tuple[int, int]] = {}
        # Adapter name -> where the cut was, which is where the next one is looked for first.
        self._near: dict[str, Near | None] = {}
        # Adapter name -> key and value of a factor of its gradient, see `_kept_factor`.
        self._kept: dict[str, tuple[Key, Tensor | None]] = {}

    @staticmethod
    def accepts(layer: MaskedLinear) -> bool:
        """All layers, but not inside torch.func's transforms: their tensors have no data pointer to compare."""
        if torch.compiler.is_compiling():
            return True
        return torch._C._functorch.peek_interpreter_stack() is None

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Map x (..., I) to (..., O); see :meth:`Masker.linear`."""
        names = self.layer.active_masks
        if torch.compiler.is_compiling() and compiled.is_supported(self, names):
            return compiled.linear(self, x, bias, dtype, names[0])
        # The cast is for mypy: torch's decorator of _linear is not annotated.
        y = self._linear(x, bias, dtype, names)
        return cast(Tensor, y)

    # A graph breaks here: the keys below are made of addresses and versions, which a graph cannot hold.
    @torch.compiler.disable
    def _linear(
        self,
        x: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        names: list[str],
    ) -> Tensor:
        """Map x (..., I) to (..., O) outside of graphs; ``names`` are the active masks."""
        layer = self.layer
        weight = self.weight(dtype)
        trained = {}
        for name in names:
            scores = layer.mask_scores[name] if name in layer.mask_scores else None
            if scores is not None and scores.requires_grad:
                trained[name] = scores

        # Nothing is trained: evaluation, a mask that was loaded, or the frozen reference of preference training.
        if not trained or not torch.is_grad_enabled():
            if layer.is_transposed:
                weight = weight.t()
            return F.linear(x, weight, bias)

        # On a matrix, reshaped outside: a view that an autograd function returns cannot be changed in place, which
        # ReLU(inplace=True) after the layer does.
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO = _FastLinear.apply(
            x_TI,
            weight,
            bias,
            self,
            list(trained),
            *trained.values(),
        )
        num_outputs = y_TO.shape[-1]
        y = y_TO.view(*x.shape[:-1], num_outputs)
        return cast(Tensor, y)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The masked weight, up to date; do not write to it."""
        key = self._current_key(dtype)
        if key != self._key:
            check_can_mask(self.layer)
            self._compute(dtype, key[0])
            self._num_computed += 1
            self._key = key
        return cast(Tensor, self.value)

    def mask(
        self,
        adapter_name: str,
        scores: Tensor | None = None,
    ) -> Tensor:
        """Hard mask of an adapter with scores; see :meth:`Masker.mask`."""
        config = self.layer.mask_configs[adapter_name]
        # A learner that cuts at a value: the plain way is one comparison.
        if selection.cut(config) is not None:
            return super().mask(adapter_name, scores)
        if scores is None:
            scores = self.layer.mask_scores[adapter_name]
        check_scores(scores, self.layer.module_name, config)
        # As selection.mask_from_scores does it, with the faster selection.
        sparsity = selection.current_sparsity(config)
        num = num_removed(scores.numel(), sparsity)
        return mask_without_lowest(scores, num, config.rank_by)

    def mask_version(self, adapter_name: str) -> object:
        """Equal versions, equal masks."""
        if adapter_name not in self.layer.mask_scores:
            return super().mask_version(adapter_name)
        # As in _current_key.
        scores = self.layer.mask_scores[adapter_name]
        config = self.layer.mask_configs[adapter_name]
        return (
            scores.data_ptr(),
            scores.device,
            _version(scores),
            num_optimizer_steps(),
            self._phase(config),
            WeakIdRef(scores),
        )

    def removed(self, adapter_name: str) -> Tensor:
        """Entries that the hard mask removes.

        Those of a top-k mask are read off the masked weight, without selecting again: weights that are zero in the base
        are then among them, and their total is known from the sparsity.
        """
        config = self.layer.mask_configs[adapter_name]
        is_alone = self.layer.active_masks == [adapter_name]
        removes_to_zero = config.removed_value == "zero"
        is_shown = is_alone and removes_to_zero and config.selection == "topk"
        if not is_shown or self.value is None:
            return super().removed(adapter_name)
        weight = self.weight(self.value.dtype)
        return torch.eq(weight, 0)

    def forget(self) -> None:
        """Free the weight and everything else that was computed from scores."""
        self.value = None
        self._key = None
        self.slopes = {}
        self._kept = {}

    def refresh(self) -> None:
        """Bring the weight that a compiled graph reads up to date, if one does."""
        if not compiled.is_in_graph(self) or self.value is None:
            return
        if self.layer.weight.device.type != "meta":
            self.weight(self.value.dtype)
            self.add_hard_slopes()

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop the state of an adapter."""
        super().delete_adapter(adapter_name)
        self._priced_at.pop(adapter_name, None)
        self._near.pop(adapter_name, None)

    @torch.inference_mode(False)
    def add_hard_slopes(self) -> None:
        """Compute the slopes that a graph reads."""
        layer = self.layer
        for name in layer.active_masks:
            if name not in layer.mask_scores or name in self.slopes:
                continue
            config = layer.mask_configs[name]
            scores = layer.mask_scores[name].detach()
            slope = selection.hard_slope(config, scores)
            if slope is not None:
                self.slopes[name] = slope

    # The masked weight

    def _current_key(self, dtype: torch.dtype) -> Key:
        """Everything that the masked weight depends on."""
        layer = self.layer
        weight = layer.weight
        names = tuple(layer.active_masks)
        # A tensor is the same if object, address and version are. Addresses and versions alone would not do:
        # torch.func.functional_call puts tensors in place of these, each of which may be where the one before it was,
        # with the same version. Objects alone would not either: `.data = ...` moves a tensor.
        key: list[object] = [
            dtype,
            weight.data_ptr(),
            weight.device,
            _version(weight),
            WeakIdRef(weight),
        ]
        soft_names = []
        for name in names:
            if name not in layer.mask_scores:
                # The mask itself, not its id, which the next mask may be given once this one is freed.
                key.append(layer.saved_masks.get(name))
                continue
            config = layer.mask_configs[name]
            scores = layer.mask_scores[name]
            # Fused optimizers raise no version, so that steps are counted. Frozen scores do not change in a step: the
            # weight under the reference of preference training stays.
            steps = num_optimizer_steps() if scores.requires_grad else None
            phase = self._phase(config)
            if phase[-1]:
                soft_names.append(name)
            key += [
                scores.data_ptr(),
                _version(scores),
                WeakIdRef(scores),
                steps,
                *phase,
            ]
        # First what `_buffer` compares.
        return ((names, tuple(soft_names)), *key)

    def _phase(self, config: MaskConfig) -> Key:
        """The settings on which a gate depends besides its scores; the last one is whether it is soft now."""
        selection.check_progress(config, self.layer.training)
        is_soft = selection.is_soft(config, self.layer.training)
        settings = _settings_of_gate(selection.LEARNERS[config.selection].options)
        return (*settings(config), is_soft)

    # A weight that is created inside torch.inference_mode() could not be used in training afterwards.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _compute(self, dtype: torch.dtype, kind: object) -> None:
        """Write the masked weight, in place if the old one is of the same ``kind``: see :meth:`_buffer`."""
        layer = self.layer
        names = layer.active_masks
        weight = layer.get_base_weight()
        out = self._buffer(weight, dtype, kind)
        self.slopes = {}

        # The first mask with scores is written in one pass over the weight. The order of several does not matter: they
        # remove the union, to zero (see check_can_mask).
        first = next((name for name in names if name in layer.mask_scores), None)
        if first is None:
            out.copy_(weight)
        else:
            self._write(first, out, weight)
        for name in names:
            if name != first:
                out.copy_(selection.blend(out, layer.get_mask(name), layer.removed_value(name)))

    def _buffer(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        kind: object,
    ) -> Tensor:
        """Where to write: into the old value, unless that is of another kind, whose graph may still need it.

        That is the graph of other adapters, or of soft gates, between the forward and backward pass of which a model
        may be evaluated. A new tensor at every step, the plain way, would take twice the memory for a moment.

        Args:
            weight: The base weight.
            dtype: Dtype of the masked weight.
            kind: Names of the active adapters, and of those whose gate is soft.
        """
        out = self.value
        is_of_others = self._key is not None and self._key[0] != kind
        # No weight is up to date until this one is written: an error in between must not leave a half-written one.
        self._key = None

        # The old value fits, unless the model was moved or cast, or another dtype is autocast's.
        wanted = (weight.shape, dtype, weight.device)
        if out is not None and not is_of_others:
            found = (out.shape, out.dtype, out.device)
            if found == wanted:
                return out

        out = torch.empty(
            weight.shape,
            dtype=dtype,
            device=weight.device,
        )
        self.value = out
        return out

    def _write(
        self,
        name: str,
        out: Tensor,
        weight: Tensor,
    ) -> None:
        """Write the weight with the gate of one adapter that has scores."""
        layer = self.layer
        config = layer.mask_configs[name]
        scores = check_scores(layer.mask_scores[name], layer.module_name, config)

        # A soft gate: its slope is known now, and the backward pass needs it.
        if selection.is_soft(config, layer.training):
            noise = selection.draw_noise(
                config,
                layer.module_name,
                scores.shape,
                scores.device,
            )
            gate, slope = selection.soft_gate(config, scores, noise)
            self.slopes[name] = slope
            masked = selection.blend(weight, gate, layer.removed_value(name))
            out.copy_(masked)
            return

        # Removed weights take a value.
        if config.removed_value != "zero":
            mask = self.mask(name)
            masked = selection.blend(weight, mask, layer.removed_value(name))
            out.copy_(masked)
            return

        # Zeros are written without making a mask first.
        cut = selection.cut(config)
        if cut is not None:
            keep_above_(out, weight, scores, cut, config.ranks_by)
        else:
            # Top-k. `near` is None in the first step, and saves the sample in the next ones.
            sparsity = selection.current_sparsity(config)
            num = num_removed(scores.numel(), sparsity)
            near = self._near.get(name)
            self._near[name] = keep_highest_(
                out,
                weight,
                scores,
                num,
                config.rank_by,
                near,
            )

    # The gradient of the scores

    def score_gradient(
        self,
        name: str,
        grad_weight: Tensor,
        scores: Tensor,
        slopes_of: Mapping[str, Tensor],
        active: Sequence[str],
    ) -> Tensor:
        """Gradient of the scores of one adapter, float32: dL/dW_eff * (W - removed value) * slope.

        Args:
            name: The adapter.
            grad_weight: dL/dW_eff, shape of the weight; may be overwritten.
            scores: The scores of the forward pass.
            slopes_of: The slopes of the forward pass.
            active: The adapters that were active in the forward pass.
        """
        layer = self.layer
        config = layer.mask_configs[name]
        scores = scores.detach()
        weight = layer.get_base_weight()
        removed_value = layer.removed_value(name)
        is_priced = self._is_priced(config, name)
        removed_by_others = [~layer.get_mask(other) for other in active if other != name]

        # A kept factor is the weight with the signs of the scores or, where that is not kept, the slopes.
        factor = self._kept_factor(config, name, weight, scores)
        signed_weight = factor if _keeps_signed_weight(config) else None
        slopes = slopes_of.get(name, factor) if signed_weight is None else None

        # In place where the dtype allows it, and some rows at a time: they stay in the cache between the operations.
        out = grad_weight
        if grad_weight.dtype != torch.float32:
            out = torch.empty_like(grad_weight, dtype=torch.float32)
        for part in row_parts(scores):
            scores_here = scores[part]
            gradient = out[part]
            if out is not grad_weight:
                gradient.copy_(grad_weight[part])

            # (W - removed value) * sign(s), from one matrix or from two.
            if signed_weight is not None:
                gradient.mul_(signed_weight[part])
            else:
                difference = weight[part]
                if removed_value is not None:
                    difference = difference - removed_value[part]
                score_gradient_(gradient, difference, scores_here, config.ranks_by)

            # The slope of the gate.
            if slopes is None:
                slope = selection.hard_slope(config, scores_here)
            else:
                slope = slopes[part]
            if slope is not None:
                gradient.mul_(slope)

            # An entry that another mask removes does not depend on these scores.
            for removed in removed_by_others:
                gradient.masked_fill_(removed[part], 0.0)

            if is_priced:
                # As in Masker.add_price_: the slope of a soft gate has noise in it.
                slope = None if selection.has_soft_gate(config) else slope
                gradient.add_(selection.price_gradient(config, scores_here, scores.numel(), slope))
        return out

    def _is_priced(self, config: MaskConfig, name: str) -> bool:
        """Whether this backward pass adds the gradient of the price: the first one of an optimizer step.

        A gradient that was dropped without a step, as trainers do with one that is not finite, took its price with it.
        A layer that is used twice comes here twice in one pass, before autograd fills ``.grad``.
        """
        if config.price == 0:
            return False

        step = num_optimizer_steps()
        backward_pass = torch._C._current_graph_task_id()
        now = (step, backward_pass)
        before = self._priced_at.get(name)

        is_same_step = before is not None and before[0] == step
        if is_same_step:
            is_same_pass = before == now
            if is_same_pass or self._has_gradient_of_step(name):
                return False
        elif self._has_gradient(name):  # the step was that of another optimizer
            return False
        self._priced_at[name] = now
        return True

    def _has_gradient_of_step(self, name: str) -> bool:
        """Whether the gradient that was priced in this step is still there, and not one that was zeroed since.

        On a GPU one of zeros counts as still there: a look at the numbers would wait for the GPU in each micro-batch.
        """
        grad = self.layer.mask_scores[name].grad
        if grad is None:
            return False
        if grad.device.type != "cpu":
            return True
        # The first row shows it at once, unless it is all zeros.
        return bool(grad[:1].any()) or self._has_gradient(name)

    def _kept_factor(
        self,
        config: MaskConfig,
        name: str,
        weight: Tensor,
        scores: Tensor,
    ) -> Tensor | None:
        """A factor of the gradient that is kept if steps have several micro-batches; None: nothing is kept.

        It is ``weight * sign(scores)`` where that is all, and else the slope of the gate. Multiplying by the product
        reads two matrices in place of three, and this is bound by memory. The result is bit for bit that of
        :func:`~maskft.fast.selection.score_gradient_`, because a sign changes no other bit. Without accumulation
        nothing is kept on a CPU; on a GPU, where memory is dearer than these passes, slopes alone are.
        """
        is_on_cpu = scores.device.type == "cpu"
        is_signed = _keeps_signed_weight(config)
        if is_signed:
            is_wanted = is_on_cpu
        else:
            # One row of scores is enough to see whether the gate has a slope other than 1.
            is_wanted = selection.hard_slope(config, scores[:1]) is not None
        if not is_wanted:
            return None

        # The weight as it is stored: a quantised one is a new tensor each time that it is dequantised.
        raw = self.layer.weight
        key = (
            scores.data_ptr(),
            _version(scores),
            raw.data_ptr(),
            _version(raw),
            num_optimizer_steps(),
            self._num_computed,
            *self._phase(config),
        )
        known_key, factor = self._kept.get(name, ((), None))
        if known_key == key and factor is not None:
            return factor
        # The first backward pass of a step, and no step so far has had a second one: only the key is kept. If the next
        # pass has the same key, it belongs to the same step, and a factor pays.
        if known_key != key and factor is None and is_on_cpu:
            self._kept[name] = (key, None)
            return None

        # Computed, into the tensor of the last step if there is one. Intermediate values have no names: each is
        # freed before the next one is allocated, which then is the same memory, still in the cache.
        like = weight if is_signed else scores
        wanted = (like.shape, like.dtype)
        if factor is None or (factor.shape, factor.dtype) != wanted:
            factor = torch.empty_like(like)
        for part in row_parts(scores):
            if is_signed:
                torch.mul(weight[part], torch.sign(scores[part]), out=factor[part])
            else:
                factor[part] = cast(Tensor, selection.hard_slope(config, scores[part]))
        self._kept[name] = (key, factor)
        return factor


class _FastLinear(torch.autograd.Function):
    """Linear map with the masked weight; the gradient goes straight through the masks of the trained adapters."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        masker: FastMasker,
        names: list[str],
        *scores: Any,
    ) -> Tensor:
        # Scores are inputs, so that autograd asks for their gradients; the output is computed from the weight alone.
        ctx.save_for_backward(x_TI, weight, *scores)
        ctx.masker = masker
        ctx.names = names
        # Before the backward pass another adapter may run: TRL's reference model does.
        ctx.active = tuple(masker.layer.active_masks)
        ctx.slopes = masker.slopes
        if masker.layer.is_transposed:
            weight = weight.t()
        return F.linear(x_TI, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight, *scores = ctx.saved_tensors
        masker = ctx.masker
        is_transposed = masker.layer.is_transposed

        # The gradient of x is needed only if something before the layer is trained, that of the bias if the bias is.
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight_OI = weight.t() if is_transposed else weight
            grad_x = grad_y_TO.matmul(weight_OI)
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y_TO.sum(0)

        grad_scores = []
        for name, scores_of_name in zip(ctx.names, scores, strict=True):
            # dL/dW_eff in the layout of the weight; once for each adapter, because score_gradient overwrites it.
            if is_transposed:
                grad_weight = x_TI.t().mm(grad_y_TO)
            else:
                grad_weight = grad_y_TO.t().mm(x_TI)
            gradient = masker.score_gradient(
                name,
                grad_weight,
                scores_of_name,
                ctx.slopes,
                ctx.active,
            )
            grad_scores.append(gradient)
        return grad_x, None, grad_bias, None, None, *grad_scores


def kept_bytes_per_weight(
    config: MaskConfig,
    itemsize: int,
    is_on_cpu: bool,
    num_micro_batches: int,
) -> int:
    """Bytes of a factor of the gradient that a masker keeps in training, beside its masked weight.

    Args:
        config: Configuration of the adapter.
        itemsize: Bytes of a weight of the base.
        is_on_cpu: Whether the layer is on a CPU.
        num_micro_batches: Micro-batches of a step.
    """
    # The slope of a soft gate comes with the gate.
    if selection.has_soft_gate(config):
        return torch.float32.itemsize
    # As in `_kept_factor`.
    has_several = num_micro_batches > 1
    if _keeps_signed_weight(config):
        return itemsize if is_on_cpu and has_several else 0
    has_slope = selection.hard_slope(config, torch.zeros(1, dtype=torch.float32, device="cpu")) is not None
    is_kept = has_slope and (has_several or not is_on_cpu)
    return torch.float32.itemsize if is_kept else 0


def _keeps_signed_weight(config: MaskConfig) -> bool:
    """Whether the kept factor is ``weight * sign(scores)``; the gradient has no other factor then."""
    if selection.has_soft_gate(config):
        return False
    return config.ranks_by == "abs" and config.removed_value == "zero"


def _version(tensor: Tensor) -> int:
    """Count of writes to a tensor, kept by torch; tensors of ``torch.inference_mode()`` have none."""
    if tensor.is_inference():
        return 0
    return tensor._version
