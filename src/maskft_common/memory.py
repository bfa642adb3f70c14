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


def peak_memory_bytes() -> int:
    """Peak memory of this process: of the GPU where there is one, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        # Not getrusage: its figure is inherited from the parent that forked.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass  # not Linux
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap as well
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # the heap is never shortened
    mallopt(_M_TOP_PAD, 2**28)  # and grows by 256 MiB at a time
