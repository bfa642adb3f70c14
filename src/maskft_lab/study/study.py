"""Running a study: every run that is not finished, stage by stage, then the table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from maskft_base import files
from maskft_base.errors import UserError, printable

from .board import Board
from .execute import Study, prepare_base, prepare_data
from .launchers import Launcher, make_runs
from .plan import Plan, StudyRun
from .summary import summarise
from .tuning import Heldout

LOCK_WAIT_S = 120  # a killed study's child ends its step and saves it


def run_study(
    plan: Plan,
    folder: str | Path,
    launcher: Launcher,
    console: Console | None = None,
    is_brief: bool = False,
) -> None:
    """Make every run that is not finished, then print and write the table.

    Args:
        plan: The runs.
        folder: The study's folder; finished runs in it are not repeated.
        launcher: Where the runs are made.
        console: Where to print; default stdout.
        is_brief: In a log, no line for each run.

    Raises:
        UserError: If a run failed; the others, as far as they do not need it, are made first.
    """
    console = console or Console()
    with locked(folder) as (folder, lock_fd):
        study = Study(folder, plan.recipe, lock_fd)
        plan, failed = make_stages(study, plan, launcher, console, is_brief)
        console.print(summarise(study, plan), highlight=False, markup=False, soft_wrap=True)
        shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        table = shown / files.STUDY_TABLE.format(plan.recipe.name)
        console.print(f"table: {table}\nresults: {shown / files.RESULTS}", highlight=False, soft_wrap=True)
    refuse_failed(failed)


def make_stages(
    study: Study, plan: Plan, launcher: Launcher, console: Console, is_brief: bool = False
) -> tuple[Plan, dict[StudyRun, str]]:
    """Make the runs whose settings are known, choose from their held-out losses those of others, and so on.

    Returns:
        The plan as it has become, and the runs that failed, with the reason.
    """
    reasons: dict[str, str] = {}

    def look(run: StudyRun) -> Heldout | None:
        return Heldout(math.inf) if run.id in reasons else study.heldout(run)

    while True:
        study = replace(study)  # which looks anew what is finished
        plan = plan.again(look)
        failed = make_all(study, plan, launcher, console, reasons, is_brief)
        reasons |= {run.id: reason for run, reason in failed.items()}
        if len(plan.ready.runs) == len(plan.runs):
            return plan, failed


def make_all(
    study: Study,
    plan: Plan,
    launcher: Launcher,
    console: Console,
    failed_before: Mapping[str, str] = {},
    is_brief: bool = False,
) -> dict[StudyRun, str]:
    """Make every run that is not finished and whose settings are known; returns those that failed, with the reason.

    Args:
        study: Where.
        plan: The runs.
        launcher: Where the runs are made.
        console: Where to print.
        failed_before: Id -> reason of the runs that are not tried again.
        is_brief: In a log, a line for each run when it has ended, none when it begins.

    Raises:
        UserError: For a mistake in the data of any run, before the first is made.
    """
    ready = plan.ready
    board = Board(study, ready, console, is_brief)
    for line in [line for run in ready.runs for line in study.set_aside_damaged(run)]:
        console.print(f"damaged: {printable(line)}", highlight=False, markup=False, soft_wrap=True)
    board.failed = {run: failed_before[run.id] for run in ready.runs if run.id in failed_before}
    todo = [run for run in ready.runs if run not in board.failed and not study.is_done(run)]
    num_finished = len(ready.runs) - len(todo) - len(board.failed)
    waiting = len({run.id for run in plan.runs}) - len(ready.runs)
    waits = f"; about {waiting} wait for what tuning chooses" if waiting else ""
    console.print(f"{len(ready.runs)} runs, {num_finished} finished before{waits}", highlight=False)
    with board:
        if todo:
            prepare_base(study, todo, board.tick)
            prepare_data(study, plan.runs, board.tick)
            make_runs(study, todo, board, launcher)
    return board.failed


def refuse_failed(failed: dict[StudyRun, str]) -> None:
    """Raise the first failure as a UserError; nothing where there is none."""
    if failed:
        run, reason = next(iter(failed.items()))
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(f"run {run.title!r} failed{others}: {reason}")


@contextmanager
def locked(folder: str | Path) -> Iterator[tuple[Path, int]]:
    """Make the folder and hold it: two studies in one folder would write over each other. A kill releases it.

    Yields:
        The folder as an absolute path, and the file descriptor of the lock.

    Raises:
        UserError: If it holds a link, which may lead elsewhere.
    """
    folder = Path(folder).absolute()
    # Those of submitit's own folder lead from a job to its array.
    inside = (path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != files.SLURM)
    link = next((path for path in inside if path.is_symlink()), None)
    if link is not None:
        raise UserError(f"{str(folder)!r} holds a link, {link.name!r}, through which a study would write; remove it")
    with files.held(folder, files.LOCK, LOCK_WAIT_S, "study") as hold:
        yield folder, hold.descriptor
