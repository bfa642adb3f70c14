"""Masks in LLaMA-Factory v1: ``peft_config: {name: mask, sparsity: 0.3}``, in a process that has imported this file.

Run with llamafactory 0.9.5 (its registry is in ``llamafactory.v1.plugins.model_plugins.peft``). It loads no plugins of
others by itself: start it as ``docs/hosts.md`` says, on one device. Its launcher's own processes for several have not
imported this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin, load_adapter
from peft import get_peft_model

from maskft_base.errors import UserError

from ..tuner import MaskConfig
from .settings import config_of, moving_settings, refuse_quantised

_OF_THE_HOST = ("name", "adapter_name_or_path")


@PeftPlugin("mask").register()
def get_masked_model(model: Any, peft_config: Mapping[str, Any], is_train: bool = False) -> Any:
    """A mask over ``model``: that of ``adapter_name_or_path`` (merged, unless it is trained on), or a new one.

    Raises:
        UserError: If a setting is not one of a mask or one that this host cannot train, or the base is quantised in
            another way than by bitsandbytes.
    """
    refuse_quantised(model)
    settings = {name: value for name, value in dict(peft_config).items() if name not in _OF_THE_HOST}
    config = config_of(settings, "peft_config", inference_mode=not is_train)
    adapter = peft_config.get("adapter_name_or_path")
    if adapter:
        masked = load_adapter(model, adapter, is_train)
    else:
        masked = get_peft_model(model, config)
    if is_train:
        _refuse_moving(masked.peft_config["default"])
        masked.print_trainable_parameters()
    return masked


def _refuse_moving(config: MaskConfig) -> None:
    # Its trainer has callbacks, and its command line passes none to it.
    if moving := moving_settings(config):
        raise UserError(
            f"{moving}: such a mask has to know how far training is, which LLaMA-Factory v1 does not tell it; "
            "drop the setting, or train with maskft train"
        )
