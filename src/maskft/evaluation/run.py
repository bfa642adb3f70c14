"""Evaluate one loaded model on held-out data and benchmarks, and write its result file; a killed run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import files
from ..data.splits import prompt_digest
from ..errors import UserError
from ..results.schema import Result, build_result, read_result, write_result
from ..runtime import environment
from .alpaca import ALPACA_EVAL, AlpacaEval, evaluate_alpaca
from .heldout import chat_template_hash, evaluate_rows
from .journal import Journal, Resuming
from .load import Loaded
from .tasks import HELDOUT, check_chat_template, run_task


@dataclass(frozen=True)
class EvaluationSettings:
    """What shapes the numbers; the ``settings`` of a result file.

    Args:
        dtype: Of the weights.
        backend: ``hf`` or ``vllm``.
        batch_size: Items at one time; None: by ``max_memory_gb``.
        max_memory_gb: Bound on the memory of a batch, in 10^9 bytes; None: half of what is free.
        max_length: Truncation of sequences whose loss is measured, in tokens.
        max_new_tokens: Bound on a held-out answer; benchmarks have their own.
        limit: First items of each benchmark only.
        apply_chat_template: None: as each benchmark is published.
        generate: Whether held-out answers are generated; None: where they can be checked.
        text_field: Column of plain text data.
        alpaca_eval: `AlpacaEval.settings`, where that is a task.
    """

    dtype: str = "float32"
    backend: str = "hf"
    batch_size: int | None = None
    max_memory_gb: float | None = None
    max_length: int | None = None
    max_new_tokens: int = 256
    limit: int | None = None
    apply_chat_template: bool | None = None
    generate: bool | None = None
    text_field: str = "text"
    alpaca_eval: dict | None = None

    # What leaves every answer as it is, up to rounding, or is kept with each; a killed run may go on with another.
    _NOT_OF_ANSWERS = ("batch_size", "max_memory_gb", "max_new_tokens", "limit", "alpaca_eval")

    def of_answers(self) -> dict:
        """The settings that answers depend on."""
        return {key: value for key, value in asdict(self).items() if key not in self._NOT_OF_ANSWERS}


def evaluate_loaded(
    loaded: Loaded,
    tasks: Mapping[str, Any],
    heldout_rows: Sequence[Mapping] | None,
    settings: EvaluationSettings,
    target: Path,
    name: str,
    *,
    alpaca: AlpacaEval | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Result:
    """Evaluate a model on ``tasks`` and, with ``heldout_rows``, on held-out data; write and return the result.

    Args:
        loaded: The model.
        tasks: From ``tasks.load_tasks``.
        heldout_rows: The held-out rows; None: that is not a task.
        settings: What shapes the numbers.
        target: The result file. The journal of an unfinished evaluation lies beside it.
        name: Label in tables.
        alpaca: From ``alpaca.load_alpaca``; None: that is not a task.
        overwrite: Drop the journal of an unfinished evaluation.
        console: Where progress bars go.
    """
    check_chat_template(list(tasks), loaded.tokenizer, settings.apply_chat_template)
    if alpaca:
        alpaca.check_model(loaded)
    journal = Journal(target.with_name(files.JOURNAL), _journal_settings(loaded, settings), overwrite)
    records = {}
    if heldout_rows is not None:
        records[HELDOUT] = evaluate_rows(
            loaded.model,
            loaded.tokenizer,
            heldout_rows,
            batch_size=settings.batch_size,
            max_memory_gb=settings.max_memory_gb,
            max_length=settings.max_length,
            max_new_tokens=settings.max_new_tokens,
            generate=settings.generate,
            text_field=settings.text_field,
            journal=journal,
            console=console,
        )
        _add_selection(records[HELDOUT], loaded, heldout_rows)
    if tasks:
        # vLLM's requests come back with other arguments than they had, and it likes to have many at one time.
        lm = Resuming(
            _backend(loaded, settings, console), journal, slice_size=256 if settings.backend == "vllm" else None
        )
        for task_name, task in tasks.items():
            started = time.perf_counter()
            record = run_task(
                lm, task_name, task, limit=settings.limit, apply_chat_template=settings.apply_chat_template
            )
            records[task_name] = record | {"time_s": round(time.perf_counter() - started, 1)}
    if alpaca:
        records[ALPACA_EVAL] = evaluate_alpaca(
            loaded,
            alpaca,
            name,
            target.parent,
            journal,
            batch_size=settings.batch_size,
            max_memory_gb=settings.max_memory_gb,
            console=console,
        )
    result = build_result(name, loaded.facts, asdict(settings), records, device=_device_name(loaded.model))
    write_result(target, result)
    journal.remove()
    return result


def finished_result(target: Path, settings: EvaluationSettings, tasks: Iterable[str]) -> Result | None:
    """The result of an earlier run with these settings and tasks, or None.

    Raises:
        UserError: If there is a result of other settings or tasks.
    """
    if not target.exists():
        return None
    result = read_result(target)
    if result["settings"] != asdict(settings) or not set(tasks) <= set(result["tasks"]):
        raise UserError(f"{target} exists, with other settings or tasks; name another output_dir or pass --overwrite")
    return result


def check_same_evaluation(result: Result, target: Path, loaded: Loaded, data: Mapping[str, str]) -> None:
    """Refuse a finished result of another model, chat template or other data than would be evaluated now.

    Args:
        result: From `finished_result`.
        target: Its file.
        loaded: The model.
        data: Task -> `results.data_sha256` of its items.

    Raises:
        UserError: If they are not the same.
    """
    facts = {key: value for key, value in loaded.facts.items() if key != "config_sha256"}
    if any(result["model"].get(key) != value for key, value in facts.items()):
        raise UserError(f"{target} is of another model; name another output_dir or pass --overwrite")
    configuration = loaded.facts.get("config_sha256")
    if result["model"].get("config_sha256") not in (None, configuration):  # None: of an earlier version
        raise UserError(
            f"{target} is of a model with another configuration or tokenizer; name another output_dir or pass "
            "--overwrite"
        )
    for task, sha256 in data.items():
        if result["tasks"][task]["chat_template_hash"] not in (None, chat_template_hash(loaded.tokenizer)):
            raise UserError(
                f"{target} has {task} with another chat template; name another output_dir or pass --overwrite"
            )
        if result["tasks"][task].get("data_sha256") != sha256:
            raise UserError(f"{target} has {task} on other data; name another output_dir or pass --overwrite")


def _device_name(model) -> str:
    """What the model ran on; vLLM, which has it elsewhere, runs on a GPU where there is one."""
    kind = model.device.type if model is not None else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def _add_selection(record: dict, loaded: Loaded, rows: Sequence[Mapping]) -> None:
    """Tell in a task record which of the held-out rows the model was measured on while it was trained."""
    ids = [str(row["id"]) for row in rows if loaded.selected_on.get(str(row["id"])) == prompt_digest(row)]
    if not ids:
        return
    note = (
        f"{len(ids)} of {len(rows)} items were measured during training (eval_tasks) and may have chosen the "
        "checkpoint; report on others, or say so"
    )
    record |= {"selected_on": ids, "note": ". ".join([*filter(None, [record.get("note")]), note])}


def _journal_settings(loaded: Loaded, settings: EvaluationSettings) -> dict:
    """What all answers depend on, beside the request."""
    generation = {} if loaded.model is None else loaded.model.generation_config.to_diff_dict()
    return {
        "model": loaded.identity,
        "configuration": loaded.facts.get("config_sha256"),
        "chat_template": chat_template_hash(loaded.tokenizer),
        **settings.of_answers(),
        "generation_config": {key: value for key, value in generation.items() if key != "transformers_version"},
        "packages": environment()["packages"],
    }


def _backend(loaded: Loaded, settings: EvaluationSettings, console):
    from ..generation.lm_eval_model import BatchedLM, vllm_model

    if settings.backend == "vllm":
        return vllm_model(loaded.source, settings.dtype)
    return BatchedLM(
        loaded.model,
        loaded.tokenizer,
        batch_size=settings.batch_size,
        max_memory_bytes=None if settings.max_memory_gb is None else settings.max_memory_gb * 1e9,
        console=console,
    )
