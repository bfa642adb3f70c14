"""SIGTERM and Ctrl-C during training: the step is finished and saved first; a second one ends the run at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from maskft_common.processes import is_main

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Debounce: Ctrl-C reaches every process of a terminal, and launchers and studies pass it on to theirs once more.
_SAME_SIGNAL_S = 1.0


class StopRequest:
    """Records the first signal inside its context; a second one goes to the handler from before.

    Attributes:
        signal: The first signal; None if none has come.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal = number
            self._time = now
            # A launcher's other processes stay silent.
            if is_main():
                # Not with a console, which may be in the middle of a line and hold its lock.
                os.write(2, b"\nstopping: the step is finished and saved first; a second signal stops immediately\n")
        elif now - self._time > _SAME_SIGNAL_S:
            # Sent once more, to the handler from before: for SIGINT that raises KeyboardInterrupt.
            self._restore()
            os.kill(os.getpid(), number)
