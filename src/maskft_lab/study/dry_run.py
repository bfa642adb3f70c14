"""``maskft study --dry_run``: the runs, what each is made from, tokens, time and disk."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskft.training.arguments import TrainConfig
from maskft_common import layout
from maskft_common.files import size
from maskft_common.progress_bar import time_text

from .disk import DiskOfRuns, RunDisk, most_at_one_time
from .folder import Study
from .plan import Plan, build_plan
from .recipe import PRETRAINED, Recipe
from .run_options import options_but_seeds, parsed_run, tokens_of
from .study_run import StudyRun, settings_text
from .train import heldout, is_done

_LOG_WIDTH = 200  # columns without a terminal: nothing may be cut off
_TO_DO = "to do"  # state of a run that is not trained

Cost = tuple[float | None, float | None]  # tokens and seconds; None if unknown


def print_dry_run(
    plan: Plan,
    folder: Path,
    own: Collection[str],
    why_no_time: str | None = None,
    num_at_once: int | None = 1,
) -> None:
    """Print what would run, from what, and the cost; writes nothing.

    Args:
        plan: The runs.
        folder: Of the study.
        own: Methods in the recipe's file; the others are controls.
        why_no_time: Why there is no time although the recipe has a speed.
        num_at_once: Runs that train at one time; None: all may, as on a cluster.
    """
    # Expand the recipe again, now that the losses of finished runs may choose settings.
    # Without the lock: a dry run only reads, also beside a study that is running.
    study = Study(folder.absolute(), plan.recipe)
    plan = build_plan(plan.recipe, partial(heldout, study))

    # Without tuning, all runs are of one stage.
    has_stages = bool(plan.tunings)
    columns = ["run", "from", "tokens", "time", "state"]
    if has_stages:
        columns.insert(0, "stage")
    table = Table(*columns, title=plan.recipe.name)

    # A row for each run. `left` has the cost of the runs that are not trained yet, `disk_left` what they write.
    costs: dict[str, Cost] = {}
    left: dict[str, Cost] = {}  # by id: the run that tried the winner's settings is the winner
    disk_of = DiskOfRuns(plan.recipe)
    disks: dict[str, RunDisk | None] = {}
    disk_left: dict[str, RunDisk | None] = {}
    for run in plan.runs:
        # Parsing a run's options takes a while, and runs that differ in their seeds alone cost the same.
        key = options_but_seeds(run)
        if key not in costs:
            # Of the base model itself there are no options.
            config = None if run.method.method == PRETRAINED else parsed_run(run)
            costs[key] = cost_of(plan.recipe, run, config)
            disks[key] = disk_of(run, config)
        tokens, seconds = costs[key]

        state = _state(study, run)
        # A trained run costs nothing more here: evaluation is not estimated.
        if state == _TO_DO:
            left[run.id] = (tokens, seconds)
            disk_left[run.id] = disks[key]
        else:
            left[run.id] = (0, 0)
        # Its settings, and so its folder, may still change.
        if run.is_assumed:
            state = f"waits for stage {run.stage - 1}"

        # A run without parents starts from the study's model.
        parents = ", ".join(_shown_id(parent) for parent in run.parents)
        tokens_text, time = _words(tokens, seconds)
        cells = [
            _shown_id(run),
            parents or run.model,
            tokens_text,
            time,
            state,
        ]
        if has_stages:
            cells.insert(0, str(run.stage))
        # As Text, because brackets in names would be read as rich's markup.
        table.add_row(*map(Text, cells))

    width = None if Console().is_terminal else _LOG_WIDTH  # None: the terminal's
    console = Console(width=width)
    console.print(table, markup=False)
    totals = _totals(plan, left, own, why_no_time)
    about_stages = _about_stages(plan)
    if disk_left:
        disk_left[layout.BASE] = disk_of.unpacked_base(folder)
    about_disk = _about_disk(disk_left.values(), folder, num_at_once)
    console.print(totals + about_stages + about_disk, highlight=False, soft_wrap=True)


def _state(study: Study, run: StudyRun) -> str:
    if is_done(study, run):
        return "finished"
    if study.is_trained(run):
        return "to evaluate"
    return _TO_DO


def _shown_id(run: StudyRun) -> str:
    """Folder of a run with its grid values and the settings it tries; no hash while its settings are not chosen."""
    name = run.id
    if run.is_assumed:
        prefix, _, _ = run.id.rpartition("-")
        name = f"{prefix}-?"
    tried = ""
    if run.tried:
        tried = f" {settings_text(run.tried)}"
    return f"{name}{run.variant}{tried}"


def _totals(
    plan: Plan,
    left: dict[str, Cost],
    own: Collection[str],
    why_no_time: str | None,
) -> str:
    """Numbers of runs, and the cost of those that are not trained yet."""
    tokens = _sum([tokens for tokens, _ in left.values()])
    seconds = _sum([seconds for _, seconds in left.values()])
    tokens_text, time = _words(tokens, seconds)

    # By id, as in `left`: two runs with one id are trained once.
    is_own = {}
    for run in plan.runs:
        is_own[run.id] = run.method.name in own
    num_own = sum(is_own.values())
    num_controls = len(is_own) - num_own

    # The speed behind the time, or why there is none.
    if plan.recipe.tokens_per_s:
        speed = f"at {plan.recipe.tokens_per_s:.3g} tokens/s of full fine-tuning"
    elif why_no_time:
        speed = f"({why_no_time})"
    else:
        speed = "(for the time add tokens_per_s: N, which maskft train prints, to the recipe)"
    return (
        f"{len(is_own)} runs: {num_own} of yours, {num_controls} controls; training left: {tokens_text} "
        f"tokens, {time} {speed}; evaluation comes on top."
    )


def _sum(values: list[float | None]) -> float | None:
    """Sum; None if a value is unknown."""
    if None in values:
        return None
    return sum(values)


def _about_stages(plan: Plan) -> str:
    """How many runs each stage has; "" without tuning."""
    if not plan.tunings:
        return ""
    # Of two runs with one id (a trial and the final run with its settings), the first is counted.
    stage_of = {}
    for run in plan.runs:
        stage_of.setdefault(run.id, run.stage)
    counts = Counter(stage_of.values())
    words = [f"stage {stage}: {counts[stage]}" for stage in sorted(counts)]
    stages = ", ".join(words)
    text = f"\nRuns by stage: {stages}; a stage starts when the held-out losses of the one before are known."
    if any(run.is_assumed for run in plan.runs):
        text += " Runs that wait are shown with the first settings of each list."
    return text


def _about_disk(
    runs: Collection[RunDisk | None],
    folder: Path,
    num_at_once: int | None,
) -> str:
    """What the runs that are not trained yet write at most at one time; "" where that is not known for each."""
    known = [run for run in runs if run is not None]
    if len(known) < len(runs) or not known:
        return ""
    most = most_at_one_time(known, num_at_once)
    needed = most.kept + most.in_training

    # The folder is not there yet.
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = (
        f"\nDisk: at most {size(needed)} at one time, {size(most.kept)} of them stay; {size(free)} are free for "
        f"{str(folder)!r}."
    )
    if free < needed:
        text += (
            "\nWarning: the disk may become full: make room, or name a folder on another disk (--output_dir); "
            "train: {save_only_model: true} leaves the optimizer out of checkpoints."
        )
    return text


def _words(tokens: float | None, seconds: float | None) -> tuple[str, str]:
    """Tokens and time as text; a question mark for an unknown one."""
    tokens_text = "?" if tokens is None else f"{tokens:.3g}"
    time = "?" if seconds is None else time_text(seconds)
    return tokens_text, time


def cost_of(
    recipe: Recipe,
    run: StudyRun,
    config: TrainConfig | None = None,
) -> Cost:
    """Tokens that a run trains on, without padding, and seconds; None where the recipe does not say.

    Every method is assumed to be as slow as full fine-tuning.

    Args:
        recipe: The recipe.
        run: The run.
        config: Its configuration, where it is parsed already.
    """
    tokens = tokens_of(recipe, run, config)
    if tokens == 0:  # nothing is trained, at any speed
        return 0, 0.0
    # The recipe says the speed of the intended hardware; this machine may be another.
    if tokens is None or not recipe.tokens_per_s:
        return tokens, None
    return tokens, tokens / recipe.tokens_per_s
