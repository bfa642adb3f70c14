"""What training rows say of each weight before the first step; see also :mod:`maskft.tuner.wanda`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from maskft_base.errors import UserError

from ..tuner import MaskConfig, MaskedLinear, adapter_layers, start_scores
from ..tuner.config import DATA_STARTS
from ..tuner.wanda import check_inputs, wanda_keys
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
    rows = rows.select(range(min(num_samples, len(rows))))
    model.to(device).eval()
    if config.init_scores == "wanda":
        keys = wanda_keys(model, rows["input_ids"], ADAPTER)
    else:
        check_inputs(layers, f"init_scores {config.init_scores}")
        with model.disable_adapter():
            found = first_order_keys(model, layers, rows)
        keys = {layer.module_name: key for layer, key in zip(layers, found, strict=True)}
    start_scores(model, keys, ADAPTER)
    model.to(before).train()


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
