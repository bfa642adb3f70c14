"""Child processes that end with the study, also when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maskft_base.errors import UserError

from .warm import PYTHON, WarmProcess, is_possible

# On Linux the kernel ends a child whose parent died: without this a killed study would leave a training behind that
# writes into the folder its successor works in. A launcher (accelerate, torchrun) passes SIGTERM on to its workers.
_END_WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(143)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)


__all__ = ["PYTHON", "command_words", "last_line", "run_command"]


def command_words(options: dict[str, Any]) -> list[str]:
    """``{"a": 1, "b": [2, 3]}`` -> ``--a 1 --b 2 3``; what is None is left out, an object is JSON."""
    words: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        texts = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
        # argparse takes -1e-05 for an option unless it stands behind an equals sign.
        words += [f"--{name}={texts[0]}"] if len(texts) == 1 and texts[0].startswith("-") else [f"--{name}", *texts]
    return words


def run_command(words: Sequence[str], log: Path, tick: Callable[[], None] = lambda: None, lock_fd: int | None = None):
    """Run a command to its end, its output appended to ``log``.

    Args:
        words: The command.
        log: File for stdout and stderr.
        tick: Called about twice a second while it runs.
        lock_fd: The study's lock, which is held until the command has ended too.

    Raises:
        UserError: If it fails; the message is the last line it printed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = WarmProcess(words, log, lock_fd) if is_possible(words) else _cold_process(words, log, lock_fd)
    try:
        while process.poll() is None:
            tick()
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    status = process.poll()
    killed_by = -status if status < 0 else status - 128
    if killed_by in set(signal.Signals):  # its last line would be one of progress
        name = signal.Signals(killed_by).name
        raise UserError(f"ended by {name}{', as when memory runs out' if name == 'SIGKILL' else ''} (see {log})")
    if status:
        reason = last_line(log).removeprefix("maskft: error: ") or f"exit status {status}"
        raise UserError(f"{reason} (see {log})")


def _cold_process(words: Sequence[str], log: Path, lock_fd: int | None) -> subprocess.Popen:
    """Any command, in an interpreter of its own."""
    words = list(words)
    if sys.platform == "linux":
        words = [sys.executable, "-c", _END_WITH_PARENT, str(os.getpid()), *words]
    fds = () if lock_fd is None else (lock_fd,)
    with log.open("ab") as output:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=fds)


def last_line(log: Path) -> str:
    """The last line of a log that says something; empty where there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 4096))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
