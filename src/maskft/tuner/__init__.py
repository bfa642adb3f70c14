"""Mask Fine-Tuning as a PEFT method. Importing this module registers it; see :class:`MaskConfig`."""

from typing import cast

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import MaskConfig, MaskPeftType
from .layer import MaskedLinear
from .model import MaskModel, adapter_layers, current_masks, start_scores
from .progress import MaskProgress, set_mask_progress
from .wanda import wanda_keys

# What register_peft_method would fill, which refuses names outside PEFT's enum; tests fail when PEFT reads others.
_name = cast(PeftType, MaskPeftType.MASK)
PEFT_TYPE_TO_CONFIG_MAPPING[_name] = MaskConfig
PEFT_TYPE_TO_TUNER_MAPPING[_name] = MaskModel
PEFT_TYPE_TO_PREFIX_MAPPING[_name] = MaskModel.prefix

__all__ = [
    "MaskConfig",
    "MaskModel",
    "MaskPeftType",
    "MaskProgress",
    "MaskedLinear",
    "adapter_layers",
    "current_masks",
    "set_mask_progress",
    "start_scores",
    "wanda_keys",
]
