"""Saved masks: their file (codec, checksums, fingerprints, card), reading, merging and verifying them.

Importing this room makes it the tuner's way to save and load adapters.
"""

from ..tuner.adapter_files import set_adapter_files
from .adapter import MaskFiles

set_adapter_files(MaskFiles())
