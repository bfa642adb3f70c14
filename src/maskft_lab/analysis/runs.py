"""Finished runs as analyses and reports need them: from a study's folder, or from published results."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskft_common import files, layout
from maskft_common.errors import UserError, did_you_mean

from ..results.reading import is_result
from ..results.schema import Result, read_result, run_identity

BEST = "best"
LAST = "last"
FULL = "full"
MASK = "mask"
PUBLISHED_SUMMARY = "summary.json"

ByRole = dict[str, Result]  # role (best, last) -> result


@contextmanager
def fields_of(place: Path) -> Iterator[None]:
    """Read the fields of a study's file without checking each of them.

    Args:
        place: The file, or the folder that it is in, for the error.

    Raises:
        UserError: If the file was damaged or written by hand: in place of whatever error its content leads to.
    """
    try:
        yield
    except UserError:
        # A UserError is a ValueError too. Its message says what to do already.
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{place} is not as maskft study writes it ({type(error).__name__}: {error}); run the study again: it "
            "writes its summary anew, and names damaged runs"
        ) from error


@dataclass(frozen=True)
class TrainedRun:
    """One run: its method and settings, its training history, its models and their results.

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
        models: Role (``best``, ``last``) -> folder of a model or adapter; empty where only results are there,
            and without ``best`` where ``path.choose`` took a part of the change.
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
    results: ByRole = field(default_factory=dict)

    @property
    def best_step(self) -> int | None:
        """Step of the model that was evaluated, which may be another point of the run's path than the best."""
        step = self.summary.get("best_step")
        # The result says which checkpoint was measured. A study may have chosen another than training's own best.
        if BEST in self.results:
            step = self.results[BEST]["study"]["best_step"]
        if step is None:
            # Trained without an evaluation: the last step is the best.
            step = self.summary.get("num_steps")
        return step

    @property
    def history(self) -> list[dict]:
        """Rows of the training history, each with ``step``."""
        return self.summary.get("history", [])


def read_study(
    folder: str | Path,
    base: str | None = None,
    study_name: str | None = None,
) -> list[TrainedRun]:
    """All finished runs of one base model, from a study's folder or from published results.

    Args:
        folder: The ``output_dir`` of a study, or a folder of published results with ``summary.json``.
        base: The base model; needed if the runs have several.
        study_name: In a folder that several studies share, the one whose runs are wanted; None: all. A study is known
            by its summary; before that is written, all runs of the folder are returned.

    Raises:
        UserError: If no run is found, or they have several base models and ``base`` is none of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a folder: give the output_dir of a study")

    # Published results have no folders of runs, only the files that a study wrote about them.
    records = (folder / layout.RUNS).glob(f"*/{layout.RUN}")
    # A generator, of which `any` reads the first record only.
    if any(records):
        runs = _runs_in(folder, study_name)
    else:
        runs = _published(folder)
    if not runs:
        raise UserError(
            f"{str(folder)!r} holds neither finished runs (runs/*/run.json) nor results of a study (summary.json); "
            "single results are for maskft compare"
        )

    unique_bases = dict.fromkeys(run.base for run in runs)  # a set would lose the order of the runs
    bases = list(unique_bases)
    # Losses of different base models are over different vocabularies, and have no common scale.
    if base is None and len(bases) > 1:
        raise UserError(f"runs of different base models cannot be compared ({', '.join(bases)}): name one with --base")
    # An empty name is no default: it is what "$BASE" becomes in a shell where BASE is not set.
    if base is None:
        base = bases[0]
    base = _known("base model", base, bases)
    return [run for run in runs if run.base == base]


def _runs_in(
    folder: Path,
    study_name: str | None,
) -> list[TrainedRun]:
    """The finished runs in a study's folder, without those that tuning tried and rejected."""
    # Several studies may share the folder; the summary of each, once it is written, names its runs and results.
    rows: list[dict] = []
    summary_files = folder.glob(layout.SUMMARY.format("*"))
    for file in summary_files:
        summary = files.read_json(file)
        with fields_of(file):
            if study_name is not None and summary["study"] != study_name:
                continue
            for model in summary["models"].values():
                for row in model["runs"]:
                    rows.append({"run": row["run"], "result": row["result"]})

    # Without a summary, all results of the folder count.
    results_folder = folder / layout.RESULTS
    candidates = sorted(results_folder.glob(f"*/{layout.RESULT}"))
    if rows:
        names_of_results = {row["result"] for row in rows}
        candidates = [file for file in candidates if file.parent.name in names_of_results]
    results = _results_of(candidates)

    runs_folder = folder / layout.RUNS
    records = sorted(runs_folder.glob(f"*/{layout.RUN}"))
    runs = [_from_record(folder, record, results) for record in records]
    # The runs that the summaries name, and those that they start from, which another study may have made.
    if rows:
        in_summaries = {run_identity(row["run"]) for row in rows}
        wanted = _with_starts(in_summaries, runs)
        runs = [run for run in runs if run_identity(run.id) in wanted]

    # Runs that tuning tried and did not choose have the name and the seed of the one it chose, and no results.
    evaluated: set[tuple[str, int | None]] = set()
    for run in runs:
        if run.results:
            evaluated.add((run.name, run.seed))

    # A run without results whose name and seed no other has is only not evaluated yet.
    kept: list[TrainedRun] = []
    for run in runs:
        if run.results or (run.name, run.seed) not in evaluated:
            kept.append(run)
    return kept


def _with_starts(
    ids: set[str],
    runs: Sequence[TrainedRun],
) -> set[str]:
    """Identities of runs, with those of the runs that they start from, and so on."""
    start_of = {}
    for run in runs:
        if run.start:
            identity = run_identity(run.id)
            start_of[identity] = run_identity(run.start)

    # Chains meet: one that was found already has its own ancestors, too.
    found: set[str] = set()
    for run_id in ids:
        ancestor: str | None = run_id
        while ancestor is not None and ancestor not in found:
            found.add(ancestor)
            ancestor = start_of.get(ancestor)
    return found


def find_mask(
    runs: Sequence[TrainedRun],
    wanted: str | None = None,
) -> TrainedRun:
    """The learned mask with an id, or the lowest seed of a name; by default, of the first mask's name.

    Raises:
        UserError: If no mask with its adapter folder is among ``runs``, or none has this id or name.
    """
    # Only with its adapter's folder: published results and parts of a change have none.
    masks = [run for run in runs if run.method == MASK and BEST in run.models]
    if not masks:
        methods = dict.fromkeys(str(run.method) for run in runs)
        raise UserError(
            f"there is no learned mask with its adapter folder among these runs (methods: {', '.join(methods)}); a "
            "part of a mask, which path.choose may take, has none"
        )

    # A run may be named by its id or, for all seeds of a method, by the method's name.
    names: list[str] = []
    for run in masks:
        names += [run.name, run.id]
    unique_names = list(dict.fromkeys(names))  # seeds share a name
    # An empty name is no default, see `read_study`.
    if wanted is None:
        wanted = masks[0].name
    name = _known("mask", wanted, unique_names)
    # An id is of one run; a name is of all seeds of a method.
    candidates = [run for run in masks if name in (run.id, run.name)]
    return min(candidates, key=lambda run: run.seed or 0)


def parent_of(
    run: TrainedRun,
    runs: Sequence[TrainedRun],
) -> TrainedRun | None:
    """The run that ``run`` started from; None where it started from the base model.

    Raises:
        UserError: If that run is not among ``runs``.
    """
    if run.start is None:
        return None
    # By identity: a study that shares the folder may have made the run under another name.
    start = run_identity(run.start)
    for other in runs:
        if run_identity(other.id) == start:
            return other
    raise UserError(f"{run.id} starts from {run.start}, which is not among these runs")


def start_model(run: TrainedRun, runs: Sequence[TrainedRun]) -> str:
    """Folder or name of the model under a mask: of its start, else what its adapter says, else the base.

    Raises:
        UserError: If the start has no model, or is another revision than the main one of a model on the hub.
    """
    # It imports torch, without which reading published results saves seconds.
    from maskft.masks.mask_set import read_config
    from maskft.models import base_of

    parent = parent_of(run, runs)
    if parent is not None:
        return _best_of(parent)
    # A mask over a model from elsewhere: its adapter names it.
    adapter = run.models[BEST]
    config = read_config(adapter)
    if config.revision not in (None, "main"):
        raise UserError(
            f"{run.id} is over revision {config.revision!r} of {config.base_model_name_or_path!r}, and analyses load "
            "the main one: download it, and train over its folder"
        )
    return base_of(adapter, config.base_model_name_or_path or run.base)


def _best_of(run: TrainedRun) -> str:
    if BEST not in run.models:
        raise UserError(f"{run.id} has no model here: it diverged, or only its results were copied")
    return run.models[BEST]


def full_run(mask: TrainedRun, runs: Sequence[TrainedRun]) -> TrainedRun:
    """The full fine-tuning under a mask, with its best model.

    Raises:
        UserError: If the mask started from something else, or that has no model.
    """
    parent = parent_of(mask, runs)
    if parent is None or parent.method != FULL:
        start = mask.base if parent is None else parent.id
        raise UserError(f"{mask.id} starts from {start}, and this analysis needs a mask of a full fine-tuning")
    _best_of(parent)  # raises if there is none
    return parent


def _results_of(candidates: Sequence[Path]) -> dict[str, ByRole]:
    """Identity of a run -> role -> result; a published folder holds other JSON files beside its results."""
    found: dict[str, ByRole] = {}
    for file in candidates:
        if not is_result(file):
            continue
        result = read_result(file)
        # Results of maskft evaluate, outside of a study, belong to no run.
        study = result.get("study")
        if study is not None:
            # By the hash, because a study that shares the folder may have measured the run under another name.
            identity = run_identity(study["run"])
            roles = found.setdefault(identity, {})
            roles[study["role"]] = result
    return found


def _from_record(
    study: Path,
    file: Path,
    results: dict[str, ByRole],
) -> TrainedRun:
    """The run of a ``run.json``, with its training history and results."""
    record = files.read_json(file)
    # Missing where nothing was trained.
    training_file = file.parent / layout.TRAINING
    training = _read_if_there(training_file)
    with fields_of(training_file):
        summary = dict(training.get("summary", {}))
        data = dict(training.get("data", {}))
        # Analyses and figures look for rows of the history by their step.
        for row in summary.get("history", []):
            if not isinstance(row["step"], int):
                raise TypeError(f"step is {row['step']!r}")

    with fields_of(file):
        models: dict[str, str] = {}
        for role, path in record["models"].items():
            # Paths inside the study are relative to it; others are of a model elsewhere, or its name on the hub.
            inside = study / path
            models[role] = str(inside) if inside.exists() else path

        run_id = record["run"]
        run_results = results.get(run_identity(run_id), {})
        if BEST in run_results and "point" in run_results[BEST]["study"]:
            _take_chosen_point(models, file.parent, summary, run_results[BEST])
        return TrainedRun(
            id=run_id,
            name=record["name"],
            method=record["method"],
            seed=record["seed"],
            base=record["model"],
            start=record["start"],
            settings=record["settings"],
            summary=summary,
            data=data,
            models=models,
            results=run_results,
        )


def _take_chosen_point(
    models: dict[str, str],
    folder: Path,
    summary: dict[str, Any],
    result: Result,
) -> None:
    """Replace the best model of a run by the one at the point that ``path.choose`` took, which was evaluated.

    Args:
        models: Role -> folder, changed in place. Without ``best`` where no folder holds the model.
        folder: Of the run.
        summary: Of its training.
        result: Of its best model.
    """
    study = result["study"]
    step = study["best_step"]
    is_whole = study["point"]["scale"] == 1  # of a part of the change there is no folder
    # The run's own folder has the best checkpoint by held-out loss.
    if is_whole and step == summary.get("best_step"):
        return
    checkpoint = folder / f"checkpoint-{step}"
    if is_whole and checkpoint.is_dir():
        models[BEST] = str(checkpoint)
    else:
        models.pop(BEST, None)


def _published(folder: Path) -> list[TrainedRun]:
    """The rows of the published summary are the list of runs; some lack their result file."""
    # Large ones are gzipped, *.json.gz. A folder's name may end in .json, too.
    candidates = sorted(file for file in folder.glob("*.json*") if file.is_file())
    results = _results_of(candidates)
    training = _read_if_there(folder / layout.TRAINING)
    summary_file = folder / PUBLISHED_SUMMARY
    with fields_of(summary_file):
        return _published_runs(_read_if_there(summary_file), training, results)


def _published_runs(
    published_summary: dict[str, Any],
    training: dict[str, Any],
    results: dict[str, ByRole],
) -> list[TrainedRun]:
    """The runs of a published summary, in its order.

    Args:
        published_summary: Content of its file.
        training: Id of a run -> summary of its training.
        results: Identity of a run -> role -> result.
    """
    models = published_summary.get("models", {})

    runs: dict[str, TrainedRun] = {}
    for base, summary in models.items():
        for row in summary["runs"]:
            run_id = row["run"]
            if run_id in runs:
                continue  # its last model; the row of its best one comes first
            roles = results.get(run_identity(run_id), {})
            settings: dict[str, Any] = {}
            if roles:
                any_result = next(iter(roles.values()))  # all roles have the settings of the run
                settings = any_result["study"]["settings"]
            runs[run_id] = TrainedRun(
                id=run_id,
                name=plain_name(row["name"]),
                method=row["method"],
                seed=row["seed"],
                base=base,
                start=row["start"],
                settings=settings,
                summary=training.get(run_id, {}),
                results=roles,
            )
    return list(runs.values())


def _read_if_there(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file does not exist."""
    if not file.is_file():
        return {}
    return files.read_json(file)


def plain_name(label: str) -> str:
    """Name of the run whose best model, or end, has this label in a table."""
    return re.sub(rf" \(({BEST}|continued)\)", "", label, count=1)


def _known(
    what: str,
    name: str,
    names: Sequence[str],
) -> str:
    if name not in names:
        raise UserError(f"no {what} is called {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
    return name
