"""Watch one running program from outside: read its output, add up its memory and time, end it over a limit."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from maskft_common.errors import UserError

INTERVAL_S = 0.05  # how often the memory and CPU time of all of a program's processes are added up
STOP_PATIENCE_S = 5.0  # from asking the launcher to stop until it is killed, which ends all processes below it
# Memory of the kernel for a mapping, which counts for no process: 250 bytes, and up to 64 more for each ancestor that
# wrote to it. A process may have 65,530 mappings; an ordinary program has some hundreds.
MAPPING_BYTES = 1024

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_READ_BYTES = 2**16

# Positions in the list that `_stat` returns; ticks are CPU time, those of reaped children apart.
_USER_TICKS = 11
_SYSTEM_TICKS = 12
_REAPED_USER_TICKS = 13
_REAPED_SYSTEM_TICKS = 14
_RESIDENT_PAGES = 21


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    Args:
        status: ``passed`` only if the last line of the program was reached.
        reason: Why it did not pass, such as the exception with its message; empty if it passed.
        exit_code: Exit status of the program; minus the signal's number when a signal ended it.
        stdout: The first ``max_output_bytes`` of its standard output.
        stderr: The same of its standard error, a traceback included.
        cpu_time_s: CPU time of the program and the children it waited for, in seconds.
        confinement: ``unconfined`` only where the caller accepted the risk.
    """

    status: Literal["passed", "failed", "timeout", "out_of_memory"]
    reason: str
    exit_code: int
    stdout: str
    stderr: str
    cpu_time_s: float
    confinement: Literal["confined", "unconfined"]

    @property
    def passed(self) -> bool:
        """Whether the program ran to its last line."""
        return self.status == "passed"


@dataclass(frozen=True)
class Limits:
    """Limits of a program.

    CPU time, which a busy machine does not shorten, ends an endless loop; the wall limit only ends programs that wait.
    Output beyond its limit is read and thrown away, so it does not end the program.

    Args:
        cpu_time_s: CPU seconds, for each process of the program and for all together.
        wall_time_s: Seconds by the clock.
        memory_bytes: Address space of each process, and resident memory of all together.
        max_processes: Processes and threads at one time, the program's own included.
        max_output_bytes: Bytes kept of each of standard output and standard error.
    """

    cpu_time_s: float = 30.0  # the slowest published solution of HumanEval+ took 9.4 s on a busy machine
    wall_time_s: float = 300.0
    memory_bytes: int = 2 * 2**30
    max_processes: int = 16
    max_output_bytes: int = 64 * 2**10


@dataclass
class Watch:
    """Follows one running program.

    Args:
        process: The launcher.
        report_fd: Where ``child.py`` reports, for reading.
        limits: Of the program.
        num_helpers: Processes of ours above the program: the launcher and, confined, init.
        stop: Ends the program when set.
        verdict: Status and reason, once a limit was crossed.
        cpu_time_s: Used by the program so far, as seen from outside.
    """

    process: subprocess.Popen
    report_fd: int
    limits: Limits
    num_helpers: int
    stop: threading.Event | None
    verdict: tuple[str, str] | None = None
    cpu_time_s: float = 0.0

    def __post_init__(self) -> None:
        self.stdout_fd = self.process.stdout.fileno()
        self.stderr_fd = self.process.stderr.fileno()
        # Descriptor -> the bytes read from it.
        self.kept = {
            self.stdout_fd: bytearray(),
            self.stderr_fd: bytearray(),
            self.report_fd: bytearray(),
        }

    def until_end(self) -> None:
        """Return when the launcher has ended: then the report ends, because no other process holds it open so long."""
        start_s = time.monotonic()
        next_check_s = start_s + INTERVAL_S
        kill_s = math.inf
        with selectors.DefaultSelector() as selector:
            # Non-blocking, because the rest of the output is read below without asking `select` first.
            for descriptor in self.kept:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)

            # Until the launcher and init, which hold the other end of the report, have ended: an empty piece is read
            # then.
            while self.report_fd in selector.get_map():
                wait_s = max(0.0, next_check_s - time.monotonic())
                for key, _ in selector.select(wait_s):
                    if not self._read(key.fd):
                        selector.unregister(key.fd)

                # A program that writes all the time wakes this loop at every piece, but is looked at no more often.
                now_s = time.monotonic()
                if now_s < next_check_s:
                    continue
                next_check_s = now_s + INTERVAL_S

                if self.verdict is None:
                    self.verdict = self._over_limit(now_s - start_s)
                    if self.verdict is not None:
                        self.process.terminate()
                        # SIGTERM makes the launcher kill init, and with it the program. A launcher that does not end is
                        # killed.
                        kill_s = now_s + STOP_PATIENCE_S
                elif now_s > kill_s:
                    self.process.kill()

            # The rest of the output. An unconfined leftover process may never stop writing, hence the bound.
            still_open = list(selector.get_map())
            for descriptor in still_open:
                for _ in range(64):
                    if not self._read(descriptor):
                        break

    def _read(self, descriptor: int) -> bool:
        """Take one piece of output; return whether there may be more."""
        try:
            piece = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return False
        kept = self.kept[descriptor]
        if descriptor == self.report_fd:
            kept += piece
        else:
            # Beyond the limit it is read and dropped: a full pipe would block the program.
            num_free = self.limits.max_output_bytes - len(kept)
            kept += piece[:num_free]
        return bool(piece)

    def _over_limit(self, wall_time_s: float) -> tuple[str, str] | None:
        """Status and reason once a limit is crossed, else None; also updates ``cpu_time_s``."""
        limits = self.limits
        if self.stop is not None and self.stop.is_set():
            return "failed", "stopped from outside"
        if wall_time_s > limits.wall_time_s:
            return "timeout", f"ran for more than {limits.wall_time_s:g} s"
        # A peak between two of these looks is bounded by the kernel's limit on each process alone.
        memory_bytes, self.cpu_time_s = tree_usage(self.process.pid, self.num_helpers)
        if self.cpu_time_s > limits.cpu_time_s:
            return "timeout", f"used more than {limits.cpu_time_s:g} s of CPU time"
        if memory_bytes > limits.memory_bytes:
            return "out_of_memory", f"its processes together used more than {limits.memory_bytes} bytes"
        return None

    def end_everything(self) -> None:
        """Make sure that no process of the run is left, also after an exception."""
        # The launcher is the last to end: it waits for init, or kills its process group.
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def result(self, confinement: Literal["confined", "unconfined"]) -> SandboxResult:
        """Judge the run.

        Raises:
            UserError: If the program was not started.
        """
        stdout = self.kept[self.stdout_fd].decode("utf-8", "replace")
        stderr = self.kept[self.stderr_fd].decode("utf-8", "replace")
        report_text = self.kept[self.report_fd].decode("utf-8", "replace")

        # Defaults for a program that was killed before its end could be reported.
        end: dict[str, Any] = {
            "outcome": "",
            "reason": "",
            "exit_code": -9,
            "cpu_time_s": self.cpu_time_s,
        }
        reports = [json.loads(line) for line in report_text.splitlines()]
        # One when the program starts, one when it has ended, or one that says why it was not started.
        for report in reports:
            end |= report

        # Without any report the launcher itself failed, unless it was killed for a limit before it could start.
        if not reports and self.verdict is None:
            last_output = stderr.strip()[-500:]
            end["refused"] = f"the launcher ended with code {self.process.returncode}: {last_output}"
        if "refused" in end:
            raise UserError(f"the program could not be started in the sandbox: {end['refused']}")

        has_ended = bool(reports) and "started" not in reports[-1]
        status, reason = self._judge(end, has_ended)
        return SandboxResult(
            status=status,
            reason=reason,
            exit_code=end["exit_code"],
            stdout=stdout,
            stderr=stderr,
            cpu_time_s=end["cpu_time_s"],
            confinement=confinement,
        )

    def _judge(
        self,
        end: dict[str, Any],
        has_ended: bool,
    ) -> tuple[Any, str]:
        """Status and reason of a run.

        Args:
            end: The report of its end.
            has_ended: Whether there was one, and not only the report of its start.
        """
        exit_code = end["exit_code"]
        # Before the limits: a program that reached its last line passed, also if it crossed one by then.
        if end["outcome"] == "passed" and exit_code == 0:
            return "passed", ""
        if self.verdict is not None:
            return self.verdict
        if end["outcome"] == "out_of_memory":
            return "out_of_memory", end["reason"]
        if end["reason"]:
            return "failed", end["reason"]
        if not has_ended:
            return "failed", "the sandbox around the program was ended before the program"
        # No outcome was reported: a signal, sys.exit or os._exit ended the program.
        how = f"was ended by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}"
        return "failed", f"the program {how} before its last line"


def tree_usage(launcher: int, num_helpers: int) -> tuple[int, float]:
    """Add up the memory in bytes and the CPU seconds of the processes below ``launcher``.

    The first ``num_helpers`` generations are not the program's: of them only the time of children that they already
    reaped counts.
    """
    memory_bytes = 0
    ticks = 0
    # Processes below the launcher, each with its generation; a tree, because processes may start others at any time.
    # By ancestry, since processes may change their group and session. Confined, orphans become children of init, which
    # is below the launcher too.
    todo = [(launcher, 0)]
    while todo:
        pid, generation = todo.pop()
        process_folder = f"/proc/{pid}"
        try:
            process_stat = _stat(process_folder)
            threads = os.listdir(f"{process_folder}/task")
        except OSError:  # it ended meanwhile
            continue

        # A first thread that has ended shows no pages, but the other threads still hold them all.
        most_pages = 0
        folder_of_most_pages = process_folder
        for thread in threads:
            folder = f"{process_folder}/task/{thread}"
            with contextlib.suppress(OSError):  # as above
                num_pages = int(_stat(folder)[_RESIDENT_PAGES])
                if num_pages > most_pages:
                    most_pages = num_pages
                    folder_of_most_pages = folder
                # Each thread lists the processes that it started itself.
                children = Path(f"{folder}/children").read_text().split()
                for child in children:
                    todo.append((int(child), generation + 1))

        # For helpers too: init reaps the program's orphans, whose time then counts as that of its children.
        ticks += int(process_stat[_REAPED_USER_TICKS])
        ticks += int(process_stat[_REAPED_SYSTEM_TICKS])
        if generation >= num_helpers:
            ticks += int(process_stat[_USER_TICKS])
            ticks += int(process_stat[_SYSTEM_TICKS])
            memory_bytes += most_pages * _PAGE_BYTES
            memory_bytes += _num_mappings(folder_of_most_pages) * MAPPING_BYTES
    return memory_bytes, ticks / _TICKS_PER_S


def _num_mappings(folder: str) -> int:
    """Count the mappings of the process or thread with this folder below /proc; 0 if it has ended.

    Piece by piece: a process with 65,530 mappings has megabytes of text here.
    """
    count = 0
    with contextlib.suppress(OSError), open(f"{folder}/maps", "rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            count += piece.count(b"\n")
    return count


def _stat(folder: str) -> list[bytes]:
    """The numbers of a process or thread in /proc, counted after its name in brackets (proc_pid_stat(5)).

    As bytes, and from the last bracket: the program can give itself a name with brackets, or one that is not text.
    """
    stat = Path(f"{folder}/stat").read_bytes()
    _, _, numbers = stat.rpartition(b")")
    return numbers.split()
