"""Mask Fine-Tuning: learn which weights of a fine-tuned language model to remove so that it gets better.

``import maskft`` registers the method with PEFT: at once where PEFT is imported already, else as soon as PEFT is. It is
cheap: torch and PEFT are imported when a name that needs them is used.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder

from maskft_base.errors import UserError as UserError

from ._version import __version__ as __version__

_LAZY = {
    "MaskConfig": "tuner",
    "MaskModel": "tuner",
    "adapter_layers": "tuner",
    "current_masks": "tuner",
    "magnitude_mask": "tuner.fixed",
    "num_removed": "masking",
    "random_mask": "tuner.fixed",
    "set_mask_progress": "tuner",
    "start_scores": "tuner",
    "threshold_mask": "masking",
    "topk_mask": "masking",
    "topk_masks": "masking",
}

__all__ = sorted([*_LAZY, "UserError", "__version__"])


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__


class _RegisterWithPeft(MetaPathFinder):
    """Imports :mod:`maskft.tuner` right after PEFT."""

    def find_spec(self, fullname, path=None, target=None):
        """Find PEFT as the other finders do, and add registering to what importing it does."""
        if fullname != "peft":
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                importlib.import_module(f"{__name__}.tuner")

            spec.loader.exec_module = execute_and_register
        return spec


if "peft" in sys.modules:
    importlib.import_module(f"{__name__}.tuner")
else:
    sys.meta_path.insert(0, _RegisterWithPeft())
