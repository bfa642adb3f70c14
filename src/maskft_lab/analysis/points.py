"""Models as points: where each run's weights are, read and set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskft.adapter.mask_set import MaskSet, read_config
from maskft.models import load_model
from maskft_base.errors import UserError

from .records import digest_folder

Weights = dict[str, Tensor]  # parameter name -> values, on the model's device and in its dtype


class Point(NamedTuple):
    """A model: its folder or name, and the adapter folder of a mask over it; None: the model as it is."""

    model: str
    adapter: str | None = None

    def digest(self) -> list[str]:
        """Identity of its weights, wherever they lie."""
        return [digest_folder(each) for each in self if each is not None]


def masks_of(adapter: str) -> MaskSet:
    """The masks of an adapter whose removed weights are 0.

    Raises:
        UserError: If they take another value, where the model with these weights at 0 is not the one that was trained.
    """
    if read_config(adapter).removed_value != "zero":
        raise UserError(
            f"removed weights of {adapter!r} take their values before fine-tuning; this analysis is for masks that set "
            "them to 0: name another with --mask"
        )
    return MaskSet.from_adapter(adapter)


def weights_of(model) -> Weights:
    """A copy of all parameters; tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def weights_at(point: Point, like: Weights) -> Weights:
    """Parameters of a point, on the devices of ``like``.

    Raises:
        UserError: If it is not of the architecture of ``like``.
    """
    model = load_model(point.model, "float32")
    if point.adapter is not None:
        masks_of(point.adapter).apply_(model)
    weights = weights_of(model)
    if {name: each.shape for name, each in weights.items()} != {name: each.shape for name, each in like.items()}:
        raise UserError(f"{point.model!r} is not of the architecture of the model under the mask")
    return {name: each.to(like[name].device) for name, each in weights.items()}


@torch.no_grad()
def set_weights(model, center: Weights, steps: Sequence[tuple[float, Weights]] = ()) -> None:
    """Set parameters to ``center`` plus the sum of amount x direction; a parameter without a direction stays.

    The same amounts give the same bits, in whatever order points are visited; amounts of 0 give ``center``.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(center[name])
        for amount, direction in steps:
            if amount != 0 and name in direction:
                parameter.add_(direction[name], alpha=amount)
