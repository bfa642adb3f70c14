"""Gradients of the loss with respect to frozen weights, for masks that are made from them before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maskft_common.errors import UserError

from ..tuner import MaskedLinear

# Label of a token without loss, as in torch's cross_entropy.
_IGNORED = -100


def weight_gradients(
    model: Any,
    layers: Sequence[MaskedLinear],
    rows: Iterable[Mapping[str, Any]],
) -> list[Tensor]:
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
    totals = []
    for weight in weights:
        total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        totals.append(total)
    num_tokens = 0

    # autograd.grad below takes these weights alone; backward() would fill .grad of every trainable parameter.
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for row in rows:
            # A batch of one row, so that nothing is padded.
            device = weights[0].device
            ids_T = torch.as_tensor(row["input_ids"], device=device)
            labels_T = torch.as_tensor(row["labels"], device=device)
            ids_BT = ids_T.unsqueeze(0)
            labels_BT = labels_T.unsqueeze(0)
            with torch.enable_grad():
                # Only the loss is kept: a name for the output would keep the logits in memory.
                loss = model(
                    input_ids=ids_BT,
                    labels=labels_BT,
                    use_cache=False,
                ).loss
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)

            # The loss is a mean over the tokens of the row, so it is weighted by their number. The first token has no
            # prediction.
            is_supervised_BT = labels_BT[:, 1:] != _IGNORED
            count = int(is_supervised_BT.sum())
            num_tokens += count
            parts = zip(layers, totals, gradients, strict=True)
            for layer, total, gradient in parts:
                if gradient is None:
                    raise UserError(
                        f"the loss does not depend on {layer.module_name}, so it has no gradient; leave it out of "
                        "target_modules"
                    )
                total.add_(gradient.float(), alpha=count)
    finally:
        for weight in weights:
            weight.requires_grad_(False)

    # Without rows there are no tokens, and the mean is zero.
    divisor = max(num_tokens, 1)
    return [total / divisor for total in totals]
