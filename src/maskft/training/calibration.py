"""What the inputs of linear layers look like on training data: the activation norms behind a Wanda mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..tuner import MaskedLinear


@torch.inference_mode()
def input_norms(
    model, layers: Sequence[MaskedLinear], input_ids: Sequence[Sequence[int]], num_samples: int
) -> list[Tensor]:
    """L2 norm of every input feature of ``layers`` over all tokens of the first ``num_samples`` rows.

    One pass over the unmasked model; the published method prunes layer by layer and measures each layer behind the
    pruned ones.

    Args:
        model: The model, its adapter disabled.
        layers: The layers that are to be masked.
        input_ids: Token ids of the rows; no padding, one row per forward pass.
        num_samples: How many rows to use, at least 1.

    Returns:
        One float32 tensor per layer, (1, I), or (I, 1) where the weight is stored transposed.
    """
    if num_samples < 1:
        raise UserError(f"num_calibration_samples is {num_samples}; it must be at least 1")
    squares = [0.0] * len(layers)

    def add(index: int):
        def hook(module, args):
            squares[index] = squares[index] + args[0].detach().reshape(-1, args[0].shape[-1]).float().pow(2).sum(0)

        return hook

    hooks = [layer.get_base_layer().register_forward_pre_hook(add(n)) for n, layer in enumerate(layers)]
    try:
        for ids in input_ids[:num_samples]:
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    idle = [layer.module_name for layer, total in zip(layers, squares, strict=True) if isinstance(total, float)]
    if idle:
        raise UserError(f"no calibration row reached {idle[0]}; leave it out of mask_target_modules, or give more rows")
    return [
        total.sqrt()[:, None] if layer.is_transposed else total.sqrt()[None, :]
        for total, layer in zip(squares, layers, strict=True)
    ]
