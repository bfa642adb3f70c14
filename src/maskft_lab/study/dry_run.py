"""``maskft study --dry_run``: what would run, from what, and what it takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskft.training.method_arguments import UNTRAINED_METHODS
from maskft_common.progress_bar import time_text

from .check import parsed_run
from .execute import Study
from .plan import Plan, build_plan
from .recipe import PRETRAINED
from .runs import StudyRun, settings_text


def print_dry_run(plan: Plan, folder: Path, own: Collection[str]) -> None:
    """Print what would run, from what, and what it takes; writes nothing.

    Args:
        plan: The runs.
        folder: Of the study.
        own: Methods that stand in the recipe's file; the others are controls.
    """
    study = Study(folder.absolute(), plan.recipe)
    plan = build_plan(plan.recipe, study.heldout)
    stages = ["stage"] if plan.tunings else []
    table = Table(*stages, "run", "from", "tokens", "time", "state", title=plan.recipe.name)
    left: dict[str, tuple[float | None, float | None]] = {}
    for run in plan.runs:
        cost = cost_of(plan, run)
        state = "finished" if study.is_done(run) else "to evaluate" if study.is_trained(run) else "to do"
        left[run.id] = (0, 0) if state != "to do" else cost  # a winner is one of the runs that were tried
        if run.is_assumed:
            state = f"waits for stage {run.stage - 1}"
        parents = ", ".join(_shown_id(parent) for parent in run.parents) or run.model
        stage = [str(run.stage)] if stages else []
        table.add_row(*map(Text, (*stage, _shown_id(run), parents, *_words(*cost), state)))
    # Piped or in a log, nothing may be cut off.
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table, markup=False)
    tokens, seconds = (None if None in values else sum(values) for values in zip(*left.values(), strict=True))
    ids = {run.id: run.method.name in own for run in plan.runs}
    words = _words(tokens, seconds)
    speed = " (for the time add tokens_per_s: N, which maskft train prints, to the recipe)"
    if plan.recipe.tokens_per_s:
        speed = f" at {plan.recipe.tokens_per_s:.3g} tokens/s of full fine-tuning"
    console.print(
        f"{len(ids)} runs: {sum(ids.values())} of yours, {len(ids) - sum(ids.values())} controls; training left: "
        f"{words[0]} tokens, {words[1]}{speed}; evaluation comes on top." + _about_stages(plan),
        highlight=False,
        soft_wrap=True,
    )


def _shown_id(run: StudyRun) -> str:
    """Folder of a run and what is tried with it; no hash where its settings are still to be chosen."""
    name = f"{run.id.rpartition('-')[0]}-?" if run.is_assumed else run.id
    return f"{name} {settings_text(run.tried)}" if run.tried else name


def _about_stages(plan: Plan) -> str:
    if not plan.tunings:
        return ""
    counts = Counter({run.id: run.stage for run in reversed(plan.runs)}.values())
    stages = ", ".join(f"stage {stage}: {number}" for stage, number in sorted(counts.items()))
    waits = " Runs that wait are shown with the first settings of each list." * any(r.is_assumed for r in plan.runs)
    return f"\nRuns by stage: {stages}; a stage starts when the held-out losses of the one before are known.{waits}"


def _words(tokens: float | None, seconds: float | None) -> tuple[str, str]:
    return "?" if tokens is None else f"{tokens:.3g}", "?" if seconds is None else time_text(seconds)


def cost_of(plan: Plan, run: StudyRun) -> tuple[int | None, float | None]:
    """Tokens that a run trains on, padding not counted, and seconds; None where the recipe does not say.

    Every method is taken to be as slow as full fine-tuning.
    """
    if run.method.method in (PRETRAINED, *UNTRAINED_METHODS):
        return 0, 0.0
    data, parsed = plan.recipe.data[run.method.data or next(iter(plan.recipe.data))], parsed_run(run)
    if data.tokens_per_row is None:
        return None, None
    rows, most, training = data.num_rows, parsed.data.max_train_samples, parsed.training
    rows = most if rows is None else min(rows, most or rows)
    if training.max_steps > 0:
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        rows = training.max_steps * (training.global_batch_size or batch * (plan.recipe.launch.num_processes or 1))
    elif rows is not None:
        rows *= training.num_train_epochs
    if rows is None:
        return None, None
    tokens = round(rows * min(data.tokens_per_row, training.max_length or math.inf))
    return tokens, tokens / plan.recipe.tokens_per_s if plan.recipe.tokens_per_s else None
