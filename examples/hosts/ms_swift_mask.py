"""Masks in ms-swift (4.6.0): a tuner ``mask``, its settings as JSON in the environment.

    MASKFT='{"sparsity": 0.1, "init_scores": "magnitude"}' swift sft --tuner_type mask \
        --external_plugins examples/hosts/ms_swift_mask.py --callbacks mask ...

ms-swift's arguments cannot be added to, so settings are read from the environment. ``--callbacks mask`` tells the mask
how far training is; only masks with a ramp, a schedule or noise need it.
"""

import json
import os
from typing import Any

from peft import get_peft_model
from swift.callbacks import callbacks_map
from swift.tuner_plugin import PeftTuner, tuners_map

import maskft
from maskft.training.callbacks import MaskProgress


class MaskTuner(PeftTuner):
    """A mask as one of ms-swift's tuners; it saves and loads as PEFT does."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        """Return a new mask over ``model``."""
        targets = [name for name in getattr(args, "target_modules", None) or [] if name != "all-linear"]
        options = {"target_modules": targets or None, "modules_to_save": getattr(args, "modules_to_save", None) or None}
        options |= json.loads(os.environ.get("MASKFT") or "{}")
        # save_scores: ms-swift's checkpoints can be resumed.
        return get_peft_model(model, maskft.MaskConfig(task_type="CAUSAL_LM", save_scores=True, **options))

    @staticmethod
    def from_pretrained(model: Any, model_id: str, **kwargs: Any) -> Any:
        """Return the mask of ``model_id``; a resumed run says anew how far training is."""
        masked = PeftTuner.from_pretrained(model, model_id, **kwargs)
        if kwargs.get("is_trainable"):
            for config in masked.peft_config.values():
                config.progress = None
        return masked


tuners_map["mask"] = MaskTuner
callbacks_map["mask"] = lambda args, trainer: MaskProgress()
