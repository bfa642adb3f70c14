"""Masks in ms-swift: ``--external_plugins .../ms_swift.py --tuner_type mask``; settings in ``MASKFT`` as JSON.

Run with ms-swift 4.6.0 (``swift.tuner_plugin``, ``swift.callbacks``). Its arguments cannot be added to, and its plugins
read the environment: ``MASKFT='{"sparsity": 0.1}' swift sft ...``. The folder of the file that ``--external_plugins``
takes is printed by ``python -c "import maskft.integrations as m; print(m.__path__[0])"``.
"""

import os
from typing import Any

from peft import get_peft_model
from swift.callbacks import callbacks_map
from swift.tuner_plugin import PeftTuner, tuners_map

from maskft.integrations.settings import config_of, moving_settings, refuse_quantised
from maskft.training.callbacks import MaskProgress
from maskft_base.errors import UserError

NAME = "mask"
SETTINGS = "MASKFT"


class MaskTuner(PeftTuner):
    """A mask as one of ms-swift's tuners; it saves and loads as PEFT does."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        """A mask over ``model``.

        Raises:
            UserError: If the base is quantised in another way than by bitsandbytes, a setting is not one of a mask, or
                the mask has to know how far training is and nothing tells it.
        """
        refuse_quantised(model)
        targets = [name for name in getattr(args, "target_modules", None) or [] if name != "all-linear"]
        saved = getattr(args, "modules_to_save", None)
        config = config_of(
            os.environ.get(SETTINGS), SETTINGS, target_modules=targets or None, modules_to_save=saved or None
        )
        moving = moving_settings(config)
        if moving and NAME not in (getattr(args, "callbacks", None) or []):
            raise UserError(f"{moving}: such a mask has to know how far training is; add --callbacks {NAME}")
        return get_peft_model(model, config)

    @staticmethod
    def from_pretrained(model: Any, model_id: str, **kwargs: Any) -> Any:
        """The mask of ``model_id``; one to be trained on forgets how far that was.

        The command's arguments are not known here. Without ``--callbacks mask`` such a mask would stay where it was;
        this way its first step says what is missing.
        """
        masked = PeftTuner.from_pretrained(model, model_id, **kwargs)
        if kwargs.get("is_trainable"):
            for config in masked.peft_config.values():
                config.progress = None
        return masked


tuners_map[NAME] = MaskTuner
# What it calls gets the trainer's arguments and the trainer.
callbacks_map[NAME] = lambda args, trainer: MaskProgress()
