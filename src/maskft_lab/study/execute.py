"""Making one run: train in a process of its own, account for it, evaluate its models.

A run is finished when ``run.json`` is there and the files that it names are what was written, an evaluation when its
``result.json`` can be read; both are written last, whole. Everything before may be cut off at any moment: training is
resumed from its last whole checkpoint, the rest is made again.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from maskft.data.arguments import TEMPLATE, DataArguments, mixture_text
from maskft.training.method_arguments import (
    INTERPOLATE,
    MASK_METHODS,
    PEFT,
    UNTRAINED_METHODS,
    method_label,
    selection_of,
)
from maskft_common import files, layout
from maskft_common.environment import environment
from maskft_common.errors import NOT_UPDATED, UserError

from ..evaluation.arguments import AND, HELDOUT, NOT_OF_HELDOUT_DATA
from ..results.schema import BEFORE, DOMAINS, read_result, write_result
from .damage import damage_of_result, damage_of_run, is_whole_result, written_files
from .identity import evaluation_identity, options_identity, short_digest
from .process import PYTHON, command_words, run_command
from .recipe import CURRENT_RATE, HOW, HOW_OF_HELDOUT, PRETRAINED, REVISION, Method, Recipe
from .record import RunRecord, build_record, data_name, read_record, write_record
from .runs import BEST, LAST, Heldout, Point, PointValues, StudyRun

_MIXED = "mixed"  # name of the data of all domains
_TOKENISATION = ("max_length", "completion_only_loss", "dataset_text_field")  # options of TRL that decide tokens
_OF_DATA = {f.name for f in fields(DataArguments)} - set(NOT_OF_HELDOUT_DATA)
_OF_DATA |= {"eval_split_size", "data_dir", "dataset_text_field"}
PATH = "path"  # folder of a run's points
_ALL = 1_000_000  # checkpoints of a run with a path, which may need any of them

Tick = Callable[[], None]  # called about twice a second while a command runs


@dataclass(frozen=True)
class Study:
    """Where a study's files are, and what its runs need to know of the recipe."""

    folder: Path  # absolute: adapters name their base model by it
    recipe: Recipe
    lock_fd: int | None = None

    def run_folder(self, run: StudyRun) -> Path:
        """Folder of a run: model or adapter, log, ``run.json``. Of another study's, where that has made the same."""
        own = self.folder / layout.RUNS / run.id
        return own if own.exists() else self._finished_before.get(run.hash, own)

    @cached_property
    def _finished_before(self) -> dict[str, Path]:
        """Hash -> folder of the runs that were finished when this began; several studies may share a folder."""
        records = sorted((self.folder / layout.RUNS).glob(f"*/{layout.RUN}"))
        return {record.parent.name.rpartition("-")[2]: record.parent for record in records}

    def result_file(self, run: StudyRun, role: str) -> Path:
        """Result file of one of the run's models."""
        name = evaluation_id(run, role, self._evaluation, self.recipe.name)
        return self.folder / layout.RESULTS / name / layout.RESULT

    @cached_property
    def _evaluation(self) -> dict:
        return evaluation_identity(self.recipe.evaluation, self.recipe.before)

    def base(self, run: StudyRun) -> str:
        """The base model as the commands take it; the embedded one is unpacked once, for all runs."""
        return str(self.folder / layout.BASE) if run.model == layout.EMBEDDED_MODEL else run.model

    def start(self, run: StudyRun) -> str:
        """The model that a run starts from."""
        return self.base(run) if run.start is None else self.model(run.start, BEST)

    def record(self, run: StudyRun) -> RunRecord:
        """What a finished run left in ``run.json``; its best checkpoint is that of the point that was chosen."""
        record = read_record(self.run_folder(run))
        if run.point is None or not record.num_steps:
            return record
        training = files.read_json(self.run_folder(run) / layout.TRAINING)["summary"]
        training |= {"best_step": round(run.point[0] * record.num_steps)}
        return build_record(run, self.recipe, record.models, record.settings, training, self.record_before(run))

    def record_before(self, run: StudyRun) -> RunRecord | None:
        """That of what counts as trained before a run: the tokens of a mask count for the weights after it."""
        before = next(iter(run.masks.values()), run.start)
        return None if before is None else self.record(before)

    def model(self, run: StudyRun, role: str) -> str:
        """Folder or name of one of a finished run's models; the checkpoint of the point that was chosen."""
        if run.method.method == PRETRAINED:
            return self.base(run)  # which may have been moved since
        if run.point is not None:
            return str(self.checkpoints(run)[run.point[0]])
        if (name := self.record(run).models.get(role)) is None:
            raise UserError(f"the loss of {run.title!r} was not finite; lower learning_rate or check the data")
        return str(self.folder / name) if (self.folder / name).exists() else name

    def heldout(self, run: StudyRun) -> Heldout | None:
        """Loss of a finished run on the rows held out from its training data; None where it is not finished."""
        if not self.is_trained(run):
            return None
        points = self.path_values(run) if self.has_path(run) else {}
        loss = self.record(run).best_heldout_loss
        return None if points is None else Heldout(math.inf if loss is None else loss, points)

    def is_trained(self, run: StudyRun) -> bool:
        """Whether the run's models are there, as they were written."""
        folder = self.run_folder(run)
        return (folder / layout.RUN).is_file() and damage_of_run(folder) is None

    def has_path(self, run: StudyRun) -> bool:
        """Whether held-out rows measure points between the base model and the end of the run's training."""
        is_measured = run.method.method not in UNTRAINED_METHODS and (run.tried is not None or run.tuned is None)
        return self.recipe.path is not None and is_measured

    def points(self, run: StudyRun) -> list[Point]:
        """Share of training and part of the change of every point of its path."""
        return [(0.0, 0.0)] if run.method.method == PRETRAINED else self.recipe.path.points

    def checkpoints(self, run: StudyRun) -> dict[float, Path]:
        """Share of training -> checkpoint of the points of its path."""
        num_steps = self.record(run).num_steps if self.recipe.path else None
        if not num_steps:
            return {}
        return {share: _checkpoint(self.run_folder(run), share * num_steps) for share, _ in self.points(run)}

    def heldout_options(self, run: StudyRun) -> dict:
        """Options of ``maskft evaluate`` for the rows held out from a run's training data; of the base's, the first."""
        data = run.options or self.recipe.train | self.recipe.data[next(iter(self.recipe.data))].options
        options = {key: value for key, value in data.items() if key in _OF_DATA and value is not None}
        is_named = options.keys() & {"eval_dataset_name", "dataset_eval_split"}
        return ({} if is_named else {"eval_split_size": DataArguments.eval_split_size}) | options

    def path_sets(self, run: StudyRun) -> dict[str, tuple[Path, dict]]:
        """Set of rows -> folder of the results of all points of a run's path, and options of ``maskft evaluate``."""
        evaluation = self.recipe.evaluation
        shared = {key: evaluation[key] for key in (*HOW, *HOW_OF_HELDOUT) if key in evaluation}
        sets = {HELDOUT: shared | self.heldout_options(run)} | self.recipe.path.before
        # By content: what other rows have said of a point is another measurement.
        folder = self.run_folder(run) / PATH
        return {n: (folder / f"{n}-{short_digest(options_identity(options))}", options) for n, options in sets.items()}

    def path_values(self, run: StudyRun) -> dict[Point, PointValues] | None:
        """Point -> set -> metric -> value of a run's path; None where one is missing."""
        sets, out = self.path_sets(run), dict[Point, Any]()
        for point in self.points(run) if self.record(run).models else ():  # else it diverged
            places = {name: folder / point_name(*point) / layout.RESULT for name, (folder, _) in sets.items()}
            if not all(map(is_whole_result, places.values())):
                return None
            found = {name: read_result(file)["tasks"][HELDOUT]["metrics"] for name, file in places.items()}
            out[point] = {n: {m: record["value"] for m, record in each.items()} for n, each in found.items()}
        return out

    def is_done(self, run: StudyRun) -> bool:
        """Whether the run and all its evaluations are finished."""
        if not self.is_trained(run) or (self.has_path(run) and self.path_values(run) is None):
            return False
        return all(is_whole_result(self.result_file(run, role)) for role in run.labels)

    def check_damage(self, run: StudyRun) -> None:
        """Raise where what of a finished run is there is not what was written."""
        folder = self.run_folder(run)
        found = {folder: damage_of_run(folder) if (folder / layout.RUN).is_file() else None}
        results = (self.result_file(run, role) for role in run.labels)
        found |= {file.parent: damage_of_result(file) for file in results if file.is_file()}
        for place, problem in found.items():
            if problem:
                raise UserError(f"{run.title}: {problem}; remove {str(place)!r}, and it is made again")

    def call(self, words: list[str], log: Path, tick: Tick) -> None:
        """Run a command to its end; the study's lock is held as long."""
        run_command(words, log, tick, self.lock_fd)


def evaluation_id(run: StudyRun, role: str, evaluation: dict, study: str) -> str:
    """Folder name of an evaluation of one of the run's models.

    It ends with a hash of what is measured (``evaluation``: see :func:`evaluation_identity`) and one of the study's
    name: studies in one folder copy each other's numbers, and each says itself what the model is in its tables.
    """
    settings = {"run": run.hash, "role": role, "evaluation": evaluation}
    settings |= {} if run.point is None else {"point": list(run.point)}
    return f"{run.id.rpartition('-')[0]}-{role}-{short_digest(settings)}-{short_digest({'study': study})[:4]}"


def prepare_base(study: Study, runs: list[StudyRun], tick: Tick = lambda: None) -> None:
    """Unpack the embedded model, once for all runs."""
    folder = study.folder / layout.BASE
    if not folder.exists() and any(run.model == layout.EMBEDDED_MODEL for run in runs):
        code = f"from maskft.training.build import unpack_embedded; unpack_embedded({str(folder)!r})"
        study.call([sys.executable, "-c", code], study.folder / layout.LOG, tick)


def prepare_data(study: Study, runs: list[StudyRun], tick: Tick = lambda: None) -> None:
    """Read and tokenise the data of every training to come: once for all, and mistakes are told before any starts.

    Raises:
        UserError: The first mistake, of whichever run.
    """
    decides = {field.name for field in fields(DataArguments)} | {*_TOKENISATION, TEMPLATE, REVISION}
    prepared = []
    for run in runs:
        options = {key: value for key, value in run.options.items() if key in decides}
        if run.method.method == PRETRAINED or study.is_trained(run) or options in prepared:
            continue
        prepared.append(options)
        options = options | {"prepared_data_dir": str(study.folder / layout.PREPARED), "prepare_only": True}
        options |= {"model_name_or_path": study.base(run), "output_dir": str(study.run_folder(run))}
        options |= {key: run.options[key] for key in ("dataset_num_proc",) if key in run.options}
        study.call([*PYTHON, "train", *command_words(options)], study.folder / layout.LOG, tick)


def make(study: Study, run: StudyRun, tick: Tick = lambda: None) -> None:
    """Train and evaluate what of ``run`` is not finished.

    Raises:
        UserError: If a command fails, with its last line.
    """
    if not study.is_trained(run):
        folder = study.run_folder(run)
        try:
            record = _train(study, run, tick)
        except UserError as error:
            if run.tried is None or NOT_UPDATED not in str(error):  # as of a loss of NaN
                raise
            # The setting loses. As a failure it would be trained again each time the study is started.
            record = build_record(run, study.recipe, {}, run.options, None, None)
        write_record(folder, record.model_copy(update={"files": written_files(folder)}))
        study._finished_before.setdefault(run.hash, folder)
    if not (folder := study.run_folder(run) / PATH).exists():  # else a study chooses among those that are left
        kept = set(study.checkpoints(run).values())
        for checkpoint in set(folder.parent.glob("checkpoint-*")) - kept:
            shutil.rmtree(checkpoint)
        if kept:
            folder.mkdir()
    if study.has_path(run) and study.path_values(run) is None:
        _measure_path(study, run, tick)
    for role in run.labels:
        if not is_whole_result(study.result_file(run, role)):
            _evaluate(study, run, role, tick)


# Points of a path


def _measure_path(study: Study, run: StudyRun, tick: Tick) -> None:
    """Measure every point of a run's path on its held-out rows and on earlier abilities."""
    points, found = study.points(run), study.checkpoints(run)
    names, sets = [point_name(*point) for point in points], list(study.path_sets(run).values())
    which = {
        "model_name_or_path": study.base(run),
        "change": [str(found.get(share, "none")) for share, _ in points],
        "scale": [scale for _, scale in points],
        "name": names,
    }
    if len(names) == 1:  # the folder of one model is that of its result
        which, sets = which | {"name": names[0]}, [(folder / names[0], options) for folder, options in sets]
    _measure(study, run, which, sets, tick)


def _checkpoint(folder: Path, step: float) -> Path:
    steps = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-[1-9]*")}
    found = {int(number): path for path, number in steps.items() if number.isdigit()}  # else it is damaged
    nearest = min(found, key=lambda number: abs(number - step), default=-2)
    if abs(nearest - step) >= 1:
        raise UserError(
            f"path: {folder.name} has no checkpoint at step {step:g} (it has {sorted(found)}): let save_steps divide "
            "path.checkpoints; a run that was made with others, or without a path, is to be removed first"
        )
    return found[nearest]


def point_name(share: float, scale: float) -> str:
    """Folder of a point of a path, e.g. ``1-0.5``: end of training, half of the change."""
    return f"{share:g}-{scale:g}"


# Training


def _train(study: Study, run: StudyRun, tick: Tick) -> RunRecord:
    """Train and return the run's record."""
    options, training, folder = run.options, None, study.run_folder(run)
    if run.method.method == PRETRAINED:
        models = {BEST: study.base(run)}
    else:
        options = _train_options(study, run)
        is_restart = run.method.method == "full" and run.start is not None and not run.masks
        if options.get("learning_rate") == 0 and is_restart and not study.recipe.path:
            # The schedule of its start had ended: training at rate 0 would change nothing. (A mask would: it removes
            # weights before its first step. And a path is made of checkpoints.)
            models = dict.fromkeys(run.roles, study.model(run.start, BEST))
        else:
            study.call([*launch_words(study.recipe, run), *command_words(options)], folder / layout.LOG, tick)
            training = files.read_json(folder / layout.TRAINING)["summary"]
            last_is_best = training["best_step"] == training["num_steps"]
            models = {BEST: str(folder), LAST: str(folder if last_is_best else folder / layout.LAST)}
    models = {role: _inside(study.folder, models[role]) for role in run.roles}
    return build_record(run, study.recipe, models, options, training, study.record_before(run))


def _train_options(study: Study, run: StudyRun) -> dict:
    """Options of ``maskft train`` for a run whose parents are finished."""
    options = {
        "method": run.method.method,
        "model_name_or_path": study.start(run),
        "output_dir": str(study.run_folder(run)),
        "resume_from_checkpoint": "auto",
        "match_adapter": None if run.match is None else study.model(run.match, BEST),
        "before_model": study.start(run.start) if run.method.method == INTERPOLATE else None,
        "mask_removed_value_model": study.start(run.start) if run.takes_values_before else None,
        **{option: study.model(mask, BEST) for option, mask in run.masks.items()},
        "prepared_data_dir": str(study.folder / layout.PREPARED),
        "keep_worse": True if run.method.method == "mask" else None,  # a study compares masks, also bad ones
        "save_total_limit": _ALL if study.recipe.path else None,
        **{k: v for k, v in run.options.items() if k != "save_total_limit" or not study.recipe.path},
    }
    if options.get("learning_rate") == CURRENT_RATE:
        options["learning_rate"] = study.record(run.start).learning_rate_at_best
        if options["learning_rate"] is None:
            raise UserError(f"{run.start.title!r} has no best rate: it was never measured, give it eval_strategy")
    return options


def launch_words(recipe: Recipe, run: StudyRun) -> list[str]:
    """The command up to the options of ``maskft train``."""
    launch = recipe.launch
    if run.method.method in UNTRAINED_METHODS:
        return [*PYTHON, "train"]  # nothing is trained
    # One process of a configuration for eight has to be said.
    processes = launch.num_processes if launch.accelerate_config or (launch.num_processes or 1) > 1 else None
    shared = {"accelerate_config": launch.accelerate_config, "num_processes": processes}
    return [*PYTHON, "train", *command_words(shared)]


def _inside(folder: Path, name: str) -> str:
    """A path inside the study's folder relative to it, so that the folder can be moved; anything else as it is."""
    return str(Path(name).relative_to(folder)) if Path(name).is_relative_to(folder) else name


# Evaluation


def _evaluate(study: Study, run: StudyRun, role: str, tick: Tick) -> None:
    """Evaluate one of the run's models, or copy the result of the same model where there is one."""
    target = study.result_file(run, role)
    # Under another name, or of another study; or the end of training is the best checkpoint.
    same = sorted(target.parent.parent.glob(f"*-{target.parent.name.split('-')[-2]}-????/{layout.RESULT}"))
    same += [study.result_file(run, BEST)] if study.model(run, BEST) == study.model(run, role) else []
    file = next(filter(is_whole_result, same), None)
    if file is not None:
        result = read_result(file)
    else:
        # Answers of other versions of the packages are not mixed with today's.
        versions = short_digest(environment()["packages"])
        partial = target.parent.with_name(f"{target.parent.name}.{versions}.partial")
        before = {name: partial / f"before-{short_digest({'set': name})}" for name in study.recipe.before}
        sets = [(partial, study.recipe.evaluation), *zip(before.values(), study.recipe.before.values(), strict=True)]
        _measure(study, run, _model_options(study, run, role), sets, tick)
        result = read_result(partial / layout.RESULT)
        for name, folder in before.items():
            for task, found in read_result(folder / layout.RESULT)["tasks"].items():
                result["tasks"][f"{BEFORE}{name}" + ("" if task == HELDOUT else f" {task}")] = found
    result, record = result | {"name": run.labels[role]}, study.record(run)
    # A folder of weights alone, as of the pre-trained model or of the end of training, does not tell its method.
    result["model"] |= {"seed": run.seed, "method": method_label(run.method.method, run.options)}
    result["training"] = _training_block(study, run, role, record)
    kept = ("run", "start", "match", "settings", "num_steps", "best_step")
    result["study"] = {
        "role": role,
        "model": record.model,
        "study": study.recipe.name,
        "name": run.name,
        "data": data_name(run, study.recipe),
        **({} if run.point is None else {"point": dict(zip(("checkpoint", "scale"), run.point, strict=True))}),
        **{key: getattr(record, key) for key in kept},
        **{key: getattr(record, key)[role] for key in ("epochs", "tokens", "total_epochs", "total_tokens")},
    }
    write_result(target, result)
    for partial in target.parent.parent.glob(f"{target.parent.name}.*partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _measure(study: Study, run: StudyRun, which: dict, sets: list[tuple[Path, dict]], tick: Tick) -> None:
    """Evaluate models in one process on sets of rows, each a folder and options, whose results are not there."""
    words, inside = [], which["name"] if isinstance(which["name"], list) else [""]
    for folder, options in sets:
        missing = [file for name in inside if not is_whole_result(file := folder / name / layout.RESULT)]
        words += [AND, *evaluation_words(which | {"output_dir": str(folder)} | options)] if missing else []
        for file in missing:
            file.unlink(missing_ok=True)  # it is damaged
    if words:
        study.call([*PYTHON, "evaluate", *words], study.run_folder(run) / layout.LOG, tick)


def _model_options(study: Study, run: StudyRun, role: str) -> dict:
    """Options of ``maskft evaluate`` that say what is evaluated."""
    model = study.model(run, role)
    is_adapter = run.method.method in (*MASK_METHODS, PEFT) and not run.masks  # else it is merged
    which = {"model_name_or_path": study.start(run) if is_adapter else model, "adapter": model if is_adapter else None}
    if study.recipe.path:
        of = run.match or run  # of a fixed mask as much is kept as of the mask that it is beside
        which = {"model_name_or_path": study.base(run), "change": "none" if run.method.method == PRETRAINED else model}
        which["scale"] = of.point[1] if of.point else 1.0
    return which | {"name": run.labels[role], "seed": run.seed}


def evaluation_words(options: dict) -> list[str]:
    """Options of ``maskft evaluate`` as words."""
    return command_words(options | {"tasks": mixture_text(options.get("tasks"))})


def _training_block(study: Study, run: StudyRun, role: str, record: RunRecord) -> dict:
    """The result's block ``training``, by which ``maskft report`` finds the row of the paper's tables."""
    method, name = run.method, data_name(run, study.recipe)
    is_trained = method.method != PRETRAINED
    data = {name} if run.start is None else {name, data_name(run.start, study.recipe)}
    return {
        "base": record.model,
        "domain": name if is_trained and name in DOMAINS else None,
        "mixed": _MIXED in data if is_trained else None,
        "checkpoint": role,
        "selection": selection_of(run.options) if method.method == "mask" else None,
        "variant": run.name if is_control(study.recipe, run) else None,
        "num_epochs": record.total_epochs[role],
        "num_train_tokens": record.total_tokens[role],
        "complete_num_epochs": record.total_epochs[LAST],
        "complete_num_train_tokens": record.total_tokens[LAST],
    }


def is_control(recipe: Recipe, run: StudyRun) -> bool:
    """Whether the paper's tables have no row for a run: a control, a grid's variant, a second of its kind."""
    method = run.method

    def kind(method: Method) -> tuple:
        return method.method, method.start, method.data, selection_of(recipe.train | method.options)

    first = next(other for other in recipe.methods.values() if kind(other) == kind(method))
    continued = method.method in ("full", PEFT) and run.start is not None and run.start.method.method != PRETRAINED
    return bool(method.method in ("wanda_mask", INTERPOLATE) or continued or run.axes or first.name != method.name)
