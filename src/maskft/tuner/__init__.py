"""Mask Fine-Tuning as a PEFT method. Importing this module registers it; see :class:`MaskConfig`."""

from typing import cast

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import MaskConfig, MaskPeftType
from .layer import MaskedLinear
from .masker import MASKERS, Masker
from .model import METHOD_PREFIX, MaskModel, adapter_layers, current_masks, start_scores
from .schedule import MaskProgress, set_mask_progress
from .selection import Learner, register_learner

# The three tables that register_peft_method fills in. It is not called, because it raises for names outside PEFT's
# enum. A test fails if PEFT reads more tables.
_name = cast(PeftType, MaskPeftType.MASK)
PEFT_TYPE_TO_CONFIG_MAPPING[_name] = MaskConfig
PEFT_TYPE_TO_TUNER_MAPPING[_name] = MaskModel
PEFT_TYPE_TO_PREFIX_MAPPING[_name] = METHOD_PREFIX

__all__ = [
    "MASKERS",
    "Learner",
    "MaskConfig",
    "MaskModel",
    "MaskPeftType",
    "MaskProgress",
    "MaskedLinear",
    "Masker",
    "adapter_layers",
    "current_masks",
    "register_learner",
    "set_mask_progress",
    "start_scores",
]
