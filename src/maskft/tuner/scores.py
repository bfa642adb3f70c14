"""The scores of one adapter in one layer: where they start, and how they stay float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..masking import initial_scores, spread_by_rank
from .selection import generator, is_free

if TYPE_CHECKING:
    from .config import MaskConfig


class Float32ParameterDict(nn.ParameterDict):
    """Scores that stay float32 under ``model.to(dtype)``: in bfloat16 they would tie at the cut and move the mask."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32ParameterDict:
        """Apply ``fn``, which moves or casts; then put the float32 values back where it has cast.

        ``model.to(device, dtype)`` does both in one function, so that the cast cannot be left out by itself.
        """
        # The tensors and not the parameters, whose `.data` torch replaces.
        before = {}
        for name, parameter in self.items():
            if parameter is None:
                continue
            grad = None
            if parameter.grad is not None:
                grad = parameter.grad.data
            before[name] = (parameter.data, grad)

        super()._apply(fn, recurse)

        for name, (data, grad) in before.items():
            parameter = self[name]
            if parameter.dtype == torch.float32:
                continue

            # On the device that `fn` has moved it to. The scores first: torch checks a gradient against their dtype.
            device = parameter.device
            parameter.data = data.to(device)
            parameter.grad = None
            if grad is not None:
                parameter.grad = grad.to(device)
        return self


def draw_scores(config: MaskConfig, weight: Tensor, module_name: str) -> Tensor:
    """Scores to start from, decided by the seed and the name of the layer; float32, shape of ``weight``.

    They are NaN if the start needs data, until ``start_scores`` fills them in.

    Args:
        config: Configuration of the adapter.
        weight: The frozen weight, without merged masks.
        module_name: Name of the layer in the unwrapped model.
    """
    # low_cpu_mem_usage: PEFT fills the scores in from the file.
    if weight.device.type == "meta":
        return torch.empty(
            weight.shape,
            dtype=torch.float32,
            device="meta",
        )
    if config.starts_from_data:
        return torch.full_like(weight, torch.nan, dtype=torch.float32)

    # A stream for each layer: its scores do not depend on which other layers are masked. On the CPU, whose draws are
    # the same whatever device the weight is on.
    stream = generator("cpu", config.mask_seed, module_name)
    scores = initial_scores(
        weight,
        config.init_scores,
        stream,
        config.init_std,
        config.start_value,
    )
    if config.init_scores == "constant":  # every score is start_value already
        return scores
    # The other starts are drawn around 0, or spread by rank.
    is_spread = config.init_scores == "magnitude"
    return _centered(config, scores, is_spread)


def ranked_scores(config: MaskConfig, keys: Tensor) -> Tensor:
    """Scores in the order of ``keys``; the lowest are removed first. Float32, shape of ``keys``."""
    scores = spread_by_rank(keys, config.init_std)
    return _centered(config, scores, is_spread=True)


def _centered(config: MaskConfig, scores: Tensor, is_spread: bool) -> Tensor:
    """Move scores that are cut at 0 to ``start_value``; other learners take scores where they are.

    Args:
        config: Configuration of the adapter.
        scores: Fresh scores.
        is_spread: Whether they were spread by rank; else their mean is 0.
    """
    if not is_free(config.selection):
        return scores
    # Scores spread by rank lie in (0, std * sqrt(12)), around std * sqrt(3).
    center = 0.0
    if is_spread:
        center = config.init_std * math.sqrt(3)
    return scores + (config.start_value - center)
