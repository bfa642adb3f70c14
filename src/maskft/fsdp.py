"""Masks of a model sharded by FSDP2: every rank holds some rows of each matrix, and the mask is the unsharded one.

Scores and weights are DTensors sharded by rows (``Shard(0)``). Ranks agree on the cut by summing counts of score bits,
so no score leaves its rank. Each rank then masks its own rows of the weight in place, keeping the originals, and FSDP's
all-gather, which every frozen weight goes through anyway, carries the masked weight: masking adds no traffic to it. The
gradient of the masked weight is reduce-scattered in every backward pass and multiplied by the local weight.

Importing this module adds :class:`ShardedMasker` to the tuner, for layers whose scores are DTensors.

Shapes: a matrix is (O, I); its shard on one rank is (rows, I), where the last ranks may have fewer rows or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.utils.hooks import RemovableHandle

from maskft_common.errors import NotFiniteError, UserError

from .fast.masker import FastMasker
from .fast.selection import row_parts, score_gradient_
from .fast.steps import num_optimizer_steps, watch_optimizers
from .masking import num_removed, ranking_keys
from .masks.fingerprints import base_fingerprint
from .tuner import selection
from .tuner.config import MaskConfig
from .tuner.layer import MaskedLinear
from .tuner.masker import MASKERS
from .tuner.model import MODEL_HOOKS
from .tuner.scores import Float32ParameterDict

# One for each value of half a float32.
_NUM_BINS = 1 << 16


# The algorithm


def remove_lowest_of_shards(
    shard: Tensor,
    num: int,
    rank: int,
    all_reduce: Callable[[Tensor], Tensor],
    all_gather: Callable[[Tensor], Tensor],
) -> Tensor:
    """This rank's rows of the mask that :func:`maskft.masking.remove_lowest` gives on the whole matrix.

    Two histograms of 65,536 counts (upper, then lower half of the float32 patterns) are summed over the ranks and give
    the cut exactly; the number of entries equal to it on each rank decides which of them are removed.

    Args:
        shard: Flat float32 ranking values of this rank's rows, maybe empty.
        num: How many entries of the whole matrix to remove.
        rank: Position of this rank; lower ranks hold the rows before this one's.
        all_reduce: Sums an int64 tensor over the ranks.
        all_gather: Stacks the int64 tensors of all ranks: (n,) -> (ranks, n).

    Returns:
        Flat bool mask; True = keep; over all ranks exactly ``num`` entries are False. Among equal values the first in
        index order of the whole matrix are removed first.

    Raises:
        NotFiniteError: On every rank, if a value on any of them is NaN.
    """
    # The plain way, one rank that gathers all scores, would take their memory and traffic; a bisection would take 32
    # rounds of messages. Here there are two, of 512 KiB each, and then one number from each rank.

    # The upper half of the cut. The number of NaN goes with the counts, so that every rank raises or none does.
    bits = ordered_bits(shard)
    counts = torch.bincount(_upper(bits), minlength=_NUM_BINS)
    num_nan = shard.isnan().sum()[None]
    counts = torch.cat([counts, num_nan])
    counts = all_reduce(counts)
    if counts[-1]:
        raise NotFiniteError("scores contain NaN, so they cannot be ranked")
    if num == 0:
        return torch.ones_like(shard, dtype=torch.bool)
    upper, num_in_bin = _find(counts[:-1], num)

    # Its lower half, among the entries with that upper half.
    is_in_bin = _upper(bits) == upper
    lower_halves = bits[is_in_bin] & (_NUM_BINS - 1)
    counts = torch.bincount(lower_halves, minlength=_NUM_BINS)
    counts = all_reduce(counts)
    lower, num_ties_removed = _find(counts, num_in_bin)

    # The reverse of _upper. In Python's integers, which shift negative numbers as int32 does.
    signed_upper = upper - (_NUM_BINS >> 1)
    cut = (signed_upper << 16) | lower

    # Of the entries equal to the cut the first ones are removed, those of earlier ranks before those of this one.
    mask = bits > cut
    is_tie = bits == cut
    num_ties_of_ranks = all_gather(is_tie.sum()[None])
    num_ties_before = int(num_ties_of_ranks[:rank].sum())
    # Not below 0, where a slice would count from the end.
    num_removed_here = max(num_ties_removed - num_ties_before, 0)
    ties = is_tie.nonzero().squeeze(1)
    mask[ties[num_removed_here:]] = True
    return mask


def ordered_bits(key: Tensor) -> Tensor:
    """Bits of each float32 as int32, mapped so that the integers are ordered as the floats are."""
    bits = key.view(torch.int32)
    # For negative floats the magnitude bits run backwards; flipping them makes the integer order the float order. The
    # shift keeps the sign: all bits of a negative number are 1 after it, those of others 0.
    is_negative = bits >> 31
    return bits ^ (is_negative & 0x7FFFFFFF)


def _upper(bits: Tensor) -> Tensor:
    """Upper half of ordered bits, from 0 instead of from -32,768."""
    # Bins of a histogram are counted from 0.
    return (bits >> 16) + (_NUM_BINS >> 1)


def _find(counts: Tensor, k: int) -> tuple[int, int]:
    """Bin of the ``k``-th smallest value (from 1), and its rank inside that bin (from 1)."""
    # The first bin up to which there are at least k values.
    cumulative = counts.cumsum(0)
    index = int(torch.searchsorted(cumulative, k))
    num_in_lower_bins = 0
    if index > 0:
        num_in_lower_bins = int(cumulative[index - 1])
    return index, k - num_in_lower_bins


# On DTensors


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a parameter is spread over ranks."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded over processes."""
    # It shares memory with the parameter, and may be written to in place.
    detached = tensor.detach()
    if is_sharded(detached):
        own: Tensor = detached.to_local()
        return own
    return detached


def rows_of(matrix: Tensor, like: DTensor) -> Tensor:
    """The rows of a whole matrix that this rank holds of ``like``."""
    # FSDP2 splits as torch.chunk does, which gives fewer chunks than ranks if there are few rows.
    chunks = matrix.chunk(like.device_mesh.size())
    rank = like.device_mesh.get_local_rank()
    if rank < len(chunks):
        return chunks[rank]
    return matrix[:0]


@torch.no_grad()
def shard_mask(config: MaskConfig, scores: DTensor) -> Tensor:
    """This rank's rows of the mask of a matrix; every rank must call it. Bool, True = keep."""
    mesh = scores.device_mesh
    group = mesh.get_group()
    num_ranks = mesh.size()
    rows = scores.to_local()
    keys = ranking_keys(rows, config.ranks_by)

    def all_reduce(counts: Tensor) -> Tensor:
        dist.all_reduce(counts, group=group)
        return counts

    def all_gather(counts: Tensor) -> Tensor:
        # One flat tensor: gathering into it saves a copy from a list of tensors.
        out = counts.new_empty(num_ranks * counts.numel())
        dist.all_gather_into_tensor(out, counts, group=group)
        return out.view(num_ranks, -1)

    cut = selection.cut(config)
    if cut is not None:
        # Summed over the ranks, so that every rank raises or none does.
        num_nan = keys.isnan().sum()
        num_nan = all_reduce(num_nan)
        if num_nan:
            raise NotFiniteError("scores contain NaN, so they cannot be compared")
        mask = keys > cut
    else:
        sparsity = selection.current_sparsity(config)
        num = num_removed(scores.numel(), sparsity)
        mask = remove_lowest_of_shards(
            keys,
            num,
            mesh.get_local_rank(),
            all_reduce,
            all_gather,
        )
    return mask.view(rows.shape)


def whole_mask(config: MaskConfig, scores: DTensor) -> Tensor:
    """The mask of a matrix in full on every rank; every rank must call it."""
    # As bytes, which every backend gathers.
    rows = shard_mask(config, scores).byte()
    whole = _like(rows, scores).full_tensor()
    return whole.bool()


def _like(rows: Tensor, scores: DTensor) -> DTensor:
    """This rank's rows as a DTensor that is sharded as ``scores``."""
    return DTensor.from_local(
        rows,
        scores.device_mesh,
        scores.placements,
        run_check=False,
        shape=scores.shape,
        stride=scores.stride(),
    )


class ShardedMasker(FastMasker):
    """Masks this rank's rows of the weight of one layer, from which FSDP gathers.

    Attributes:
        original: The unmasked rows; None until :func:`refresh_masks` is called for the first time.
        removed_rows: Values that removed weights take, rows as ``original``; None: zero.
        shard: Mask of the rows, bool; None while the layer shows its unmasked weight.
        base_fingerprint: That of the whole model's masked weights, taken before the first of them was masked.
    """

    def __init__(self, layer: MaskedLinear) -> None:
        super().__init__(layer)
        self.original: Tensor | None = None
        self.removed_rows: Tensor | None = None
        self.shard: Tensor | None = None
        # The sharded weight: inside forward, the layer's own attribute is the gathered one.
        self._parameter: DTensor | None = None
        # Slope of the gate that is shown; None: 1.
        self._slope: Tensor | None = None
        # The state (see _state) of which the rows are shown; None: masked rows have not been written yet.
        self._shown: tuple[Any, ...] | None = None

    @staticmethod
    def accepts(layer: MaskedLinear) -> bool:
        """Layers whose scores are spread over ranks."""
        return any(is_sharded(scores) for scores in layer.mask_scores.values())

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Map x (..., I) to (..., O); see :meth:`Masker.linear`."""
        # Not FastMasker.linear, whose path through torch.compile reads a weight that is kept outside of FSDP.
        names = self.layer.active_masks
        return cast(Tensor, self._linear(x, bias, dtype, names))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The masked weight as FSDP shows it: in full inside forward, else this rank's rows."""
        # Rows cannot be masked here: FSDP has gathered them already.
        if not self.is_current():
            raise UserError(
                f"the sharded mask of {self.layer.module_name} is out of date: call the model, not a part of it"
            )
        return self.layer.weight.to(dtype)

    def mask(self, adapter_name: str, scores: Tensor | None = None) -> Tensor:
        """Hard mask of an adapter, in full on every rank; every rank must call it, unless it passes whole scores."""
        if scores is None:
            scores = self.layer.mask_scores[adapter_name]
        if is_sharded(scores):
            config = self.layer.mask_configs[adapter_name]
            return whole_mask(config, scores)
        # Whole scores, as a state dict has them that was gathered for saving.
        return super().mask(adapter_name, scores)

    def removed(self, adapter_name: str) -> Tensor:
        """Entries that this rank's rows of the mask remove, as of the latest :func:`refresh_masks`."""
        assert self.shard is not None
        return ~self.shard

    def refresh(self) -> None:
        """Nothing: :func:`refresh_masks` runs before every forward pass of the model."""

    def attach(self, fingerprint: str) -> None:
        """Take over the rows of the weight, before the first of them is masked."""
        layer = self.layer
        parameter = cast(DTensor, layer.weight)
        self._parameter = parameter
        self.base_fingerprint = fingerprint
        # A copy: the rows that FSDP gathers from are overwritten with masked ones.
        self.original = parameter.to_local().clone()
        # Values are not parameters, so that FSDP has left them whole on every rank.
        value = layer.removed_values.get(self.adapter())
        if value is not None:
            rows = rows_of(value, parameter)
            self.removed_rows = rows.to(self.original)

    def is_current(self) -> bool:
        """Whether the rows are up to date with the layer's scores and its active adapters."""
        return self._shown is not None and self._shown == self._state()

    def show(self) -> None:
        """Mask the rows (with the layer's soft gate, if it is trained with one), or show them unmasked if disabled."""
        layer = self.layer
        assert self._parameter is not None and self.original is not None
        # The memory from which FSDP gathers.
        rows = self._parameter.to_local()
        self.shard = None
        self._slope = None
        if layer.disable_adapters:
            rows.copy_(self.original)
        else:
            name = self.adapter()
            config = layer.mask_configs[name]
            scores = cast(DTensor, layer.mask_scores[name])
            self.shard = shard_mask(config, scores)
            gate = self._gate(name)
            masked_rows = selection.blend(self.original, gate, self.removed_rows)
            rows.copy_(masked_rows)
        # Written last: an error in between leaves rows that are not current.
        self._shown = self._state()

    def score_gradient(
        self,
        name: str,
        grad_weight: Tensor,
        scores: Tensor,
        slopes_of: Mapping[str, Tensor],
        active: Sequence[str],
    ) -> Tensor:
        """Mean over the ranks of dL/dscores, sharded as the scores; ``grad_weight`` is this rank's (dL/dy)^T x."""
        # FSDP gathers the weight again for the backward pass, from the rows as they are now.
        if not self.is_current():
            raise UserError(
                f"the mask of {self.layer.module_name} changed between forward and backward, for which FSDP gathers "
                "the weight again: compute what needs the model without its mask before the forward pass"
            )
        config = self.layer.mask_configs[name]
        sharded = cast(DTensor, scores.detach())
        mesh = sharded.device_mesh

        # A reduce-scatter: every rank has a gradient of the whole weight from its own rows of the batch, and gets the
        # mean of all ranks for its own rows of the weight. FSDP would do it for a weight that is trained; ours is
        # frozen.
        partial = DTensor.from_local(
            grad_weight.float(),
            mesh,
            [Partial()],
            run_check=False,
        )
        total = partial.redistribute(placements=sharded.placements)
        rows = total.to_local().div_(mesh.size())

        # As the fast masker, with this rank's rows.
        weight = cast(Tensor, self.original)
        if self.removed_rows is not None:
            weight = weight - self.removed_rows
        local_scores = sharded.to_local()
        for part in row_parts(rows):
            score_gradient_(
                rows[part],
                weight[part],
                local_scores[part],
                config.ranks_by,
            )
        if self._slope is not None:
            rows.mul_(self._slope)

        # The price is not summed over the ranks: each entry is on one of them. It counts all entries of the matrix.
        gradient: Tensor = _like(rows, sharded)
        if self._is_priced(config, name):
            numel = sharded.numel()
            price = selection.price_gradient(config, sharded, numel)
            gradient.add_(price)
        return gradient

    def _has_gradient(self, name: str) -> bool:
        # The ranks would have to agree. So only one optimizer is expected to take steps.
        return False

    def _has_gradient_of_step(self, name: str) -> bool:
        # For the same reason without a look at the numbers.
        return self.layer.mask_scores[name].grad is not None

    def adapter(self) -> str:
        """The one active adapter."""
        # One, because the rows hold one masked weight, and `original` is the weight without any mask.
        names = self.layer.active_masks
        if len(names) != 1 or names[0] not in self.layer.mask_scores:
            raise UserError(
                f"{self.layer.module_name} has the active masks {names}; with FSDP exactly one, with scores, is "
                "supported"
            )
        return names[0]

    def _gate(self, name: str) -> Tensor:
        """Gate of this rank's rows; also sets its slope."""
        layer = self.layer
        config = layer.mask_configs[name]
        scores = cast(DTensor, layer.mask_scores[name])
        rows = scores.to_local()
        if selection.is_soft(config, layer.training):
            # Every rank draws the whole matrix, so that the noise does not depend on how many ranks there are.
            noise = selection.draw_noise(
                config,
                layer.module_name,
                scores.shape,
                rows.device,
            )
            own_noise = rows_of(noise, scores)
            gate, self._slope = selection.soft_gate(config, rows, own_noise)
            return gate
        self._slope = selection.hard_slope(config, rows)
        return cast(Tensor, self.shard)

    def _state(self) -> tuple[Any, ...]:
        """Everything that the rows depend on."""
        layer = self.layer
        if layer.disable_adapters:  # unmasked rows, which do not depend on scores
            return (None,)
        name = self.adapter()
        scores = cast(DTensor, layer.mask_scores[name])
        local = scores.to_local()
        phase = self._phase(layer.mask_configs[name])
        # torch's version counters see writes in place, and the pointer a tensor that was replaced. Fused optimizers
        # raise no version, hence the number of steps.
        return (
            name,
            num_optimizer_steps(),
            phase,
            scores._version,
            local.data_ptr(),
            local._version,
        )


# The whole model


@torch.no_grad()
def refresh_masks(model: nn.Module, *_: Any) -> None:
    """Bring the masked rows of all layers up to date, before FSDP gathers any of them; every rank must call it.

    It does nothing for a model that is not sharded. It is a hook before the model's forward.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return

    layers = _sharded_layers(model)
    maskers = _attached(layers)
    # The usual case between two optimizer steps.
    if all(masker.is_current() for masker in maskers):
        return

    # Weights that an evaluation left gathered are out of date. Not those of the model itself, which is in its forward.
    for child in model.children():
        reshard(child)
    for masker in maskers:
        if not masker.is_current():
            masker.show()
    _finish_writing(layers[0].weight.device)


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward pass under FSDP left gathered; the next one gathers them from the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _sharded_layers(model: nn.Module) -> list[MaskedLinear]:
    """Masked layers that are sharded; those of an adapter that is loaded for inference have no scores."""
    layers = []
    for module in model.modules():
        if not isinstance(module, MaskedLinear):
            continue
        # FSDP2's mark of a module that it shards.
        is_managed = getattr(module.mask_scores, "_is_fsdp_managed_module", False)
        if is_managed and len(module.mask_scores):
            layers.append(module)
    return layers


def _finish_writing(device: torch.device) -> None:
    """Wait until rows are written, before FSDP reads them.

    On a GPU it reads them in a stream of its own, which it lets wait for this one only once a forward pass: in a hook
    of the outermost module, before the hook that writes them.
    """
    if device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()


def _attached(layers: Sequence[MaskedLinear]) -> list[ShardedMasker]:
    """The maskers of all layers; each takes over its rows before the first of them is masked."""
    # Checked once: FSDP does not change how a parameter is sharded.
    for layer in layers:
        masker = layer.masker
        is_attached = isinstance(masker, ShardedMasker) and masker.original is not None
        if not is_attached:
            _check_sharding(layer)
    maskers = [cast(ShardedMasker, layer.masker) for layer in layers]
    # The fingerprint is of all layers together, so it is taken before any of them is masked.
    if any(masker.original is None for masker in maskers):
        fingerprint = base_fingerprint(layers)
        for masker in maskers:
            masker.attach(fingerprint)
    return maskers


def _check_sharding(layer: MaskedLinear) -> None:
    """Raise for any way of sharding but the plain one, in which scores are never gathered in forward."""
    # Rows are masked as floats. Codes that FSDP has split are without their scales.
    if layer.quantization_backend is not None:
        raise UserError(
            f"{layer.module_name} is quantised, and masks over quantised weights cannot be sharded: train with "
            "--accelerate_config multi_gpu, or load the model without quantisation"
        )

    # Of an active adapter, if there is one: its scores are those that mask the weight.
    active = [name for name in layer.active_masks if name in layer.mask_scores]
    if active:
        name = active[0]
    else:
        name = next(iter(layer.mask_scores))
    scores = layer.mask_scores[name]

    is_unit = isinstance(layer.mask_scores, FSDPModule)
    is_by_rows = _is_by_rows(layer.weight) and _is_by_rows(scores)
    is_plain = is_unit and is_by_rows
    if is_plain:
        # With fsdp_offload_params the rows are on the CPU.
        rows = scores.to_local()
        is_plain = rows.device.type == scores.device_mesh.device_type
    if not is_plain:
        raise UserError(
            f"{layer.module_name} is not sharded as masks need it: take FSDP2, by rows, without fsdp_offload_params "
            "and fsdp_activation_checkpointing, with fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, and if you name "
            f"the classes to wrap, add {type(layer.mask_scores).__name__.removeprefix('FSDP')}"
        )


def _is_by_rows(tensor: Tensor) -> bool:
    return is_sharded(tensor) and tuple(tensor.placements) == (Shard(0),)


def _prepare(model: nn.Module) -> Callable[[], None]:
    """Let accelerate shard scores as masks need it, and refresh masks before every forward pass; returns the undoing.

    accelerate makes an FSDP unit of every module that ``_no_split_modules`` names. As a unit, scores are never gathered
    in the forward pass of their layer.
    """
    whole: Any = model  # torch's type of an attribute is Tensor | Module
    unsplit = getattr(whole, "_no_split_modules", None)
    handle = model.register_forward_pre_hook(refresh_masks)
    # Without the list the user has to name the classes, see _check_sharding.
    if unsplit:
        whole._no_split_modules = {*unsplit, Float32ParameterDict.__name__}
    # Not a nested function, which cannot be pickled with the model, and which in a copy would undo the original's.
    return partial(_undo, model, unsplit, handle)


def _undo(model: nn.Module, unsplit: Any, handle: RemovableHandle) -> None:
    """Undo :func:`_prepare`."""
    whole: Any = model
    whole._no_split_modules = unsplit
    handle.remove()


# After FastMasker, which accepts these layers, too: a layer takes the last class that accepts it.
watch_optimizers()
MASKERS.append(ShardedMasker)
MODEL_HOOKS.append(_prepare)
