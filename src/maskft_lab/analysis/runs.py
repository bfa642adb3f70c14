"""Finished runs as analyses need them: from a study's folder, from published results, or from folders of training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskft_base import files
from maskft_base.errors import UserError, did_you_mean

from ..results.schema import Result, read_result

BEST, LAST = "best", "last"
FULL, MASK = "full", "mask"


@dataclass(frozen=True)
class TrainedRun:
    """One run: what it is, what it did, its models and their results.

    Attributes:
        id: Unique name, e.g. ``mask-s0-1f2e3d4c5b``.
        name: Label of the method with its varied settings; equal for the seeds of one method.
        method: ``full``, ``lora``, ``mask``, ``random_mask``, ...
        seed: Training seed.
        base: The pre-trained model that everything started from.
        start: ``id`` of the run from whose best model this one started; None: from ``base``.
        settings: Options of training.
        summary: ``summary`` of ``training.json``: losses in nats per token, times in s, history; empty if not trained.
        data: Counts of the rows it was trained on, ``data`` of ``training.json``; empty where that is not known.
        models: Role (``best``, ``last``) -> folder of a model or adapter; empty where only results are there.
        results: Role -> result.
    """

    id: str
    name: str
    method: str
    seed: int | None
    base: str
    start: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def history(self) -> list[dict]:
        """Rows of the training history, each with ``step``."""
        return self.summary.get("history", [])


def read_study(folder: str | Path) -> list[TrainedRun]:
    """All finished runs of a study's folder, or of a folder of published results with their ``training.json``.

    Raises:
        UserError: If there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a folder; name the output_dir of a study")
    records = sorted((folder / files.RUNS).glob(f"*/{files.RUN}"))
    is_published = not records
    results: dict[str, dict[str, Result]] = {}
    for file in sorted(folder.glob("*.json*") if is_published else (folder / files.RESULTS).glob(f"*/{files.RESULT}")):
        if '"kind": "evaluation"' not in files.read_text(file)[:200]:
            continue  # a published folder holds summaries beside its results
        result = read_result(file)
        if "study" in result:
            results.setdefault(_identity(result["study"]["run"]), {})[result["study"]["role"]] = result
    if not is_published:
        return _without_trials([_from_record(folder, file, results) for file in records])
    if not results:
        raise UserError(f"{str(folder)!r} holds neither finished runs (runs/*/run.json) nor results of a study")
    return _from_results(results, _read_json(folder / files.TRAINING))


def read_runs(folders: Sequence[str]) -> list[TrainedRun]:
    """Runs of ``maskft train``, each by its output folder; one that was trained on another's model starts from it.

    Raises:
        UserError: If a folder is not one of training.
    """
    runs: dict[str, TrainedRun] = {}
    # What is trained on stands before what is trained over it.
    for path in sorted({Path(folder).resolve() for folder in folders}, key=files.holds_adapter):
        training = _read_json(path / files.TRAINING)
        if not training:
            raise UserError(f"{str(path)!r} is not a folder of maskft train: it has no {files.TRAINING}")
        recipe, last = training["recipe"], path / files.LAST
        start = runs.get(Path(recipe["model_name_or_path"]).name)  # a recipe names a folder by its last part
        runs[path.name] = TrainedRun(
            id=path.name,
            name=path.name,
            method=recipe["method"],
            seed=recipe.get("seed"),
            base=start.base if start else recipe["model_name_or_path"],
            start=start.id if start else None,
            settings=recipe,
            models={BEST: str(path)} | ({LAST: str(last)} if last.is_dir() else {}),
            **_of_training(training),
        )
    return list(runs.values())


def select_base(runs: Sequence[TrainedRun], wanted: str | None = None) -> list[TrainedRun]:
    """The runs of one base model.

    Raises:
        UserError: If there are several and none is named, or none is of the one named.
    """
    bases = list(dict.fromkeys(run.base for run in runs))
    if wanted is None and len(bases) > 1:
        raise UserError(f"runs of different base models cannot be compared ({', '.join(bases)}): name one with --base")
    return [run for run in runs if run.base == _known("base model", wanted or bases[0], bases)]


def find_mask(runs: Sequence[TrainedRun], wanted: str | None = None) -> TrainedRun:
    """The learned mask of an id or a name, of its lowest seed; by default the first there is.

    Raises:
        UserError: If there is none.
    """
    masks = [run for run in runs if run.method == MASK and BEST in run.models]
    if not masks:
        methods = ", ".join(dict.fromkeys(run.method for run in runs))
        raise UserError(f"there is no learned mask with its adapter folder among these runs (methods: {methods})")
    names = list(dict.fromkeys(name for run in masks for name in (run.name, run.id)))
    name = _known("mask", wanted or masks[0].name, names)
    return min((run for run in masks if name in (run.id, run.name)), key=lambda run: run.seed or 0)


def find_run(wanted: str, runs: Sequence[TrainedRun], seed: int | None) -> TrainedRun:
    """The run of an id, or of a name and a seed, whose model is a full one or a mask.

    Raises:
        UserError: If there is none.
    """
    known = [run for run in runs if BEST in run.models]
    name = _known("run with a model", wanted, list(dict.fromkeys(text for run in known for text in (run.name, run.id))))
    found = next((run for run in known if name == run.id or (name, seed) == (run.name, run.seed)), None)
    if found is None:
        raise UserError(f"{name!r} has no run of seed {seed}, that of the mask: name a run by its id")
    if not found.method.endswith(MASK) and files.holds_adapter(found.models[BEST]):
        raise UserError(f"{found.id} is an adapter of method {found.method}: name a run of all weights, or a mask")
    return found


def parent_of(run: TrainedRun, runs: Sequence[TrainedRun]) -> TrainedRun | None:
    """The run that ``run`` started from; None where it started from the base model.

    Raises:
        UserError: If that run is not among ``runs``.
    """
    found = next((other for other in runs if run.start and _identity(other.id) == _identity(run.start)), None)
    if found is None and run.start is not None:
        raise UserError(f"{run.id} starts from {run.start}, which is not among these runs; give that too")
    return found


def start_model(run: TrainedRun, runs: Sequence[TrainedRun]) -> str:
    """Folder or name of the model under a mask: of its start, else what its adapter says, else the base."""
    from maskft.adapter.mask_set import read_config  # torch: reading published results takes seconds without it

    parent = parent_of(run, runs)
    return parent.models[BEST] if parent else read_config(run.models[BEST]).base_model_name_or_path or run.base


def full_run(mask: TrainedRun, runs: Sequence[TrainedRun]) -> TrainedRun:
    """The full fine-tuning under a mask.

    Raises:
        UserError: If the mask started from something else.
    """
    parent = parent_of(mask, runs)
    if parent is None or parent.method != FULL:
        raise UserError(
            f"{mask.id} starts from {parent.id if parent else mask.base}, which is no full fine-tuning here"
        )
    return parent


def has_continued(full: TrainedRun) -> bool:
    """Whether the model with which full fine-tuning ended was kept, and is not its best."""
    return full.models.get(LAST) not in (None, full.models[BEST])


def continued_model(full: TrainedRun) -> str:
    """Folder of the model with which full fine-tuning ended, where that is not its best.

    Raises:
        UserError: If it was not kept, or is the best one.
    """
    last = full.models.get(LAST)
    if last is None or not has_continued(full):
        why = "was not kept (train it with keep_last)" if last is None else "is its best checkpoint"
        raise UserError(
            f"a landscape needs a third model, and the end of {full.id} {why}: name a run with --against, such as a "
            "warm restart"
        )
    return last


def _identity(run_id: str) -> str:
    """The hash in a run's id: studies that share a folder share runs, each under its own name for the method."""
    found = re.search(r"-([0-9a-f]{10})$", run_id)
    return found[1] if found else run_id


def _without_trials(runs: Sequence[TrainedRun]) -> list[TrainedRun]:
    """Runs less those that tuning tried and did not take: they bear the winner's name and seed, and no results."""
    evaluated = {(run.name, run.seed) for run in runs if run.results}
    return [run for run in runs if run.results or (run.name, run.seed) not in evaluated]


def _from_record(study: Path, file: Path, results: dict[str, dict[str, Result]]) -> TrainedRun:
    record = _read_json(file)
    # Paths inside the study are relative to it.
    models = {role: str(study / name) if (study / name).exists() else name for role, name in record["models"].items()}
    return TrainedRun(
        id=record["run"],
        base=record["model"],
        models=models,
        results=results.get(_identity(record["run"]), {}),
        **{key: record[key] for key in ("name", "method", "seed", "start", "settings")},
        **_of_training(_read_json(file.parent / files.TRAINING)),
    )


def _from_results(results: dict[str, dict[str, Result]], summaries: dict[str, dict]) -> list[TrainedRun]:
    runs = []
    for roles in results.values():
        result = next(iter(roles.values()))
        study, model = result["study"], result["model"]
        runs.append(
            TrainedRun(
                id=study["run"],
                method=model["method"],
                seed=model["seed"],
                base=study["model"],
                summary=summaries.get(study["run"], {}),
                results=roles,
                **{key: study[key] for key in ("name", "start", "settings")},
            )
        )
    # Of a start that was not evaluated, its training alone is known; it is taken to begin at the base model.
    known = {run.id for run in runs}
    for start, run in {run.start: run for run in runs if run.start in summaries.keys() - known}.items():
        method, name = summaries[start]["method"], start.rsplit("-", 2)[0]
        runs.append(TrainedRun(start, name, method, run.seed, run.base, summary=summaries[start]))
    return runs


def _of_training(training: dict) -> dict[str, Any]:
    return {"summary": training.get("summary", {}), "data": training.get("data", {})}


def _known(what: str, name: str, names: Sequence[str]) -> str:
    if name not in names:
        raise UserError(f"no {what} is called {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
    return name


def _read_json(file: Path) -> dict:
    return files.read_json(file) if file.is_file() else {}
