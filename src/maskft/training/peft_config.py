"""Configurations of PEFT's adapters, from what stands in an ``adapter_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from maskft_common.errors import UserError, did_you_mean, first_line

from ..tuner import MaskConfig

# Types of PEFT's that a plain loop of steps does not train, and why.
_NOT_BY_STEPS = {
    "ADALORA": "must be told of every step while it trains",
    "XLORA": "mixes adapters that are trained already",
    "POLY": "needs to be told the task of every row",
    "SHADOW": "is a second model beside the first",
}
_CALIBRATED = ("eva", "corda", "lora_ga", "loftq")


def adapter_config(content: Mapping[str, Any]) -> PeftConfig:
    """PEFT's configuration of an adapter, from what stands in its ``adapter_config.json``.

    Raises:
        UserError: If there is no such type or option, or the adapter needs more than a loop of steps.
    """
    types = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = str(content.get("peft_type"))
    kind = types.get(name)
    if kind is MaskConfig:
        raise UserError("peft_config has peft_type MASK; masks are --method mask, with options mask_...")
    if kind is None:
        raise UserError(f"peft_config has peft_type {name!r}{did_you_mean(name, types)}; PEFT has {', '.join(types)}")
    if issubclass(kind, PromptLearningConfig) or name in _NOT_BY_STEPS:
        what = _NOT_BY_STEPS.get(name, "learns tokens before the prompt, which leaves no weights to compare or merge")
        raise UserError(f"peft_config has peft_type {name}, which {what}; name an adapter of weights, such as LORA")
    for option, value in content.items():
        if option not in kind.__dataclass_fields__:
            raise UserError(f"peft_config has an option {option!r}{did_you_mean(option, kind.__dataclass_fields__)}")
        if option.startswith("init") and str(value).lower() in _CALIBRATED:
            raise UserError(
                f"peft_config has {option} {value!r}, a start that PEFT computes from data beforehand, in a program of "
                "its own; leave it out"
            )
    given = {key: value for key, value in content.items() if key != "peft_type"}
    try:
        return kind(**{"task_type": "CAUSAL_LM", **given, "inference_mode": False})  # PEFT saves it as true
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"peft_config: {first_line(error)}") from error
