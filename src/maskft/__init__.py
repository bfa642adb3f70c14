"""Mask Fine-Tuning: learn which weights of a fine-tuned language model to remove so that it gets better.

``import maskft`` is cheap: torch and PEFT are imported when a name that needs them is used, or with
``import maskft.tuner``, which registers the method with PEFT.
"""

import importlib

from ._version import __version__ as __version__
from .errors import UserError as UserError

_LAZY = {
    "MaskConfig": "tuner",
    "MaskModel": "tuner",
    "adapter_layers": "tuner",
    "current_masks": "tuner",
    "magnitude_mask": "masking",
    "num_removed": "masking",
    "random_mask": "masking",
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
