"""Interpolation of a fine-tuned model with the model before, without training: a control for a mask.

With t0 all weights before fine-tuning and t1 those after it: (1 - a) * t0 + a * t1 with one a for all weights
(WiSE-FT, arXiv:2109.01903), which the held-out rows choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from maskft_common.errors import UserError
from maskft_common.memory import peak_memory_bytes

from ..data.prepared import Prepared
from ..loss import HeldoutLoss, mean_nll
from ..models import load_model
from ..weights import write_part
from .method_arguments import INTERPOLATE, SHARES
from .record import TrainingSummary


@torch.no_grad()
def interpolate(
    model: PreTrainedModel,
    before_model: str,
    data: Prepared,
    measure: HeldoutLoss,
    console: Console,
) -> TrainingSummary:
    """Interpolate ``model``, in place, with the model before fine-tuning, at the share with the lowest held-out loss.

    Args:
        model: The fine-tuned model, on the device to compute on.
        before_model: Folder or name of the model before fine-tuning.
        data: The rows.
        measure: Measures held-out rows under ``model``.
        console: Where to print.

    Returns:
        Summary of the run; ``history`` has the held-out loss at each share of the fine-tuned model that was tried.

    Raises:
        UserError: If the two models differ in a parameter's name or shape.
    """
    # load_model takes the name of a dtype, without "torch.".
    dtype = str(model.dtype).removeprefix("torch.")
    before = dict(load_model(before_model, dtype).named_parameters())
    # A copy, because the model is overwritten at every share. Parameters alone: buffers, such as rotary frequencies,
    # stay those of the fine-tuned model.
    after = {}
    for name, parameter in model.named_parameters():
        after[name] = parameter.detach().clone()
    for name in {**before, **after}:
        is_in_both = name in before and name in after
        if not is_in_both or before[name].shape != after[name].shape:
            raise UserError(
                f"before_model {before_model!r} is another model: {name} is not in both, or of another shape"
            )

    history = []
    # The last share is 1, which is the fine-tuned model itself.
    for share in SHARES:
        _set(model, before, after, share)
        losses = measure(data.heldout)
        history.append({"value": share, "eval_loss": mean_nll(losses)})

    # A loss that is not finite is the worst: NaN compares with nothing.
    def comparable_loss(row: dict[str, float]) -> float:
        loss = row["eval_loss"]
        if math.isfinite(loss):
            return loss
        return math.inf

    # Of equal ones the first, which has the smallest share.
    best = min(history, key=comparable_loss)
    _set(model, before, after, best["value"])
    console.print(f"{INTERPOLATE}: {best['value']:g} is the best of {len(history)} shares by held-out loss")
    return TrainingSummary(
        method=INTERPOLATE,
        best_loss=best["eval_loss"],
        peak_memory_bytes=peak_memory_bytes(model.device.type),
        history=history,
    )


def _set(
    model,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    share: float,
) -> None:
    """Write (1 - share) * before + share * after into the model, computed in float32."""
    for name, parameter in model.named_parameters():
        # The model before is on the CPU, so that a GPU need not hold three models.
        write_part(parameter, before[name], after[name], share)
