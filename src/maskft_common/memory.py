"""Memory of this process: its peak, and how the C library gives it back."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import psutil

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4


def peak_memory_bytes(device_type: str | None = None) -> int:
    """Peak memory of this process: of the GPU if it computes there, else resident memory.

    Args:
        device_type: Where it computes, such as ``cpu``; None: on the GPU if there is one.
    """
    # Imported here: commands that only read files start without torch.
    import torch

    if device_type in (None, "cuda") and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        # Not getrusage, the plain way: its figure is inherited from the parent that forked. The line is "VmHWM: N kB",
        # the high-water mark in KiB.
        status = Path("/proc/self/status").read_text()
        behind_name = status.split("VmHWM:")[1]
        num_kib = int(behind_name.split()[0])
        return num_kib * 1024
    except (OSError, IndexError, ValueError):
        pass  # not Linux
    usage = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return usage.ru_maxrss * unit


def resident_memory_bytes() -> int:
    """Memory of this process that is resident now."""
    return psutil.Process().memory_info().rss


def keep_freed_memory() -> None:
    """Configure glibc to keep freed memory instead of giving it back to the kernel.

    By default every large activation is mapped, zeroed page by page and unmapped again, in every operation of every
    step. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        # None: the libraries that this process has loaded, the C library among them.
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    # Large blocks come from the heap as well, which never shrinks and grows by 256 MiB at a time.
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**28)
