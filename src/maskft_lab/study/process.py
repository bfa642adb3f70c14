"""Run commands as child processes that die with the study.

A study makes hundreds of short commands. maskft's own use Python's fork server, which imports torch, transformers and
trl once (9 s) and forks a child for each command.
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
from typing import Any, NamedTuple

from maskft_common.errors import UserError

PYTHON = [sys.executable, "-m", "maskft_lab.cli.main"]

# The imports of `maskft train` and `maskft evaluate`, and of libraries that import their own parts late.
IMPORTED = [
    "maskft_lab.cli.train",
    "maskft_lab.cli.evaluate",
    "maskft.training.train",
    "maskft.training.options",
    "maskft_lab.evaluation.evaluate",
    "maskft_lab.evaluation.load_models",
    "maskft_lab.generation.greedy",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
]

_PR_SET_PDEATHSIG = 1  # prctl: the signal that this process gets when its parent ends
_TAIL_BYTES = 4096  # of a log, to find its last line


class Threads(NamedTuple):
    """Threads that the commands of a run compute with; None: as the environment says."""

    training: int | None
    evaluation: int | None


THREADS_OF_ENVIRONMENT = Threads(None, None)

Tick = Callable[[], None]  # called about ten times a second while a command runs
Call = Callable[[list[str], Path], None]  # runs a command to its end: its words, its log


def no_tick() -> None:
    """Do nothing while a command runs."""


def command_words(options: dict[str, Any]) -> list[str]:
    """``{"a": 1, "b": [2, 3]}`` -> ``--a 1 --b 2 3``; None is left out, a dictionary becomes JSON."""
    words: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        # JSON for dictionaries, such as peft_config: Python's own text has single quotes.
        items = value if isinstance(value, list) else [value]
        texts = []
        for item in items:
            text = json.dumps(item) if isinstance(item, dict) else str(item)
            texts.append(text)

        is_negative = len(texts) == 1 and texts[0].startswith("-")
        if is_negative:
            # As a word on its own, argparse takes -1e-05 for an option.
            words.append(f"--{name}={texts[0]}")
        else:
            words += [f"--{name}", *texts]
    return words


def start_server() -> None:
    """Start the fork server, whose imports take seconds, while this process does something else."""
    # Other systems start commands without a server, see `start_command`.
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()


def start_command(
    words: Sequence[str],
    log: Path,
    lock_fd: int | None = None,
    num_threads: int | None = None,
) -> multiprocessing.process.BaseProcess:
    """Start a command, its output appended to ``log``; it holds the study's lock until it ends."""
    # Elsewhere a new interpreter for each command: macOS's frameworks do not survive a fork, and Windows has none.
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
    else:
        context = multiprocessing.get_context("spawn")

    # The server keeps the environment in which it was started, so the present one is passed on.
    environment = dict(os.environ)
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)

    log.parent.mkdir(parents=True, exist_ok=True)
    lock = None if lock_fd is None else _Descriptor(lock_fd)
    args = (list(words), str(log), environment, lock)
    process = context.Process(target=_run, args=args)
    process.start()
    return process


def run_command(
    words: Sequence[str],
    log: Path,
    tick: Tick = no_tick,
    lock_fd: int | None = None,
    num_threads: int | None = None,
) -> None:
    """Run a command to its end, its output appended to ``log``.

    Args:
        words: The command.
        log: File for stdout and stderr.
        tick: Called about ten times a second while it runs.
        lock_fd: The study's lock, which is held until the command has ended too.
        num_threads: Threads that it computes with; None: as the environment says.

    Raises:
        UserError: If it fails; the message is the last line it printed.
    """
    # Waiting in short steps keeps the board moving, and lets `tick` end the command by raising.
    process = start_command(words, log, lock_fd, num_threads)
    try:
        while process.exitcode is None:
            tick()
            process.join(0.1)
    finally:
        if process.exitcode is None:  # tick raised, as for Ctrl-C
            process.terminate()
            process.join()
    _check_status(process.exitcode, log)


def _check_status(status: int, log: Path) -> None:
    """Raise if a command failed, with the signal that ended it or the last line of its log."""
    # A child that a signal ended has the negative number; a shell or launcher in between makes it 128 + number.
    number = -status if status < 0 else status - 128
    # A status above 128 whose rest is not the number of a signal is an ordinary failure, with a last line.
    is_signal = number in set(signal.Signals)
    if is_signal:
        # The log's last line would be one of progress.
        name = signal.Signals(number).name
        hint = ", as when memory runs out" if name == "SIGKILL" else ""
        raise UserError(f"ended by {name}{hint} (see {log})")
    if status:
        line = last_line(log)
        reason = line.removeprefix("maskft: error: ") or f"exit status {status}"
        raise UserError(f"{reason} (see {log})")


def last_line(log: Path) -> str:
    """The last line of a log that is neither empty nor advice; "" if there is none."""
    try:
        with log.open("rb") as stream:
            # Only the end: a board reads logs twice a second. Half a character at the cut is replaced when decoding.
            size = log.stat().st_size
            start = max(0, size - _TAIL_BYTES)
            stream.seek(start)
            tail = stream.read()
    except OSError:
        return ""
    text = tail.decode("utf-8", "replace")

    for line in reversed(text.splitlines()):
        line = line.strip()
        if line and not line.startswith("next: "):
            return line
    return ""


class _Descriptor:
    """A file descriptor that the fork server duplicates into the child when it is unpickled there."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self):
        # The number alone would mean nothing in another process. DupFd sends the descriptor itself, over a socket.
        duplicate = multiprocessing.reduction.DupFd(self.fd)
        return _detach, (duplicate,)


def _detach(duplicate) -> int:
    return duplicate.detach()


def _run(
    words: list[str],
    log: str,
    environment: dict[str, str],
    lock: int | None,
) -> None:
    """In the child: the command, as if it had been started alone."""
    if lock is not None:
        os.set_inheritable(lock, True)  # or execvp below would close it (PEP 446)
    if sys.platform == "linux":
        _die_with_the_server()

    # Stdin, stdout, stderr. By descriptor, not by sys.stdout: libraries in C and the command's own children write to
    # it too.
    with open(log, "ab", buffering=0) as output, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    # By methods of os.environ, which call unsetenv and setenv: libraries in C read the process's own environment.
    os.environ.clear()
    os.environ.update(environment)

    # The command replaces this process: another program, or a new interpreter.
    if not _can_run_here(words):
        os.execvp(words[0], words)

    num_threads = environment.get("OMP_NUM_THREADS", "")
    torch = sys.modules.get("torch")
    if torch is not None and num_threads.isdecimal():
        # torch read the variable when the server imported it. With two threads each, two trainings on two cores are
        # five times slower than with one.
        torch.set_num_threads(int(num_threads))

    # As `python -m` would, but with the server's imports.
    name = PYTHON[-1]
    sys.argv = [name, *words[len(PYTHON) :]]
    module = importlib.import_module(name)
    sys.exit(module.main(sys.argv[1:]))


def _can_run_here(words: Sequence[str]) -> bool:
    """Whether a command can run in this process, with the server's imports: it is maskft's, and finds its GPU."""
    num_words = len(PYTHON)
    if words[:num_words] != PYTHON:
        return False
    # CUDA does not survive a fork, and an import of the server may have used it: PEFT imports bitsandbytes, which does.
    # torch would raise in this process at the first tensor on the GPU.
    torch = sys.modules.get("torch")
    return torch is None or not torch.cuda._is_in_bad_fork()


def _die_with_the_server() -> None:
    """End with the fork server, which ends with the study.

    A training left behind would write into the folder that a resumed study works in. SIGTERM, because a launcher
    (accelerate, torchrun) passes it on to its workers.
    """
    # The server notices the study's end by the end of this pipe, which a forked child would keep open.
    # Private, but Python keeps the number of this descriptor in no other place (`_serve_one` of forkserver.py).
    os.close(forkserver._forkserver._forkserver_alive_fd)
    forkserver._forkserver._forkserver_alive_fd = None

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if not multiprocessing.parent_process().is_alive():  # it ended before prctl
        sys.exit(128 + signal.SIGTERM)
