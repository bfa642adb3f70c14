"""Saved masks: their file (codec, checksums, fingerprints, card), reading, merging and verifying them.

On by default: adapters are saved as coded masks with checksums, and loading is strict. Off, adapters are saved and
loaded the plain way, as PEFT's own methods are: float32 scores of every weight, without checks of the file or the base.

    >>> import maskft.masks
    >>> with maskft.masks.disabled():
    ...     pass  # save_pretrained, from_pretrained
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..tuner.adapter_files import AdapterFiles, adapter_files, set_adapter_files
from .adapter import MaskFiles

__all__ = [
    "MaskFiles",
    "disable",
    "disabled",
    "enable",
    "is_enabled",
]


def is_enabled() -> bool:
    """Whether adapters are saved and loaded as coded masks."""
    return isinstance(adapter_files(), MaskFiles)


def enable() -> None:
    """Save and load coded masks, for all models of this process."""
    set_adapter_files(MaskFiles())


def disable() -> None:
    """Save and load scores, for all models of this process."""
    set_adapter_files(AdapterFiles())


@contextmanager
def disabled() -> Iterator[None]:
    """Save and load scores inside the ``with`` block."""
    before = set_adapter_files(AdapterFiles())
    try:
        yield
    finally:
        set_adapter_files(before)


# On by default: importing the package is enough.
enable()
