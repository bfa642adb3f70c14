"""lm-eval's ``samples_TASK_DATE.jsonl`` as a result, with what ``results_DATE.json`` beside it says, where it is there.

The format is that of lm-eval 0.4.5 to 0.4.13 (``loggers/evaluation_tracker.py``): a line per document and filter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskft_base.errors import UserError
from maskft_base.files import parse_json, read_text

from .elsewhere import add_samples, as_number, cluster_label, metrics_of, read_json_lines, result_from
from .schema import Result, TaskRecord, build_task, items_fingerprint

FILE_NAME = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.+-]+)\.jsonl(\.gz)?")
_NEEDED = ("doc_id", "filter", "metrics", "prompt_hash", "target_hash", "doc_hash", "resps")
_SETTINGS = (
    "limit",
    "gen_kwargs",
    "model_dtype",
    "random_seed",
    "numpy_seed",
    "torch_seed",
    "fewshot_seed",
    "system_instruction_sha",
    "fewshot_as_multiturn",
)


def is_samples_file(path: Path) -> bool:
    """Tell whether a file is named as lm-eval names its samples."""
    return bool(re.fullmatch(r"samples_.+\.jsonl(\.gz)?", path.name))


def read_samples(paths: Sequence[Path], name: str | None = None, cluster_by: str | None = None) -> Result:
    """Return the samples files of one model as a result.

    Args:
        paths: One file per task.
        name: Of the model; by default as lm-eval's results name it, else the folder of the files.
        cluster_by: Field of the documents whose values are the clusters; by default ``cluster_id`` where they have it.

    Raises:
        UserError: If a file is no samples file, or two are of one task.
    """
    tasks: dict[str, TaskRecord] = {}
    settings: dict[str, Any] = {}
    packages: dict[str, Any] = {}
    for path in paths:
        named = FILE_NAME.fullmatch(path.name)
        task = named["task"] if named else path.name.removesuffix(".gz").removesuffix(".jsonl").removeprefix("samples_")
        if task in tasks:
            raise UserError(f"{path}: a second file of task {task} beside another: name the file that is meant")
        summary = _summary_beside(path, named["date"] if named else None)
        tasks[task] = _task(path, task, summary, cluster_by)
        config = summary.get("config") or {}
        settings |= {key: value for key in _SETTINGS if (value := config.get(key, summary.get(key))) is not None}
        packages |= {
            package: summary[f"{package}_version"]
            for package in ("lm_eval", "transformers")
            if summary.get(f"{package}_version")
        }
        name = name or summary.get("model_name") or path.resolve().parent.name
    return result_from(str(name), paths[0], tasks, settings, packages)


def _summary_beside(path: Path, date: str | None) -> dict[str, Any]:
    """Return lm-eval's results of the same run; empty where they are not there."""
    found = sorted(path.parent.glob(f"*_{date}.json")) if date else []
    if not found:
        return {}
    try:
        summary = parse_json(read_text(found[0]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{found[0]}: lm-eval's results cannot be read ({error}): remove the file or evaluate again"
        ) from None
    return summary if isinstance(summary, dict) else {}


def _task(path: Path, task: str, summary: Mapping[str, Any], cluster_by: str | None) -> TaskRecord:
    items: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[str, list[Any]]] = {}  # metric -> item -> its samples' scores
    questions: dict[str, dict[str, Any]] = {}
    num_samples = 1
    for row in read_json_lines(path):
        if missing := [key for key in _NEEDED if key not in row]:
            raise UserError(
                f"{path}: no samples file of lm-eval 0.4.5 or later, {missing[0]!r} is missing: evaluate again with "
                "--log_samples"
            )
        identity = str(row["doc_id"])
        found = row.get("doc")
        document: dict[str, Any] = found if isinstance(found, dict) else {}
        item = items.setdefault(identity, {"id": identity, "prompt_hash": row["prompt_hash"]})
        if cluster_by or "cluster_id" in document:
            item["cluster_id"] = cluster_label(document.get(cluster_by or "cluster_id"), f"{path}, {cluster_by}")
        prompt = [row["doc_hash"], row["prompt_hash"]]
        questions[identity] = {"id": identity, "prompt": prompt, "reference": row["target_hash"]}
        num_samples = max([num_samples, *(len(each) for each in row["resps"] if isinstance(each, list))])
        for metric in row["metrics"]:
            name = metric if row["filter"] == "none" else f"{metric},{row['filter']}"
            value = row.get(metric)
            scores = value if isinstance(value, list) else [value]
            values.setdefault(name, {})[identity] = [as_number(score) for score in scores]
    if not items:
        raise UserError(f"{path}: no samples in it: evaluate again with --log_samples")
    rows = list(items.values())
    for name, by_item in values.items():
        if by_item.keys() == items.keys() and _are_scores(by_item, num_samples):
            add_samples(rows, name, [by_item[item["id"]] for item in rows])
    return _record(path, task, summary, rows, list(questions.values()), num_samples)


def _are_scores(by_item: Mapping[str, Sequence[float | None]], num_samples: int) -> bool:
    """Whether a metric is one number per item or sample; others are parts of a summary (a corpus score, say)."""
    return all(len(scores) in (1, num_samples) and None not in scores for scores in by_item.values())


def _record(
    path: Path,
    task: str,
    summary: Mapping[str, Any],
    items: list[dict[str, Any]],
    questions: list[dict[str, Any]],
    num_samples: int,
) -> TaskRecord:
    """Put a task together: metrics are the means over items that lm-eval reports, where it reports any."""
    names = [name for name in items[0] if name not in ("id", "prompt_hash", "cluster_id")]
    higher = {name: _higher_is_better(summary, task, name) for name in names}
    metrics = metrics_of(items, names, {name: value for name, value in higher.items() if value is not None})
    reported = (summary.get("results") or {}).get(task) or {}
    for name in names:
        expected, mean = reported.get(name if "," in name else f"{name},none"), metrics[name]["value"]
        if isinstance(expected, int | float) and mean is not None and not math.isclose(expected, mean, rel_tol=1e-6):
            del metrics[name]  # not a mean over items (a perplexity, an F1 of the corpus)
            for item in items:
                del item[name]
    if not metrics:
        raise UserError(f"{path}: no metric is a number per item, so there is nothing to compare")
    record = build_task(
        items,
        metrics,
        version=(summary.get("versions") or {}).get(task),
        num_fewshot=(summary.get("n-shot") or {}).get(task),
        fingerprint=items_fingerprint(questions),
        chat_template_hash=summary.get("chat_template_sha"),
    )
    if not summary:
        record["outputs_from_file"] = True  # whether prompts had a template is not known; their hashes are compared
    if num_samples > 1:
        record["num_samples"] = num_samples
    if kwargs := ((summary.get("configs") or {}).get(task) or {}).get("generation_kwargs"):
        record["generation_kwargs"] = kwargs
    return record


def _higher_is_better(summary: Mapping[str, Any], task: str, name: str) -> bool | None:
    metric = re.split(r",| (?:avg|pass)@", name)[0]
    found = ((summary.get("higher_is_better") or {}).get(task) or {}).get(metric)
    return found if isinstance(found, bool) else None
