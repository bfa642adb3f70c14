"""Masks in ms-swift: a tuner and a callback, run with ms-swift 4.6.0. Settings of maskft.MaskConfig are JSON in MASKFT.

MASKFT='{"sparsity": 0.3}' swift sft --tuner_type mask --callbacks mask \
    --external_plugins examples/hosts/maskft_ms_swift.py ...
"""

import json
import os

from peft import get_peft_model
from swift.callbacks import callbacks_map
from swift.tuner_plugin import PeftTuner, tuners_map

from maskft import MaskConfig, MaskProgress


class MaskTuner(PeftTuner):
    """A mask as one of ms-swift's tuners; it saves and loads as PEFT does."""

    @staticmethod
    def prepare_model(args, model):
        """A mask over ``model``."""
        given = {
            "target_modules": [name for name in args.target_modules or [] if name != "all-linear"],
            "modules_to_save": args.modules_to_save,
            "save_scores": True,  # to resume
            **json.loads(os.environ.get("MASKFT") or "{}"),
        }
        config = MaskConfig(task_type="CAUSAL_LM", **{name: value for name, value in given.items() if value})
        return get_peft_model(model, config)


tuners_map["mask"] = MaskTuner
# Without it, a mask with a ramp, a schedule or noise ends at its first step.
callbacks_map["mask"] = lambda args, trainer: MaskProgress()
