"""The scores of one adapter in one layer: how they start, what is kept of them, and the masks they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import digest
from ..masking import initial_scores, num_removed, threshold_mask
from .config import MaskConfig
from .selection import keep_highest_, topk_masks
from .sharded import is_sharded, whole_masks


class Float32ParameterDict(nn.ParameterDict):
    """Scores stay float32 under ``model.to(dtype)``: ranking casts to bfloat16 would create ties and move the mask."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32ParameterDict:
        before = {name: parameter.data for name, parameter in self.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, data in before.items():
            if self[name].dtype != torch.float32:
                self[name].data = data.to(self[name].device)
        return self


def draw_scores(config: MaskConfig, weight: Tensor, module_name: str, input_dim: int) -> Tensor:
    """Scores to start from, decided by the seed and the name of the layer."""
    if weight.device.type == "meta":
        return torch.empty(weight.shape, dtype=torch.float32, device="meta")
    # Every layer draws from its own stream, so that adding or leaving out a layer does not move the others.
    stream = bytes.fromhex(digest(f"{config.mask_seed}/{module_name}"))
    generator = torch.Generator().manual_seed(int.from_bytes(stream[:8], "little") >> 1)
    return initial_scores(weight, config.init_scores, generator, config.init_std, config.init_value, input_dim)


def check_scores(scores: Tensor, module_name: str) -> Tensor:
    """Return ``scores``, or refuse what cannot be ranked."""
    if scores.device.type == "meta":
        raise UserError(f"the scores of {module_name} are still on the meta device; load or initialise them")
    if scores.dtype != torch.float32:
        raise UserError(
            f"the scores of {module_name} were cast to {scores.dtype}; masks are ranked in float32, undo the cast"
        )
    return scores


def masks_from_scores(config: MaskConfig, scores: Sequence[Tensor]) -> list[Tensor]:
    """Masks of the score matrices of one adapter; bool, True = keep."""
    if is_sharded(scores[0]):
        return whole_masks(config, scores)
    if config.selection == "threshold":
        return [threshold_mask(s, config.threshold, config.rank_by) for s in scores]
    pools = [scores] if config.scope == "global" else [[s] for s in scores]
    return [mask for pool in pools for mask in topk_masks(pool, config.sparsity, config.rank_by)]


def write_masked_(
    config: MaskConfig, outs: Sequence[Tensor], weights: Sequence[Tensor], scores: Sequence[Tensor]
) -> None:
    """Write the masked weights of one pool of matrices into ``outs``."""
    if config.selection == "topk":
        num = num_removed(sum(s.numel() for s in scores), config.sparsity)
        keep_highest_(outs, weights, scores, num, config.rank_by)
        return
    for out, weight, s in zip(outs, weights, scores, strict=True):
        out.copy_(weight).masked_fill_(~threshold_mask(s, config.threshold, config.rank_by), 0.0)
