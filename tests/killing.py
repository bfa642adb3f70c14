"""Starts a study or a search as a user does, and kills it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_SRC = str(Path(__file__).parents[1] / "src")


def _start(file, folder, command="study"):
    words = [sys.executable, "-m", "maskft.cli.main", command, str(file), "--output_dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": _SRC}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_now_and_then(file, folder, waits, command="study"):
    """Start the study and kill it after each wait, which is a number of seconds or a condition to become true."""
    killed = 0
    for wait in waits:
        process = _start(file, folder, command)
        deadline = time.monotonic() + (wait if isinstance(wait, float) else 120)
        while process.poll() is None and time.monotonic() < deadline:
            if callable(wait) and wait():
                break
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        process.stderr.close()
    return killed
