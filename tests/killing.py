"""Starts commands as a user does, and kills them."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from maskft_lab.cli.main import main
from maskft_lab.study.process import PYTHON, start_command

_SRC = str(Path(__file__).parents[1] / "src")


def start(words):
    """A command of maskft in a process of its own, its stderr in a pipe."""
    words = [sys.executable, "-m", "maskft_lab.cli.main", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": _SRC}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


class Forked:
    """A command of maskft in a fork that has imported everything, with what is called of a ``Popen``."""

    def __init__(self, words, log):
        self._process = start_command([*PYTHON, *map(str, words)], log)
        self.kill, self.wait = self._process.kill, self._process.join

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self._process.pid, number)


class Fork:
    """A command in a fork of this process, without seconds of imports, with what is called of a ``Popen``.

    Args:
        words: The command.
        err: File for what it writes to stderr.
        prepare: Called in the fork before the command.
    """

    def __init__(self, words, err, prepare=lambda: None):
        self.returncode = None
        self.pid = os.fork()
        if self.pid > 0:
            return
        status = 1
        try:
            torch.set_num_threads(1)  # the threads of this process are not in its fork, which would wait for them
            sys.stderr = open(err, "w")
            sys.stdout = open(os.devnull, "w")
            prepare()
            status = main(words)
        finally:
            sys.stderr.flush()
            os._exit(status)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def stop_when(is_time, words):
    """Start a command, send SIGTERM once ``is_time()``; returns its exit status and the lines of its stderr."""
    process = start(words)
    wait_for(process, is_time)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    return process.returncode, err.strip().splitlines()


def kill_when(is_time, words, log):
    """Kill a command in a fork that has imported everything once ``is_time()``; its output goes to the file ``log``."""
    process = Forked(words, log)
    wait_for(process, is_time)
    assert process.poll() is None, log.read_text()
    process.kill()
    process.wait()


def stop_forked_when(is_time, words, log):
    """The same of a command in a fork that has imported everything; its output goes to the file ``log``."""
    process = Forked(words, log)
    wait_for(process, is_time)
    process.send_signal(signal.SIGTERM)
    process.wait()
    return process.poll(), log.read_text().strip().splitlines()


def forget(*packages):
    """Drop packages from the modules that are imported, so that they are imported anew."""
    for name in list(sys.modules):
        if any(name == package or name.startswith(f"{package}.") for package in packages):
            del sys.modules[name]


def kill_ten_times(words, folder, seconds, check, begin=start):
    """Kill a command ten times, up to ``seconds`` after it began to write, and let it end; ``check`` what it leaves.

    Counted from there, for how long Python takes to start and import is the machine's. Where a command was faster than
    the moment, its folder is checked and deleted, and another one takes the kills that are left.
    """
    moments, killed = random.Random(0), 0
    while killed < 10:
        begun = time.time()
        process = begin(words)
        wait_for(process, lambda: _last_write(folder) >= begun)  # noqa: B023 - called at once
        wait_for(process, moments.uniform(0.0, seconds))
        if process.poll() is None:
            process.kill()
            killed += 1
            process.wait()
        else:
            check()
            shutil.rmtree(folder)
    process = begin(words)
    process.wait()
    check()


def _last_write(folder):
    """Time of the newest file in a folder, 0 of none."""
    newest = 0.0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            newest = max(newest, file.stat().st_mtime)
    return newest


def wait_for(process, wait):
    deadline = time.monotonic() + (wait if isinstance(wait, float) else 600)
    while process.poll() is None and time.monotonic() < deadline:
        if callable(wait) and wait():
            break
        time.sleep(0.01)
