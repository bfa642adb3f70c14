"""Where runs are made: here, on a Ray cluster, or under SLURM; each run as soon as its parents are finished.

A launcher is a context for a study, in which what it yields hands out runs whose parents are finished, the first of
them as far as there is room: as jobs with ``done()``, ``result()`` (why the run failed, None if it did not) and
``cancel()``, as a Future has.
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from maskft_common import files, layout
from maskft_common.environment import num_cores
from maskft_common.errors import UserError, install_hint

from .board import Board
from .execute import Study, make
from .runs import StudyRun

_MAX_LOST = 3  # times that a run is submitted again after its worker was lost
_ASK_S = 2.0  # between two questions to SLURM's queue
_GONE_S = 15.0  # after which a job that left the queue without a result is lost; shared file systems are late
_MAX_TIMEOUTS = 1000  # times that a job whose time is over is requeued; submitit's default is 3
TIME_MIN = 24 * 60  # minutes that a job of SLURM's may take before it is requeued

Submit = Callable[[list[StudyRun]], list[Any]]
Launcher = Callable[[Study], contextlib.AbstractContextManager[Submit]]


def failure_of(study: Study, run: StudyRun, tick=lambda: None) -> str | None:
    """Make a run; returns why it failed, None if it did not."""
    try:
        make(study, run, tick)
    except UserError as error:
        return str(error)
    return None


@contextlib.contextmanager
def local(study: Study, num_at_once: int = 1) -> Iterator[Submit]:
    """This machine, ``num_at_once`` runs at a time, which share its cores."""
    if num_at_once > 1:  # where the user has not said how many threads a process has
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_at_once)))
    is_over, jobs = threading.Event(), []

    def tick() -> None:
        if is_over.is_set():
            raise KeyboardInterrupt  # which ends the command that this thread waits for

    def submit(runs: list[StudyRun]) -> list[Future]:
        room = num_at_once - sum(not job.done() for job in jobs)
        new = [pool.submit(failure_of, study, run, tick) for run in runs[:room]]
        jobs.extend(new)
        return new

    with ThreadPoolExecutor(num_at_once) as pool:
        try:
            yield submit
        finally:
            is_over.set()


@contextlib.contextmanager
def ray(study: Study) -> Iterator[Submit]:
    """A Ray cluster: that of RAY_ADDRESS, else one on this machine. The study's folder must be one all nodes see."""
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    launch, study = study.recipe.launch, replace(study, lock_fd=None)  # a descriptor means nothing on another machine
    task = ray.remote(num_cpus=launch.num_cpus, num_gpus=launch.num_gpus, max_retries=0)(failure_of)
    yield lambda runs: [task.remote(study, run).future() for run in runs]


@contextlib.contextmanager
def slurm(
    study: Study, partition: str | None = None, time_min: int | None = None, cluster: str = "slurm"
) -> Iterator[Submit]:
    """SLURM, by submitit: ready runs are a job array; a job that is preempted is requeued and resumes its run.

    Args:
        study: The study.
        partition: Of the cluster; None: its default.
        time_min: Minutes that a job may take before it is requeued.
        cluster: ``slurm``, or ``local`` for processes of this machine.
    """
    import submitit

    study = replace(study, lock_fd=None)
    launch, queue = study.recipe.launch, _Queue(f"maskft-{files.digest(str(study.folder))[:8]}")
    place = study.folder / layout.SLURM / "%j"
    executor = submitit.AutoExecutor(place, cluster, slurm_max_num_timeout=_MAX_TIMEOUTS)
    options = {"timeout_min": time_min or TIME_MIN, "cpus_per_task": max(1, round(launch.num_cpus)), "name": queue.name}
    if launch.num_gpus:
        options["gpus_per_node"] = max(1, round(launch.num_gpus))
    if partition:
        options["slurm_partition"] = partition
    executor.update_parameters(**options)
    if cluster == "slurm":  # what a killed study has left would write into the same folders
        subprocess.run(["scancel", "--name", queue.name], check=False)
        while queue.ask().stdout.strip():
            time.sleep(_ASK_S)

    def submit(runs: list[StudyRun]) -> list[Any]:
        try:
            with executor.batch():
                jobs = [executor.submit(_SlurmJob(), study, run) for run in runs]
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"SLURM refused the jobs: {' '.join(str(error).split())}") from None
        return [_Submitted(job, queue) for job in jobs] if cluster == "slurm" else jobs

    yield submit


class _Queue:
    """SLURM's queue of the jobs of a name."""

    def __init__(self, name: str):
        self.name, self._asked = name, 0.0
        self._seen: dict[str, float] = {}

    def ask(self) -> subprocess.CompletedProcess:
        """The jobs in it, one a line."""
        return subprocess.run(["squeue", "-h", "-r", "-o", "%i", "--name", self.name], capture_output=True, text=True)

    def last_seen(self, job_id: str) -> float:
        """When a job was last in the queue; while SLURM does not answer, all are."""
        if time.monotonic() - self._asked > _ASK_S:
            found, self._asked = self.ask(), time.monotonic()
            self._seen |= dict.fromkeys(self._seen if found.returncode else found.stdout.split(), self._asked)
        return self._seen.setdefault(job_id, time.monotonic())


@dataclass(frozen=True)
class _Submitted:
    """A job of SLURM's, told by its queue: submitit would ask sacct, which answers where there is accounting."""

    job: Any
    queue: _Queue

    def done(self) -> bool:
        is_gone = time.monotonic() - self.queue.last_seen(self.job.job_id) > _GONE_S
        return self.job.paths.result_pickle.exists() or is_gone

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
        return partial(slurm, partition=partition, time_min=time_min)
    return ray if kind == "ray" else partial(local, num_at_once=num_at_once)


def make_runs(study: Study, todo: list[StudyRun], board: Board, launcher: Launcher) -> None:
    """Make ``todo``, each run as soon as its parents are finished; what fails is noted on ``board``."""
    waiting, jobs, lost = list(todo), {}, Counter()
    most = 0 if getattr(launcher, "func", launcher) is local else _MAX_LOST  # here a worker is not lost, it fails
    with launcher(study) as submit:
        try:
            while waiting or jobs:
                if ready := _ready(waiting, jobs, board):
                    started = dict(zip(ready, submit(ready), strict=False))
                    jobs |= started
                    waiting = [run for run in waiting if run not in started]
                    for run in started:
                        board.started(run)
                for run in [run for run, job in jobs.items() if job.done()]:
                    try:
                        board.ended(run, jobs.pop(run).result())
                    except Exception as error:  # the worker, its node or its container: of any kind
                        lost[run] += 1
                        if lost[run] <= most:
                            waiting.append(run)
                        else:
                            board.ended(run, " ".join(f"{type(error).__name__}: {error}".split())[:300])
                board.tick()
                time.sleep(0.1)
        finally:  # an exception, as of Ctrl-C, ends the study
            for job in jobs.values():
                job.cancel()


def _ready(waiting: list[StudyRun], jobs: Mapping[StudyRun, Any], board: Board) -> list[StudyRun]:
    """Those of ``waiting`` whose parents are finished; those whose parent failed are removed and noted as failed."""
    for run in list(waiting):
        parent = next((parent for parent in run.parents if parent in board.failed), None)
        if parent is not None:
            board.ended(run, f"it needs {parent.title!r}, which failed")
            waiting.remove(run)
    return [run for run in waiting if not any(parent in waiting or parent in jobs for parent in run.parents)]
