"""Where runs are made: on this machine, on a Ray cluster, or under SLURM.

A launcher is a context for a study. It yields a function that takes runs whose parents are trained, starts the first
of them as far as there is room, and returns their jobs: with ``done()``, ``result()`` (why the run failed, None if it
did not) and ``cancel()``, as a Future has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from maskft_common import files, layout
from maskft_common.environment import num_cores
from maskft_common.errors import UserError, install_hint

from .folder import Study
from .process import Threads
from .study_run import StudyRun

_ASK_S = 2.0  # between two questions to SLURM's queue
_NO_ANSWER_S = 60.0  # after which a queue that does not answer is an error
_GONE_S = 15.0  # after which a job that left the queue without a result is lost; shared file systems are late
_MAX_ARRAY = 1000  # jobs of an array: SLURM's own default (MaxArraySize) allows one more, and refuses larger arrays
_MAX_TIMEOUTS = 1000  # times that a job whose time is over is requeued; submitit's default is 3
TIME_MIN = 24 * 60  # minutes a SLURM job may take before it is requeued

# Makes a run: (study, run) -> why it failed, or None. A module-level function, so that it can be pickled.
Work = Callable[..., str | None]
Submit = Callable[[list[StudyRun]], list[Any]]
# Called with the study, what makes a run, and the runs beside which no other training can run (see `alone`).
Launcher = Callable[[Study, Work, Collection[StudyRun]], contextlib.AbstractContextManager[Submit]]


def alone(runs: Sequence[StudyRun]) -> set[StudyRun]:
    """Trainings that no other one can overlap: each other run is an ancestor or a descendant, or trains nothing."""
    known: dict[StudyRun, set[StudyRun]] = {}  # lineages, each found once: runs share most of their ancestors

    def lineage(run: StudyRun) -> set[StudyRun]:
        """The run and its ancestors."""
        if run in known:
            return known[run]
        found = {run}
        for parent in run.parents:
            found |= lineage(parent)
        known[run] = found
        return found

    def can_overlap(run: StudyRun, other: StudyRun) -> bool:
        return run not in lineage(other) and other not in lineage(run)

    # The others take seconds.
    trained = [run for run in runs if run.method.is_trained]
    found_alone = set()
    for run in trained:
        # `any` ends at the first that can overlap, so most runs of a large study are compared with few others.
        overlaps = any(can_overlap(run, other) for other in trained)
        if not overlaps:
            found_alone.add(run)
    return found_alone


# This machine


@contextlib.contextmanager
def local(
    study: Study,
    work: Work,
    runs_alone: Collection[StudyRun] = (),
    num_at_once: int = 1,
) -> Iterator[Submit]:
    """This machine, ``num_at_once`` runs at a time, which share its cores.

    A run of ``runs_alone`` is trained with all cores, and nothing runs beside its training. OMP_NUM_THREADS decides
    instead where the user has set it.
    """
    is_over = threading.Event()
    jobs: dict[Future, StudyRun] = {}

    # Several processes with a thread per core each would slow each other down.
    is_shared = num_at_once > 1 and "OMP_NUM_THREADS" not in os.environ
    share = None
    if is_shared:
        share = max(1, num_cores() // num_at_once)

    def tick() -> None:
        # A thread cannot be killed from outside, so its command looks ten times a second whether the study has ended.
        if is_over.is_set():
            raise KeyboardInterrupt  # which ends the command that this thread waits for

    def submit(runs: list[StudyRun]) -> list[Future]:
        new: list[Future] = []
        # In order, until one does not fit: a run that needs all cores would wait forever if later ones passed it.
        for run in runs:
            running = [other for job, other in jobs.items() if not job.done()]
            if len(running) == num_at_once:
                break

            # A run that needs all cores waits until nothing runs, and everything else until its training is over.
            # Its evaluation shares the cores again.
            is_alone = is_shared and run in runs_alone
            in_training = {other for other in running if not study.has_record(other)}
            alone_in_training = in_training.intersection(runs_alone)
            is_blocked = is_shared and bool(alone_in_training)
            if is_blocked or (is_alone and running):
                break

            # None: as many as a command takes by itself.
            for_training = None if is_alone else share
            threads = Threads(for_training, share)
            job = pool.submit(work, study, run, tick, threads)
            jobs[job] = run
            new.append(job)
        return new

    with ThreadPoolExecutor(num_at_once) as pool:
        try:
            yield submit
        finally:
            # Before the pool waits for its threads: `tick` ends their commands.
            is_over.set()


# Ray


@contextlib.contextmanager
def ray(
    study: Study,
    work: Work,
    runs_alone: Collection[StudyRun] = (),
) -> Iterator[Submit]:
    """A Ray cluster: RAY_ADDRESS, else one on this machine. All nodes must see the study's folder."""
    # In this function the name is the library's; outside, it is this launcher's.
    import ray

    # A program that calls maskft may have connected to a cluster itself. Runs log to their own files: the workers'
    # output would break the bar on the terminal.
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    launch = study.recipe.launch
    study = study.without_lock()

    folder = os.getcwd()

    # With the name of the work, which Ray shows for its processes.
    @functools.wraps(work)
    def work_here(study: Study, run: StudyRun) -> Any:
        # A worker may have started elsewhere, and relative names in the recipe count from here. A node that does not
        # have this folder may do without, if all names are absolute.
        if os.path.isdir(folder):
            os.chdir(folder)
        return work(study, run)

    # No retries by Ray: the study submits a lost run again itself, a limited number of times.
    task = ray.remote(
        num_cpus=launch.num_cpus,
        num_gpus=launch.num_gpus,
        max_retries=0,
    )(work_here)

    def submit(runs: list[StudyRun]) -> list[Any]:
        # All at once: Ray queues those for which it has no room. A future has the methods of a job.
        references = [task.remote(study, run) for run in runs]
        return [reference.future() for reference in references]

    yield submit


# SLURM


@contextlib.contextmanager
def slurm(
    study: Study,
    work: Work,
    runs_alone: Collection[StudyRun] = (),
    partition: str | None = None,
    time_min: int | None = None,
    cluster: str = "slurm",
) -> Iterator[Submit]:
    """SLURM, by submitit: ready runs are a job array; a preempted job is requeued and resumes its run.

    Args:
        study: The study.
        work: Makes a run.
        runs_alone: Not used: a job has the cores that the recipe says.
        partition: Of the cluster; None: its default.
        time_min: Minutes that a job may take before it is requeued.
        cluster: ``slurm``, or ``local`` for processes of this machine.
    """
    import submitit

    is_real = cluster == "slurm"
    launch = study.recipe.launch
    study = study.without_lock()

    # The jobs of a folder have one name, by which those of an earlier start are found.
    digest_of_folder = files.digest(str(study.folder))
    queue = _Queue(f"maskft-{digest_of_folder[:8]}")

    # SLURM counts whole cores and GPUs; the recipe may give a run a share of one.
    options = {
        "timeout_min": time_min or TIME_MIN,
        "cpus_per_task": max(1, round(launch.num_cpus)),
        "name": queue.name,
    }
    if launch.num_gpus:
        options["gpus_per_node"] = max(1, round(launch.num_gpus))
    if partition:
        options["slurm_partition"] = partition

    logs = study.folder / layout.SLURM / "%j"  # %j: the number of the job
    executor = submitit.AutoExecutor(
        logs,
        cluster,
        slurm_max_num_timeout=_MAX_TIMEOUTS,
    )
    executor.update_parameters(**options)

    # A killed study of this machine ends with its commands; jobs of SLURM continue without it.
    if is_real:
        queue.clear()  # jobs of a killed study would write into the same folders

    def submit(runs: list[StudyRun]) -> list[Any]:
        jobs: list[Any] = []
        try:
            for start in range(0, len(runs), _MAX_ARRAY):
                # Jobs get their numbers then, so nothing may ask for them inside.
                # A batch is one job array, submitted when the context ends.
                with executor.batch():
                    for run in runs[start : start + _MAX_ARRAY]:
                        job = executor.submit(_SlurmJob(work), study, run)
                        jobs.append(job)
        except submitit.core.utils.FailedJobError as error:
            message = " ".join(str(error).split())
            raise UserError(f"SLURM refused the jobs: {message}") from None

        if is_real:
            return [_Submitted(job, queue) for job in jobs]
        return jobs

    yield submit


class _Queue:
    """SLURM's queue of the jobs with a name.

    One ``squeue`` serves all jobs of the study; asked for each job and tick, it would load the cluster's controller.
    """

    def __init__(self, name: str):
        self.name = name
        self._asked_at = 0.0  # monotonic, in s, as all times here
        self._seen_at: dict[str, float] = {}  # job -> when it was last in the queue

    def clear(self) -> None:
        """Cancel all jobs, and wait until they have left the queue."""
        # Whether it worked is seen in the queue.
        subprocess.run(["scancel", "--name", self.name], check=False)
        give_up_at = time.monotonic() + _NO_ANSWER_S
        while True:
            answer = self._ask()
            # A controller that does not answer has not said that the jobs are gone.
            has_answered = answer.returncode == 0
            if has_answered and not answer.stdout.strip():
                return
            if not has_answered and time.monotonic() > give_up_at:
                raise UserError(f"SLURM's queue does not answer: squeue says {answer.stderr.strip()!r}")
            time.sleep(_ASK_S)

    def last_seen(self, job_id: str) -> float:
        """When a job was last in the queue; while SLURM does not answer, all jobs count as seen."""
        seconds_since = time.monotonic() - self._asked_at
        if seconds_since > _ASK_S:
            answer = self._ask()
            self._asked_at = time.monotonic()
            has_answered = answer.returncode == 0
            if has_answered:
                ids = answer.stdout.split()
            else:
                ids = list(self._seen_at)
            for each in ids:
                self._seen_at[each] = self._asked_at
        # A job that was just submitted counts as seen: the queue may not list it yet.
        return self._seen_at.setdefault(job_id, time.monotonic())

    def _ask(self) -> subprocess.CompletedProcess:
        """The jobs in it, one a line."""
        # -h: no header, -r: each job of an array by itself, %i: its number.
        command = ["squeue", "-h", "-r", "-o", "%i", "--name", self.name]
        return subprocess.run(command, capture_output=True, text=True)


@dataclass(frozen=True)
class _Submitted:
    """A SLURM job whose state comes from the queue: submitit would ask sacct, which needs accounting."""

    job: Any
    queue: _Queue

    def done(self) -> bool:
        now = time.monotonic()
        last_seen = self.queue.last_seen(self.job.job_id)
        is_gone = now - last_seen > _GONE_S
        return is_gone or self._has_result()

    def result(self) -> str | None:
        # submitit's own result() waits until sacct says that the job has ended, without accounting forever.
        if not self._has_result():
            log = self.job.paths.stderr
            raise RuntimeError(f"SLURM's job {self.job.job_id} ended without a result (see {log})")
        return self.job.result()

    def _has_result(self) -> bool:
        return self.job.paths.result_pickle.exists()

    def cancel(self) -> None:
        self.job.cancel(check=False)


class _SlurmJob:
    """The function of a job. When a job is preempted or its time is over, submitit calls ``checkpoint``."""

    def __init__(self, work: Work):
        self.work = work

    def __call__(self, study: Study, run: StudyRun) -> str | None:
        # Preemption is not a failure of the run: leave no result, and SLURM or the study starts the job again.
        def end(*_) -> None:
            sys.exit(128 + signal.SIGTERM)

        signal.signal(signal.SIGTERM, end)
        return self.work(study, run)

    def checkpoint(self, study: Study, run: StudyRun):
        """Submit the same job again: the run resumes from its own checkpoints."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, study, run)


# Choosing one


def launcher_of(
    kind: str,
    num_at_once: int = 1,
    partition: str | None = None,
    time_min: int | None = None,
) -> Launcher:
    """The launcher that the options of ``maskft study`` ask for.

    Raises:
        UserError: If its library is missing, or an option belongs to another.
    """
    modules = {"ray": "ray", "slurm": "submitit"}
    module = modules.get(kind)
    is_missing = module is not None and importlib.util.find_spec(module) is None
    if is_missing:
        raise UserError(f"--launcher {kind} needs {module}, which is not installed; {install_hint(kind)}")
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--launcher slurm needs sbatch, which is not on PATH; start the study on a node of the cluster")

    # An option of another launcher would have no effect.
    # The other two are None where they are not given.
    given_num = None if num_at_once == 1 else num_at_once  # 1 is the default
    _check_option("num_at_once", given_num, "local", kind)
    _check_option("partition", partition, "slurm", kind)
    _check_option("time_min", time_min, "slurm", kind)

    if kind == "slurm":
        return partial(slurm, partition=partition, time_min=time_min)
    if kind == "ray":
        return ray
    return partial(local, num_at_once=num_at_once)


def _check_option(
    name: str,
    value: str | int | None,
    owner: str,
    kind: str,
) -> None:
    if value is None:
        return
    if kind != owner:
        raise UserError(f"--{name} is an option of --launcher {owner}, not of {kind}; remove it, or name that launcher")
    if isinstance(value, int) and value < 1:
        raise UserError(f"{name} is {value}; it must be at least 1")


def is_local(launcher: Launcher) -> bool:
    """Whether runs are made on this machine, where a worker cannot be lost."""
    # `launcher_of` wraps a launcher to give it its options.
    function = launcher.func if isinstance(launcher, partial) else launcher
    return function is local
