"""Masks whose removed weights take the value they had before fine-tuning (``removed_value="base"``)."""

from __future__ import annotations

from torch import Tensor, nn

from maskft_common.errors import UserError

from ..masks.fingerprints import weights_fingerprint
from ..models import load_model
from ..tuner.config import REMOVED_VALUES, MaskConfig
from ..tuner.quantized import find_quantized_weight
from ..tuner.targets import is_target


def base_values(config: MaskConfig, model: nn.Module) -> dict[str, Tensor]:
    """Values that removed weights take, by module name: those in ``removed_value_model``.

    Args:
        config: Its ``removed_value_fingerprint``, if any, must be that of the values.
        model: The model that is masked.

    Raises:
        UserError: If the model is quantised, or the other model is missing, has another architecture or the same
            weights, or is not the mask's.
    """
    # Weights to mask by name, in the order of names, in which fingerprints are computed.
    weights = {}
    for name, module in sorted(model.named_modules()):
        if not name or not is_target(config, name):
            continue
        # A mask is merged into codes as the code of zero; other values might have none. A layer that another adapter
        # masks already knows how its base layer is quantised.
        backend = getattr(module, "quantization_backend", None)
        if backend is not None or find_quantized_weight(module) is not None:
            raise UserError(
                f"removed_value='base' needs weights that are floats, and {name} is quantised: load the model without "
                "quantisation, or use removed_value='zero'"
            )
        weights[name] = module.weight

    source = str(config.removed_value_model)
    # With low_cpu_mem_usage PEFT creates every module on the meta device meanwhile, and so it would the other model.
    is_on_meta = nn.LayerNorm(1).weight.is_meta
    if is_on_meta:
        raise UserError("removed_value='base' does not load with low_cpu_mem_usage; leave it out")
    try:
        other = load_model(source, "auto")
    except UserError as error:
        raise UserError(f"removed_value_model: {error}") from error
    values = _values_of(other, weights, source)

    # The fingerprint is there if the adapter is being loaded; a new one gets it here.
    fingerprint = weights_fingerprint(values.items())
    if config.verify_base and config.removed_value_fingerprint not in (None, fingerprint):
        raise UserError(
            f"removed_value_model {source!r} (fingerprint {fingerprint[:12]}) has other weights than the mask was "
            f"trained with ({str(config.removed_value_fingerprint)[:12]}); set removed_value_model in "
            "adapter_config.json to the right one"
        )
    # A likely mistake: the fine-tuned model instead of the one before.
    if fingerprint == weights_fingerprint(weights.items()):
        raise UserError(
            f"removed_value_model {source!r} has the weights of the model itself, so nothing would change; "
            "name the model before fine-tuning"
        )
    config.removed_value_fingerprint = fingerprint
    return values


def _values_of(
    other: nn.Module,
    weights: dict[str, Tensor],
    source: str,
) -> dict[str, Tensor]:
    """Weights of the other model at the same names and of the same shapes."""
    modules: dict[str, nn.Module] = dict(other.named_modules())
    values = {}
    for name, weight in weights.items():
        # None where the other model has no such module, or one without a weight.
        module = modules.get(name)
        found = getattr(module, "weight", None)
        # Codes of the same shape, such as whole numbers of eight bits, would pass for the values.
        is_quantised = module is not None and find_quantized_weight(module) is not None
        holds_codes = found is not None and not found.is_floating_point()
        if is_quantised or holds_codes:
            raise UserError(
                f"removed_value_model {source!r} is quantised ({name} is), and removed weights take values that are "
                "floats: name the model before it was quantised"
            )
        if found is None or found.shape != weight.shape:
            has = "no such layer" if found is None else f"shape {tuple(found.shape)}"
            raise UserError(
                f"removed_value_model {source!r} has another architecture: {name} is {tuple(weight.shape)} in the "
                f"model, there {has}; name the model that was fine-tuned"
            )
        # Cloned, so that the rest of the other model is freed.
        values[name] = found.detach().clone()
    return values


# Importing this module makes the value known to MaskConfig.
REMOVED_VALUES["base"] = base_values
