"""``run.json``: the record that a finished run leaves for the runs made from it and for the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskft_common import layout
from maskft_common.files import read_json, write_text
from maskft_common.schema import FileModel, read_model


class BudgetedKL(FileModel):
    """What became of a ``kl_budget``.

    Attributes:
        reached: KL(base || model) of the checkpoint, nats per token; None if it was not measured, as that of a part of
            the change.
        budget: ``kl_budget``, nats per token.
    """

    reached: float | None
    budget: float


class RunRecord(FileModel):
    """Identity, settings and accounts of one finished run; dictionaries have a value per role, ``best`` and ``last``.

    ``last`` is counted even if that model is not kept: a table shows how long training continued after the best.

    Attributes:
        study: Name of the study that made it.
        run: Its id.
        name: Method and grid values, as in tables.
        model: Base model of the study.
        start: Id of the run it starts from.
        match: Id of the run whose counts a fixed mask has.
        settings: Options of ``maskft train``, without folders of the machine.
        models: Folders relative to the study's, if they are in it.
        num_steps: None if nothing was trained.
        averaged_steps: Always empty today.
        best_heldout_loss: In nats per token.
        epochs: Of its own training.
        tokens: Of its own training, without padding.
        total_epochs: With those of the run it starts from.
        total_tokens: With those of the run it starts from.
        peak_memory_bytes: Of one process.
        kl: KL(base || model) of the best checkpoint and the ``kl_budget`` it was trained with; None without a budget.
        files: Name in the run's folder -> sha256.
    """

    study: str
    run: str
    method: str
    name: str
    seed: int
    model: str
    data: str
    start: str | None
    match: str | None
    settings: dict[str, Any]
    models: dict[str, str]
    num_steps: int | None
    best_step: int | None
    # With a default: records of published studies have it, newer ones need not.
    averaged_steps: list[int] = []
    best_heldout_loss: float | None
    learning_rate_at_best: float | None
    epochs: dict[str, float]
    tokens: dict[str, int]
    total_epochs: dict[str, float]
    total_tokens: dict[str, int]
    train_time_s: float | None
    peak_memory_bytes: int | None
    # With a default: older records lack it.
    kl: BudgetedKL | None = None
    # With a default: the oldest published records lack it.
    files: dict[str, str] = {}


def read_run_record(folder: Path) -> RunRecord:
    """Record of the finished run in ``folder``."""
    file = folder / layout.RUN
    content = read_json(file)
    # A record that cannot be read is not replaced: the weights beside it may have taken days.
    remedy = "delete the run's folder to run it again"
    return read_model(RunRecord, content, file, remedy)


def write_run_record(folder: Path, record: RunRecord) -> None:
    """Write ``run.json``, which marks the run as finished."""
    # `write_text` renames a complete file, so that a run is never marked by half a record.
    text = json.dumps(record.model_dump(), indent=1)
    write_text(folder / layout.RUN, text + "\n")
