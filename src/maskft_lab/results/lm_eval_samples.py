"""lm-eval's ``samples_TASK_DATE.jsonl`` as a log, with what ``results_DATE.json`` beside it says, where it is there.

The format is that of lm-eval 0.4.5 to 0.4.13 (``loggers/evaluation_tracker.py``): a line per document and filter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maskft_base.errors import UserError
from maskft_base.files import open_text, parse_json, read_text

from .elsewhere import Asked, Log, add_samples, as_number, base_name, metrics_of, set_cluster
from .schema import build_task, items_fingerprint

_FILE_NAME = re.compile(r"samples_(?P<task>.+?)(_(?P<date>\d{4}-\d\d-\d\dT[\d.+-]+))?\.jsonl(\.gz)?")
_NEEDED = ("doc_id", "filter", "metrics", "prompt_hash", "target_hash", "doc_hash", "resps")
_SETTINGS = (
    *("limit", "gen_kwargs", "model_dtype", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed"),
    *("system_instruction_sha", "fewshot_as_multiturn"),
)

Items = dict[str, dict[str, Any]]  # id -> item, or question


def is_samples_file(path: Path) -> bool:
    """Tell whether a file is named as lm-eval names its samples."""
    return bool(_FILE_NAME.fullmatch(path.name))


def read_samples(path: Path, asked: Asked) -> Log:
    """Return a samples file as a log; the model is called as lm-eval's results call it, else as the folder is.

    Raises:
        UserError: If it has no samples, or not those of lm-eval 0.4.5 or later.
        ValueError: If it cannot be read; other exceptions where its content is not what it should be.
    """
    named = _FILE_NAME.fullmatch(path.name)
    assert named is not None
    task, beside = named["task"], sorted(path.parent.glob(f"*_{named['date']}.json")) if named["date"] else []
    try:
        summary: dict[str, Any] = parse_json(read_text(beside[0])) if beside else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{beside[0]}: cannot be read ({error}): remove the file or evaluate again") from None
    items, values, questions, num_samples = _parsed(path, asked)
    for name, by_item in values.items():
        # Others are parts of a summary (a corpus score, say).
        is_score = all(len(scores) in (1, num_samples) and None not in scores for scores in by_item.values())
        if by_item.keys() == items.keys() and is_score and _is_mean(summary, task, name, by_item):
            add_samples(list(items.values()), name, [by_item[identity] for identity in items])
    higher = (summary.get("higher_is_better") or {}).get(task) or {}
    known = {name: higher[base_name(name)] for name in values if isinstance(higher.get(base_name(name)), bool)}
    metrics = metrics_of(list(items.values()), known, asked, path)
    if not metrics:
        raise UserError(f"{path}: no metric is a number per item, so there is nothing to compare")
    record = build_task(
        list(items.values()),
        metrics,
        version=(summary.get("versions") or {}).get(task),
        num_fewshot=(summary.get("n-shot") or {}).get(task),
        fingerprint=items_fingerprint(questions.values()),
        chat_template_hash=summary.get("chat_template_sha"),
    )
    if not summary:
        record["outputs_from_file"] = True  # whether prompts had a template is not known; their hashes are compared
    if num_samples > 1:
        record["num_samples"] = num_samples
    if kwargs := ((summary.get("configs") or {}).get(task) or {}).get("generation_kwargs"):
        record["generation_kwargs"] = kwargs
    said = {**summary, **(summary.get("config") or {})}
    settings = {key: said[key] for key in _SETTINGS if said.get(key) is not None}
    versions = {name: summary.get(f"{name}_version") for name in ("lm_eval", "transformers")}
    packages = {name: version for name, version in versions.items() if version}
    model = str(summary.get("model_name") or path.resolve().parent.name)
    return Log(path, model, task, record, settings, packages)


def _parsed(path: Path, asked: Asked) -> tuple[Items, dict[str, dict[str, list[Any]]], Items, int]:
    """Return the items, metric -> item -> its samples' scores, the questions, and the number of samples per item."""
    items: Items = {}
    values: dict[str, dict[str, list[Any]]] = {}
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
        set_cluster(item, document if isinstance(document, dict) else {}, asked, path)
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
    return items, values, questions, num_samples


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}): is the file whole?") from None


def _is_mean(summary: Mapping[str, Any], task: str, name: str, by_item: Mapping[str, list[Any]]) -> bool:
    """Whether lm-eval reports the mean over the items, where it reports anything (of a perplexity it does not)."""
    reported = (summary.get("results") or {}).get(task) or {}
    expected = reported.get(name if "," in name else f"{name},none")
    mean = math.fsum(math.fsum(scores) / len(scores) for scores in by_item.values()) / len(by_item)
    return not isinstance(expected, int | float) or math.isclose(expected, mean, rel_tol=1e-6)
