"""Evaluate a loaded model on held-out data and benchmarks into its result file; a killed run is resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from maskft_common import files, layout
from maskft_common.environment import environment
from maskft_common.errors import UserError, printable

from ..results.schema import Result, build_result, read_result, write_result
from .alpaca import alpaca_settings, evaluate_alpaca
from .evaluation_arguments import ALPACA_EVAL, HELDOUT, EvaluationArguments
from .heldout import chat_template_hash, evaluate_kl, evaluate_rows
from .journal import Journal, Resuming
from .load_models import Loaded
from .model_facts import facts_of
from .tasks import check_chat_template, run_task, task_data_sha256

# Settings that leave every answer as it is, up to rounding, or are kept with each; a killed run may resume with others.
_CHANGE_NO_ANSWER = ("batch_size", "max_new_tokens", "limit", "alpaca_eval")
_SETTINGS = ("dtype", "batch_size", "max_length", "max_new_tokens", "limit", "apply_chat_template")


def settings_of(options: EvaluationArguments) -> dict:
    """What shapes the numbers: the ``settings`` of a result file."""
    return {
        **{name: getattr(options, name) for name in _SETTINGS},
        **{name: True for name in ("bf16", "kl") if getattr(options, name)},
        "generate": False if options.no_generate else None,
        "text_field": options.dataset_text_field,
        "alpaca_eval": alpaca_settings(options) if ALPACA_EVAL in options.task_names else None,
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
        tasks: Name -> what is asked: rows of ``heldout`` and ``alpaca_eval``, and tasks from ``tasks.load_tasks``.
        options: How it is evaluated.
        target: The result file. The journal of an unfinished evaluation lies beside it.
        name: Label in tables.
        test_set: File of the held-out rows, by which tables call them; None: they are no file of their own.
    """
    benchmarks = {task: asked for task, asked in tasks.items() if task not in (HELDOUT, ALPACA_EVAL)}
    rows = tasks.get(HELDOUT)
    references = tasks.get(ALPACA_EVAL)
    check_chat_template([task for task in tasks if task != HELDOUT], loaded.tokenizer, options.apply_chat_template)
    settings = settings_of(options)
    journal = Journal(target.with_name(layout.JOURNAL), _journal_settings(loaded, settings))
    with torch.autocast(loaded.model.device.type, torch.bfloat16, enabled=options.bf16):
        records: dict[str, dict] = {}
        if rows is not None and options.kl:
            records[HELDOUT] = evaluate_kl(loaded, rows, options, journal)
        elif rows is not None:
            records[HELDOUT] = evaluate_rows(loaded.model, loaded.tokenizer, rows, options, journal)
        if benchmarks:
            from ..generation.lm_eval_model import BatchedLM

            lm = Resuming(BatchedLM(loaded.model, loaded.tokenizer, options.batch_size, options.bf16), journal)
        for task_name, task in benchmarks.items():
            started = time.perf_counter()
            chat = options.apply_chat_template
            record = run_task(lm, task_name, task, limit=options.limit, apply_chat_template=chat)
            records[task_name] = record | {"time_s": round(time.perf_counter() - started, 1)}
        if references:
            records[ALPACA_EVAL] = evaluate_alpaca(loaded, references, options, name, target.parent, journal)
    if rows is not None and test_set:
        records[HELDOUT]["data_file"] = test_set
    device = torch.cuda.get_device_name() if loaded.model.device.type == "cuda" else loaded.model.device.type
    result = build_result(name, loaded.facts, settings, records, device=device)
    write_result(target, result)
    journal.remove()
    return result


def labelled_files(output_dir: str, sources: Sequence[str], names: Sequence[str]) -> list[tuple[str, Path]]:
    """A label and a result file per model: of one in ``output_dir``, of several in a folder for each label.

    Training seeds of one method have one label; their folders have the seed in their names.

    Args:
        output_dir: Folder of the results.
        sources: Folders of models or adapters, or hub names.
        names: Labels by the user; none: the folders' names.

    Raises:
        UserError: If a label is none, two models would have one file, or the folder cannot be written to.
    """
    if names and len(names) != len(sources):
        raise UserError(f"{len(names)} names for {len(sources)} models; give one --name for each")
    # `.` and `..` have names too; a hub name is none of a folder.
    paths = [Path(source).resolve() if Path(source).exists() else Path(source) for source in sources]
    labels = list(names) or [printable(path.name) for path in paths]
    for label in labels:
        if not label.strip() or printable(label) != label:
            raise UserError(f"{label!r} is not a valid --name; use printable characters")
    _check_writable(Path(output_dir))
    if len(sources) == 1:
        return [(labels[0], Path(output_dir) / layout.RESULT)]
    seeds = [
        facts_of(source).get("seed") if labels.count(label) > 1 else None
        for label, source in zip(labels, sources, strict=True)
    ]
    folders = [label if seed is None else f"{label}-seed{seed}" for label, seed in zip(labels, seeds, strict=True)]
    for folder in folders:
        if folder in (".", "..") or "/" in folder:
            raise UserError(f"{folder!r} names a folder inside output_dir; give a --name without a slash")
    if len(set(folders)) < len(folders):
        raise UserError(
            f"two models have the same label ({', '.join(folders)}) and were not trained with different seeds; tell "
            "them apart with --name"
        )
    return [(label, Path(output_dir) / folder / layout.RESULT) for label, folder in zip(labels, folders, strict=True)]


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, hours before something is."""
    files.check_no_link(folder)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        problem = "there is no permission for it" if place.is_dir() else "it is a file"
        raise UserError(f"output_dir {str(folder)!r} cannot be written below {place}: {problem}; name another")


def finished_result(target: Path, name: str, settings: Mapping, tasks: Iterable[str]) -> Result | None:
    """The result of an earlier run with this name, these settings and tasks, or None.

    Raises:
        UserError: If there is a result of another name, other settings or tasks.
    """
    if not target.exists():
        return None
    result = read_result(target)
    found = result["settings"]
    names = {*result["settings"], *settings} - {"batch_size"}
    is_same = result["name"] == name and all(found.get(k) == settings.get(k) for k in names)
    if not is_same or not set(tasks) <= set(result["tasks"]):
        raise UserError(
            f"{target} exists, with another name, other settings or tasks; name another output_dir or pass --overwrite"
        )
    return result


def check_same_evaluation(
    result: Result, target: Path, loaded: Loaded, tasks: Mapping[str, Any], limit: int | None
) -> None:
    """Refuse a finished result of another model, chat template or other data than would be evaluated now.

    Args:
        result: From `finished_result`.
        target: Its file.
        loaded: The model.
        tasks: What would be asked, as for `evaluate_loaded`.
        limit: First items of benchmarks only.

    Raises:
        UserError: If they are not the same.
    """
    template = chat_template_hash(loaded.tokenizer)
    problem = None
    if any(result["model"].get(key) != value for key, value in loaded.facts.items()):
        problem = "is of another model, configuration or tokenizer"
    for task, asked in tasks.items():
        if result["tasks"][task]["chat_template_hash"] not in (None, template):
            problem = problem or f"has {task} with another chat template"
        if result["tasks"][task].get("data_sha256") != task_data_sha256(asked, limit):
            problem = problem or f"has {task} on other data"
    if problem:
        raise UserError(f"{target} {problem}; name another output_dir or pass --overwrite")


def _journal_settings(loaded: Loaded, settings: Mapping) -> dict:
    """What all answers depend on, apart from the request."""
    generation = loaded.model.generation_config.to_diff_dict()
    return {
        "model": loaded.identity,
        "device": loaded.model.device.type,
        "configuration": loaded.facts.get("config_sha256"),
        "chat_template": chat_template_hash(loaded.tokenizer),
        **{key: value for key, value in settings.items() if key not in _CHANGE_NO_ANSWER},
        "generation_config": {key: value for key, value in generation.items() if key != "transformers_version"},
        "packages": environment()["packages"],
    }
