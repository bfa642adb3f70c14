"""lm-eval's ``samples_TASK_DATE.jsonl`` as a result, with the ``results_DATE.json`` that it writes beside them.

The format is that of lm-eval 0.4.5 to 0.4.13 (``loggers/evaluation_tracker.py``): a line per document and filter.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from maskft_base.errors import UserError, first_line
from maskft_base.files import open_text, parse_json, read_text

from .schema import Result, TaskRecord, build_result, build_task, is_finite, items_fingerprint, metric_from_items

_FILE_NAME = re.compile(r"samples_(?P<task>.+?)_(?P<date>\d{4}-\d\d-\d\dT[\d.+-]+)\.jsonl(\.gz)?")
_NEEDED = ("doc_id", "filter", "metrics", "prompt_hash", "target_hash", "doc_hash", "resps")
_SETTINGS = (
    *("limit", "gen_kwargs", "model_dtype", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed"),
    *("system_instruction_sha", "fewshot_as_multiturn"),
)

# What a damaged or strange file of another program may end in, however it is damaged.
_DAMAGE = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, zlib.error)

Items = dict[str, dict[str, Any]]  # id -> item, or question


def is_samples_file(path: Path) -> bool:
    """Tell whether a file is named as lm-eval names its samples."""
    return bool(_FILE_NAME.fullmatch(path.name))


def read_samples(files: Sequence[Path], name: str | None) -> Result:
    """Return samples files, each of another task, as a result of one model, called as lm-eval's results call it.

    Args:
        files: Of one folder.
        name: Of the model, if not lm-eval's.

    Raises:
        UserError: If they have no samples, not those of lm-eval 0.4.5 or later, or nothing stands beside them.
    """
    tasks: dict[str, TaskRecord] = {}
    settings: dict[str, Any] = {}
    packages: dict[str, Any] = {}
    for file in files:
        named = cast(re.Match[str], _FILE_NAME.fullmatch(file.name))
        if named["task"] in tasks:
            raise UserError(f"{file}: a second log of task {named['task']} in this folder: name single files")
        beside = file.with_name(f"results_{named['date']}.json")
        try:
            summary: dict[str, Any] = parse_json(read_text(beside))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{beside}: cannot be read ({getattr(error, 'strerror', None) or error}): keep it beside its samples"
            ) from None
        try:
            tasks[named["task"]] = _task(file, named["task"], summary)
        except UserError:
            raise
        except _DAMAGE as error:
            raise UserError(f"{file}: cannot be read as a log ({first_line(error)}): is the file whole?") from None
        said = {**summary, **(summary.get("config") or {})}
        settings |= {key: said[key] for key in _SETTINGS if said.get(key) is not None}
        packages |= {key: said[f"{key}_version"] for key in ("lm_eval", "transformers") if said.get(f"{key}_version")}
        name = name or str(summary.get("model_name") or file.resolve().parent.name)
    assert name is not None
    result = build_result(name, {"name_or_path": name}, settings, tasks)
    return {**result, "environment": {"packages": packages}}


def _task(file: Path, task: str, summary: Mapping[str, Any]) -> TaskRecord:
    """Return what is measured item by item, with what lm-eval says of the task."""
    items, questions, num_samples = _parsed(file)
    higher = (summary.get("higher_is_better") or {}).get(task) or {}
    metrics = {}
    for metric in dict.fromkeys(key for item in items.values() for key in item if key not in ("id", "cluster_id")):
        values: list[Any] = [item.get(metric) for item in items.values()]
        direction = higher.get(metric.partition(",")[0])
        # Others are no numbers, or parts of a summary (a corpus score, say).
        if all(map(is_finite, values)) and isinstance(direction, bool) and _is_mean(summary, task, metric, values):
            metrics[metric] = metric_from_items(list(items.values()), metric, higher_is_better=direction)
    if not metrics:
        raise UserError(f"{file}: no metric is a number per item, so there is nothing to compare")
    kept = ("id", "cluster_id", *metrics)
    record = build_task(
        [{key: item[key] for key in kept if key in item} for item in items.values()],
        metrics,
        version=(summary.get("versions") or {}).get(task),
        num_fewshot=(summary.get("n-shot") or {}).get(task),
        fingerprint=items_fingerprint(questions.values()),
        chat_template_hash=summary.get("chat_template_sha"),
    )
    if num_samples > 1:
        record["num_samples"] = num_samples
    if kwargs := ((summary.get("configs") or {}).get(task) or {}).get("generation_kwargs"):
        record["generation_kwargs"] = kwargs
    return record


def _parsed(path: Path) -> tuple[Items, Items, int]:
    """Return the items with their scores, the questions, and the number of samples per item."""
    items: Items = {}
    questions: Items = {}
    num_samples = 1
    for row in _rows(path):
        if missing := [key for key in _NEEDED if key not in row]:
            raise UserError(
                f"{path}: no samples file of lm-eval 0.4.5 or later, {missing[0]!r} is missing: evaluate again with "
                "--log_samples"
            )
        identity, document = str(row["doc_id"]), row.get("doc")
        item = items.setdefault(identity, {"id": identity})
        if isinstance(document, dict) and document.get("cluster_id") is not None:
            item["cluster_id"] = str(document["cluster_id"])
        prompt = [row["doc_hash"], row["prompt_hash"]]
        questions[identity] = {"id": identity, "prompt": prompt, "reference": row["target_hash"]}
        num_samples = max([num_samples, *(len(each) for each in row["resps"] if isinstance(each, list))])
        for metric in row["metrics"]:
            value = row.get(metric)
            name = metric if row["filter"] == "none" else f"{metric},{row['filter']}"
            item[name] = int(value) if isinstance(value, bool) else value
    if not items:
        raise UserError(f"{path}: no samples in it: evaluate again with --log_samples")
    return items, questions, num_samples


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}): is the file whole?") from None


def _is_mean(summary: Mapping[str, Any], task: str, metric: str, values: Sequence[float]) -> bool:
    """Whether lm-eval reports the mean over the items, where it reports anything (of a perplexity it does not)."""
    reported = (summary.get("results") or {}).get(task) or {}
    expected = reported.get(metric if "," in metric else f"{metric},none")
    mean = math.fsum(values) / len(values)
    return not isinstance(expected, int | float) or math.isclose(expected, mean, rel_tol=1e-6)
