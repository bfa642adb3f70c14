"""Running a study: every unfinished run, stage by stage, then the table."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from maskft_common import layout, locks
from maskft_common.errors import UserError
from maskft_common.files import write_text

from .board import Board
from .check import check_before_running
from .damage import is_whole_result
from .evaluate import evaluate, measure_path
from .folder import Study
from .launchers import Launcher, alone, is_local
from .path import has_path
from .plan import Plan, build_plan
from .prepare import prepare_base, prepare_data
from .process import THREADS_OF_ENVIRONMENT, Threads, Tick, no_tick, run_command
from .recipe import Recipe
from .run_options import options_but_seeds, tokens_of
from .study_run import StudyRun
from .summary import summarise
from .train import delete_checkpoints, heldout, is_done, record_at_point, train

LOCK_WAIT_S = 120  # a killed study's child finishes its step and saves it
_POLL_S = 0.1  # between two looks at the running jobs
_MAX_LOST = 3  # times that a run is submitted again after its worker was lost
_MAX_REASON = 300  # characters of a lost worker's error: remote ones carry whole tracebacks


def run_study(
    plan: Plan,
    folder: Path,
    launcher: Launcher,
    is_brief: bool = False,
    recipe_text: str | None = None,
) -> None:
    """Check tasks and data, make every unfinished run, then print and write the table.

    Runs whose settings are known come first. Their held-out losses choose the settings of the next stage, and so on.

    Args:
        plan: The runs.
        folder: The study's folder; finished runs in it are not repeated.
        launcher: Where the runs are made.
        is_brief: In a log, show no line for each run.
        recipe_text: The recipe's file as the plan was made from it, for a copy beside the table; None: no copy.

    Raises:
        UserError: If tasks or data do not fit, before anything is written; or if a run failed, after those that do
            not depend on it.
    """
    console = Console()
    # Notes for the reader of the table.
    notes = check_before_running(plan)
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    # Commands run elsewhere and need the absolute path; messages show the folder as the user wrote it.
    shown_folder = folder
    folder = folder.absolute()

    # Two studies in one folder would overwrite each other's files. The kernel releases the lock of a killed study.
    with locks.held(folder, layout.LOCK, LOCK_WAIT_S, "study") as hold:
        study = Study(folder, plan.recipe, hold.descriptor)
        study.check_no_folder_links()
        plan, failed = _make_all(study, launcher, console, is_brief)

        # The table is printed and written also if a run failed: the other results are there.
        text = summarise(study, plan.ready.runs, plan.tunings, notes)
        # With the table, so that both are of one recipe: the page of the study shows the copy, and whoever gets the
        # folder has it too.
        if recipe_text is not None:
            copy = folder / layout.STUDY_RECIPE.format(plan.recipe.name)
            write_text(copy, recipe_text)
        console.print(
            text,
            end="",
            highlight=False,
            markup=False,  # brackets in names are not rich's markup
            soft_wrap=True,  # rows of the table are not broken at the width of a terminal
        )
        if not is_brief:
            table = shown_folder / layout.STUDY_TABLE.format(plan.recipe.name)
            results = shown_folder / layout.RESULTS
            places = f"table: {table}\nresults: {results}"
            console.print(places, highlight=False, soft_wrap=True)

    if failed:
        run, reason = next(iter(failed.items()))
        num_others = len(failed) - 1
        others = f" (and {num_others} more)" if num_others else ""
        raise UserError(f"run {run.title!r} failed{others}: {reason}")


def _make_all(
    study: Study,
    launcher: Launcher,
    console: Console,
    is_brief: bool,
) -> tuple[Plan, dict[StudyRun, str]]:
    """Make stage after stage; returns the last plan, and failed runs with the reason."""
    reasons: dict[str, str] = {}  # by id: every plan has new run objects
    while True:
        # Expand the recipe again: the losses of the last stage choose settings, and with them new runs.
        study.rescan()
        plan = build_plan(study.recipe, partial(heldout, study))
        ready = plan.ready.runs

        # Runs that failed in an earlier stage are not tried again.
        failed_before = {}
        for run in ready:
            if run.id in reasons:
                failed_before[run] = reasons[run.id]

        failed, num_made = _make_stage(
            study,
            plan,
            failed_before,
            launcher,
            console,
            is_brief,
        )
        for run, reason in failed.items():
            reasons[run.id] = reason

        # All settings are known, or nothing more can become known.
        is_last_stage = len(ready) == len(plan.runs)
        is_stuck = num_made == 0  # a run whose loss would choose has failed
        if is_last_stage or is_stuck:
            return plan, failed


def _make_stage(
    study: Study,
    plan: Plan,
    failed: Mapping[StudyRun, str],
    launcher: Launcher,
    console: Console,
    is_brief: bool,
) -> tuple[dict[StudyRun, str], int]:
    """Make every unfinished run whose settings are known; returns all failed runs, and how many were to be made.

    Args:
        study: The study.
        plan: All runs, as far as they are known.
        failed: Runs that failed in earlier stages, with the reason.
        launcher: Where the runs are made.
        console: Where progress is shown.
        is_brief: In a log, show no line for each run.

    Raises:
        UserError: For a mistake in the data of any run, before the first is made.
    """
    runs = plan.ready.runs
    # Damaged files are the user's to delete: a run may have taken days.
    for run in runs:
        study.check_damage(run)

    # Runs that failed before are in neither list.
    finished = []
    todo = []
    for run in runs:
        if run in failed:
            continue
        if is_done(study, run):
            finished.append(run)
            # A kill may have come between its record and the deletion. What tuning tried is never made again: it has
            # no evaluation that could be missing.
            delete_checkpoints(study, run)
            continue
        # Raises if its checkpoints were deleted before the recipe had a path: now, and not after the other runs.
        if study.has_record(run):
            study.checkpoints(run)
        todo.append(run)

    # About: the settings of waiting runs are guesses, and the winner's run may exist already, as a trial.
    all_ids = {run.id for run in plan.runs}
    num_waiting = len(all_ids) - len(runs)
    waits = f"; about {num_waiting} wait for what tuning chooses" if num_waiting else ""
    console.print(f"{len(runs)} runs, {len(finished)} finished before{waits}", highlight=False)

    def log_of(run: StudyRun) -> Path:
        return study.run_folder(run) / layout.LOG

    costs = _costs(study.recipe, runs)
    with Board(
        runs,
        finished,
        log_of,
        console,
        is_brief,
        failed,
        costs,
    ) as board:
        if todo:
            prepare_base(study, todo, board.tick)
            # Also the data of runs that wait: a mistake in it is found before hours of training, not after.
            prepare_data(study, plan.runs, board.tick)

            # Runs of earlier stages, such as the trials of tuning, are finished.
            newest_stage = max(run.stage for run in runs)
            runs_of_stage = [run for run in runs if run.stage == newest_stage]
            runs_alone = alone(runs_of_stage)
            _make_runs(study, todo, board, launcher, runs_alone)
    return board.failed, len(todo)


def _costs(recipe: Recipe, runs: Sequence[StudyRun]) -> dict[StudyRun, float] | None:
    """Tokens to train on, for the time left; None if the recipe does not say how many."""
    # Parsing a run's options takes a while, and runs that differ in their seeds alone have the same tokens.
    tokens: dict[str, int | None] = {}
    for run in runs:
        key = options_but_seeds(run)
        if key not in tokens:
            tokens[key] = tokens_of(recipe, run)
    if None in tokens.values():
        return None

    # A run without training still has its evaluation: about a tenth of a training.
    most_tokens = max(tokens.values(), default=0)
    evaluation = most_tokens / 10
    if not evaluation:
        evaluation = 1  # if nothing is trained, all runs cost the same

    costs = {}
    for run in runs:
        key = options_but_seeds(run)
        costs[run] = tokens[key] + evaluation
    return costs


def make(
    study: Study,
    run: StudyRun,
    tick: Tick = no_tick,
    threads: Threads = THREADS_OF_ENVIRONMENT,
) -> None:
    """Train and evaluate the unfinished part of ``run``.

    Args:
        study: The study.
        run: The run, whose parents are trained.
        tick: Called about ten times a second while a command runs.
        threads: Threads of its commands.

    Raises:
        UserError: If a command fails, with its last line.
    """
    # A command holds the study's lock too, until it ends. Training and evaluation may have different numbers of
    # threads: a training may have all cores for itself.
    call = partial(run_command, tick=tick, lock_fd=study.lock_fd)
    call_training = partial(call, num_threads=threads.training)
    call_evaluation = partial(call, num_threads=threads.evaluation)

    # Each step is skipped where an earlier start of the study has finished it.
    if not study.is_trained(run):
        train(study, run, call_training)

    # Here and not in `train`, because a kill may have interrupted the deletion. See also `_make_stage`.
    delete_checkpoints(study, run)

    # The path, from the checkpoints that are left.
    if has_path(study.recipe, run) and heldout(study, run) is None:
        measure_path(study, run, call_evaluation)

    # Evaluation of each model that a table shows.
    for role in run.labels:
        file = study.result_file(run, role)
        if not is_whole_result(file):
            record = record_at_point(study, run)
            evaluate(study, run, role, record, call_evaluation)


def failure_of(
    study: Study,
    run: StudyRun,
    tick: Tick = no_tick,
    threads: Threads = THREADS_OF_ENVIRONMENT,
) -> str | None:
    """Make a run; returns why it failed, None if it did not. Launchers call this, wherever they run it.

    An expected failure is returned, because an exception of a worker means to the study that the worker was lost.
    """
    try:
        make(study, run, tick, threads)
    except UserError as error:
        return str(error)
    return None


def _make_runs(
    study: Study,
    todo: list[StudyRun],
    board: Board,
    launcher: Launcher,
    runs_alone: Collection[StudyRun],
) -> None:
    """Make ``todo``, each run as soon as its parents are trained; failures are noted on ``board``.

    Those of ``runs_alone`` are submitted first: they need all cores, and would later wait for all others.
    """
    waiting = list(todo)
    jobs: dict[StudyRun, Any] = {}  # the started runs, until they have ended
    num_lost: Counter[StudyRun] = Counter()
    # Nodes of a cluster fail for reasons that have nothing to do with the run, so a lost run is submitted again.
    # On this machine no worker is lost: an unexpected error is one of the program, and would be raised again.
    max_lost = 0 if is_local(launcher) else _MAX_LOST

    with launcher(study, failure_of, runs_alone) as submit:
        try:
            while waiting or jobs:
                # Start as many as the launcher has room for.
                ready = _ready(study, waiting, jobs, board)
                ready.sort(key=lambda run: run not in runs_alone)  # those alone first: False sorts before True
                if ready:
                    new_jobs = submit(ready)
                    started = dict(zip(ready, new_jobs, strict=False))  # fewer jobs than runs if there is no room
                    jobs |= started
                    waiting = [run for run in waiting if run not in started]
                    for run in started:
                        board.started(run)

                # Note those that have ended.
                done = [run for run, job in jobs.items() if job.done()]
                for run in done:
                    job = jobs.pop(run)
                    reason, is_lost = _end_of(job)
                    if is_lost:
                        num_lost[run] += 1
                    if is_lost and num_lost[run] <= max_lost:
                        waiting.append(run)  # submitted again; it resumes from its checkpoints
                    elif reason is None:
                        board.finished(run, _outcome(study, run))
                    else:
                        board.has_failed(run, reason)

                # The loop polls, because `concurrent.futures.wait` knows futures alone, and the jobs of SLURM are not
                # futures.
                board.tick()
                time.sleep(_POLL_S)
        finally:  # Ctrl-C too
            # A future of this machine that is running cannot be cancelled: leaving the launcher's context ends its
            # command.
            for job in jobs.values():
                job.cancel()


def _ready(
    study: Study,
    waiting: list[StudyRun],
    jobs: Mapping[StudyRun, Any],
    board: Board,
) -> list[StudyRun]:
    """The runs of ``waiting`` whose parents are trained; those whose parent failed are removed and noted.

    Args:
        study: The study.
        waiting: Runs that have not started; changed in place.
        jobs: The started runs.
        board: Where failures are noted.
    """

    def suffices(parent: StudyRun) -> bool:
        # Its evaluation may go on, or have failed: children do not need it. But with a path, the evaluation chooses
        # which checkpoint they start from.
        if study.recipe.path is not None:
            return False
        return study.has_record(parent)

    # A plan lists parents first, so a failure reaches all runs below in one pass.
    for run in list(waiting):
        for parent in run.parents:
            if parent in board.failed and not suffices(parent):
                board.has_failed(run, f"it needs {parent.title!r}, which failed")
                waiting.remove(run)
                break

    # A set, because this is asked ten times a second, for each parent of possibly thousands of runs.
    still_waiting = set(waiting)

    def is_there(parent: StudyRun) -> bool:
        if parent in jobs:
            return suffices(parent)
        return parent not in still_waiting

    ready = []
    for run in waiting:
        if all(is_there(parent) for parent in run.parents):
            ready.append(run)
    return ready


def _end_of(job: Any) -> tuple[str | None, bool]:
    """Why the run of an ended job failed, None if it did not, and whether its worker was lost."""
    try:
        return job.result(), False
    except Exception as error:  # of the worker, its node or its container: any type
        message = f"{type(error).__name__}: {error}"
        one_line = " ".join(message.split())
        return one_line[:_MAX_REASON], True


def _outcome(study: Study, run: StudyRun) -> str:
    """How a finished run ended, for the board."""
    measured = heldout(study, run)
    if measured is not None and math.isfinite(measured.loss):
        return f"finished, held-out loss {measured.loss:.4f}"
    # Only trials may diverge without an error; other runs without a loss had no evaluation during training.
    return "finished" if run.tried is None else "diverged"
