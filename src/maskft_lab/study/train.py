"""Training one run in a child process, and its record.

A run is finished when ``run.json`` is there and the files it names are as they were written. It is written last, whole.
Everything before may be cut off at any moment: training resumes from its last complete checkpoint.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from maskft.training.kl_budget import excess, kl_by_step
from maskft.training.method_arguments import INTERPOLATE, UNTRAINED_METHODS
from maskft_common import files, layout
from maskft_common.errors import NOT_UPDATED, UserError

from .accounts import build_record
from .damage import is_whole_result, written_files
from .folder import Study
from .identity import data_digest
from .path import PATH, has_path, path_values
from .process import PYTHON, Call, command_words
from .recipe import CURRENT_RATE, PRETRAINED, Recipe
from .run_record import RunRecord, write_run_record
from .study_run import BEST, LAST, Heldout, Point, StudyRun

# save_total_limit of a run with a path, which may need any of its checkpoints.
_ALL_CHECKPOINTS = 1_000_000
_START_AGAIN = "put it back, or start the study again, which then trains on the new one"


# Finished runs


def heldout(study: Study, run: StudyRun) -> Heldout | None:
    """Loss of a finished run on the rows held out from its training data; None while it is not finished."""
    if not study.is_trained(run):
        return None

    record = study.record(run)
    points_measured = {}
    has_diverged = not record.models  # see `_trained`
    if has_path(study.recipe, run) and not has_diverged:
        folder = study.run_folder(run)
        points_measured = path_values(study.recipe, run, folder)
        if points_measured is None:  # a point is not measured yet
            return None

    loss = record.best_heldout_loss
    if loss is None:
        # Diverged, or trained without an evaluation: tuning prefers every run that has a loss.
        loss = math.inf
    over_budget = 0.0
    points_over_budget = {}
    # Only a run that was trained with a budget has measured it.
    if run.options.get("kl_budget") is not None and not has_diverged:
        training = training_summary(study.run_folder(run))
        kl = training["kl"]
        over_budget = excess(kl["reached"], kl["budget"])
        for point in points_measured:
            kl_there = _kl_at(study, run, training, point)
            points_over_budget[point] = excess(kl_there, kl["budget"])
    return Heldout(
        loss,
        points_measured,
        over_budget,
        points_over_budget,
    )


def _kl_at(
    study: Study,
    run: StudyRun,
    training: dict,
    point: Point,
) -> float:
    """KL(base || model) of the checkpoint that a point is of, nats per token; NaN if it was not measured."""
    share, _ = point
    # The kept checkpoint is taken from the run's folder, which has the part of the change that is within the budget.
    if study.checkpoint(run, share) == study.run_folder(run):
        return training["kl"]["reached"]
    # Other checkpoints hold the whole change.
    measured = kl_by_step(training["history"]).get(study.step(run, share))
    return math.nan if measured is None else measured.whole


def is_done(study: Study, run: StudyRun) -> bool:
    """Whether the run and all its evaluations are finished."""
    if heldout(study, run) is None:
        return False
    files_of_results = [study.result_file(run, role) for role in run.labels]
    return all(is_whole_result(file) for file in files_of_results)


def record_at_point(study: Study, run: StudyRun) -> RunRecord:
    """Record of a finished run; with ``path.choose``, its best checkpoint is the one at the chosen point."""
    record = study.record(run)
    # Without `path.choose`, or without steps of training, the record is already about the model that is kept.
    if run.point is None or not record.num_steps:
        return record

    # The record counts epochs, tokens and learning rate at `best_step`. Replacing that step by the point's is enough.
    training = training_summary(study.run_folder(run))
    share, scale = run.point
    # Not round(share * num_steps), which may be one step off, see `Study.step`.
    training["best_step"] = study.step(run, share)
    if training.get("kl") is not None:
        # Of a part of the change it was not measured.
        reached = _kl_at(study, run, training, run.point) if scale == 1 else math.nan
        training["kl"]["reached"] = reached if math.isfinite(reached) else None

    before = record_before(study, run)
    return build_record(
        run,
        study.recipe,
        record.models,
        record.settings,
        training,
        before,
    )


def training_summary(folder: Path) -> dict:
    """``summary`` of the ``training.json`` that ``maskft train`` wrote: losses in nats per token, steps, tokens."""
    training = files.read_json(folder / layout.TRAINING)
    return training["summary"]


def record_before(study: Study, run: StudyRun) -> RunRecord | None:
    """Record of the training that counts as done before a run: for weights after a mask, the mask's."""
    before = run.start
    if run.masks:
        before = next(iter(run.masks.values()))  # a method has at most one

    if before is None:
        return None
    return record_at_point(study, before)


# Training


def train(
    study: Study,
    run: StudyRun,
    call: Call,
) -> None:
    """Train a run, or resume its training, and write its record.

    Raises:
        UserError: If its data has changed, or the training fails.
    """
    # The run is named by the data that was there when the study was started, maybe days ago.
    if run.data is not None and data_digest(run.options) != run.data:
        raise UserError(f"a data file of {run.title!r} has changed since the study was started; {_START_AGAIN}")

    folder = study.run_folder(run)
    record = _trained(study, run, call)
    # The record is the mark of a finished run, so it is written after the files whose checksums it holds.
    checksums = written_files(folder)
    record = record.model_copy(update={"files": checksums})
    write_run_record(folder, record)
    study.note_finished(folder)


def _trained(
    study: Study,
    run: StudyRun,
    call: Call,
) -> RunRecord:
    """Train a run; if its loss was not finite while settings are tried, a record without a loss."""
    try:
        return _train(study, run, call)
    except UserError as error:
        # A child process reports by its last line: the text is all that tells a divergence from other errors.
        is_divergence = NOT_UPDATED in str(error)
        if run.tried is None or not is_divergence:
            raise

        # These settings lose. Treated as a failure, they would be trained again each time the study is started.
        return build_record(
            run,
            study.recipe,
            models={},
            options=run.options,
            training=None,
            parent=None,
        )


def _train(
    study: Study,
    run: StudyRun,
    call: Call,
) -> RunRecord:
    """Train and return the run's record."""
    is_pretrained = run.method.method == PRETRAINED
    options = run.options if is_pretrained else _train_options(study, run)

    training = None  # stays so where nothing is trained
    if is_pretrained:
        models = {BEST: study.base(run)}
    elif _changes_nothing(study, run, options):
        # The start's own folder, for both roles: training at rate 0 would write the same weights again.
        start = study.model(run.start, BEST)
        models = dict.fromkeys(run.roles, start)
    else:
        folder = study.run_folder(run)
        launch = launch_words(study.recipe, run)
        words = [*launch, *command_words(options)]
        call(words, folder / layout.LOG)
        training = training_summary(folder)

        # If the best checkpoint is the last one, both roles name one folder, and one evaluation serves both. Without an
        # evaluation during training (None) the last step's model is kept.
        is_last_best = training["best_step"] in (None, training["num_steps"])
        last = folder if is_last_best else folder / layout.LAST
        models = {BEST: str(folder), LAST: str(last)}

    # Only roles that are kept: without `last` in the recipe, no model of the last step is written.
    # Relative to the study's folder, which may be moved.
    models = {role: study.inside(models[role]) for role in run.roles}
    before = record_before(study, run)
    return build_record(
        run,
        study.recipe,
        models,
        options,
        training,
        before,
    )


def _changes_nothing(
    study: Study,
    run: StudyRun,
    options: dict,
) -> bool:
    """Whether full fine-tuning would continue at rate 0, because the schedule of its start had ended.

    A mask at rate 0 does change the model: it removes weights before its first step. And a path needs checkpoints.
    """
    if study.recipe.path is not None or run.masks:
        return False
    is_continued = run.method.method == "full" and run.start is not None
    return is_continued and options.get("learning_rate") == 0


def _train_options(study: Study, run: StudyRun) -> dict:
    """Options of ``maskft train`` for a run whose parents are trained."""
    options = {
        "method": run.method.method,
        "model_name_or_path": study.start(run),
        "output_dir": str(study.run_folder(run)),
        "resume_from_checkpoint": "auto",  # from the last complete checkpoint, if the run was interrupted
        "prepared_data_dir": str(study.folder / layout.PREPARED),
    }

    # Models of the runs that this one is made from. Their names were not known when the recipe was expanded.
    if run.match is not None:
        options["match_adapter"] = study.model(run.match, BEST)
    # The model before ``start`` was trained: interpolate mixes both, a difference mask takes removed weights from it.
    if run.method.method == INTERPOLATE:
        options["before_model"] = study.start(run.start)
    if run.takes_values_before:
        options["mask_removed_value_model"] = study.start(run.start)
    for option, mask in run.masks.items():
        options[option] = study.model(mask, BEST)

    if run.method.method == "mask":
        options["keep_worse"] = True  # a study compares masks, also bad ones
    options |= run.options  # after keep_worse: a recipe may turn that off

    # Options that overrule the recipe's.
    if study.recipe.path:
        options["save_total_limit"] = _ALL_CHECKPOINTS
    if options.get("learning_rate") == CURRENT_RATE:
        options["learning_rate"] = _current_rate(study, run)
    return options


def _current_rate(study: Study, run: StudyRun) -> float:
    """The rate that the schedule of ``run.start`` had reached at its best checkpoint."""
    # With a path, the record is that of the chosen point.
    record = record_at_point(study, run.start)
    rate = record.learning_rate_at_best
    if rate is None:
        raise UserError(f"{run.start.title!r} has no best rate: it was never measured, give it eval_strategy")
    return rate


def launch_words(recipe: Recipe, run: StudyRun) -> list[str]:
    """The command up to the options of ``maskft train``."""
    if run.method.method in UNTRAINED_METHODS:
        return [*PYTHON, "train"]

    # `maskft train` takes the options of `accelerate launch`, and starts itself again in several processes.
    launch = recipe.launch
    options: dict = {"accelerate_config": launch.accelerate_config}
    num_processes = launch.num_processes or 1
    has_several = num_processes > 1
    if launch.accelerate_config or has_several:
        # With a configuration also if it is 1: without it, one for eight GPUs would start eight processes.
        options["num_processes"] = launch.num_processes
    return [*PYTHON, "train", *command_words(options)]


# Checkpoints of finished runs


def delete_checkpoints(study: Study, run: StudyRun) -> None:
    """Delete the checkpoints of a finished run, except those at points of its path.

    A checkpoint may hold the optimizer's moments too, which are twice as large as the model.

    A run with the folder ``path`` is left alone: a study without a path that shares the folder must not delete them.
    """
    folder = study.run_folder(run)
    path_folder = folder / PATH
    if path_folder.exists():
        return

    checkpoints_of_points = study.checkpoints(run)
    kept = set(checkpoints_of_points.values())
    # The pattern also matches checkpoints that were renamed as damaged, which are never among the kept ones.
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint not in kept:
            shutil.rmtree(checkpoint)
    if kept:
        path_folder.mkdir()  # the mark that the remaining ones stay
