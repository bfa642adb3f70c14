"""lm-eval's own logs as a result: ``samples_TASK_DATE.jsonl`` and the ``results_DATE.json`` beside them.

``lm_eval --log_samples --output_path DIR`` writes them; a line of samples is one document under one filter. The format
is that of lm-eval 0.4.5 to 0.4.13 (``lm_eval/loggers/evaluation_tracker.py``).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskft_common.errors import UserError, first_line
from maskft_common.files import open_text, parse_json, read_text

from .schema import (
    Item,
    Result,
    TaskRecord,
    build_result,
    build_task,
    is_finite,
    items_fingerprint,
    metric_from_items,
)

# The date is that of the evaluation, with ``-`` where a time has ``:``. Names of tasks may have underscores.
_FILE_NAME = re.compile(r"samples_(?P<task>.+?)_(?P<date>\d{4}-\d\d-\d\dT[\d.+-]+)\.jsonl(\.gz)?")
_NEEDED = ("doc_id", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash")
_NO_FILTER = "none"

# Settings that may change answers, noted where two results differ in them.
_SETTINGS = ("limit", "gen_kwargs", "model_dtype", "random_seed", "fewshot_seed", "system_instruction_sha")

# A damaged file of another program may end in any of these, depending on where the damage is.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    OverflowError,
)


def samples_in(folder: Path) -> list[Path]:
    """Return the samples files directly in a folder, one for each task."""
    files = sorted(folder.glob("samples_*.jsonl*"))
    return [file for file in files if is_samples_file(file)]


def is_samples_file(file: Path) -> bool:
    """Tell whether a file is named as lm-eval names its samples."""
    return bool(_FILE_NAME.fullmatch(file.name))


def read_samples(
    files: Sequence[Path],
    name: str | None = None,
) -> Result:
    """Return samples files, each of another task, as the result of one model.

    Args:
        files: Samples files of one folder, at least one.
        name: Name of the model; by default lm-eval's ``model_name``.

    Raises:
        UserError: If a file is damaged or older, two are of one task or of different models, or the results file beside
            it is missing.
    """
    tasks: dict[str, TaskRecord] = {}
    settings: dict[str, Any] = {}
    packages: dict[str, Any] = {}
    model_name = None
    for file in files:
        found = _FILE_NAME.fullmatch(file.name)
        assert found is not None  # the caller asks is_samples_file
        task = found["task"]
        if task in tasks:
            raise UserError(f"{file}: the folder has a second log of task {task}: name single files")

        # The file of one evaluation with the same date: directions of metrics, versions and settings.
        summary = _summary(_results_file(file, found["date"]))
        # lm-eval's folder of a model, where its file does not name the model.
        found_name = str(summary.get("model_name") or file.resolve().parent.name)
        # With an --output_path that names a file, lm-eval writes the samples of all models beside it.
        if model_name not in (None, found_name):
            raise UserError(
                f"{file.parent} holds samples of several models, {model_name!r} and {found_name!r}: name single files, "
                "or give each model a folder"
            )
        model_name = found_name
        try:
            tasks[task] = _task(file, task, summary)
        except UserError:
            raise  # which is a ValueError, and says more
        except _DAMAGE as error:
            raise UserError(f"{file}: not a complete samples file of lm-eval ({first_line(error)})") from None

        # Some settings are at the top of the file, others in its block `config`.
        config = summary.get("config") or {}
        # Where both have one, that of the block counts.
        known = {**summary, **config}
        for key in _SETTINGS:
            if known.get(key) is not None:
                settings[key] = known[key]
        for package in ("lm_eval", "transformers"):
            version = known.get(f"{package}_version")
            if version:
                packages[package] = version

    name = name or model_name
    assert name is not None  # there is a file

    result = build_result(name, {"name_or_path": name}, settings, tasks)
    result["environment"] = {"packages": packages}  # of the evaluation, not of this process
    return result


def _results_file(file: Path, date: str) -> Path:
    """Return the file of the evaluation that wrote these samples.

    Raises:
        UserError: If there is none, or several.
    """
    usual = file.with_name(f"results_{date}.json")
    if usual.is_file():
        return usual
    # With an --output_path that names a file, it is called by that.
    others = sorted(file.parent.glob(f"*_{date}.json"))
    if len(others) != 1:
        raise UserError(f"{file}: found {len(others)} results files of lm-eval for it; keep {usual.name} beside it")
    return others[0]


def _summary(file: Path) -> dict[str, Any]:
    try:
        summary = parse_json(read_text(file))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}): keep it beside its samples") from None
    # Some settings are in its block `config`, which may be missing, or null.
    if not isinstance(summary, dict) or not isinstance(summary.get("config") or {}, dict):
        raise UserError(f"{file}: not a results file of lm-eval: give the one that it wrote beside the samples")
    return summary


def _task(
    file: Path,
    task: str,
    summary: Mapping[str, Any],
) -> TaskRecord:
    """Return the metrics that are means of a number per item, with lm-eval's direction of each."""
    # Either may lack the task, or hold null for it.
    items, questions = _items(file)
    directions = summary["higher_is_better"].get(task) or {}
    reported = summary["results"].get(task) or {}
    counts = (summary.get("n-samples") or {}).get(task) or {}
    expected = counts.get("effective")
    if isinstance(expected, int) and expected != len(items):
        raise UserError(f"{file}: {len(items)} of the {expected} documents that were evaluated: is the file complete?")

    # Every metric that any item has; a dictionary, because a set would not keep their order.
    names: dict[str, None] = {}
    for item in items:
        names |= dict.fromkeys(item)
    # The id is not a metric, and every item has it.
    del names["id"]

    metrics = {}
    left_out: dict[str, str] = {}
    # Of these, metrics that have numbers: nobody expects a score of the whole corpus, which logs pairs of texts.
    with_numbers: list[str] = []
    for name in names:
        values = [item.get(name) for item in items]
        metric, _, _ = name.partition(",")  # without its filter
        direction = directions.get(metric)
        num_numbers = sum(is_finite(value) for value in values)
        if num_numbers < len(values):
            left_out[name] = f"a number on {num_numbers} of {len(values)} documents"
        elif not isinstance(direction, bool):
            left_out[name] = "without a direction in higher_is_better"
        elif not _is_mean(reported, name, values):
            left_out[name] = "not a mean over the documents"
        else:
            metrics[name] = metric_from_items(items, name, higher_is_better=direction)
        if name in left_out and num_numbers > 0:
            with_numbers.append(name)
    if not metrics:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"{file}: no metric can be compared ({reasons or 'there is none'})")
    for name in with_numbers:
        warnings.warn(f"{file}: {name} is left out: {left_out[name]}")

    # Without the metrics left out above: `check_result` raises for a metric of items whose values are not numbers.
    kept = ("id", *metrics)
    kept_items: list[Item] = []
    for item in items:
        kept_item = {key: item[key] for key in kept}
        kept_items.append(kept_item)
    # A block may be missing, or null.
    versions = summary.get("versions") or {}
    shots = summary.get("n-shot") or {}
    configs = summary.get("configs") or {}
    record = build_task(
        kept_items,
        metrics,
        version=versions.get(task),
        num_fewshot=shots.get(task),
        fingerprint=items_fingerprint(questions),
        chat_template_hash=summary.get("chat_template_sha"),
    )
    config = configs.get(task) or {}
    if config.get("generation_kwargs"):
        record["generation_kwargs"] = config["generation_kwargs"]
    return record


def _items(file: Path) -> tuple[list[Item], list[Item]]:
    """Return the items with their scores, and the questions that they were asked, by their hashes."""
    items: dict[str, Item] = {}
    questions: dict[str, Item] = {}
    seen: set[tuple[str, str]] = set()
    for row in _rows(file):
        missing = [key for key in _NEEDED if key not in row]
        if missing:
            raise UserError(f"{file}: no samples of lm-eval 0.4.5 or later, {missing[0]!r} is missing")

        # The hashes that lm-eval logs replace the texts: equal questions have equal hashes.
        # A number in lm-eval's files; the schema has texts.
        identity = str(row["doc_id"])
        name_of_filter = str(row["filter"])
        # As of two logs in one file: the second would take the place of the first.
        if (identity, name_of_filter) in seen:
            raise UserError(
                f"{file}: document {identity} has two samples under filter {name_of_filter!r}, as of two logs in one: "
                "give each log as a file of its own"
            )
        seen.add((identity, name_of_filter))
        questions[identity] = {
            "id": identity,
            "prompt": [row["doc_hash"], row["prompt_hash"]],
            "reference": row["target_hash"],
        }
        # A document has one row for each filter: metrics of all of them are one item, under names with the filter.
        item = items.setdefault(identity, {"id": identity})
        for metric in row["metrics"]:
            name = metric
            if name_of_filter != _NO_FILTER:
                name = f"{metric},{name_of_filter}"
            value = row.get(metric)
            if isinstance(value, bool):
                value = int(value)  # right or wrong; a result has numbers
            item[name] = value
    if not items:
        raise UserError(f"{file}: no samples in it: evaluate again with --log_samples")
    return list(items.values()), list(questions.values())


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Return the JSON objects of a file, line by line."""
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(
                    f"{file}, line {number}: not JSON ({first_line(error)}): is the file complete?"
                ) from None
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: not a sample of lm-eval")
            yield row


def _is_mean(
    reported: Mapping[str, Any],
    name: str,
    values: Sequence[Any],
) -> bool:
    """Whether lm-eval reports the mean over the items, where it reports anything (it does not for perplexities)."""
    # In the summary every metric has the name of its filter, also where that is ``none``.
    key = name if "," in name else f"{name},{_NO_FILTER}"
    expected = reported.get(key)
    if not is_finite(expected):
        return True
    # A corpus score, such as BLEU, logs a number or a pair of texts for each item, and its value is not their mean.
    mean = math.fsum(values) / len(values)
    return math.isclose(expected, mean, rel_tol=1e-6, abs_tol=1e-9)
