"""Masks over quantised layers. Zero is a level of many formats, so that a mask merges into them without rounding.

Importing this registers the formats with the tuner (``maskft.tuner.quantized``); nothing of bitsandbytes, torchao or
transformers' GGUF layers is imported for it.
"""

from .weights import find_codes

__all__ = ["find_codes"]
