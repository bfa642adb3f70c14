"""Masks whose removed weights take the value they had before fine-tuning (``removed_value="base"``)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from maskft_base.errors import UserError

from ..models import load_model
from .config import MaskConfig
from .fingerprints import weights_fingerprint


def load_removed_values(config: MaskConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of removed weights by module name, out of ``removed_value_model``.

    Args:
        config: With ``removed_value="base"``; the fingerprint it names, if any, must be that of the values.
        weights: The weights that are masked, by module name.

    Raises:
        UserError: If the model is missing, has another architecture or the same weights, or is not the one the mask was
            trained with.
    """
    source = str(config.removed_value_model)
    try:
        base = load_model(source, "auto")
    except UserError as error:
        raise UserError(f"removed_value_model: {error}") from error
    modules: dict[str, nn.Module] = dict(base.named_modules())
    values = {}
    for name, weight in weights.items():
        found = getattr(modules.get(name), "weight", None)
        if found is None or found.shape != weight.shape:
            has = "no such layer" if found is None else f"shape {tuple(found.shape)}"
            raise UserError(
                f"removed_value_model {source!r} has another architecture: {name} is {tuple(weight.shape)} in the "
                f"model, there {has}; name the model that was fine-tuned"
            )
        values[name] = found.detach().clone()
    fingerprint = weights_fingerprint(values.items())
    if config.verify_base and config.removed_value_fingerprint not in (None, fingerprint):
        raise UserError(
            f"removed_value_model {source!r} (fingerprint {fingerprint[:12]}) has other weights than the mask was "
            f"trained with ({str(config.removed_value_fingerprint)[:12]}); set removed_value_model in "
            "adapter_config.json to the right one"
        )
    if fingerprint == weights_fingerprint(weights.items()):
        raise UserError(
            f"removed_value_model {source!r} has the weights of the model itself, so nothing would change; "
            "name the model before fine-tuning"
        )
    config.removed_value_fingerprint = fingerprint
    return values
