"""Evaluations of a run: the points of its path, and the models that a table shows.

An evaluation is finished when its ``result.json`` can be read, which is written last, whole. An interrupted one
continues with the answers that its partial folder holds.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from maskft.data.arguments import mixture_text
from maskft.training.method_arguments import MASK_METHODS, PEFT, method_label
from maskft_common import layout
from maskft_common.environment import environment
from maskft_common.errors import UserError

from ..evaluation.evaluation_arguments import AND, HELDOUT
from ..results.schema import BEFORE, Result, read_result, write_result
from .accounts import study_block, training_block
from .damage import is_whole_result
from .folder import Study
from .identity import evaluation_identity, short_digest
from .path import path_sets, point_name, points
from .process import PYTHON, Call, command_words
from .recipe import PRETRAINED
from .run_record import RunRecord
from .study_run import BEST, StudyRun

# Points of a path


def measure_path(
    study: Study,
    run: StudyRun,
    call: Call,
) -> None:
    """Measure every point of a run's path on its held-out rows and on earlier abilities."""
    checkpoints = study.checkpoints(run)
    # One entry per point in each of the three lists, as `maskft evaluate` takes --name, --change and --scale.
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


# Models that a table shows


def evaluate(
    study: Study,
    run: StudyRun,
    role: str,
    record: RunRecord,
    call: Call,
) -> None:
    """Evaluate one of the run's models, or copy the result of the same model; ``record`` is the run's."""
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
    result["training"] = training_block(run, study.recipe, role, record)
    result["study"] = study_block(run, study.recipe, role, record)
    # This file marks the evaluation as finished. A kill before the clean-up below leaves folders that nothing reads.
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

    # The pattern also matches the model's own file, which is missing or damaged: otherwise nothing would be evaluated.
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
    """Evaluate on the tasks of the study and on the sets of earlier abilities; one result with all tasks.

    Raises:
        UserError: If a file of the evaluation has changed, or the evaluation fails.
    """
    # The result is named by the rows that were there when the study was started, maybe days ago.
    present = evaluation_identity(study.recipe.evaluation, study.recipe.before)
    if _without_folders(present) != _without_folders(study.evaluation):
        raise UserError(
            "a file of the evaluation has changed since the study was started; put it back, or start the study again, "
            "which then evaluates all models on the new one"
        )

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
    files = {record.get("data_file") for record in result["tasks"].values()}
    for name, folder_before in folders_before.items():
        result_before = read_result(folder_before / layout.RESULT)
        for task, found in result_before["tasks"].items():
            suffix = "" if task == HELDOUT else f" {task}"
            # Tables name a set by its file. Where another set has a file of that name, in another folder, they name
            # this one as the recipe does.
            if found.get("data_file") in files:
                found.pop("data_file", None)
            files.add(found.get("data_file"))
            result["tasks"][f"{BEFORE}{name}{suffix}"] = found
    return result


def _without_folders(evaluation: dict) -> dict:
    """The identity of an evaluation without that of folders of tasks: other programs may write into these."""
    kept = {}
    for key, value in evaluation.items():
        if key == "before":
            # Name of a set -> its own identity.
            kept[key] = {name: _without_folders(of_set) for name, of_set in value.items()}
        elif key != "include_path":
            kept[key] = value
    return kept


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
    # Whole models: the base, full fine-tuning, interpolation, an adapter that was merged.
    return {"model_name_or_path": model} | label


def evaluation_words(options: dict) -> list[str]:
    """Options of ``maskft evaluate`` as words."""
    tasks = mixture_text(options.get("tasks"))  # one text with commas, as on the command line
    return command_words(options | {"tasks": tasks})
