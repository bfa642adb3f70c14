"""Making one run: train in a child process, record it, evaluate its models.

A run is finished when ``run.json`` is there and the files it names are as they were written, an evaluation when its
``result.json`` can be read. Both are written last, whole. Everything before may be cut off at any moment: training
resumes from its last complete checkpoint, other steps are repeated.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

from maskft.data.arguments import TEMPLATE, DataArguments, mixture_text
from maskft.training.method_arguments import (
    INTERPOLATE,
    MASK_METHODS,
    PEFT,
    UNTRAINED_METHODS,
    method_label,
)
from maskft_common import files, layout
from maskft_common.environment import environment
from maskft_common.errors import NOT_UPDATED, UserError

from ..evaluation.evaluation_arguments import AND, HELDOUT
from ..results.schema import BEFORE, Result, read_result, write_result
from .accounts import build_record, study_block, training_block
from .damage import is_whole_result, written_files
from .folder import Study, step_of
from .identity import short_digest
from .path import (
    PATH,
    has_path,
    path_sets,
    path_values,
    point_name,
    points,
)
from .process import (
    PYTHON,
    THREADS_OF_ENVIRONMENT,
    Threads,
    command_words,
    run_command,
)
from .recipe import CURRENT_RATE, PRETRAINED, REVISION, Recipe
from .run_record import RunRecord, write_run_record
from .study_run import BEST, LAST, Heldout, StudyRun

# Options of TRL that decide how rows become tokens.
_TOKENISATION = ("max_length", "completion_only_loss", "dataset_text_field")
# save_total_limit of a run with a path, which may need any of its checkpoints.
_ALL_CHECKPOINTS = 1_000_000

Tick = Callable[[], None]  # called about ten times a second while a command runs
Call = Callable[[list[str], Path], None]  # runs a command to its end: its words, its log


def _no_tick() -> None:
    pass


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
    return Heldout(loss, points_measured)


def is_done(study: Study, run: StudyRun) -> bool:
    """Whether the run and all its evaluations are finished."""
    if heldout(study, run) is None:
        return False
    files_of_results = [study.result_file(run, role) for role in run.labels]
    return all(is_whole_result(file) for file in files_of_results)


def _record(study: Study, run: StudyRun) -> RunRecord:
    """Record of a finished run; with ``path.choose``, its best checkpoint is the one at the chosen point."""
    record = study.record(run)
    if run.point is None or not record.num_steps:
        return record

    # The record counts epochs, tokens and learning rate at `best_step`. Replacing that step by the point's is enough.
    training = _training_summary(study.run_folder(run))
    share, _ = run.point
    checkpoint = study.checkpoint(run, share)
    # Not round(share * num_steps), which may be one step off, see `Study.checkpoint`.
    training["best_step"] = step_of(checkpoint)

    before = _record_before(study, run)
    return build_record(
        run,
        study.recipe,
        record.models,
        record.settings,
        training,
        before,
    )


def _training_summary(folder: Path) -> dict:
    """``summary`` of the ``training.json`` that ``maskft train`` wrote: losses in nats per token, steps, tokens."""
    training = files.read_json(folder / layout.TRAINING)
    return training["summary"]


def _record_before(study: Study, run: StudyRun) -> RunRecord | None:
    """Record of the training that counts as done before a run: for weights after a mask, the mask's."""
    before = run.start
    if run.masks:
        before = next(iter(run.masks.values()))  # a method has at most one

    if before is None:
        return None
    return _record(study, before)


# Preparing


def prepare_base(
    study: Study,
    runs: list[StudyRun],
    tick: Tick = _no_tick,
) -> None:
    """Unpack the embedded model, once for all runs."""
    folder = study.folder / layout.BASE
    is_embedded = any(run.model == layout.EMBEDDED_MODEL for run in runs)
    if not is_embedded or folder.exists():
        return

    # In a child process, so that the board goes on meanwhile.
    code = f"from maskft.training.build import unpack_embedded; unpack_embedded({str(folder)!r})"
    words = [sys.executable, "-c", code]
    _call(study, words, study.folder / layout.LOG, tick)


def prepare_data(
    study: Study,
    runs: list[StudyRun],
    tick: Tick = _no_tick,
) -> None:
    """Read and tokenise the data of all trainings to come, so that mistakes in it are found before any starts.

    Raises:
        UserError: The first mistake, of whichever run.
    """
    # Runs with equal values of these options train on the same tokens: one of them prepares the data of all.
    deciding = {field.name for field in fields(DataArguments)}
    deciding.update(_TOKENISATION)
    deciding.update((TEMPLATE, REVISION))

    prepared: list[dict] = []
    for run in runs:
        is_to_train = run.method.method != PRETRAINED and not study.is_trained(run)
        if not is_to_train:
            continue

        options = {}
        for key, value in run.options.items():
            if key in deciding:
                options[key] = value
        if options in prepared:
            continue
        prepared.append(options)

        # The command writes the prepared rows, from which the trainings read, and ends before it loads a model.
        command = options | {
            "prepared_data_dir": str(study.folder / layout.PREPARED),
            "prepare_only": True,
            "model_name_or_path": study.base(run),
            "output_dir": str(study.run_folder(run)),
            "dataset_num_proc": run.options.get("dataset_num_proc"),
        }
        words = [*PYTHON, "train", *command_words(command)]
        _call(study, words, study.folder / layout.LOG, tick)


# Making a run


def make(
    study: Study,
    run: StudyRun,
    tick: Tick = _no_tick,
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
    # Training and evaluation may have different numbers of threads: a training may have all cores for itself.
    call_training = partial(_call, study, tick=tick, num_threads=threads.training)
    call_evaluation = partial(_call, study, tick=tick, num_threads=threads.evaluation)

    # Training.
    if not study.is_trained(run):
        folder = study.run_folder(run)
        record = _trained(study, run, call_training)
        # The record is the mark of a finished run, so it is written after the files whose checksums it holds.
        checksums = written_files(folder)
        record = record.model_copy(update={"files": checksums})
        write_run_record(folder, record)
        study.note_finished(folder)

    # The path, from checkpoints that are kept for it.
    _delete_checkpoints(study, run)
    if has_path(study.recipe, run) and heldout(study, run) is None:
        _measure_path(study, run, call_evaluation)

    # Evaluation of each model that a table shows.
    for role in run.labels:
        file = study.result_file(run, role)
        if not is_whole_result(file):
            _evaluate(study, run, role, call_evaluation)


def _call(
    study: Study,
    words: list[str],
    log: Path,
    tick: Tick,
    num_threads: int | None = None,
) -> None:
    """Run a command to its end; until then it holds the study's lock too."""
    run_command(words, log, tick, study.lock_fd, num_threads)


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


def _delete_checkpoints(study: Study, run: StudyRun) -> None:
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
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint not in kept:
            shutil.rmtree(checkpoint)
    if kept:
        path_folder.mkdir()  # the mark that the remaining ones stay


# Points of a path


def _measure_path(
    study: Study,
    run: StudyRun,
    call: Call,
) -> None:
    """Measure every point of a run's path on its held-out rows and on earlier abilities."""
    checkpoints = study.checkpoints(run)
    names = []
    changes = []
    scales = []
    for point in points(study.recipe, run):
        share, scale = point
        checkpoint = checkpoints.get(share, "none")  # the base model has no checkpoints: no change
        names.append(point_name(point))
        changes.append(str(checkpoint))
        scales.append(scale)

    # All points in one command, which loads the base model once.
    models = {
        "model_name_or_path": study.base(run),
        "change": changes,
        "scale": scales,
        "name": names,
    }
    folder = study.run_folder(run)
    named_sets = path_sets(study.recipe, run, folder)
    sets = list(named_sets.values())
    if len(names) == 1:
        # maskft evaluate writes one model's result into output_dir itself, not into a folder of its name.
        [name] = names
        models["name"] = name
        sets = [(folder_of_set / name, options) for folder_of_set, options in sets]
    _measure(study, run, models, sets, call)


# Training


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
        start = study.model(run.start, BEST)
        models = dict.fromkeys(run.roles, start)
    else:
        folder = study.run_folder(run)
        launch = launch_words(study.recipe, run)
        words = [*launch, *command_words(options)]
        call(words, folder / layout.LOG)
        training = _training_summary(folder)

        # If the best checkpoint is the last one, both roles name one folder, and one evaluation serves both. Without an
        # evaluation during training (None) the last step's model is kept.
        is_last_best = training["best_step"] in (None, training["num_steps"])
        last = folder if is_last_best else folder / layout.LAST
        models = {BEST: str(folder), LAST: str(last)}

    # Relative to the study's folder, which may be moved.
    models = {role: study.inside(models[role]) for role in run.roles}
    before = _record_before(study, run)
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
    record = _record(study, run.start)
    rate = record.learning_rate_at_best
    if rate is None:
        raise UserError(f"{run.start.title!r} has no best rate: it was never measured, give it eval_strategy")
    return rate


def launch_words(recipe: Recipe, run: StudyRun) -> list[str]:
    """The command up to the options of ``maskft train``."""
    if run.method.method in UNTRAINED_METHODS:
        return [*PYTHON, "train"]

    launch = recipe.launch
    options: dict = {"accelerate_config": launch.accelerate_config}
    num_processes = launch.num_processes or 1
    has_several = num_processes > 1
    if launch.accelerate_config or has_several:
        # With a configuration also if it is 1: without it, one for eight GPUs would start eight processes.
        options["num_processes"] = launch.num_processes
    return [*PYTHON, "train", *command_words(options)]


# Evaluation


def _evaluate(
    study: Study,
    run: StudyRun,
    role: str,
    call: Call,
) -> None:
    """Evaluate one of the run's models, or copy the result of the same model."""
    same = _same_result(study, run, role)
    if same is None:
        result = _measured(study, run, role, call)
    else:
        result = read_result(same)
    result = result | {"name": run.labels[role]}  # another study may have another name

    # A folder of plain weights (the pre-trained model, the end of training) does not say by which method it was made.
    method = method_label(run.method.method, run.options)
    result["model"] |= {"seed": run.seed, "method": method}

    # The blocks from which tables are made.
    record = _record(study, run)
    result["training"] = training_block(run, study.recipe, role, record)
    result["study"] = study_block(run, study.recipe, role, record)
    target = study.result_file(run, role)
    write_result(target, result)

    # The folder that _measured worked in, and those of interrupted evaluations by other versions of the packages.
    own_folder = target.parent
    for leftover in own_folder.parent.glob(f"{own_folder.name}.*partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _same_result(
    study: Study,
    run: StudyRun,
    role: str,
) -> Path | None:
    """A result of the same model: of another study in the folder, or of the best if the last is the best."""
    own_folder = study.result_file(run, role).parent
    # A folder's name ends with the hash of the evaluation and four digits for the study, see `evaluation_id`.
    hash_of_evaluation = own_folder.name.split("-")[-2]
    pattern = f"*-{hash_of_evaluation}-????/{layout.RESULT}"
    candidates = sorted(own_folder.parent.glob(pattern))

    # The hash has the role in it, so that the best and the last model have two hashes even if they are one model.
    is_best = study.model(run, BEST) == study.model(run, role)
    if is_best:
        candidates.append(study.result_file(run, BEST))

    for file in candidates:
        if is_whole_result(file):
            return file
    return None


def _measured(
    study: Study,
    run: StudyRun,
    role: str,
    call: Call,
) -> Result:
    """Evaluate on the tasks of the study and on the sets of earlier abilities; one result with all tasks."""
    # Answers that other versions of the packages gave before an interruption are not mixed with today's.
    packages = environment()["packages"]
    versions = short_digest(packages)
    final_folder = study.result_file(run, role).parent
    folder = final_folder.with_name(f"{final_folder.name}.{versions}.partial")

    # One command for all sets, which loads the model once.
    sets = [(folder, study.recipe.evaluation)]
    folders_before = {}
    for name, options in study.recipe.before.items():
        # A digest, because the name of a set may have characters that a folder cannot have.
        digest_of_name = short_digest({"set": name})
        folder_before = folder / f"before-{digest_of_name}"
        folders_before[name] = folder_before
        sets.append((folder_before, options))
    models = _model_options(study, run, role)
    _measure(study, run, models, sets, call)

    # The tasks of all sets in one result; those of a set are named `before NAME` or `before NAME TASK`.
    result = read_result(folder / layout.RESULT)
    for name, folder_before in folders_before.items():
        result_before = read_result(folder_before / layout.RESULT)
        for task, found in result_before["tasks"].items():
            suffix = "" if task == HELDOUT else f" {task}"
            result["tasks"][f"{BEFORE}{name}{suffix}"] = found
    return result


def _measure(
    study: Study,
    run: StudyRun,
    models: dict,
    sets: list[tuple[Path, dict]],
    call: Call,
) -> None:
    """Evaluate models in one process on every set of rows whose results are missing.

    Args:
        study: The study.
        run: The run whose log is written to.
        models: Options of ``maskft evaluate`` that name the models.
        sets: Folder of the results and options, for each set.
        call: Runs a command.
    """
    # `maskft evaluate` gives each of several models a folder in output_dir; the result of one is in output_dir itself.
    has_several = isinstance(models["name"], list)
    subfolders = models["name"] if has_several else [""]

    # The words of one command, with the evaluations joined by AND.
    words: list[str] = []
    for folder, options in sets:
        # If some model's result is missing, all models are evaluated, and those with a result are skipped there.
        results = [folder / subfolder / layout.RESULT for subfolder in subfolders]
        missing = [file for file in results if not is_whole_result(file)]
        if not missing:
            continue
        for file in missing:
            file.unlink(missing_ok=True)  # damaged, if it exists
        all_options = models | {"output_dir": str(folder)} | options
        words += [AND, *evaluation_words(all_options)]

    if words:
        log = study.run_folder(run) / layout.LOG
        call([*PYTHON, "evaluate", *words], log)


def _model_options(
    study: Study,
    run: StudyRun,
    role: str,
) -> dict:
    """Options of ``maskft evaluate`` that name one of the run's models."""
    model = study.model(run, role)
    label = {"name": run.labels[role], "seed": run.seed}

    if study.recipe.path:
        # The model is the base with a scaled change. A fixed mask is scaled as the mask that it is compared with.
        scaled = run if run.match is None else run.match
        scale = 1.0
        if scaled.point is not None:
            _, scale = scaled.point
        change = "none" if run.method.method == PRETRAINED else model
        options = {
            "model_name_or_path": study.base(run),
            "change": change,
            "scale": scale,
        }
        return options | label

    # An adapter that was trained after a mask was merged at its end, and is a model.
    is_merged = bool(run.masks)
    makes_adapter = run.method.method in (*MASK_METHODS, PEFT)
    if makes_adapter and not is_merged:
        return {"model_name_or_path": study.start(run), "adapter": model} | label
    return {"model_name_or_path": model} | label


def evaluation_words(options: dict) -> list[str]:
    """Options of ``maskft evaluate`` as words."""
    tasks = mixture_text(options.get("tasks"))  # one text with commas, as on the command line
    return command_words(options | {"tasks": tasks})
