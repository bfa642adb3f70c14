"""Configurations of PEFT's adapters, from the content of an ``adapter_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from maskft_common.errors import UserError, did_you_mean, first_line

from ..tuner import MaskConfig

# Types of PEFT's that an ordinary training loop does not train, and why.
_NOT_BY_STEPS = {
    "ADALORA": "needs a call after every training step",
    "XLORA": "mixes adapters that are already trained",
    "POLY": "needs the task of every row",
    "SHADOW": "is a second model beside the first",
}
# Initialisations that PEFT computes from data before training.
_CALIBRATED = ("eva", "corda", "lora_ga", "loftq")
# Beginnings of initialisations that move a part of each weight of the base into the adapter.
_SPLIT = ("pissa", "olora")


def config_of_name(name: Any) -> dict[str, Any] | None:
    """``peft_config`` of an adapter that people name as a method, such as ``lora``; None for other names."""
    lower_name = str(name).lower()
    # An option of LoRA that people know as a method.
    if lower_name == "dora":
        return {"peft_type": "LORA", "use_dora": True}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        # A mask is a method here.
        if kind.value.lower() == lower_name and config is not MaskConfig:
            return {"peft_type": kind.value}
    return None


def adapter_config(content: Mapping[str, Any]) -> PeftConfig:
    """PEFT's configuration of an adapter, from the content of its ``adapter_config.json``.

    Raises:
        UserError: If a type or option does not exist, or the adapter needs more than an ordinary training loop.
    """
    types = {}
    for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        types[peft_type.value] = config
    name = str(content.get("peft_type"))
    kind = types.get(name)
    if kind is MaskConfig:
        raise UserError("peft_config has peft_type MASK; masks are --method mask, with options mask_...")
    if kind is None:
        raise UserError(f"peft_config has peft_type {name!r}{did_you_mean(name, types)}; PEFT has {', '.join(types)}")
    if issubclass(kind, PromptLearningConfig) or name in _NOT_BY_STEPS:
        reason = _NOT_BY_STEPS.get(name, "learns tokens before the prompt, which leaves no weights to compare or merge")
        raise UserError(f"peft_config has peft_type {name}, which {reason}; name an adapter of weights, such as LORA")

    # Before PEFT's TypeError, which does not say which options there are.
    known = kind.__dataclass_fields__
    for option, value in content.items():
        if option not in known:
            raise UserError(f"peft_config has an option {option!r}{did_you_mean(option, known)}")
        if option.startswith("init") and str(value).lower() in _CALIBRATED:
            raise UserError(
                f"peft_config has {option} {value!r}, an initialisation that PEFT computes from data in a separate "
                "program; leave it out"
            )
        if option == "kasa_config" and value is not None:
            raise UserError(
                "peft_config has kasa_config, which changes the base's weights and needs other terms of the loss than "
                "training has; leave it out"
            )

    given = {"task_type": "CAUSAL_LM", **content}
    # Each class sets its own type.
    del given["peft_type"]
    # PEFT saves it as true, and would freeze the adapter.
    given["inference_mode"] = False
    try:
        return kind(**given)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"peft_config: {first_line(error)}") from error


def keeps_base(model: nn.Module) -> bool:
    """Whether a model without its adapter stays the model before training; False for a model without an adapter."""
    configs = getattr(model, "peft_config", {})
    for config in configs.values():
        start = str(getattr(config, "init_lora_weights", "")).lower()
        # The base's own biases are trained, and PEFT leaves them as they are when it switches an adapter off.
        trains_biases = getattr(config, "bias", "none") != "none"
        if trains_biases or start.startswith(_SPLIT):
            return False
    return len(configs) > 0
