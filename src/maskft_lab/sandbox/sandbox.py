"""Run model-written Python programs confined.

A program runs in its own Linux namespaces with no network, no file system but a read-only view of the Python
installation and an empty folder in memory, and limits on memory, processes, CPU time, wall time and output.
docs/evaluation.md describes the protection and its limits. ``child.py`` is the inside, ``system_calls.py`` lists the
system calls that are refused there, and ``watch.py`` follows a program from outside.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskft_common.environment import num_cores
from maskft_common.errors import UserError

from .system_calls import seccomp_filter
from .watch import Limits, SandboxResult, Watch

_CHILD = Path(__file__).with_name("child.py")
# Not /dev/zero: mapped, it is memory that belongs to no process.
_VISIBLE_FILES = ("/dev/null", "/dev/random", "/dev/urandom", "/etc/ld.so.cache")
# Where Python's own libraries are, on one system or another.
_LIBRARIES = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/nix/store",
    "/gnu/store",
    "/usr/share/zoneinfo",
)


@functools.lru_cache(maxsize=1)
def why_unconfined() -> str | None:
    """Why this machine cannot confine a program, or None; an empty program is run once per process to find out."""
    if sys.platform != "linux":
        return f"it takes Linux namespaces, and this is {sys.platform}"
    try:
        # An import from a shared library: it fails where the libraries are in a folder that is not visible inside.
        result = _run("import decimal", Limits(), confined=True)
    except UserError as error:
        return str(error)
    if result.passed:
        return None
    last_output = result.stderr[-500:]
    return f"an empty program did not run: {result.reason} {last_output}".strip()


def check_allowed(allow_unconfined: bool) -> bool:
    """Whether programs are confined; raises where they cannot be and the caller does not accept that."""
    reason = why_unconfined()
    if reason and not allow_unconfined:
        raise UserError(
            f"model-written code cannot be confined on this machine ({reason}), so it is not run; "
            "to run it with the rights of the current user, accept that risk with --allow_unconfined_code"
        )
    # A reason means that programs run unconfined, which the caller has accepted.
    return reason is None


def run_code(
    code: str,
    *,
    allow_unconfined: bool = False,
    **limits: Any,
) -> SandboxResult:
    """Run one Python program confined and return how it ended; see `run_many`."""
    (result,) = run_many([code], num_workers=1, allow_unconfined=allow_unconfined, **limits)
    return result


def run_many(
    programs: Iterable[str],
    *,
    num_workers: int | None = None,
    progress: Callable[[int, int, SandboxResult], None] | None = None,
    allow_unconfined: bool = False,
    **limits: Any,
) -> list[SandboxResult]:
    """Run Python programs confined, several at a time, and return how each ended.

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
    is_confined = check_allowed(allow_unconfined)
    # An unknown limit is a TypeError here, before any program runs.
    bounds = Limits(**limits)
    stop = threading.Event()
    run = functools.partial(
        _run,
        limits=bounds,
        confined=is_confined,
        stop=stop,
    )
    # Threads are enough: each only waits for its program, which is a process.
    with ThreadPoolExecutor(num_workers or num_cores()) as pool:
        futures = [pool.submit(run, code) for code in programs]
        try:
            for num_done, future in enumerate(as_completed(futures), start=1):
                result = future.result()
                if progress is not None:
                    progress(num_done, len(futures), result)
        except BaseException:
            # Ctrl-C in particular: do not wait for programs that may run for minutes.
            stop.set()
            # Programs that run are ended by `stop`, those that wait never start.
            pool.shutdown(cancel_futures=True)
            raise
    # In the order of the programs; `as_completed` is in the order in which they end.
    return [future.result() for future in futures]


def _run(
    code: str,
    limits: Limits,
    *,
    confined: bool,
    stop: threading.Event | None = None,
) -> SandboxResult:
    """Run one program.

    Raises:
        UserError: If it could not be started.
    """
    # Closes the job's file and, unconfined, deletes the temporary folder, whatever happens below.
    with contextlib.ExitStack() as opened:
        if confined:
            # Where the launcher starts; init changes into the writable folder.
            folder = "/"
            home = "/tmp"  # the program's, in memory
        else:
            # A leftover process may still write there while the folder is deleted, hence ignore_cleanup_errors.
            temporary = tempfile.TemporaryDirectory(prefix="maskft-sandbox-", ignore_cleanup_errors=True)
            home = opened.enter_context(temporary)
            folder = home

        # The job comes through a file without a name, which a kill of this process cannot leave behind.
        job_file = opened.enter_context(tempfile.TemporaryFile("w+"))
        job = _job(code, limits, confined)
        json.dump(job, job_file)
        job_file.seek(0)

        # The launcher and init alone hold the other end: when it closes, the run is over.
        report_end, child_report_end = os.pipe()
        try:
            # The same interpreter as this one: the program imports compiled packages that are installed for it.
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-S",  # no site hooks
                    "-P",  # nothing from the current folder
                    "-B",  # no bytecode written
                    str(_CHILD),
                    str(child_report_end),
                ],
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
            num_helpers = 2 if confined else 1  # the launcher; confined, init below it
            watch = Watch(process, report_file.fileno(), limits, num_helpers, stop)
            try:
                watch.until_end()
            finally:
                # Popen's `with` waits for the process, which must have ended by then, also after an exception.
                watch.end_everything()
            return watch.result("confined" if confined else "unconfined")


def _job(
    code: str,
    limits: Limits,
    confined: bool,
) -> dict[str, Any]:
    """The job for ``child.py``."""
    folders, import_paths = _python_folders()
    return {
        "code": code,
        # A program that ends early, or prints whatever it likes, cannot guess it.
        "token": secrets.token_hex(16),
        "confined": confined,
        "seccomp_filter": seccomp_filter().hex() if confined else "",
        "folders": folders,
        "files": [path for path in _VISIBLE_FILES if os.path.exists(path)],
        "import_paths": import_paths,
        **asdict(limits),
    }


def _environment(home: str) -> dict[str, str]:
    """Return the whole environment of the program."""
    # Nothing of our environment is passed on: it may hold the user's keys.
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
    if site.ENABLE_USER_SITE:
        user_site_packages = site.getusersitepackages()
        if os.path.isdir(user_site_packages):
            site_packages.append(user_site_packages)

    # The folder above: libpython is beside the standard library.
    standard_library = []
    for name in ("stdlib", "platstdlib"):
        folder = sysconfig.get_path(name)
        standard_library.append(os.path.dirname(folder))
    candidates = [*site_packages, *standard_library, *_LIBRARIES]

    # A path and the one that it links to: the loader and Python may ask for either.
    wanted: set[str] = set()
    for path in candidates:
        if os.path.isdir(path):
            wanted.add(path)
            wanted.add(os.path.realpath(path))

    # Sorted, a folder comes before those inside of it, which it makes visible.
    folders: list[str] = []
    for path in sorted(wanted):
        is_inside = any(path.startswith(folder.rstrip("/") + "/") for folder in folders)
        if not is_inside:
            folders.append(path)
    return folders, site_packages
