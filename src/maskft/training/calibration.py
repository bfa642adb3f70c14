"""What training rows say of each weight before the first step: norms of its input, first-order change of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from maskft_base.errors import UserError

from ..tuner import MaskConfig, MaskedLinear, adapter_layers, start_scores
from ..tuner.config import DATA_STARTS
from ..tuner.experts import ExpertMatrix
from ..tuner.fixed import ranks_per_output
from .method_arguments import ADAPTER


def start_on_data(model: PeftModel, rows: Dataset, num_samples: int, device: torch.device) -> None:
    """Let scores start in the order that ``init_scores`` asks for, if that order needs data.

    Args:
        model: The model, its adapter not yet trained.
        rows: Tokenised training rows.
        num_samples: How many of them to look at, at least 1.
        device: Where to compute; the model is moved back.
    """
    config = model.peft_config[ADAPTER]
    if not isinstance(config, MaskConfig) or config.init_scores not in DATA_STARTS:
        return
    before, layers = model.device, list(adapter_layers(model, ADAPTER).values())
    check_inputs(layers, f"mask_init_scores {config.init_scores}")
    model.to(device).eval()
    with model.disable_adapter():
        if config.init_scores == "wanda":
            keys = wanda_keys(model, layers, rows["input_ids"], num_samples)
        else:
            keys = first_order_keys(model, layers, rows.select(range(min(num_samples, len(rows)))))
    start_scores(model, {layer.module_name: key for layer, key in zip(layers, keys, strict=True)}, ADAPTER)
    model.to(before).train()


def check_inputs(layers: Sequence[MaskedLinear], what: str) -> None:
    """Refuse fused experts where ``what`` looks at the input of each matrix."""
    if any(isinstance(layer.get_base_layer(), ExpertMatrix) for layer in layers):
        raise UserError(
            f"{what} looks at the input of each matrix, which fused experts do not show; use magnitude (l1_mask), or "
            "leave the experts out (mask_exclude_modules experts)"
        )


def wanda_keys(
    model: PeftModel, layers: Sequence[MaskedLinear], input_ids: Sequence[Sequence[int]], num_samples: int
) -> list[Tensor]:
    """Rank of abs(weight) * norm of its input among the inputs of its output (https://arxiv.org/abs/2306.11695).

    Ranks, because magnitudes of different outputs have no common scale: removing the lowest gives Wanda's mask.
    """
    norms = input_norms(model, layers, input_ids, num_samples)
    weights = [layer.weight.detach().float().abs() for layer in layers]
    return [
        ranks_per_output(weight * norm, output_dim=int(layer.is_transposed)).float()
        for weight, norm, layer in zip(weights, norms, layers, strict=True)
    ]


def first_order_keys(model: PeftModel, layers: Sequence[MaskedLinear], rows: Dataset) -> list[Tensor]:
    """abs(gradient * weight) of each weight: the change of the loss, to first order, if it were removed.

    The gradient is that of the sum over ``rows`` of each row's mean loss; one row per pass, no padding.
    """
    held = [layer.module_name for layer in layers if layer.quantisation is not None]
    if held:
        raise UserError(
            f"first_order takes the gradient of the weights, which quantised ones have not ({held[0]}); use wanda or "
            "magnitude, or load the model without quantisation"
        )
    weights = [layer.weight for layer in layers]
    gradients = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for row in rows:
            ids, labels = (torch.tensor([row[key]], device=model.device) for key in ("input_ids", "labels"))
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            for total, gradient in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                total += gradient
    finally:
        for weight in weights:
            weight.requires_grad_(False)
        for parameter in frozen:
            parameter.requires_grad_(True)
    return [(total * weight.detach()).abs() for total, weight in zip(gradients, weights, strict=True)]


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
    squares = [0.0] * len(layers)

    def add(index: int):
        def hook(module, args):
            squares[index] = squares[index] + args[0].detach().reshape(-1, args[0].shape[-1]).float().pow(2).sum(0)

        return hook

    hooks = [layer.register_forward_pre_hook(add(n)) for n, layer in enumerate(layers)]
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
