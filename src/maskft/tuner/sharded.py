"""Masks of a model sharded by FSDP2: every rank holds some rows of each matrix, and the mask is the unsharded one.

Scores and weights are DTensors sharded by rows (``Shard(0)``). Ranks agree on the cut by summing counts of score bits,
so no score leaves its rank. Each rank then masks its own rows of the weight in place, keeping what was there, and
FSDP's all-gather, which every frozen weight goes through anyway, carries the masked weight: masking adds no traffic to
it. The gradient of the masked weight is reduce-scattered in every backward pass and multiplied by the local weight.

Nothing here runs unless scores are DTensors.

Shapes: a matrix is (O, I); its shard on one rank is (rows, I), where the last ranks may have fewer rows or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard

from maskft_common.errors import NotFiniteError, UserError

from ..masking import RankBy, num_removed, ranking_keys
from . import learners
from .config import MaskConfig
from .selection import row_parts, score_gradient_
from .steps import optimizer_steps

if TYPE_CHECKING:
    from .layer import MaskedLinear

Fingerprint = Callable[[Sequence["MaskedLinear"]], str]

_NUM_BINS = 1 << 16


# The algorithm


def remove_lowest_of_shards(
    shard: Tensor, num: int, rank: int, all_reduce: Callable[[Tensor], Tensor], all_gather: Callable[[Tensor], Tensor]
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
    bits = ordered_bits(shard)
    counts = torch.bincount(_upper(bits), minlength=_NUM_BINS)
    counts = all_reduce(torch.cat([counts, shard.isnan().sum()[None]]))
    if counts[-1]:
        raise NotFiniteError("scores contain NaN, so they cannot be ranked")
    if num == 0:
        return torch.ones_like(shard, dtype=torch.bool)
    upper, num = _find(counts[:-1], num)
    counts = torch.bincount(bits[_upper(bits) == upper] & (_NUM_BINS - 1), minlength=_NUM_BINS)
    lower, num = _find(all_reduce(counts), num)
    cut = ((upper - (_NUM_BINS >> 1)) << 16) | lower
    mask, is_tie = bits > cut, bits == cut
    before = int(all_gather(is_tie.sum()[None])[:rank].sum())  # ties of earlier rows, which go first
    mask[is_tie.nonzero().squeeze(1)[max(num - before, 0) :]] = True
    return mask


def ordered_bits(key: Tensor) -> Tensor:
    """Bits of each float32 as int32, mapped so that the integers are ordered as the floats are."""
    bits = key.view(torch.int32)
    # For negative floats the magnitude bits run backwards; flipping them makes the integer order the float order.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _upper(bits: Tensor) -> Tensor:
    return (bits >> 16) + (_NUM_BINS >> 1)


def _find(counts: Tensor, k: int) -> tuple[int, int]:
    """Bin of the ``k``-th smallest value (from 1), and its rank inside that bin (from 1)."""
    cumulative = counts.cumsum(0)
    index = int(torch.searchsorted(cumulative, k))
    return index, k - (int(cumulative[index - 1]) if index else 0)


# On DTensors


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a parameter is spread over ranks."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def shard_mask(config: MaskConfig, scores: DTensor) -> Tensor:
    """This rank's rows of the mask of a matrix; every rank must call it. Bool, True = keep."""
    mesh, key = scores.device_mesh, ranking_keys(scores.to_local(), config.ranks_by)

    def all_reduce(counts: Tensor) -> Tensor:
        dist.all_reduce(counts, group=mesh.get_group())
        return counts

    def all_gather(counts: Tensor) -> Tensor:
        out = counts.new_empty(mesh.size() * counts.numel())
        dist.all_gather_into_tensor(out, counts, group=mesh.get_group())
        return out.view(mesh.size(), -1)

    cut = learners.cut(config)
    if cut is not None:
        if all_reduce(key.isnan().sum()):
            raise NotFiniteError("scores contain NaN, so they cannot be compared")
        mask = key > cut
    else:
        num = num_removed(scores.numel(), learners.current_sparsity(config))
        mask = remove_lowest_of_shards(key, num, mesh.get_local_rank(), all_reduce, all_gather)
    return mask.view(scores.to_local().shape)


def whole_mask(config: MaskConfig, scores: DTensor) -> Tensor:
    """The mask of a matrix in full on every rank; every rank must call it."""
    rows, (mesh, placements) = shard_mask(config, scores).byte(), (scores.device_mesh, scores.placements)
    return DTensor.from_local(rows, mesh, placements, shape=scores.shape, stride=scores.stride()).full_tensor().bool()


class ShardedWeight:
    """This rank's rows of the weight of one masked layer: unmasked here, masked where FSDP gathers them from.

    Attributes:
        original: The unmasked rows.
        removed_value: What removed weights become, rows as ``original``; None: zero.
        mask: Their mask, bool; None while the layer shows its unmasked weight.
        slope: Slope of their gate; None: 1.
        num_flips: Entries of ``mask`` that the latest refresh changed.
        base_fingerprint: That of the whole model's masked weights, taken before the first of them was masked.
    """

    def __init__(self, parameter: DTensor, base_fingerprint: str, removed_value: Tensor | None = None):
        self.parameter = parameter
        self.original = parameter.to_local().clone()
        self.removed_value = None if removed_value is None else rows_of(removed_value, parameter).to(self.original)
        self.mask: Tensor | None = None
        self.slope: Tensor | None = None
        self.num_flips = 0
        self.base_fingerprint = base_fingerprint
        self._key: tuple[Any, ...] | None = None

    def is_current(self, layer: MaskedLinear) -> bool:
        """Whether the rows show what the layer's scores and adapter switches ask for."""
        return self._key == _key(layer)

    def show(self, layer: MaskedLinear, mask: Tensor | None) -> None:
        """Mask the rows (with the layer's soft gate, if it is trained with one), or (None) show them unmasked."""
        rows, self.slope = self.parameter.to_local(), None
        if mask is None:
            rows.copy_(self.original)
        else:
            gate, self.slope = _gate(layer, mask)
            learners.blend_(rows, self.original, gate, self.removed_value)
            self.num_flips = 0 if self.mask is None else int((mask != self.mask).sum())
        self.mask, self._key = mask, _key(layer)

    def score_gradient(self, raw: Tensor, scores: DTensor, rank_by: RankBy) -> DTensor:
        """Mean over the ranks of dL/dscores, sharded as ``scores``; ``raw`` is this rank's (dL/dy)^T x, (O, I)."""
        mesh = scores.device_mesh
        summed = DTensor.from_local(raw, mesh, [Partial()], run_check=False).redistribute(placements=scores.placements)
        rows = summed.to_local().div_(mesh.size())
        weight = self.original if self.removed_value is None else self.original - self.removed_value
        for part in row_parts(rows):
            score_gradient_(rows[part], weight[part], scores.to_local()[part], rank_by)
        if self.slope is not None:
            rows.mul_(self.slope)
        return DTensor.from_local(
            rows, mesh, scores.placements, run_check=False, shape=scores.shape, stride=scores.stride()
        )


def rows_of(matrix: Tensor, like: DTensor) -> Tensor:
    """The rows of a whole matrix that this rank holds of ``like``."""
    chunks, rank = matrix.chunk(like.device_mesh.size()), like.device_mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else matrix[:0]


def _gate(layer: MaskedLinear, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gate and slope of this rank's rows; ``mask`` is their hard gate."""
    name = _adapter(layer)
    config, scores = layer.mask_configs[name], layer.mask_scores[name]
    rows = scores.to_local()
    if learners.is_soft(config, layer.training):
        # Every rank draws the whole matrix, so that the noise does not depend on how many there are.
        noise = rows_of(learners.draw_noise(config, layer.module_name, scores.shape, rows.device), scores)
        return learners.soft_gate(config, rows, noise)
    return mask, learners.hard_slope(config, rows)


def _key(layer: MaskedLinear) -> tuple[Any, ...]:
    if layer.disable_adapters:
        return (None,)
    name = _adapter(layer)
    scores, phase = layer.mask_scores[name], learners.phase(layer.mask_configs[name], layer.training)
    return name, optimizer_steps(), phase, scores._version, scores.to_local().data_ptr(), scores.to_local()._version


def _adapter(layer: MaskedLinear) -> str:
    names = layer.active_masks
    if len(names) != 1 or names[0] not in layer.mask_scores:
        raise UserError(
            f"{layer.module_name} has the active masks {names}; with FSDP exactly one, with scores, is supported"
        )
    return names[0]


@torch.no_grad()
def refresh(model: nn.Module, layers: Sequence[MaskedLinear], base_fingerprint: Fingerprint) -> None:
    """Bring the masked rows of all layers up to date, before FSDP gathers any of them; every rank must call it.

    Args:
        model: The model whose FSDP units are to be resharded when a mask has changed; not itself, it is in forward.
        layers: The masked layers.
        base_fingerprint: Of the weights of layers; called once.
    """
    layers = [layer for layer in layers if getattr(layer.mask_scores, "_is_fsdp_managed_module", False)]
    shards = _attached([layer for layer in layers if len(layer.mask_scores)], base_fingerprint)
    if all(shard.is_current(layer) for layer, shard in shards.items()):
        return
    for module in model.modules():
        if isinstance(module, FSDPModule) and module is not model:
            module.reshard()  # what an evaluation left gathered is out of date
    for layer, shard in shards.items():
        if shard.is_current(layer):
            continue
        name = None if layer.disable_adapters else _adapter(layer)
        shard.show(layer, None if name is None else shard_mask(layer.mask_configs[name], layer.mask_scores[name]))


def _attached(layers: Sequence[MaskedLinear], base_fingerprint: Fingerprint) -> dict[MaskedLinear, ShardedWeight]:
    """The rows of each layer, taken over before the first of them is masked."""
    if any(layer.sharded_weight is None for layer in layers):
        for layer in layers:
            _check_sharding(layer)
        fingerprint = base_fingerprint(layers)
        for layer in layers:
            value = layer.removed_values.get(_adapter(layer))
            layer.sharded_weight = ShardedWeight(cast(DTensor, layer.weight), fingerprint, value)
    return {layer: layer.sharded_weight for layer in layers if layer.sharded_weight is not None}


def _check_sharding(layer: MaskedLinear) -> None:
    """Refuse any way of sharding but the plain one, in which scores are never gathered in forward."""
    weight, scores, by_rows = layer.weight, layer.mask_scores[_adapter(layer)], (Shard(0),)
    is_plain = isinstance(layer.mask_scores, FSDPModule) and is_sharded(weight) and tuple(weight.placements) == by_rows
    is_plain = is_plain and tuple(scores.placements) == by_rows
    if not is_plain or scores.to_local().device.type != scores.device_mesh.device_type:
        raise UserError(
            f"{layer.module_name} is not sharded as masks need it: take FSDP2, by rows, without fsdp_offload_params "
            "and fsdp_activation_checkpointing, with fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, and if you name "
            f"the classes to wrap, add {type(layer.mask_scores).__name__.removeprefix('FSDP')}"
        )
