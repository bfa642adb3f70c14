"""Commands of maskft in processes that have imported everything: a fork in place of seconds of imports for each.

A study makes hundreds of short commands. Python's fork server imports once and forks a child for each.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.reduction
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

PYTHON = [sys.executable, "-m", "maskft_lab.cli.main"]

# What `maskft train` and `maskft evaluate` import, and the libraries that import their own parts late.
IMPORTED = [
    "maskft_lab.cli.train",
    "maskft_lab.cli.evaluate",
    "maskft.training.train",
    "maskft.training.options",
    "maskft_lab.evaluation.run",
    "maskft_lab.evaluation.load",
    "maskft_lab.generation.greedy",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
]


def is_possible(words: Sequence[str]) -> bool:
    """Whether a command can be run by a fork: one of maskft, on Linux."""
    return sys.platform == "linux" and list(words[: len(PYTHON)]) == PYTHON


class WarmProcess:
    """A command of maskft in a fork, with the methods of ``subprocess.Popen`` that a study calls.

    Args:
        words: The command; it begins with :data:`PYTHON`.
        log: File that stdout and stderr are appended to.
        lock_fd: A file descriptor that the child holds open too.
    """

    def __init__(self, words: Sequence[str], log: Path, lock_fd: int | None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        # The server hands the descriptor over to the child.
        lock = None if lock_fd is None else _Descriptor(lock_fd)
        arguments = (list(words[len(PYTHON) :]), str(log), dict(os.environ), lock)
        self._process = context.Process(target=_run, args=arguments)
        self._process.start()

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def wait(self) -> None:
        """Wait for its end."""
        self._process.join()


class _Descriptor:
    """A file descriptor, duplicated into the child when it is pickled for it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self):
        return _detach, (multiprocessing.reduction.DupFd(self.fd),)


def _detach(duplicate) -> int:
    return duplicate.detach()


def _run(words: list[str], log: str, environment: dict[str, str], lock: int | None) -> None:
    """In the child: the command, as if it had been started alone."""
    del lock  # open until the process ends
    threading.Thread(target=_end_with_study, daemon=True).start()
    with open(log, "ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [PYTHON[-1], *words]
    sys.exit(importlib.import_module(PYTHON[-1]).main(words))  # by name, as `python -m` has it


def _end_with_study() -> None:
    """Without this a killed study would leave a training behind that writes into the folder its successor works in."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
