"""Finished runs as analyses and reports need them: from a study's folder, or from published results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskft_common import files, layout
from maskft_common.errors import UserError, did_you_mean

from ..results.schema import Result, read_result

BEST = "best"
LAST = "last"
FULL = "full"
MASK = "mask"
PUBLISHED_SUMMARY = "summary.json"


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
    def best_step(self) -> int | None:
        """Of the model that was evaluated, which may be another point of the run's path than the best."""
        return self.results[BEST]["study"]["best_step"] if BEST in self.results else self.summary.get("best_step")

    @property
    def history(self) -> list[dict]:
        """Rows of the training history, each with ``step``."""
        return self.summary.get("history", [])


def read_study(folder: str | Path, base: str | None = None, study_name: str | None = None) -> list[TrainedRun]:
    """All finished runs of one base model: in a study's folder, where it has a summary those of it; or published ones.

    Raises:
        UserError: If there are none, or they are of several base models and ``base`` names none of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a folder; name the output_dir of a study")
    records = sorted((folder / layout.RUNS).glob(f"*/{layout.RUN}"))
    summaries = map(files.read_json, folder.glob(layout.SUMMARY.format("*")) if records else ())
    models = [m for each in summaries if study_name in (None, each["study"]) for m in each["models"].values()]
    rows = [row for model in models for row in model["runs"]]
    named = {row.get("result") for row in rows} or {None}  # None: in a summary of an earlier version
    found = (folder / layout.RESULTS).glob(f"*/{layout.RESULT}") if records else folder.glob("*.json*")
    results = _results_of(sorted(file for file in found if None in named or file.parent.name in named))
    runs = [_from_record(folder, file, results) for file in records] or _published(folder, results)
    if not runs:
        raise UserError(f"{str(folder)!r} holds neither finished runs (runs/*/run.json) nor results of a study")
    if rows:
        ids = {_identity(row["run"]) for row in rows}
        while parents := {_identity(r.start) for r in runs if r.start and _identity(r.id) in ids} - ids:
            ids |= parents
        runs = [run for run in runs if _identity(run.id) in ids]
    # Runs that tuning tried and did not take have the name and the seed of the one it took, and no results.
    evaluated = {(run.name, run.seed) for run in runs if run.results}
    runs = [run for run in runs if run.results or not records or (run.name, run.seed) not in evaluated]
    bases = list(dict.fromkeys(run.base for run in runs))
    if base is None and len(bases) > 1:
        raise UserError(f"runs of different base models cannot be compared ({', '.join(bases)}): name one with --base")
    return [run for run in runs if run.base == _known("base model", base or bases[0], bases)]


def find_mask(runs: Sequence[TrainedRun], wanted: str | None = None) -> TrainedRun:
    """The learned mask of an id or a name, of its lowest seed; by default the first there is.

    Raises:
        UserError: If there is none.
    """
    masks = [run for run in runs if run.method == MASK and BEST in run.models]
    if not masks:
        methods = ", ".join(dict.fromkeys(str(run.method) for run in runs))
        raise UserError(f"there is no learned mask with its adapter folder among these runs (methods: {methods})")
    names = list(dict.fromkeys(name for run in masks for name in (run.name, run.id)))
    name = _known("mask", wanted or masks[0].name, names)
    return min((run for run in masks if name in (run.id, run.name)), key=lambda run: run.seed or 0)


def parent_of(run: TrainedRun, runs: Sequence[TrainedRun]) -> TrainedRun | None:
    """The run that ``run`` started from; None where it started from the base model.

    Raises:
        UserError: If that run is not among ``runs``.
    """
    if run.start is None:
        return None
    found = next((other for other in runs if _identity(other.id) == _identity(run.start)), None)
    if found is None:
        raise UserError(f"{run.id} starts from {run.start}, which is not among these runs")
    return found


def start_model(run: TrainedRun, runs: Sequence[TrainedRun]) -> str:
    """Folder or name of the model under a mask: of its start, else what its adapter says, else the base."""
    from maskft.masks.mask_set import read_config  # torch: reading published results takes seconds without it

    parent = parent_of(run, runs)
    return parent.models[BEST] if parent else read_config(run.models[BEST]).base_model_name_or_path or run.base


def full_run(mask: TrainedRun, runs: Sequence[TrainedRun]) -> TrainedRun:
    """The full fine-tuning under a mask.

    Raises:
        UserError: If the mask started from something else.
    """
    parent = parent_of(mask, runs)
    if parent is None or parent.method != FULL:
        start = parent.id if parent else mask.base
        raise UserError(f"{mask.id} starts from {start}, and this analysis needs a mask of a full fine-tuning")
    return parent


def _identity(run_id: str) -> str:
    """The hash in a run's id: studies that share a folder share runs, each under its own name for the method."""
    found = re.search(r"-([0-9a-f]{10})$", run_id)
    return found[1] if found else run_id


def _results_of(candidates: Sequence[Path]) -> dict[str, dict[str, Result]]:
    """Identity of a run -> role -> result; a published folder holds other JSON files beside its results."""
    found: dict[str, dict[str, Result]] = {}
    for file in candidates:
        if '"kind": "evaluation"' in files.read_text(file)[:200]:
            result = read_result(file)
            if "study" in result:
                found.setdefault(_identity(result["study"]["run"]), {})[result["study"]["role"]] = result
    return found


def _from_record(study: Path, file: Path, results: dict[str, dict[str, Result]]) -> TrainedRun:
    record = files.read_json(file)
    training = file.parent / layout.TRAINING
    known = files.read_json(training) if training.is_file() else {}
    # Paths inside the study are relative to it.
    models = {role: str(study / name) if (study / name).exists() else name for role, name in record["models"].items()}
    return TrainedRun(
        id=record["run"],
        base=record["model"],
        summary=known.get("summary", {}),
        data=known.get("data", {}),
        models=models,
        results=results.get(_identity(record["run"]), {}),
        **{key: record[key] for key in ("name", "method", "seed", "start", "settings")},
    )


def _published(folder: Path, results: dict[str, dict[str, Result]]) -> list[TrainedRun]:
    """The rows of the published summary are the list of runs; not each has its result file beside it."""
    published = {name: folder / name for name in (PUBLISHED_SUMMARY, layout.TRAINING)}
    content = {name: files.read_json(file) if file.is_file() else {} for name, file in published.items()}
    runs: dict[str, TrainedRun] = {}
    for base, summary in content[PUBLISHED_SUMMARY].get("models", {}).items():
        for row in summary["runs"]:
            roles = results.get(_identity(row["run"]), {})
            run = TrainedRun(
                id=row["run"],
                name=plain_name(row["name"]),
                base=base,
                settings=next(iter(roles.values()))["study"]["settings"] if roles else {},
                summary=content[layout.TRAINING].get(row["run"], {}),
                results=roles,
                **{key: row[key] for key in ("method", "seed", "start")},
            )
            runs.setdefault(run.id, run)  # the row of its best model comes before that of its last
    return list(runs.values())


def plain_name(label: str) -> str:
    """Name of the run whose best model, or end, has this label in a table."""
    return re.sub(rf" \(({BEST}|continued)\)", "", label, count=1)


def _known(what: str, name: str, names: Sequence[str]) -> str:
    if name not in names:
        raise UserError(f"no {what} is called {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
    return name
