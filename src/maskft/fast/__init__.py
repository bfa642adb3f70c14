"""The fast training step: a masked weight that is kept between optimizer steps, selection in place, compiled graphs.

It is on by default and changes no number. Off, every forward pass computes its mask, the plain way:

    >>> import maskft.fast
    >>> with maskft.fast.disabled():
    ...     pass  # train, evaluate, save
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..tuner.masker import MASKERS
from .masker import FastMasker
from .steps import watch_optimizers

__all__ = ["FastMasker", "disable", "disabled", "enable", "is_enabled"]


def is_enabled() -> bool:
    """Whether layers use the fast step."""
    return FastMasker in MASKERS


def enable() -> None:
    """Use the fast step, for all layers of this process."""
    if not is_enabled():
        watch_optimizers()
        # Over the plain way, under maskers of special cases, such as FSDP's.
        MASKERS.insert(1, FastMasker)


def disable() -> None:
    """Use the plain way, for all layers of this process; tensors that were kept are freed at the next forward."""
    if is_enabled():
        MASKERS.remove(FastMasker)


@contextmanager
def disabled() -> Iterator[None]:
    """Use the plain way for some lines."""
    was_enabled = is_enabled()
    disable()
    try:
        yield
    finally:
        if was_enabled:
            enable()


enable()
