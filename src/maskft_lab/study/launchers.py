"""Where runs are made: here, on a Ray cluster, or under SLURM; each run as soon as its parents are finished.

A launcher has ``num_at_once`` and ``submit``; what that returns has ``done()``, ``result()`` and ``cancel()``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from maskft_base import files
from maskft_base.errors import UserError, install_hint
from maskft_base.runtime import num_cores

from .board import Board
from .execute import Study, make
from .plan import StudyRun

_MAX_LOST = 3  # times that a run is submitted again after its worker was lost
_ASK_S = 2.0  # between two questions to SLURM's queue
_GONE_S = 15.0  # after which a job that left the queue without a result is lost; shared file systems are late


Job = Any  # a run that was submitted: `done`, `result` (why it failed, None if it did not), `cancel`, as a Future has


class Launcher(Protocol):
    """Where the runs of a study are made."""

    @property
    def num_at_once(self) -> int | None:
        """Runs at a time; None: as many as there is room for, and the others wait in a queue."""

    def open(self, study: Study) -> contextlib.AbstractContextManager:
        """Be ready for runs of ``study`` inside."""

    def submit(self, study: Study, runs: list[StudyRun]) -> list[Job]:
        """Hand out runs whose parents are finished."""


def failure_of(study: Study, run: StudyRun, tick=lambda: None) -> str | None:
    """Make a run; returns why it failed, None if it did not."""
    try:
        make(study, run, tick)
    except UserError as error:
        return str(error)
    return None


@dataclass
class Local:
    """This machine, ``num_at_once`` runs at a time, which share its cores."""

    num_at_once: int = 1
    _is_over: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def open(self, study: Study) -> Iterator[None]:
        """See :class:`Launcher`."""
        if self.num_at_once > 1:  # where the user has not said how many threads a process has
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // self.num_at_once)))
        self._is_over.clear()
        with ThreadPoolExecutor(self.num_at_once) as self._pool:
            try:
                yield
            finally:
                self._is_over.set()

    def _tick(self) -> None:
        if self._is_over.is_set():
            raise KeyboardInterrupt  # which ends the command that this thread waits for

    def submit(self, study: Study, runs: list[StudyRun]) -> list[Job]:
        """See :class:`Launcher`."""
        return [self._pool.submit(failure_of, study, run, self._tick) for run in runs]


class Ray:
    """A Ray cluster: that of RAY_ADDRESS, else one on this machine. The study's folder must be one all nodes see."""

    num_at_once: None = None

    @contextlib.contextmanager
    def open(self, study: Study) -> Iterator[None]:
        """See :class:`Launcher`."""
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        launch = study.recipe.launch
        task = ray.remote(num_cpus=launch.num_cpus, num_gpus=launch.num_gpus, max_retries=0)
        self._task = task(failure_of)
        yield

    def submit(self, study: Study, runs: list[StudyRun]) -> list[Job]:
        """See :class:`Launcher`."""
        return [self._task.remote(study, run).future() for run in runs]


@dataclass
class Slurm:
    """SLURM, by submitit: ready runs are a job array; a job that is preempted is requeued and resumes its run.

    Attributes:
        partition: Of the cluster; None: its default.
        time_min: Minutes that a job may take before it is requeued.
        cluster: ``slurm``, or ``local`` for processes of this machine.
    """

    partition: str | None = None
    time_min: int = 24 * 60
    cluster: str = "slurm"
    num_at_once: None = None
    _seen: dict[str, float] = field(default_factory=dict)
    _asked: float = 0.0

    @contextlib.contextmanager
    def open(self, study: Study) -> Iterator[None]:
        """See :class:`Launcher`."""
        import submitit

        launch, self._name = study.recipe.launch, f"maskft-{files.digest(str(study.folder))[:8]}"
        self._executor = submitit.AutoExecutor(folder=study.folder / files.SLURM / "%j", cluster=self.cluster)
        options = {"timeout_min": self.time_min, "cpus_per_task": max(1, round(launch.num_cpus)), "name": self._name}
        if launch.num_gpus:
            options["gpus_per_node"] = max(1, round(launch.num_gpus))
        if self.partition:
            options["slurm_partition"] = self.partition
        self._executor.update_parameters(**options)
        if self.cluster == "slurm":  # what a killed study has left would write into the same folders
            subprocess.run(["scancel", "--name", self._name], check=False)
            while self._queue().stdout.strip():
                time.sleep(_ASK_S)
        yield

    def submit(self, study: Study, runs: list[StudyRun]) -> list[Job]:
        """See :class:`Launcher`."""
        import submitit

        try:
            with self._executor.batch():
                jobs = [self._executor.submit(_SlurmJob(), study, run) for run in runs]
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"SLURM refused the jobs: {' '.join(str(error).split())}") from None
        return [_Submitted(job, self._last_seen) for job in jobs] if self.cluster == "slurm" else jobs

    def _queue(self) -> subprocess.CompletedProcess:
        return subprocess.run(["squeue", "-h", "-r", "-o", "%i", "--name", self._name], capture_output=True, text=True)

    def _last_seen(self, job_id: str) -> float:
        """When a job was last in the queue; while SLURM does not answer, all are."""
        if time.monotonic() - self._asked > _ASK_S:
            queue, self._asked = self._queue(), time.monotonic()
            self._seen |= dict.fromkeys(self._seen if queue.returncode else queue.stdout.split(), self._asked)
        return self._seen.setdefault(job_id, time.monotonic())


@dataclass(frozen=True)
class _Submitted:
    """A job of SLURM's, told by its queue: submitit would ask sacct, which answers where there is accounting."""

    job: Any
    last_seen: Callable[[str], float]

    def done(self) -> bool:
        return self.job.paths.result_pickle.exists() or time.monotonic() - self.last_seen(self.job.job_id) > _GONE_S

    def result(self) -> str | None:
        if not self.job.paths.result_pickle.exists():
            raise RuntimeError(f"SLURM's job {self.job.job_id} ended without a result (see {self.job.paths.stderr})")
        return self.job.result()

    def cancel(self) -> None:
        self.job.cancel(check=False)


class _SlurmJob:
    """What a job calls; when it is preempted or its time is over, submitit asks for its ``checkpoint``."""

    def __call__(self, study: Study, run: StudyRun) -> str | None:
        # Preemption is no failure of the run: leave no result, and SLURM or the study starts the job again.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        return failure_of(study, run)

    def checkpoint(self, study: Study, run: StudyRun):
        """The same once more: the run resumes from its own checkpoints."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, study, run)


def launcher_of(kind: str, num_at_once: int = 1, partition: str | None = None, time_min: int | None = None) -> Launcher:
    """The launcher that the options of ``maskft study`` ask for.

    Raises:
        UserError: If its library is missing, or an option is for another.
    """
    module = {"ray": "ray", "slurm": "submitit"}.get(kind)
    if module and importlib.util.find_spec(module) is None:
        raise UserError(f"--launcher {kind} needs {module}, which is not installed; {install_hint(kind)}")
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--launcher slurm needs sbatch, which is not on PATH; start the study on a node of the cluster")
    given = {"num_at_once": (num_at_once, "local"), "partition": (partition, "slurm"), "time_min": (time_min, "slurm")}
    for name, (value, launcher) in given.items():
        if value not in (None, 1) and kind != launcher:
            raise UserError(f"--{name} is for --launcher {launcher}; drop it, or --launcher {kind}")
        if isinstance(value, int) and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if kind == "slurm":
        return Slurm(partition, time_min or Slurm.time_min)
    return Ray() if kind == "ray" else Local(num_at_once)


def make_runs(study: Study, todo: list[StudyRun], board: Board, launcher: Launcher) -> None:
    """Make ``todo``, each run as soon as its parents are finished; what fails is noted on ``board``."""
    # A file descriptor means nothing on another machine; the driver holds the lock.
    handed = study if isinstance(launcher, Local) else replace(study, lock_fd=None)
    waiting, jobs, lost = list(todo), {}, Counter()
    with launcher.open(study), _cancelled(jobs):
        while waiting or jobs:
            room = len(waiting) if launcher.num_at_once is None else launcher.num_at_once - len(jobs)
            ready = _ready(waiting, jobs, board)[:room]
            if ready:
                jobs |= zip(ready, launcher.submit(handed, ready), strict=True)
                waiting = [run for run in waiting if run not in ready]
                for run in ready:
                    board.started(run)
            for run in [run for run, job in jobs.items() if job.done()]:
                try:
                    board.ended(run, jobs.pop(run).result())
                except Exception as error:  # the worker, its node or its container: of any kind
                    lost[run] += 1
                    if lost[run] <= _MAX_LOST and not isinstance(launcher, Local):
                        waiting.append(run)
                    else:
                        board.ended(run, " ".join(str(error).split())[:300])
            board.tick()
            time.sleep(0.1)


@contextlib.contextmanager
def _cancelled(jobs: dict[StudyRun, Job]) -> Iterator[None]:
    """Cancel what is left when an exception, as of Ctrl-C, ends the study."""
    try:
        yield
    finally:
        for job in jobs.values():
            job.cancel()


def _ready(waiting: list[StudyRun], jobs: dict[StudyRun, Job], board: Board) -> list[StudyRun]:
    """Those of ``waiting`` whose parents are finished; those whose parent failed are removed and noted as failed."""
    for run in list(waiting):
        parent = next((parent for parent in run.parents if parent in board.failed), None)
        if parent is not None:
            board.ended(run, f"it needs {parent.title!r}, which failed")
            waiting.remove(run)
    return [run for run in waiting if not any(parent in waiting or parent in jobs for parent in run.parents)]
