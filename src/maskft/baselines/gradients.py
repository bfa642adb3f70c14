"""Gradients of the loss with respect to frozen weights, for masks that are made from them before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maskft_common.errors import UserError

from ..tuner import MaskedLinear

_IGNORED = -100  # label of a token without loss, as in torch's cross_entropy


def weight_gradients(model: Any, layers: Sequence[MaskedLinear], rows: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """Gradient of the mean loss per supervised token with respect to the weight of each layer.

    Args:
        model: The model, its adapter disabled, in evaluation mode.
        layers: The layers that are to be masked.
        rows: Rows with ``input_ids`` and ``labels``, one per forward pass.

    Returns:
        One float32 tensor per layer, in the shape of its weight.

    Raises:
        UserError: If a layer takes no part in the loss.
    """
    weights = [layer.weight for layer in layers]
    # Float32, in which many small gradients are summed, whatever the dtype of the weights is.
    totals = [torch.zeros(weight.shape, device=weight.device) for weight in weights]
    num_tokens = 0

    # autograd.grad below takes these weights alone; backward() would fill .grad of every trainable parameter.
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for row in rows:
            ids_BT = torch.as_tensor(row["input_ids"], device=weights[0].device)[None]
            labels_BT = torch.as_tensor(row["labels"], device=weights[0].device)[None]
            with torch.enable_grad():
                loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)

            # The loss is a mean over the tokens of the row; the first token has no prediction.
            count = int((labels_BT[:, 1:] != _IGNORED).sum())
            num_tokens += count
            for layer, total, gradient in zip(layers, totals, gradients, strict=True):
                if gradient is None:
                    raise UserError(
                        f"the loss does not depend on {layer.module_name}, so it has no gradient; leave it out of "
                        "target_modules"
                    )
                total.add_(gradient.float(), alpha=count)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return [total / max(num_tokens, 1) for total in totals]
