"""Mask Fine-Tuning: learn which weights of a fine-tuned language model to remove so that it gets better.

``import maskft`` registers the method with PEFT; then ``get_peft_model(model, maskft.MaskConfig(...))``,
``PeftModel.from_pretrained`` and every trainer that takes a PEFT configuration work as for PEFT's own methods.
"""

from maskft_common import __version__
from maskft_common.errors import UserError

from .masking import num_removed, topk_mask
from .tuner import (
    MaskConfig,
    MaskModel,
    MaskProgress,
    adapter_layers,
    current_masks,
    set_mask_progress,
    start_scores,
    wanda_keys,
)

__all__ = [
    "MaskConfig",
    "MaskModel",
    "MaskProgress",
    "UserError",
    "__version__",
    "adapter_layers",
    "current_masks",
    "num_removed",
    "set_mask_progress",
    "start_scores",
    "topk_mask",
    "wanda_keys",
]
