"""What a run is on: its folder, processes, memory, progress bar, and the environment that results record.

torch is imported where it is used: commands that only read files start without it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import psutil
import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TaskID, TextColumn
from rich.text import Text

from .errors import UserError
from .files import check_no_link

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30.0
_BAR_WIDTH = 8
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

# Those that a number may depend on.
PACKAGES = (
    "accelerate alpaca_eval antlr4-python3-runtime datasets langdetect lm_eval maskft math-verify nltk numpy peft "
    "scipy sympy tokenizers torch transformers trl vllm"
).split()


# Folders


class Hold(NamedTuple):
    """A folder that is held by a descriptor of the lock's file, which child processes inherit."""

    descriptor: int
    is_left_over: bool  # whether the file was there: an owner that was killed has left it


@contextmanager
def held(folder: Path, name: str, wait_s: float, owner: str) -> Iterator[Hold]:
    """Make a folder and hold it by a locked file in it; the kernel releases it when its owner dies, however it does.

    Args:
        folder: What is held; what of it is new and empty at the end is removed.
        name: Of the lock's file, which is removed at the end.
        wait_s: Seconds to wait for an owner that is ending.
        owner: Who else may hold it, for the message.

    Raises:
        UserError: If it is a file, or someone else holds it.
    """
    check_no_link(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {str(folder)!r} is a file; name a folder")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    hold, deadline = None, time.monotonic() + wait_s
    while hold is None:
        hold = _try_to_hold(folder, name)
        if hold is None:
            if time.monotonic() > deadline:
                raise UserError(f"another {owner} is running in {str(folder)!r}; wait for it or stop it")
            time.sleep(0.2)
    try:
        yield hold
    finally:
        (folder / name).unlink(missing_ok=True)  # before it is released: the next owner makes its own
        os.close(hold.descriptor)
        for place in made:
            with suppress(OSError):  # not empty
                place.rmdir()


def _try_to_hold(folder: Path, name: str) -> Hold | None:
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    is_left_over = file.exists()
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:  # its last owner has just removed the folder
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return Hold(descriptor, is_left_over)
    except BlockingIOError:
        pass
    os.close(descriptor)  # someone holds it, or has just removed it
    return None


# Processes

COMMAND = "MASKFT_COMMAND"  # in the environment of processes that a launcher started: the command it was given


def rank() -> int:
    """Number of this process among those that a launcher started."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def uses_fsdp() -> bool:
    """Whether this run shards the model with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def silence() -> None:
    """Show no progress bars of libraries and no warnings of their futures; other warnings in the main process only."""
    import logging

    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # That it gives the model the tokenizer's special tokens, and how it sorts checkpoints.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    if not is_main():
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()


def num_processes() -> int:
    """Processes that train together; 1 before they have met."""
    if "torch" not in sys.modules:
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """The picklable ``value`` of every process, in order of rank, on every process."""
    if num_processes() == 1:
        return [value]
    import torch.distributed as dist

    values: list = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def reduce_(values: Tensor, op: str = "sum") -> Tensor:
    """Sum (or ``max``) of ``values`` over the processes, in place."""
    if num_processes() > 1:
        import torch.distributed as dist

        dist.all_reduce(values, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return values


def decided_by_main(decide: Callable[[], T]) -> T:
    """Call ``decide`` in the main process only; its result, or its UserError, is that of every process."""
    answer: list = [None, None]
    if is_main():
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    if num_processes() > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def check_same(value: dict[str, str], what: str) -> None:
    """Refuse, in every process with the same line, when the processes do not hold the same ``value``.

    Args:
        value: What must be equal everywhere, by name.
        what: Plural noun for the message, with what to do: ``"{what} differ ..."``.
    """
    first, *others = gather(value)
    for rank, other in enumerate(others, start=1):
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                raise UserError(
                    f"{what} differ between processes: {name} is {first.get(name)} on rank 0 and {other.get(name)} on "
                    f"rank {rank}; start every process with the same model, data and arguments"
                )


def largest(*flags: Tensor) -> int:
    """Index (from 1) of the last of the 0-dimensional bool ``flags`` that is set in any process; 0 if none is."""
    import torch

    weighted = torch.stack([flag.to(torch.int32) * index for index, flag in enumerate(flags, start=1)])
    return int(reduce_(weighted.max(), "max"))


# Memory


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
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory_bytes() -> int:
    """Memory of this process that is resident now."""
    return psutil.Process().memory_info().rss


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the kernel.

    By default every large activation is mapped, zeroed page by page and unmapped again, in every operation of every
    step. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**28)


# Progress


def time_text(seconds: float) -> str:
    """``90 s`` and longer in minutes, ``90 min`` and longer in hours: ``12 s``, ``34 min``, ``1.6 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def shortened(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns of a terminal; what is cut off is an ellipsis."""
    shown = Text(text)
    shown.truncate(max(width, 1), overflow="ellipsis")
    return shown.plain


class Progress(rich.progress.Progress):
    """The progress of a command: a bar on a terminal; in a log a line about every half a minute.

    Beside the count of each task stand the time left, at the mean speed so far, and a note.
    """

    def __init__(self, console: Console | None = None):
        console = console or Console(stderr=True)
        super().__init__(
            TextColumn("{task.description}", markup=False),
            MofNCompleteColumn(),
            BarColumn(bar_width=_BAR_WIDTH),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        self._began: dict[TaskID, tuple[float, float]] = {}  # when, and what was completed by then

    def add_task(self, description: str, *args: Any, **kwargs: Any) -> TaskID:
        """Add a task, whose speed is measured from now on."""
        task_id = super().add_task(description, *args, note="", **kwargs)
        self._began[task_id] = (time.monotonic(), self._task(task_id).completed)
        return task_id

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move a task, whose total must be known."""
        self.move(task_id, self._task(task_id).completed + advance)

    def move(self, task_id: TaskID, completed: float, note: str = "", is_news: bool = False) -> None:
        """Set what is completed of a task.

        Args:
            task_id: The task.
            completed: All of it so far.
            note: What to show beside it.
            is_news: Whether a log gets a line now.
        """
        task = self._task(task_id)
        count = f"{completed:>{len(f'{task.total:g}')}g}/{task.total:g}"
        parts = [part for part in (self._left(task_id, completed), note) if part]
        if self.console.is_terminal:
            room = self.console.width - len(task.description) - len(count) - _BAR_WIDTH - 3
            self.update(task_id, completed=completed, note=shortened("  ".join(parts), room))
            return
        self.update(task_id, completed=completed)
        if is_news or time.monotonic() > self._next_line:
            line = "  ".join([f"  {task.description} {count}", *reversed(parts)])
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def _left(self, task_id: TaskID, completed: float) -> str:
        began, first = self._began[task_id]
        total = self._task(task_id).total or completed
        if completed <= first or completed >= total:
            return ""
        seconds = (time.monotonic() - began) / (completed - first) * (total - completed)
        return f"{time_text(seconds)} left"

    def _task(self, task_id: TaskID) -> Task:
        return next(task for task in self.tasks if task.id == task_id)


# Environment


def environment() -> dict:
    """Return what the numbers were made with: Python, platform, processor, threads, versions of installed packages."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
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
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _num_threads() -> int:
    """Return the number of threads that numerical libraries use by default: OMP_NUM_THREADS or the usable cores."""
    requested = os.environ.get("OMP_NUM_THREADS", "")
    if requested.isdecimal() and int(requested) > 0:
        return int(requested)
    return num_cores()
