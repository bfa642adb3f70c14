"""Mask Fine-Tuning: learn which weights of a fine-tuned language model to remove so that it gets better.

``import maskft`` registers the method with PEFT; then ``get_peft_model(model, maskft.MaskConfig(...))``,
``PeftModel.from_pretrained`` and every trainer that takes a PEFT configuration work as for PEFT's own methods.
"""

from maskft_common import __version__
from maskft_common.errors import UserError

from .masking import num_removed, topk_mask
from .tuner import (
    Learner,
    MaskConfig,
    MaskModel,
    MaskProgress,
    adapter_layers,
    current_masks,
    register_learner,
    set_mask_progress,
    start_scores,
)

# Add-ons over the tuner; each registers itself when it is imported. Not sorted: they come after the tuner, over which
# they work.
from . import fast, fsdp, learners, masks, quant  # isort: skip
from .baselines.wanda import wanda_keys  # isort: skip

__all__ = [
    "Learner",
    "MaskConfig",
    "MaskModel",
    "MaskProgress",
    "UserError",
    "__version__",
    "adapter_layers",
    "current_masks",
    "fast",
    "fsdp",
    "learners",
    "masks",
    "num_removed",
    "quant",
    "register_learner",
    "set_mask_progress",
    "start_scores",
    "topk_mask",
    "wanda_keys",
]
