"""The environment that results record: Python, processor, threads, versions."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

# Packages on whose version a result may depend.
PACKAGES = (
    "accelerate alpaca_eval antlr4-python3-runtime datasets langdetect lm_eval maskft math-verify nltk numpy peft "
    "scipy sympy tokenizers torch transformers trl vllm"
).split()


def environment() -> dict:
    """Describe the environment of a result: Python, platform, processor, threads, versions of installed packages."""
    # From the metadata of the installed packages: importing them would take seconds.
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_threads": _num_threads(),
        "packages": packages,
    }


def _cpu_name() -> str:
    """Return the processor's model name; `platform.processor` is empty or just the architecture on Linux."""
    if sys.platform == "linux":
        for line in _cpu_info():
            if line.startswith("model name"):
                _, _, name = line.partition(":")
                return name.strip()
    return platform.processor() or platform.machine()


def _cpu_info() -> list[str]:
    """Lines of Linux' description of the processors."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return text.splitlines()


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    # Fewer than the machine has under taskset, or in a job of a scheduler.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows


def _num_threads() -> int:
    """Return the number of threads that numerical libraries use by default: OMP_NUM_THREADS or the usable cores."""
    # A list ("4,2", for nested threads) or a mistake counts as not set.
    requested = os.environ.get("OMP_NUM_THREADS", "")
    if requested.isdecimal() and int(requested) > 0:
        return int(requested)
    return num_cores()


def bfloat16_instructions() -> list[str] | None:
    """Instructions of this processor that multiply bfloat16; None where the system does not list them.

    ``amx_bf16`` multiplies matrices, several times as fast as float32; ``avx512_bf16`` of x86 and ``bf16``, ``svebf16``
    of ARM multiply vectors. Without any, bfloat16 is slower than float32 (``maskft train --bf16 false``).
    """
    if sys.platform != "linux":
        return None
    for line in _cpu_info():
        name, _, values = line.partition(":")
        if name.strip() not in ("flags", "Features"):  # of x86, of ARM
            continue
        # All processors have the same ones, so that the first line is enough.
        instructions = set(values.split())
        return sorted({"amx_bf16", "avx512_bf16", "bf16", "svebf16"} & instructions)
    return None
