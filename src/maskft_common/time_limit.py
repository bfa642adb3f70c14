"""A limit on the time that a stranger's program takes inside this process, such as a chat template."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import UserError


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Stop the ``with`` block after some seconds, by an error that is raised inside it.

    A signal's handler raises it, and Python runs handlers in the main thread alone: elsewhere there is no limit.

    Args:
        seconds: At most.
        message: Of the error.

    Raises:
        UserError: If the block took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise UserError(message)

    # ITIMER_REAL sends SIGALRM; signal.alarm(), the plain way, takes whole seconds only.
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # The timer first: its signal must not reach the handler that was there before.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
