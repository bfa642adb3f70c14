"""Commands in processes that end with the study, also when it is killed; those of maskft without seconds of imports.

A study makes hundreds of short commands. Python's fork server imports once and forks a child for each.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import multiprocessing.reduction
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from maskft_common.errors import UserError

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
_PR_SET_PDEATHSIG = 1


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


def start_command(words: Sequence[str], log: Path, lock_fd: int | None = None) -> multiprocessing.process.BaseProcess:
    """Start a command, its output appended to ``log``; it holds the study's lock until it ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(IMPORTED)
    lock = None if lock_fd is None else _Descriptor(lock_fd)  # the server hands it over to the child
    process = context.Process(target=_run, args=(list(words), str(log), dict(os.environ), lock))
    process.start()
    return process


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
    process = start_command(words, log, lock_fd)
    try:
        while process.exitcode is None:
            tick()
            process.join(0.1)
    finally:
        if process.exitcode is None:
            process.terminate()
            process.join()
    status = process.exitcode
    killed_by = -status if status < 0 else status - 128
    if killed_by in set(signal.Signals):  # its last line would be one of progress
        name = signal.Signals(killed_by).name
        raise UserError(f"ended by {name}{', as when memory runs out' if name == 'SIGKILL' else ''} (see {log})")
    if status:
        reason = last_line(log).removeprefix("maskft: error: ") or f"exit status {status}"
        raise UserError(f"{reason} (see {log})")


def last_line(log: Path) -> str:
    """The last line of a log that says something, and does not advise; "" where there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 4096))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = (line.strip() for line in reversed(text.splitlines()))
    return next((line for line in lines if line and not line.startswith("next: ")), "")


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
    if lock is not None:
        os.set_inheritable(lock, True)
    if sys.platform == "linux":
        # The server ends with the study, and this with the server: a training left behind would write into the folder
        # that a resumed study works in. A launcher (accelerate, torchrun) passes SIGTERM on to its workers. A child
        # holds the pipe by whose end the server knows that the study is gone, for processes of its own.
        os.close(forkserver._forkserver._forkserver_alive_fd)
        forkserver._forkserver._forkserver_alive_fd = None
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if not multiprocessing.parent_process().is_alive():
            sys.exit(128 + signal.SIGTERM)
    with open(log, "ab", buffering=0) as output, open(os.devnull) as nothing:
        for stream, number in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(stream.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    if words[: len(PYTHON)] != PYTHON:
        os.execvp(words[0], words)
    num_threads = environment.get("OMP_NUM_THREADS", "")
    if num_threads.isdecimal() and "torch" in sys.modules:
        # torch read the variable when the server imported it. With two threads each, two trainings on two cores are
        # five times slower than with one.
        sys.modules["torch"].set_num_threads(int(num_threads))
    sys.argv = [PYTHON[-1], *words[len(PYTHON) :]]
    sys.exit(importlib.import_module(PYTHON[-1]).main(sys.argv[1:]))  # by name, as `python -m` has it
