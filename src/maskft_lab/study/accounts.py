"""What tables say about a run: its record, and the blocks ``training`` and ``study`` of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskft.data.arguments import DATA_NAMES, KL_DATA, TEMPLATE
from maskft.data.mixtures import rename_sets
from maskft.training.method_arguments import INTERPOLATE, PEFT, selection_of
from maskft_common.files import without_folder

from ..results.schema import DOMAINS
from .recipe import PRETRAINED, Method, Recipe
from .run_record import BudgetedKL, RunRecord
from .study_run import BEST, LAST, StudyRun

_MIXED = "mixed"  # name of the data of all domains


# Records


def build_record(
    run: StudyRun,
    recipe: Recipe,
    models: dict[str, str],
    options: dict[str, Any],
    training: dict[str, Any] | None,
    parent: RunRecord | None,
) -> RunRecord:
    """Account for a run that has just been made.

    Args:
        run: The run.
        recipe: The study's.
        models: Role -> folder, relative to the study's, or name.
        options: Options it was trained with.
        training: ``summary`` of its ``training.json``; None if nothing was trained.
        parent: Record of the run whose epochs and tokens count as trained before.
    """
    # The run's own training.
    num_steps = training["num_steps"] if training else 0
    best_step = None
    learning_rate = None
    epochs = {BEST: 0.0, LAST: 0.0}
    tokens = {BEST: 0, LAST: 0}
    if num_steps:
        best_step = training["best_step"]
        learning_rate, epochs, tokens = _counts(training)
    elif parent is not None and not training:
        # Full fine-tuning at rate 0 that was not run, see `_changes_nothing` of train.py.
        learning_rate = 0.0  # nothing was left to anneal

    # With the training before, which counts up to its best checkpoint: the run started from that.
    epochs_before = parent.total_epochs[BEST] if parent else 0.0
    tokens_before = parent.total_tokens[BEST] if parent else 0
    rounded_epochs = {}
    total_epochs = {}
    total_tokens = {}
    for role in (BEST, LAST):
        rounded_epochs[role] = round(epochs[role], 4)
        total_epochs[role] = round(epochs_before + epochs[role], 4)
        total_tokens[role] = tokens_before + tokens[role]

    # The run's identity for tables.
    settings = _without_folders(run.options)
    if "learning_rate" in options:
        settings["learning_rate"] = options["learning_rate"]  # the number for `current`

    start = None  # also for the base model: a table shows runs that count as trained before
    if run.is_continued:
        start = run.start.id
    match = None
    if run.match is not None:
        match = run.match.id
    return RunRecord(
        study=recipe.name,
        run=run.id,
        method=run.method.method,
        name=run.name,
        seed=run.seed,
        model=without_folder(run.model),
        data=recipe.data_name(run.method),
        start=start,
        match=match,
        settings=settings,
        models=models,
        num_steps=num_steps or None,
        best_step=best_step,
        best_heldout_loss=training["best_loss"] if training else None,
        learning_rate_at_best=learning_rate,
        epochs=rounded_epochs,
        tokens=tokens,
        total_epochs=total_epochs,
        total_tokens=total_tokens,
        train_time_s=training["train_time_s"] if training else None,
        peak_memory_bytes=training["peak_memory_bytes"] if training else None,
        kl=_budgeted_kl(training),
    )


def _budgeted_kl(training: dict[str, Any] | None) -> BudgetedKL | None:
    """KL of the kept checkpoint beside its budget; None for a run without a budget."""
    # Runs of older versions have no such entry.
    report = training.get("kl") if training else None
    if report is None or report["budget"] is None:
        return None
    return BudgetedKL(reached=report["reached"], budget=report["budget"])


def _counts(training: dict[str, Any]) -> tuple[float | None, dict[str, float], dict[str, int]]:
    """Learning rate of the best checkpoint, epochs and tokens of each role."""
    best_step = training["best_step"]
    num_tokens = training["num_train_tokens"]
    num_epochs = training["num_epochs"]
    share = 1.0  # of the steps, up to the best; without an evaluation the last is the best
    if best_step is not None:
        share = best_step / training["num_steps"]

    # The line of the log with the evaluation of the best checkpoint.
    measured: dict[str, Any] = {}
    for row in training["history"]:
        if "eval_loss" in row and row["step"] == best_step:
            measured = row

    # Tokens are counted at each evaluation. Without one at this step, they are in proportion to the steps.
    counted = measured.get("eval_num_tokens")
    tokens_at_best = int(counted) if counted else round(share * num_tokens)
    if best_step == 0:  # the start is best
        tokens_at_best = 0

    # In proportion to the steps, which have about equal numbers of rows; tokens are counted where they can be.
    epochs = {BEST: share * num_epochs, LAST: num_epochs}
    tokens = {BEST: tokens_at_best, LAST: num_tokens}
    return measured.get("learning_rate"), epochs, tokens


def _without_folders(options: dict[str, Any]) -> dict[str, Any]:
    """The options without folders of this machine: result files are shared."""
    shown = dict(options)
    # The folder of the data files, and then the paths in front of the names that remain.
    shown.pop("data_dir", None)
    shown.pop("eval_data_dir", None)
    if TEMPLATE in shown:
        template = Path(shown[TEMPLATE])
        shown[TEMPLATE] = template.name

    # Training, evaluation and KL data; a mixture names several files.
    for key in (*DATA_NAMES, KL_DATA):
        mixture = shown.get(key)
        if isinstance(mixture, str):
            shown[key] = rename_sets(mixture, without_folder)
    return shown


# Blocks of a result


def training_block(
    run: StudyRun,
    recipe: Recipe,
    role: str,
    record: RunRecord,
) -> dict[str, Any]:
    """Block ``training`` of a result, by which ``maskft report`` finds its row of the paper's tables."""
    # None for the base model, which was trained on no domain.
    domain = None
    is_mixed = None
    is_trained = run.method.method != PRETRAINED
    if is_trained:
        name = recipe.data_name(run.method)
        if name in DOMAINS:
            domain = name
        # Whether the full fine-tuning, of a mask that of its start, used all domains.
        name_before = None
        if run.start is not None:
            name_before = recipe.data_name(run.start.method)
        is_mixed = _MIXED in (name, name_before)

    selection = None
    if run.method.method == "mask":
        selection = selection_of(run.options)
    variant = None
    if is_control(recipe, run):
        variant = run.name

    # The counts of both ends: a row of the paper's table shows how long training went on after the best.
    return {
        "base": record.model,
        "domain": domain,
        "mixed": is_mixed,
        "checkpoint": role,
        "selection": selection,
        "variant": variant,
        "num_epochs": record.total_epochs[role],
        "num_train_tokens": record.total_tokens[role],
        "complete_num_epochs": record.total_epochs[LAST],
        "complete_num_train_tokens": record.total_tokens[LAST],
    }


def study_block(
    run: StudyRun,
    recipe: Recipe,
    role: str,
    record: RunRecord,
) -> dict[str, Any]:
    """Block ``study`` of a result, from which the study's tables are made."""
    block = {
        "role": role,
        "model": record.model,
        "study": recipe.name,
        "name": run.name,
        "data": recipe.data_name(run.method),
    }
    if run.point is not None:
        share, scale = run.point
        block["point"] = {"checkpoint": share, "scale": scale}
    # Of the whole run, and then of this role.
    of_run = ("run", "start", "match", "settings", "num_steps", "best_step")
    for key in of_run:
        block[key] = getattr(record, key)
    for key in ("epochs", "tokens", "total_epochs", "total_tokens"):
        block[key] = getattr(record, key)[role]
    # Of the best checkpoint alone: the record has no KL of the last. Results without a budget have no such key.
    if record.kl is not None and role == BEST:
        block["kl"] = record.kl.model_dump()
    return block


def is_control(recipe: Recipe, run: StudyRun) -> bool:
    """Whether the paper's tables have no row for a run: a control, a grid's variant, the second of a kind."""
    method = run.method
    is_not_in_paper = method.method in ("wanda_mask", INTERPOLATE)
    if is_not_in_paper or run.axes:
        return True

    # In the paper, full fine-tuning starts from the base model, and only masks continue from there.
    if run.is_continued and method.method in ("full", PEFT):
        return True

    # Of methods that a row of the paper does not tell apart, the first of the recipe has the row.
    def kind(method: Method) -> tuple:
        selection = selection_of(recipe.train | method.options)
        return method.method, method.start, method.data, selection

    own_kind = kind(method)
    same_kind = [other for other in recipe.methods.values() if kind(other) == own_kind]
    first = same_kind[0]
    return first.name != method.name
