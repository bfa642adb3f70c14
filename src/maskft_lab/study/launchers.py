"""Starting the runs of a study: here one after another or several at once, or on a Ray cluster."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from maskft_base import files
from maskft_base.errors import UserError
from maskft_base.runtime import num_cores

from .board import Board
from .execute import Study, Tick, make
from .plan import StudyRun


@dataclass(frozen=True)
class Launcher:
    """Where the runs of a study are made.

    Attributes:
        kind: ``local`` or ``ray``.
        num_at_once: Runs at a time on this machine, at least 1; they share its cores.
    """

    kind: str = "local"
    num_at_once: int = 1

    def share_cores(self) -> None:
        """Give each run its share of the cores, where the user has not said how many threads a process has."""
        if self.num_at_once > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // self.num_at_once)))

    def run(self, study: Study, todo: list[StudyRun], board: Board) -> None:
        """Make ``todo``; what fails is noted on ``board``."""
        if self.kind == "ray":
            run_on_ray(study, todo, board)
        elif self.num_at_once > 1:
            run_several_here(study, todo, board, self.num_at_once)
        else:
            run_here(study, todo, board)


def _blocked(run: StudyRun, failed: dict[StudyRun, str]) -> str | None:
    parent = next((parent for parent in run.parents if parent in failed), None)
    return None if parent is None else f"it needs {parent.title!r}, which failed"


def _failure(study: Study, run: StudyRun, tick: Tick = lambda: None) -> str | None:
    """Make a run; returns why it failed, None if it did not."""
    try:
        make(study, run, tick)
    except UserError as error:
        return str(error)
    return None


def run_here(study: Study, todo: list[StudyRun], board: Board) -> None:
    """Make runs on this machine, one after another."""
    for run in todo:
        reason = _blocked(run, board.failed)
        if reason is None:
            board.started(run)
            reason = _failure(study, run, board.tick)
        board.ended(run, reason)


def run_several_here(study: Study, todo: list[StudyRun], board: Board, num_at_once: int) -> None:
    """Make runs on this machine, ``num_at_once`` at a time, each as soon as those it needs are finished."""
    is_over = threading.Event()

    def tick() -> None:
        if is_over.is_set():
            raise KeyboardInterrupt  # which ends the command that this thread waits for

    waiting, running = list(todo), {}
    with ThreadPoolExecutor(num_at_once) as pool:
        try:
            while waiting or running:
                for run in _ready(waiting, running, board):
                    if len(running) < num_at_once:
                        board.started(run)
                        running[pool.submit(_failure, study, run, tick)] = run
                        waiting.remove(run)
                for done in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    board.ended(running.pop(done), done.result())
                board.tick()
        finally:
            is_over.set()


def _ready(waiting: list[StudyRun], under_way: dict[Any, StudyRun], board: Board) -> Iterator[StudyRun]:
    """Those of ``waiting`` whose parents are finished; those whose parent failed are taken out and noted as failed."""
    for run in list(waiting):
        reason = _blocked(run, board.failed)
        if reason is not None:
            board.ended(run, reason)
            waiting.remove(run)
        elif not any(parent in waiting or parent in under_way.values() for parent in run.parents):
            yield run


def run_on_ray(study: Study, todo: list[StudyRun], board: Board) -> None:
    """Hand each run to the cluster as soon as those it needs are finished. The folder must be one all nodes see."""
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)  # RAY_ADDRESS names a cluster; without it, this machine
    launch = study.recipe.launch
    # A file descriptor means nothing in another process; the driver holds the lock.
    remote_study = Study(study.folder, study.recipe)
    task = ray.remote(num_cpus=launch.num_cpus, num_gpus=launch.num_gpus, max_retries=0)(_failure)
    waiting, pending, queued = list(todo), {}, {}
    while waiting or pending:
        for run in _ready(waiting, pending, board):
            pending[task.remote(remote_study, run)] = run
            queued[run] = time.time()
            waiting.remove(run)
        for run in [run for run, since in queued.items() if _writes(study, run, since)]:
            board.started(run)
            del queued[run]
        done, _ = ray.wait(list(pending), timeout=0.5) if pending else ([], [])
        for reference in done:
            run = pending.pop(reference)
            if queued.pop(run, None):
                board.started(run)
            try:
                board.ended(run, ray.get(reference))
            except ray.exceptions.RayError as error:
                board.ended(run, " ".join(str(error).split())[:300])
        board.tick()


def _writes(study: Study, run: StudyRun, since: float) -> bool:
    """Whether a run that was handed out has begun: until there is room for it, the cluster keeps it in a queue."""
    log = study.run_folder(run) / files.LOG
    return log.is_file() and log.stat().st_mtime >= since
