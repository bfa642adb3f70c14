"""Another mask in a running model: put over the one that is there, without loading the base again."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from maskft_base.errors import UserError

from ..tuner import MaskConfig, adapter_layers
from ..tuner.codec import PREFIX, decode_mask, pack_mask
from ..tuner.model import check_base
from ..tuner.targets import listed
from .mask_set import read_coded, read_config


@torch.no_grad()
def swap_mask(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Put the mask of ``folder`` in the place of one that the model has loaded for inference.

    Masks that were loaded side by side change with ``model.set_adapter(name)`` instead. Either way the masked weights
    are written at the next forward pass.

    Args:
        model: A model with a mask adapter, loaded by ``PeftModel.from_pretrained``.
        folder: Adapter folder over the same base, for the same layers.
        adapter_name: The adapter that becomes the other.

    Raises:
        UserError: If the folder does not fit, or the adapter is one that is being trained or is merged; the model is
            then as it was.
    """
    layers = {name.removeprefix(PREFIX): layer for name, layer in adapter_layers(model, adapter_name).items()}
    if not layers:
        raise UserError(f"the model has no mask adapter named {adapter_name!r}")
    there = next(iter(layers.values())).mask_configs[adapter_name]
    if any(adapter_name in layer.mask_scores or layer.merged for layer in layers.values()):
        raise UserError(f"adapter {adapter_name!r} is being trained or is merged; load it for inference to swap it")
    config, coded = read_config(folder), read_coded(folder)
    other = sorted(coded.keys() ^ layers.keys())
    if other:
        raise UserError(f"{str(folder)!r} masks other layers than adapter {adapter_name!r}: {listed(other)}")
    if config.weights_sha256 or there.weights_sha256:
        raise UserError(f"{str(folder)!r} or adapter {adapter_name!r} replaces weights beside the mask; load it anew")
    if "base" in (config.removed_value, there.removed_value):
        raise UserError("masks whose removed weights take the base's values cannot be swapped; load the adapter anew")
    # All are checked before any is put in its place, and kept packed until then: a bit per weight, and not a byte.
    packed = {n: pack_mask(decode_mask(coded[n], n, layer.weight.shape)) for n, layer in layers.items()}
    # The base was compared with this fingerprint when the first mask was loaded: hashing it again takes seconds.
    is_checked = there.verify_base and there.base_fingerprint and there.base_fingerprint == config.base_fingerprint
    if config.verify_base and not is_checked:
        check_base(layers.values(), config)
    full = MaskConfig.from_pretrained(str(folder))
    full.inference_mode = True
    model.peft_config[adapter_name] = full
    for name, layer in layers.items():
        layer.mask_configs[adapter_name] = full
        layer.mask_coded[adapter_name] = coded[name]
        if adapter_name in layer.active_adapters:
            layer.mask_decoded[adapter_name] = coded[name], packed[name]
        layer.effective.forget()
