"""``run.json``: what a finished run leaves for the runs made from it and for the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskft.data.arguments import DATA_NAMES, TEMPLATE
from maskft.data.mixtures import rename_sets
from maskft_common import layout
from maskft_common.files import is_there, read_json, write_text
from maskft_common.schema import FileModel, read_model

from .recipe import PRETRAINED, Recipe
from .runs import BEST, LAST, StudyRun


class RunRecord(FileModel):
    """Identity, settings and accounts of one finished run. Dictionaries hold a value per role, ``best`` and ``last``.

    ``last`` is counted also where that model is not kept: a table tells how long training went on beyond the best.
    """

    study: str  # that made it
    run: str  # its id
    method: str
    name: str  # method and grid values, as in tables
    seed: int
    model: str  # base model of the study
    data: str
    start: str | None  # ids of the runs it was made from
    match: str | None
    settings: dict[str, Any]  # options of `maskft train`, without folders of the machine
    models: dict[str, str]  # relative to the study's folder where they lie in it
    num_steps: int | None  # None where nothing was trained
    best_step: int | None
    averaged_steps: list[int] = []  # of earlier versions: the best is the mean of these checkpoints
    best_heldout_loss: float | None  # nats per token
    learning_rate_at_best: float | None
    epochs: dict[str, float]  # its own
    tokens: dict[str, int]  # without padding
    total_epochs: dict[str, float]  # with those of the run it starts from
    total_tokens: dict[str, int]
    train_time_s: float | None
    peak_memory_bytes: int | None  # of one process
    files: dict[str, str] = {}  # name in the run's folder -> sha256; none in records of earlier versions


def read_record(folder: Path) -> RunRecord:
    """Record of the finished run in ``folder``."""
    file = folder / layout.RUN
    return read_model(RunRecord, read_json(file), file, "remove the run's folder, and it is made again")


def write_record(folder: Path, record: RunRecord) -> None:
    """Write ``run.json``, which marks the run as finished."""
    write_text(folder / layout.RUN, json.dumps(record.model_dump(), indent=1) + "\n")


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
        training: ``summary`` of its ``training.json``; None where nothing was trained.
        parent: Record of the run it starts from.
    """
    best = dict.fromkeys(("step", "learning_rate"))
    own = {"epochs": {BEST: 0.0, LAST: 0.0}, "tokens": {BEST: 0, LAST: 0}}
    if training and training["num_steps"]:
        best, own = _accounts(training)
    elif parent is not None and not training:
        best["learning_rate"] = 0.0  # nothing was left to anneal
    before = {"epochs": 0.0, "tokens": 0}
    if parent is not None:
        before = {"epochs": parent.total_epochs[BEST], "tokens": parent.total_tokens[BEST]}
    total = {count: {role: before[count] + n for role, n in roles.items()} for count, roles in own.items()}
    settings = _shown(run.options)
    if "learning_rate" in options:
        settings["learning_rate"] = options["learning_rate"]  # instead of `current`
    return RunRecord(
        study=recipe.name,
        run=run.id,
        method=run.method.method,
        name=run.name,
        seed=run.seed,
        model=_without_folder(run.model),
        data=data_name(run, recipe),
        start=run.start.id if run.start and run.start.method.method != PRETRAINED else None,
        match=run.match and run.match.id,
        settings=settings,
        models=models,
        num_steps=training["num_steps"] or None if training else None,
        best_step=best["step"],
        best_heldout_loss=training and training["best_loss"],
        learning_rate_at_best=best["learning_rate"],
        epochs={role: round(number, 4) for role, number in own["epochs"].items()},
        tokens=own["tokens"],
        total_epochs={role: round(number, 4) for role, number in total["epochs"].items()},
        total_tokens=total["tokens"],
        train_time_s=training and training["train_time_s"],
        peak_memory_bytes=training and training["peak_memory_bytes"],
    )


def data_name(run: StudyRun, recipe: Recipe) -> str:
    """Name in the recipe of the data that a run is trained on."""
    return run.method.data or next(iter(recipe.data))


def _accounts(training: dict[str, Any]) -> tuple[dict, dict]:
    """Step and learning rate of the best checkpoint, and epochs and tokens of each role."""
    step, num_steps = training["best_step"], training["num_steps"]
    measured = {row["step"]: row for row in training["history"] if "eval_loss" in row}.get(step, {})
    share = 1.0 if step is None else step / num_steps
    # Tokens are counted up to each measurement; the share of the steps stands in where none was made.
    tokens = int(measured.get("eval_num_tokens") or round(share * training["num_train_tokens"]))
    own = {
        "epochs": {BEST: share * training["num_epochs"], LAST: training["num_epochs"]},
        "tokens": {BEST: 0 if step == 0 else tokens, LAST: training["num_train_tokens"]},
    }
    return {"step": step, "learning_rate": measured.get("learning_rate")}, own


def _shown(options: dict[str, Any]) -> dict[str, Any]:
    """The options without folders of this machine: result files are shared."""
    shown = {key: value for key, value in options.items() if key not in ("data_dir", "eval_data_dir")}
    shown |= {TEMPLATE: Path(shown[TEMPLATE]).name} if TEMPLATE in shown else {}
    names = {key: shown[key] for key in DATA_NAMES if isinstance(shown.get(key), str)}
    shown |= {key: rename_sets(name, _without_folder) for key, name in names.items()}
    return shown


def _without_folder(name: str) -> str:
    """Name of a file or folder without those above it; names of the hub, which have slashes too, as they are."""
    return Path(name).name if is_there(name) else name
