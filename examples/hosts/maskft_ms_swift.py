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
from maskft_common.errors import UserError


class MaskTuner(PeftTuner):
    """A mask as one of ms-swift's tuners; it saves and loads as PEFT does."""

    @staticmethod
    def prepare_model(args, model):
        """Put a mask over ``model``."""
        # Checkpoints are saved with the scores, without which training could not resume.
        settings = {"save_scores": True}

        # ms-swift's default is ["all-linear"], which is also the default of MaskConfig.
        target_modules = [name for name in args.target_modules or [] if name != "all-linear"]
        if target_modules:
            settings["target_modules"] = target_modules
        # A regular expression for the whole name; ms-swift's own tuners take it before target_modules.
        if args.target_regex:
            settings["target_modules"] = args.target_regex
        if args.modules_to_save:
            settings["modules_to_save"] = args.modules_to_save

        # From an environment variable: ms-swift's options are those of its own tuners.
        text = os.environ.get("MASKFT") or "{}"
        try:
            settings |= json.loads(text)
        except (TypeError, ValueError):
            raise UserError(f"MASKFT is {text!r}, not a JSON object of MaskConfig's settings") from None
        return get_peft_model(model, MaskConfig(task_type="CAUSAL_LM", **settings))


tuners_map["mask"] = MaskTuner
# Reports the progress of training. Masks with a ramp, a schedule or noise raise at their first step without it.
callbacks_map["mask"] = lambda args, trainer: MaskProgress()
