"""The scores of one adapter in one layer: how they start, what is kept of them, and the masks they give."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from maskft_common.errors import UserError

from ..masking import check_not_nan, initial_scores, num_removed, ranking_keys, spread_by_rank
from . import learners
from .config import DATA_STARTS, MaskConfig
from .selection import Near, keep_above_, keep_highest_, mask_without_lowest
from .sharded import is_sharded, whole_mask


class Float32ParameterDict(nn.ParameterDict):
    """Scores stay float32 under ``model.to(dtype)``: ranking casts to bfloat16 would create ties and move the mask."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32ParameterDict:
        known = {name: parameter for name, parameter in self.items() if parameter is not None}
        before = {name: (p.data, None if p.grad is None else p.grad.data) for name, p in known.items()}
        super()._apply(fn, recurse)
        for name, (data, grad) in before.items():
            if self[name].dtype != torch.float32:
                self[name].data = data.to(self[name].device)
                self[name].grad = None if grad is None else grad.to(self[name].device)
        return self


def draw_scores(config: MaskConfig, weight: Tensor, module_name: str) -> Tensor:
    """Scores to start from, decided by the seed and the name of the layer; NaN until :func:`start_scores` is called."""
    if weight.device.type == "meta":
        return torch.empty(weight.shape, dtype=torch.float32, device="meta")
    if config.init_scores in DATA_STARTS:
        return torch.full_like(weight, torch.nan, dtype=torch.float32)
    generator = learners.generator("cpu", config.mask_seed, module_name)
    scores = initial_scores(weight, config.init_scores, generator, config.init_std, config.start_value)
    return _centred(config, scores, config.init_scores == "magnitude")


def ranked_scores(config: MaskConfig, keys: Tensor) -> Tensor:
    """Scores in the order of ``keys``, of which the lowest are removed first."""
    return _centred(config, spread_by_rank(keys, config.init_std), is_spread=True)


def _centred(config: MaskConfig, scores: Tensor, is_spread: bool) -> Tensor:
    """Where scores are cut at 0 they start around ``start_value``; where they are ranked this would change nothing."""
    if not learners.is_free(config.selection) or (config.init_scores == "constant" and not is_spread):
        return scores
    return scores + (config.start_value - (config.init_std * math.sqrt(3) if is_spread else 0.0))


def check_scores(scores: Tensor, module_name: str, config: MaskConfig) -> Tensor:
    """Return ``scores``, or refuse what cannot be ranked."""
    if scores.device.type == "meta":
        raise UserError(f"the scores of {module_name} are still on the meta device; load or initialise them")
    if scores.dtype != torch.float32:
        raise UserError(
            f"the scores of {module_name} were cast to {scores.dtype}; masks are ranked in float32, undo the cast"
        )
    if config.init_scores in DATA_STARTS and bool(scores.detach().view(-1)[:1].isnan().any()):
        raise UserError(
            f"the scores of {module_name} hold NaN: training diverged, or init_scores={config.init_scores!r} got no "
            "data: maskft.start_scores(model, maskft.wanda_keys(model, rows)), which maskft train does by itself"
        )
    return scores


def mask_from_scores(config: MaskConfig, scores: Tensor) -> Tensor:
    """Mask of a score matrix, in full on every rank; bool, True = keep."""
    if is_sharded(scores):
        return whole_mask(config, scores)
    cut = learners.cut(config)
    if cut is None:
        num = num_removed(scores.numel(), learners.current_sparsity(config))
        return mask_without_lowest(scores, num, config.rank_by)
    return (check_not_nan(ranking_keys(scores, config.ranks_by)) > cut).view(scores.shape)


def write_masked_(
    config: MaskConfig, out: Tensor, weight: Tensor, scores: Tensor, near: Near | None = None
) -> Near | None:
    """Write the masked weight of a matrix into ``out``, +0 where removed; ``near``: see :func:`keep_highest_`."""
    cut = learners.cut(config)
    if cut is None:
        num = num_removed(scores.numel(), learners.current_sparsity(config))
        return keep_highest_(out, weight, scores, num, config.rank_by, near)
    keep_above_(out, weight, scores, cut, config.ranks_by)
    return None
