"""Evaluate one loaded model on held-out data and benchmarks, and write its result file; a killed run is resumed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from maskft_base import files
from maskft_base.errors import UserError
from maskft_base.runtime import environment

from ..results.schema import Result, build_result, read_result, write_result
from .alpaca import AlpacaEval, evaluate_alpaca
from .arguments import ALPACA_EVAL, HELDOUT, EvaluationArguments
from .heldout import chat_template_hash, evaluate_kl, evaluate_rows
from .journal import Journal, Resources, Resuming
from .load import Loaded
from .tasks import check_chat_template, run_task

# Settings that leave every answer as it is, up to rounding, or are kept with each; a killed run may resume with others.
_CHANGE_NO_ANSWER = ("batch_size", "max_memory_gb", "max_new_tokens", "limit")
_SETTINGS = (
    "dtype",
    "batch_size",
    "max_memory_gb",
    "max_length",
    "max_new_tokens",
    "limit",
    "apply_chat_template",
)


def settings_of(options: EvaluationArguments, alpaca: AlpacaEval | None = None) -> dict:
    """What shapes the numbers: the ``settings`` of a result file."""
    return {
        **{name: getattr(options, name) for name in _SETTINGS},
        **{name: True for name in ("bf16", "kl") if getattr(options, name)},
        "generate": False if options.no_generate else None,
        "text_field": options.dataset_text_field,
        "alpaca_eval": alpaca.settings() if alpaca else None,
    }


def evaluate_loaded(
    loaded: Loaded,
    tasks: Mapping[str, Any],
    options: EvaluationArguments,
    target: Path,
    name: str,
    test_set: str | None = None,
) -> Result:
    """Evaluate a model on ``tasks``; write and return the result.

    Args:
        loaded: The model.
        tasks: Name -> what is asked: the rows of ``heldout``, `AlpacaEval`, and tasks from ``tasks.load_tasks``.
        options: How it is evaluated.
        target: The result file. The journal of an unfinished evaluation lies beside it.
        name: Label in tables.
        test_set: File of the held-out rows, by which tables call them; None: they are no file of their own.
    """
    benchmarks = {task: asked for task, asked in tasks.items() if task not in (HELDOUT, ALPACA_EVAL)}
    rows, alpaca = tasks.get(HELDOUT), tasks.get(ALPACA_EVAL)
    check_chat_template([task for task in tasks if task != HELDOUT], loaded.tokenizer, options.apply_chat_template)
    settings = settings_of(options, alpaca)
    journal = Journal(target.with_name(files.JOURNAL), _journal_settings(loaded, settings), overwrite=options.overwrite)
    resources = Resources(options.batch_size, options.max_memory_gb, journal)
    with torch.autocast(loaded.model.device.type, torch.bfloat16, enabled=options.bf16):
        records = {} if rows is None else {HELDOUT: _heldout_record(loaded, rows, options, resources)}
        if benchmarks:
            from ..generation.lm_eval_model import BatchedLM

            bounds = {"batch_size": resources.batch_size, "max_memory_bytes": resources.max_memory_bytes}
            lm = Resuming(BatchedLM(loaded.model, loaded.tokenizer, **bounds), journal)
        for task_name, task in benchmarks.items():
            started = time.perf_counter()
            chat = options.apply_chat_template
            record = run_task(lm, task_name, task, limit=options.limit, apply_chat_template=chat)
            records[task_name] = record | {"time_s": round(time.perf_counter() - started, 1)}
        if alpaca:
            records[ALPACA_EVAL] = evaluate_alpaca(loaded, alpaca, name, target.parent, resources)
    if rows is not None and test_set:
        records[HELDOUT]["data_file"] = test_set
    result = build_result(name, loaded.facts, settings, records, device=_device_name(loaded.model))
    write_result(target, result)
    journal.remove()
    return result


def _heldout_record(loaded: Loaded, rows: Sequence, options: EvaluationArguments, resources: Resources) -> dict:
    """The record of the held-out rows."""
    if options.kl:
        return evaluate_kl(loaded.model, loaded.before or {}, loaded.tokenizer, rows, options.max_length)
    return evaluate_rows(loaded.model, loaded.tokenizer, rows, options, resources)


def finished_result(target: Path, settings: Mapping, tasks: Iterable[str]) -> Result | None:
    """The result of an earlier run with these settings and tasks, or None.

    Raises:
        UserError: If there is a result of other settings or tasks.
    """
    if not target.exists():
        return None
    result = read_result(target)
    if result["settings"] != settings or not set(tasks) <= set(result["tasks"]):
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
    differing = {key for key, value in loaded.facts.items() if result["model"].get(key) != value}
    template = chat_template_hash(loaded.tokenizer)
    problem = None
    if differing == {"config_sha256"}:
        problem = "is of a model with another configuration or tokenizer"
    elif differing:
        problem = "is of another model"
    for task, sha256 in data.items():
        if result["tasks"][task]["chat_template_hash"] not in (None, template):
            problem = problem or f"has {task} with another chat template"
        if result["tasks"][task].get("data_sha256") != sha256:
            problem = problem or f"has {task} on other data"
    if problem:
        raise UserError(f"{target} {problem}; name another output_dir or pass --overwrite")


def _device_name(model) -> str:
    return torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type


def _journal_settings(loaded: Loaded, settings: Mapping) -> dict:
    """What all answers depend on, apart from the request."""
    generation = loaded.model.generation_config.to_diff_dict()
    return {
        "model": loaded.identity,
        "configuration": loaded.facts.get("config_sha256"),
        "chat_template": chat_template_hash(loaded.tokenizer),
        **{key: value for key, value in settings.items() if key not in _CHANGE_NO_ANSWER},
        "generation_config": {key: value for key, value in generation.items() if key != "transformers_version"},
        "packages": environment()["packages"],
    }
