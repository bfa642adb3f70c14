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
from .alpaca import alpaca_settings, evaluate_alpaca, remove_verdicts
from .cast_once import weights_cast_once
from .evaluation_arguments import ALPACA_EVAL, HELDOUT, EvaluationArguments
from .heldout import chat_template_hash, evaluate_kl, evaluate_rows
from .journal import Journal, Resuming
from .load_models import Loaded
from .model_facts import facts_of
from .tasks import check_chat_template, run_task, task_data_sha256

# A killed run may resume with other values of these: they change no answer but for rounding, or the journal keeps them
# with each answer.
_CHANGE_NO_ANSWER = ("batch_size", "max_new_tokens", "limit", "alpaca_eval")
# Options that are settings of a result under their own names.
_SETTINGS = (
    "dtype",
    "batch_size",
    "max_length",
    "max_new_tokens",
    "limit",
    "apply_chat_template",
)


def settings_of(options: EvaluationArguments) -> dict:
    """The ``settings`` of a result file: the options that influence the numbers."""
    settings = {name: getattr(options, name) for name in _SETTINGS}
    # Named only where they are set: most results are without.
    if options.bf16:
        settings["bf16"] = True
    if options.kl:
        settings["kl"] = True

    settings["generate"] = False if options.no_generate else None
    settings["text_field"] = options.dataset_text_field
    settings["alpaca_eval"] = None
    if ALPACA_EVAL in options.task_names:
        settings["alpaca_eval"] = alpaca_settings(options)
    return settings


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
        tasks: Name -> rows of ``heldout`` and ``alpaca_eval``, and tasks from ``tasks.load_tasks``.
        options: How it is evaluated.
        target: The result file. The journal of an unfinished evaluation is beside it.
        name: Label in tables.
        test_set: File name of the held-out rows, for tables; None: they are not a whole file.
    """
    rows = tasks.get(HELDOUT)
    references = tasks.get(ALPACA_EVAL)
    benchmarks = {task: asked for task, asked in tasks.items() if task not in (HELDOUT, ALPACA_EVAL)}

    # Before anything is measured: benchmarks come after the held-out rows, which may take hours.
    prompted = [task for task in tasks if task != HELDOUT]
    check_chat_template(prompted, loaded.tokenizer, options.apply_chat_template)

    settings = settings_of(options)
    file = target.with_name(layout.JOURNAL)
    journal = Journal(file, _journal_settings(loaded, settings))
    device = loaded.model.device
    records: dict[str, dict] = {}
    # As in training with bf16: the weights keep their dtype.
    with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
        # Instead of loss and answers: a KL divergence is of a change, whose losses another evaluation measures.
        if rows is not None and options.kl:
            records[HELDOUT] = evaluate_kl(loaded, rows, options, journal)
        # Not before: for the divergence the model's weights are those of the base and of the change by turns.
        with weights_cast_once(loaded.model):
            if rows is not None and not options.kl:
                records[HELDOUT] = evaluate_rows(loaded.model, loaded.tokenizer, rows, options, journal)
            if benchmarks:
                records |= _evaluate_benchmarks(loaded, benchmarks, options, journal)
            if references:
                records[ALPACA_EVAL] = evaluate_alpaca(
                    loaded,
                    references,
                    options,
                    name,
                    target.parent,
                    journal,
                )
    if rows is not None and test_set:
        records[HELDOUT]["data_file"] = test_set

    device_name = device.type
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    result = build_result(name, loaded.facts, settings, records, device=device_name)
    write_result(target, result)

    # Only now: until the result is on the disk, a run that is killed is resumed from these.
    journal.remove()
    if references:
        remove_verdicts(target.parent)
    return result


def _evaluate_benchmarks(
    loaded: Loaded,
    benchmarks: Mapping[str, Any],
    options: EvaluationArguments,
    journal: Journal,
) -> dict[str, dict]:
    """Name -> record of each task of lm-eval."""
    # lm-eval takes seconds to import.
    from ..generation.lm_eval_model import BatchedLM

    lm = BatchedLM(
        loaded.model,
        loaded.tokenizer,
        options.batch_size,
        options.bf16,
    )
    # Around lm-eval's model: answers of a killed run are given without asking it.
    lm = Resuming(lm, journal)
    records: dict[str, dict] = {}
    for name, task in benchmarks.items():
        started_at = time.perf_counter()
        record = run_task(
            lm,
            name,
            task,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
        )
        # Of a resumed run only the rest is measured.
        time_s = time.perf_counter() - started_at
        record["time_s"] = round(time_s, 1)
        records[name] = record
    return records


def labelled_files(
    output_dir: str,
    sources: Sequence[str],
    names: Sequence[str],
) -> list[tuple[str, Path]]:
    """A label and a result file per model: in ``output_dir``, or of several models in a folder for each label.

    Training seeds of one method have one label; their folders have the seed in their names.

    Args:
        output_dir: Folder of the results.
        sources: Folders of models or adapters, or hub names.
        names: Labels by the user; none: the folders' names.

    Raises:
        UserError: If a label is not valid, two models would have one file, or the folder cannot be written to.
    """
    if names and len(names) != len(sources):
        raise UserError(f"{len(names)} names for {len(sources)} models; give one --name for each")
    labels = list(names) or [_default_label(source) for source in sources]
    for label in labels:
        # A label is printed in tables: control characters could change what a terminal shows.
        is_valid = label.strip() and printable(label) == label
        if not is_valid:
            raise UserError(f"{label!r} is not a valid --name; use printable characters")

    root = Path(output_dir)
    files.check_output_dir(root)
    # The result of a single model is directly in the folder that the user named.
    if len(sources) == 1:
        return [(labels[0], root / layout.RESULT)]

    # A label that several models have is followed by the seed, for those that know theirs.
    folders: list[str] = []
    for label, source in zip(labels, sources, strict=True):
        folder = label
        if labels.count(label) > 1:
            seed = facts_of(source).get("seed")
            if seed is not None:
                folder = f"{label}-seed{seed}"
        folders.append(folder)

    # A label becomes a folder, and a label such as ``../x`` would leave output_dir.
    for folder in folders:
        if folder in (".", "..") or "/" in folder:
            raise UserError(f"{folder!r} names a folder inside output_dir; give a --name without a slash")
    if len(set(folders)) < len(folders):
        raise UserError(
            f"two models have the same label ({', '.join(folders)}) and were not trained with different seeds; tell "
            "them apart with --name"
        )
    targets = [root / folder / layout.RESULT for folder in folders]
    return list(zip(labels, targets, strict=True))


def _default_label(source: str) -> str:
    """The last part of a model's folder or hub name."""
    path = Path(source)
    if path.exists():
        # Gives `.` and `..` a name. Links are not followed: that of a file in the hub's cache leads to a checksum.
        path = Path(os.path.abspath(path))
    return printable(path.name)


def finished_result(
    target: Path,
    name: str,
    settings: Mapping,
    tasks: Iterable[str],
) -> Result | None:
    """The result of an earlier run with this name, these settings and tasks, or None.

    Raises:
        UserError: If there is a result of another name, other settings or tasks.
    """
    if not target.exists():
        return None
    result = read_result(target)
    found = result["settings"]
    # The batch size changes rounding at most, so a run may be repeated with a smaller one after memory ran out.
    # Of both: a setting that only one of them has counts as null in the other, as in results of earlier versions.
    keys = {*found, *settings} - {"batch_size"}
    has_same_settings = all(found.get(key) == settings.get(key) for key in keys)
    has_tasks = set(tasks) <= set(result["tasks"])
    if result["name"] != name or not has_same_settings or not has_tasks:
        raise UserError(
            f"{target} exists, with another name, other settings or tasks; name another output_dir or pass --overwrite"
        )
    return result


def check_same_evaluation(
    result: Result,
    target: Path,
    loaded: Loaded,
    tasks: Mapping[str, Any],
    limit: int | None,
) -> None:
    """Refuse a finished result of another model, another chat template or other data than those of this evaluation.

    Args:
        result: From `finished_result`.
        target: Its file.
        loaded: The model.
        tasks: As for `evaluate_loaded`.
        limit: First items of benchmarks only.

    Raises:
        UserError: If they are not the same.
    """
    # The first is the one that is reported: another model may also have another chat template.
    problems: list[str] = []
    # The facts of this model only: the file may have further fields, of a later version.
    if any(result["model"].get(key) != value for key, value in loaded.facts.items()):
        problems.append("is of another model, configuration or tokenizer")
    template = chat_template_hash(loaded.tokenizer)
    for task, asked in tasks.items():
        record = result["tasks"][task]
        # None: the prompts of the task were not put into a template.
        if record["chat_template_hash"] not in (None, template):
            problems.append(f"has {task} with another chat template")
        if record.get("data_sha256") != task_data_sha256(asked, limit):
            problems.append(f"has {task} on other data")
    if problems:
        raise UserError(f"{target} {problems[0]}; name another output_dir or pass --overwrite")


def _journal_settings(loaded: Loaded, settings: Mapping) -> dict:
    """The settings on which all answers depend, apart from the request."""
    # Such as a repetition penalty, which changes answers and is in no option of ours.
    generation = loaded.model.generation_config.to_diff_dict()
    # It is among the packages, and a model's folder may name an older one.
    generation.pop("transformers_version", None)
    of_answers = {key: value for key, value in settings.items() if key not in _CHANGE_NO_ANSWER}
    # With the versions of packages: answers of two versions of transformers or torch are not mixed in one result.
    return {
        "model": loaded.identity,
        "device": loaded.model.device.type,
        "configuration": loaded.facts.get("config_sha256"),
        "chat_template": chat_template_hash(loaded.tokenizer),
        **of_answers,
        "generation_config": generation,
        "packages": environment()["packages"],
    }
