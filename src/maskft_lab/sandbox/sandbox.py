"""Run model-written Python programs confined.

A program runs in its own Linux namespaces with no network, no file system but a read-only view of the Python
installation and an empty folder in memory, and limits on memory, processes, CPU time, wall time and output.
What is confined, how, and what it does not protect against: docs/evaluation.md. The inside is ``child.py``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
import selectors
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from maskft_common.environment import num_cores
from maskft_common.errors import UserError

WATCH_INTERVAL_S = 0.05  # how often the memory and CPU time of all of a program's processes are added up
STOP_PATIENCE_S = 5.0  # from asking the launcher to stop until it is killed; its end takes everything below with it

_CHILD = Path(__file__).with_name("child.py")
# Not /dev/zero: mapped, it is memory that belongs to no process.
_VISIBLE_FILES = ("/dev/null", "/dev/random", "/dev/urandom", "/etc/ld.so.cache")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    Args:
        status: ``passed`` only if the last line of the program was reached.
        reason: Why it did not pass, such as the exception with its message; empty if it passed.
        exit_code: Exit status of the program; minus the signal's number when a signal ended it.
        stdout: The first ``max_output_bytes`` of what it printed.
        stderr: The same for its errors, a traceback included.
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

    The one that decides about an endless loop is CPU time, which a busy machine does not shorten; the wall limit only
    ends programs that wait. Output beyond its limit is read and thrown away, so it does not end the program.

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


@functools.lru_cache(maxsize=1)
def why_unconfined() -> str | None:
    """Why this machine cannot confine a program, found out by an empty one, once per process; None where it can."""
    if sys.platform != "linux":
        return f"it takes Linux namespaces, and this is {sys.platform}"
    try:
        result = _run("import decimal", Limits(), confined=True)
    except UserError as error:
        return str(error)
    return None if result.passed else f"an empty program did not run: {result.reason} {result.stderr[-500:]}".strip()


def check_allowed(allow_unconfined: bool) -> bool:
    """Whether programs are confined; raises where they cannot be and the caller does not accept that."""
    reason = why_unconfined()
    if reason and not allow_unconfined:
        raise UserError(
            f"model-written code cannot be confined on this machine ({reason}), so it is not run; "
            "to run it with the rights of the current user, accept that risk with --allow_unconfined_code"
        )
    return reason is None


def run_code(code: str, *, allow_unconfined: bool = False, **limits: Any) -> SandboxResult:
    """Run one Python program confined and say how it ended; see `run_many`."""
    return run_many([code], num_workers=1, allow_unconfined=allow_unconfined, **limits)[0]


def run_many(
    programs: Iterable[str],
    *,
    num_workers: int | None = None,
    progress: Callable[[int, int, SandboxResult], None] | None = None,
    allow_unconfined: bool = False,
    **limits: Any,
) -> list[SandboxResult]:
    """Run Python programs confined, several at a time, and say how each ended.

    Args:
        programs: Sources. Each runs as a module named ``program`` with no standard input; ``__name__`` is not
            ``"__main__"``, as in HumanEval's own scorer.
        num_workers: Programs at one time; the number of usable cores when not given.
        progress: Called in this thread after each program with the number done, the number of all, and its result,
            in the order in which they end.
        allow_unconfined: Run programs even where they cannot be confined: with the current user's rights, and with the
            limits on memory, CPU time, wall time and output only.
        **limits: See `Limits`.

    Returns:
        Results in the order of ``programs``.

    Raises:
        UserError: If programs cannot be confined and ``allow_unconfined`` is not set.
    """
    confined, bounds = check_allowed(allow_unconfined), Limits(**limits)
    stop = threading.Event()
    with ThreadPoolExecutor(num_workers or num_cores()) as pool:
        how = {"confined": confined, "stop": stop}
        futures = [pool.submit(_run, code, bounds, **how) for code in programs]
        try:
            for num_done, future in enumerate(as_completed(futures), start=1):
                result = future.result()
                if progress is not None:
                    progress(num_done, len(futures), result)
        except BaseException:  # Ctrl-C in particular: do not wait for programs that may run for minutes
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _run(code: str, limits: Limits, *, confined: bool, stop: threading.Event | None = None) -> SandboxResult:
    """Run one program; raises UserError where it could not be started."""
    with contextlib.ExitStack() as opened:
        job_file = opened.enter_context(tempfile.TemporaryFile("w+"))
        folder, home = "/", "/tmp"  # the program's own is in memory and private to it
        if not confined:
            unconfined = tempfile.TemporaryDirectory(prefix="maskft-sandbox-", ignore_cleanup_errors=True)
            folder = home = opened.enter_context(unconfined)
        folders, import_paths = _python_folders()
        job = {
            "code": code,
            "token": secrets.token_hex(16),
            "confined": confined,
            "folders": folders,
            "files": [path for path in _VISIBLE_FILES if os.path.exists(path)],
            "import_paths": import_paths,
            **asdict(limits),
        }
        json.dump(job, job_file)
        job_file.seek(0)
        report_end, child_report_end = os.pipe()
        try:
            process = subprocess.Popen(
                # -S, -P, -B: no site hooks, nothing from the current folder, no bytecode written
                [sys.executable, "-S", "-P", "-B", str(_CHILD), str(child_report_end)],
                stdin=job_file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=_environment(home),
                pass_fds=[child_report_end],
                start_new_session=True,
            )
        except BaseException:
            os.close(report_end)
            raise
        finally:
            os.close(child_report_end)
        with process, open(report_end, "rb", buffering=0) as report_file:
            watch = _Watch(process, report_file.fileno(), limits, num_helpers=2 if confined else 1, stop=stop)
            try:
                watch.until_end()
            finally:
                watch.end_everything()
            return watch.result("confined" if confined else "unconfined")


def _environment(home: str) -> dict[str, str]:
    """Return all the environment that the program gets."""
    return {
        "HOME": home,
        "TMPDIR": home,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONHASHSEED": "0",  # the same order of sets, hence the same verdict, every time
        "OPENBLAS_NUM_THREADS": "1",  # threads count as processes and reserve address space
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


@functools.lru_cache(maxsize=1)
def _python_folders() -> tuple[list[str], list[str]]:
    """Return the folders a program may read, and those of them to import installed packages from."""
    site_packages = [path for path in site.getsitepackages() if os.path.isdir(path)]
    if site.ENABLE_USER_SITE and os.path.isdir(site.getusersitepackages()):
        site_packages.append(site.getusersitepackages())
    standard_library = [os.path.dirname(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/gnu/store", "/usr/share/zoneinfo"]
    wanted = {path for path in (*site_packages, *standard_library, *libraries) if os.path.isdir(path)}
    folders: list[str] = []
    for path in sorted(wanted | {os.path.realpath(path) for path in wanted}):
        if not any(path.startswith(folder.rstrip("/") + "/") for folder in folders):  # not inside one already there
            folders.append(path)
    return folders, site_packages


@dataclass
class _Watch:
    """Follow one running program from outside: read its output, add up what it uses, end it when it is over a limit."""

    process: subprocess.Popen
    report_fd: int
    limits: Limits
    num_helpers: int
    stop: threading.Event | None
    verdict: tuple[str, str] | None = None  # status and reason, once a limit was crossed
    cpu_time_s: float = 0.0

    def __post_init__(self) -> None:
        descriptors = (self.process.stdout.fileno(), self.process.stderr.fileno(), self.report_fd)
        self.kept = {descriptor: bytearray() for descriptor in descriptors}

    def until_end(self) -> None:
        """Return when the launcher is gone, which is when the report ends: nothing else holds it to the last."""
        start_s = time.monotonic()
        next_check_s, kill_s = start_s + WATCH_INTERVAL_S, math.inf
        with selectors.DefaultSelector() as selector:
            for descriptor in self.kept:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            while self.report_fd in selector.get_map():
                for key, _ in selector.select(max(0.0, next_check_s - time.monotonic())):
                    if not self._read(key.fd):
                        selector.unregister(key.fd)
                now_s = time.monotonic()
                if now_s < next_check_s:
                    continue
                next_check_s = now_s + WATCH_INTERVAL_S
                if self.verdict is None:
                    self.verdict = self._over_limit(now_s - start_s)
                    if self.verdict is not None:
                        self.process.terminate()
                        kill_s = now_s + STOP_PATIENCE_S
                elif now_s > kill_s:
                    self.process.kill()
            for descriptor in list(selector.get_map()):
                for _ in range(64):  # what is left in the pipe; an unconfined leftover process may never stop writing
                    if not self._read(descriptor):
                        break

    def _read(self, descriptor: int) -> bool:
        """Take one piece of output; return whether there may be more."""
        try:
            piece = os.read(descriptor, 2**16)
        except BlockingIOError:
            return False
        kept = self.kept[descriptor]
        room = len(piece) if descriptor == self.report_fd else self.limits.max_output_bytes - len(kept)
        kept += piece[:room]
        return bool(piece)

    def _over_limit(self, wall_time_s: float) -> tuple[str, str] | None:
        limits = self.limits
        if self.stop is not None and self.stop.is_set():
            return "failed", "stopped from outside"
        if wall_time_s > limits.wall_time_s:
            return "timeout", f"ran for more than {limits.wall_time_s:g} s"
        resident_bytes, self.cpu_time_s = _tree_usage(self.process.pid, self.num_helpers)
        if self.cpu_time_s > limits.cpu_time_s:
            return "timeout", f"used more than {limits.cpu_time_s:g} s of CPU time"
        if resident_bytes > limits.memory_bytes:
            return "out_of_memory", f"its processes together used more than {limits.memory_bytes} bytes"
        return None

    def end_everything(self) -> None:
        """Make sure that nothing of the run is left, also when an exception is on its way."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def result(self, confinement: Literal["confined", "unconfined"]) -> SandboxResult:
        """Judge the run; raises UserError where the program was not started."""
        stdout, stderr, report_text = (bytes(kept).decode("utf-8", "replace") for kept in self.kept.values())
        end: dict[str, Any] = {"outcome": "", "reason": "", "exit_code": -9, "cpu_time_s": self.cpu_time_s}
        reports = [json.loads(line) for line in report_text.splitlines()]
        for report in reports:
            end |= report
        if not reports and self.verdict is None:
            end["refused"] = f"the launcher ended with code {self.process.returncode}: {stderr.strip()[-500:]}"
        if "refused" in end:
            raise UserError(f"the program could not be started in the sandbox: {end['refused']}")
        exit_code = end["exit_code"]
        if end["outcome"] == "passed" and exit_code == 0:
            status, reason = "passed", ""
        elif self.verdict is not None:
            status, reason = self.verdict
        elif end["outcome"] == "out_of_memory":
            status, reason = "out_of_memory", end["reason"]
        elif end["reason"]:
            status, reason = "failed", end["reason"]
        elif "started" not in reports[-1]:
            how = f"was ended by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}"
            status, reason = "failed", f"the program {how} before its last line"
        else:  # the last report is that it was started
            status, reason = "failed", "the sandbox around the program was ended before the program"
        return SandboxResult(
            status=status,
            reason=reason,
            exit_code=exit_code,
            stdout=stdout,
            stderr=stderr,
            cpu_time_s=end["cpu_time_s"],
            confinement=confinement,
        )


def _tree_usage(launcher: int, num_helpers: int) -> tuple[int, float]:
    """Add up resident bytes and CPU seconds of the processes below ``launcher``.

    The first ``num_helpers`` generations are ours: of them only the time of children they already reaped counts.
    """
    resident_pages, ticks, todo = 0, 0, [(launcher, 0)]
    while todo:
        pid, generation = todo.pop()
        pages = 0
        try:
            fields, threads = _stat(f"/proc/{pid}"), os.listdir(f"/proc/{pid}/task")
        except OSError:  # it ended meanwhile
            continue
        for thread in threads:
            with contextlib.suppress(OSError):  # as above
                # A first thread that has ended shows no pages, though the others still hold them all.
                pages = max(pages, int(_stat(f"/proc/{pid}/task/{thread}")[21]))
                children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
                todo += [(int(child), generation + 1) for child in children]
        ticks += int(fields[13]) + int(fields[14])
        if generation >= num_helpers:
            ticks += int(fields[11]) + int(fields[12])
            resident_pages += pages
    return resident_pages * _PAGE_BYTES, ticks / _TICKS_PER_S


def _stat(folder: str) -> list[bytes]:
    """The numbers of a process or thread, counted after its name in brackets.

    11, 12: user and system time; 13, 14: the same of reaped children; 21: resident pages. As bytes: the program can
    give itself a name that is no text.
    """
    return Path(f"{folder}/stat").read_bytes().rpartition(b")")[2].split()
