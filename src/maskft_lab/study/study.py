"""Running a study: every run that is not finished, stage by stage, then the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from maskft_common import layout, locks
from maskft_common.errors import UserError

from .board import Board
from .execute import Study, prepare_base, prepare_data
from .launchers import Launcher, make_runs
from .plan import Plan, build_plan
from .summary import summarise

LOCK_WAIT_S = 120  # a killed study's child ends its step and saves it


def run_study(plan: Plan, folder: Path, launcher: Launcher, is_brief: bool = False) -> None:
    """Make every run that is not finished, then print and write the table.

    The runs whose settings are known come first; their held-out losses choose those of others, and so on.

    Args:
        plan: The runs.
        folder: The study's folder; finished runs in it are not repeated.
        launcher: Where the runs are made.
        is_brief: In a log, no line for each run.

    Raises:
        UserError: If a run failed; the others, as far as they do not need it, are made first.
    """
    console, shown, folder = Console(), folder, folder.absolute()
    reasons: dict[str, str] = {}
    # Two studies in one folder would write over each other. A kill releases it.
    with locks.held(folder, layout.LOCK, LOCK_WAIT_S, "study") as hold:
        study, is_over = Study(folder, plan.recipe, hold.descriptor), False
        while not is_over:
            study = replace(study)  # which looks anew what is finished
            plan = build_plan(plan.recipe, study.heldout)
            ready = plan.ready
            failed = {run: reasons[run.id] for run in ready.runs if run.id in reasons}
            board = Board(study, ready, console, is_brief, failed)
            num_made = _make_ready(study, plan, board, launcher)
            reasons |= {run.id: reason for run, reason in board.failed.items()}
            is_over = len(plan.ready.runs) == len(plan.runs) or not num_made  # where what chooses failed
        console.print(summarise(study, plan.ready), end="", highlight=False, markup=False, soft_wrap=True)
        if not is_brief:
            table = shown / layout.STUDY_TABLE.format(plan.recipe.name)
            console.print(f"table: {table}\nresults: {shown / layout.RESULTS}", highlight=False, soft_wrap=True)
    if board.failed:
        run, reason = next(iter(board.failed.items()))
        others = f" (and {len(board.failed) - 1} more)" if len(board.failed) > 1 else ""
        raise UserError(f"run {run.title!r} failed{others}: {reason}")


def _make_ready(study: Study, plan: Plan, board: Board, launcher: Launcher) -> int:
    """Make every run that is not finished and whose settings are known; returns how many; the board has what failed.

    Raises:
        UserError: For a mistake in the data of any run, before the first is made.
    """
    ready = board.plan.runs
    for run in ready:
        study.check_damage(run)
    todo = [run for run in ready if run not in board.failed and not study.is_done(run)]
    num_finished = len(ready) - len(todo) - len(board.failed)
    waiting = len({run.id for run in plan.runs}) - len(ready)
    waits = f"; about {waiting} wait for what tuning chooses" if waiting else ""
    board.console.print(f"{len(ready)} runs, {num_finished} finished before{waits}", highlight=False)
    with board:
        if todo:
            prepare_base(study, todo, board.tick)
            prepare_data(study, plan.runs, board.tick)
            make_runs(study, todo, board, launcher)
    return len(todo)
