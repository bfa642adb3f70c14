"""Masks in ms-swift: ``--external_plugins .../ms_swift.py --tuner_type mask``; settings in ``MASKFT`` as JSON.

Written against ms-swift's tuner interface of August 2026 (``swift.tuner_plugin``, commit 3602360a5). Its arguments
cannot be added to, and its plugins read the environment: ``MASKFT='{"sparsity": 0.1}' swift sft ...``. The file that
``--external_plugins`` takes is printed by ``python -c "import maskft.integrations as m; print(m.__path__[0])"``.
"""

import os
from typing import Any

from peft import get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

from maskft.errors import UserError
from maskft.integrations.settings import config_of

SETTINGS = "MASKFT"


class MaskTuner(PeftTuner):
    """A mask as one of ms-swift's tuners; it saves and loads as PEFT does."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        """A mask over ``model``.

        Raises:
            UserError: If the base is quantised or a setting is not one of a mask.
        """
        if getattr(args, "quant_method", None):
            raise UserError("tuner_type mask needs the model's own weights; drop quant_method")
        targets = [name for name in getattr(args, "target_modules", None) or [] if name != "all-linear"]
        saved = getattr(args, "modules_to_save", None)
        config = config_of(
            os.environ.get(SETTINGS), SETTINGS, target_modules=targets or None, modules_to_save=saved or None
        )
        return get_peft_model(model, config)


tuners_map["mask"] = MaskTuner
