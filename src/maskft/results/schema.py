"""The result file: what one evaluation of one model measured, item by item. ``docs/results.md`` shows one in full.

Schema version 1, a JSON object::

    schema_version  1
    kind            "evaluation"
    name            label of the model in tables; results of one name and different seeds are seeds of one method
    created         ISO 8601, UTC
    maskft_version  version that wrote the file
    model           name_or_path; and, null where there is none: fingerprint, adapter, mask_fingerprint, adapter_sha256,
                    config_sha256, method, seed
    settings        what else shaped the numbers: batch size, dtype, max_new_tokens, ...
    training        optional: how the model came about, for the tables of the paper; see `TRAINING_FIELDS`
    environment     python, platform, cpu, num_threads, packages, device
    tasks           task name -> version, num_fewshot, items_fingerprint, chat_template_hash, metrics, items; optional:
                    data_sha256
      metrics       metric name -> value, stderr, num_items, higher_is_better, unit
      items         one object per item: id, a number per metric, num_tokens for units per token, and anything else

Values are in [0, 1] (unit "fraction") or in their unit (nll: "nats/token"), never in percent. A metric whose unit ends
in "/token" is a mean over tokens: an item's number is its own mean per token and counts ``num_tokens`` times. A number
that could not be computed is null, in the item and then in the metric. A metric that no item has is a summary of its
own (a win rate fitted over all items, say): it appears in tables and is not compared item by item.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import files
from .._version import __version__
from ..errors import UserError
from ..files import digest, read_text, write_text
from ..runtime import environment
from .statistics import weighted_mean

SCHEMA_VERSION = 1

NUMBER_OR_NULL = (int, float, type(None))
TEXT_OR_NULL = (str, type(None))
RESULT_FIELDS = {
    "name": str,
    "created": str,
    "maskft_version": str,
    "model": dict,
    "settings": dict,
    "environment": dict,
    "tasks": dict,
}
MODEL_FIELDS = {
    "name_or_path": str,
    "fingerprint": TEXT_OR_NULL,
    "adapter": TEXT_OR_NULL,
    "mask_fingerprint": TEXT_OR_NULL,
    "adapter_sha256": TEXT_OR_NULL,
    "config_sha256": TEXT_OR_NULL,
    "method": TEXT_OR_NULL,
    "seed": (int, type(None)),
}
OPTIONAL_MODEL_FIELDS = ("adapter_sha256", "config_sha256")  # results of earlier versions lack them
# Of the optional block "training"; each may be left out or null. Epochs and tokens are counted from the pre-trained
# model on, so they include those of the run that a mask starts from.
TRAINING_FIELDS = {
    "base": TEXT_OR_NULL,  # the pre-trained model, e.g. meta-llama/Llama-2-7b-hf
    "domain": TEXT_OR_NULL,  # one of DOMAINS: whose data the model was last trained on
    "mixed": (bool, type(None)),  # whether full fine-tuning (under a mask: of its start) used all domains
    "checkpoint": TEXT_OR_NULL,  # one of CHECKPOINTS: best on held-out data, or as the last step left it
    "selection": TEXT_OR_NULL,  # of a mask: topk or threshold
    "variant": TEXT_OR_NULL,  # name of a control that is not in the paper; keeps it out of the paper's tables
    "num_epochs": NUMBER_OR_NULL,  # until this checkpoint
    "num_train_tokens": NUMBER_OR_NULL,
    "complete_num_epochs": NUMBER_OR_NULL,  # until the end of the run, whichever checkpoint this is
    "complete_num_train_tokens": NUMBER_OR_NULL,
}
DOMAINS = ("math", "coding", "instruction")
CHECKPOINTS = ("best", "last")
TASK_FIELDS = {
    "version": (str, int, float),
    "num_fewshot": int,
    "items_fingerprint": str,
    "chat_template_hash": TEXT_OR_NULL,
    "metrics": dict,
    "items": list,
}
METRIC_FIELDS = {
    "value": NUMBER_OR_NULL,
    "stderr": NUMBER_OR_NULL,
    "num_items": int,
    "higher_is_better": bool,
    "unit": str,
}

Result = dict[str, Any]


def build_result(
    name: str,
    model: Mapping,
    settings: Mapping,
    tasks: Mapping[str, Mapping],
    training: Mapping | None = None,
    device: str | None = None,
) -> Result:
    """Return a result of this schema version, dated now, with the environment it was made in.

    Args:
        name: Label of the model in tables, e.g. ``"mask"``.
        model: The fields of ``model``; those left out are null.
        settings: What else shaped the numbers (JSON-able).
        tasks: Task name -> `build_task`.
        training: Fields of `TRAINING_FIELDS`, where known.
        device: What the model ran on, where known: the name of a GPU, or ``cpu``.
    """
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluation",
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "maskft_version": __version__,
        "model": dict.fromkeys(MODEL_FIELDS) | dict(model),
        "settings": dict(settings),
        "environment": environment() | {"device": device},
        "tasks": {task: dict(record) for task, record in tasks.items()},
    }
    if training is not None:
        result["training"] = dict(training)
    return validate_result(result)


def build_task(
    items: Sequence[Mapping],
    metrics: Mapping[str, Mapping],
    *,
    version: str | int | float,
    num_fewshot: int,
    fingerprint: str,
    chat_template_hash: str | None = None,
) -> dict:
    """Return the record of one task: ``metrics`` from `metric_from_items`, ``fingerprint`` from `items_fingerprint`."""
    return {
        "version": version,
        "num_fewshot": num_fewshot,
        "items_fingerprint": fingerprint,
        "chat_template_hash": chat_template_hash,
        "metrics": {name: dict(metric) for name, metric in metrics.items()},
        "items": [dict(item) for item in items],
    }


def metric_from_items(
    items: Sequence[Mapping], name: str, *, unit: str | None = None, higher_is_better: bool | None = None
) -> dict:
    """Summarise the per-item numbers called ``name`` as a metric with its standard error.

    Args:
        items: Item records, each with a number under ``name`` (null where it could not be computed).
        name: Field of the items.
        unit: "fraction", "nats/token", ...; by default "nats/token" for ``nll``, "fraction" for values in [0, 1], else
            "score". With a unit per token the items are weighted by their ``num_tokens``.
        higher_is_better: By default true, except for ``nll``.

    Returns:
        The metric record; value and stderr are None if an item has no finite number, stderr alone for a single item.

    Raises:
        UserError: If there are no items, or one lacks ``name`` or the number of tokens that its unit needs.
    """
    if not items:
        raise UserError(f"no items to compute {name!r} from: give at least one")
    for item in items:
        if name not in item:
            raise UserError(f"item {item.get('id')!r} has no {name!r}: give every item a number, or null")
    values = [item[name] for item in items]
    if unit is None:
        is_share = all(0 <= value <= 1 for value in values if _is_finite(value))
        unit = "nats/token" if name == "nll" else "fraction" if is_share else "score"
    weights = item_weights(items, unit)
    value = stderr = None
    if all(_is_finite(value) for value in values):
        value, stderr = weighted_mean(values, weights)
        stderr = stderr if math.isfinite(stderr) else None
    return {
        "value": value,
        "stderr": stderr,
        "num_items": len(items),
        "higher_is_better": name != "nll" if higher_is_better is None else higher_is_better,
        "unit": unit,
    }


def item_weights(items: Sequence[Mapping], unit: str) -> list[int] | None:
    """Return the items' ``num_tokens`` for a unit per token, None (equal weights) for any other unit."""
    if not unit.endswith("/token"):
        return None
    for item in items:
        num_tokens = item.get("num_tokens")
        if not _is_finite(num_tokens) or num_tokens <= 0:
            raise UserError(f"item {item.get('id')!r} has num_tokens {num_tokens!r}: {unit} needs a number above 0")
    return [item["num_tokens"] for item in items]


def has_items(items: Sequence[Mapping], metric: str) -> bool:
    """Tell whether a metric is measured item by item, and not a summary that only the task has."""
    return any(metric in item for item in items)


def items_fingerprint(items: Iterable[Mapping]) -> str:
    """Return the sha256 of the items' ``id``, ``prompt`` and ``reference``, whatever the order of the items.

    Two results with the same fingerprint were measured on the same questions, worded alike. Prompts and references may
    be anything JSON can hold (text, a list of messages, None).
    """
    lines = sorted(json.dumps([item["id"], item["prompt"], item["reference"]], sort_keys=True) for item in items)
    return digest("\n".join(lines))


def data_sha256(rows: Iterable) -> str:
    """Return the sha256 of rows of data in their order: the identity of a data source, wherever its files lie."""
    return digest("".join(json.dumps(row, sort_keys=True, default=str) + "\n" for row in rows))


def write_result(path: str | os.PathLike, result: Result) -> None:
    """Validate ``result`` and write it to ``path`` whole or not at all; missing folders are made.

    Raises:
        UserError: If the result is not of this schema, holds NaN or infinity, or the file cannot be written.
    """
    validate_result(result, path)
    try:
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{path}: a result cannot hold NaN or infinity: give null for what has no value") from error
    write_text(path, text + "\n")


def read_result(path: str | os.PathLike) -> Result:
    """Read and validate a result from a file, which may be gzipped (``.json.gz``), or the ``result.json`` of a folder.

    Raises:
        UserError: If it is missing, not JSON, not a result, or of a newer schema.
    """
    file = result_file(path)
    try:
        result = json.loads(read_text(file), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise UserError(f"{file}: no such result file: give one that `maskft evaluate` wrote, or its folder") from None
    except OSError as error:
        raise UserError(f"{file}: the result cannot be read ({error.strerror or error}): check the path") from error
    except (ValueError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file}: not a result file, not JSON ({error}): evaluate again with `maskft evaluate`"
        ) from error
    return validate_result(result, file)


def result_file(path: str | os.PathLike) -> Path:
    """Return ``path``, or the result file in it if it is a folder."""
    return Path(path) / files.RESULT if Path(path).is_dir() else Path(path)


def validate_result(result: Any, source: str | os.PathLike = "result") -> Result:
    """Return ``result`` if it is of this schema and its metrics agree with its items; ``source`` names it in errors.

    Raises:
        UserError: The first thing that is wrong, in one line.
    """
    if not isinstance(result, dict) or not isinstance(result.get("schema_version"), int):
        raise UserError(f"{source}: not a result file, no schema_version: give one that `maskft evaluate` wrote")
    if result["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"{source}: schema version {result['schema_version']} is newer than this maskft reads "
            f"({SCHEMA_VERSION}): upgrade maskft"
        )
    if result.get("kind") != "evaluation":
        raise UserError(f"{source}: kind {result.get('kind')!r} is not an evaluation: give one of `maskft evaluate`")
    problem = next(_problems(result), None)
    if problem:
        raise UserError(f"{source}: not a valid result: {problem}; evaluate again with `maskft evaluate`")
    return result


def _problems(result: Result) -> Iterable[str]:
    """Yield what is wrong with a result, in the order of the file."""
    yield from _field_problems(result, RESULT_FIELDS, "the result")
    yield from _field_problems(dict.fromkeys(OPTIONAL_MODEL_FIELDS) | result["model"], MODEL_FIELDS, "model")
    if "training" in result:
        yield from _training_problems(result["training"])
    if not result["name"]:
        yield "name is empty"
    if not result["tasks"]:
        yield "tasks is empty"
    for task_name, task in result["tasks"].items():
        where = f"task {task_name!r}"
        yield from _field_problems(task, TASK_FIELDS, where)
        yield from _item_problems(task["items"], where)
        for metric_name, metric in task["metrics"].items():
            yield from _metric_problems(metric_name, metric, task["items"], f"{where}, metric {metric_name!r}")


def _field_problems(mapping: Any, fields: Mapping, where: str) -> Iterable[str]:
    if not isinstance(mapping, dict):
        yield f"{where} is not an object"
        return
    for field, types in fields.items():
        if field not in mapping:
            yield f"{where} has no {field!r}"
        elif not isinstance(mapping[field], types):
            yield f"{where} has {field} {str(mapping[field])[:40]!r}, of the wrong type"


def _training_problems(training: Any) -> Iterable[str]:
    if not isinstance(training, dict):
        yield "training is not an object"
        return
    yield from _field_problems(dict.fromkeys(TRAINING_FIELDS) | training, TRAINING_FIELDS, "training")
    for field, known in (("domain", DOMAINS), ("checkpoint", CHECKPOINTS)):
        if training.get(field) not in (*known, None):
            yield f"training has {field} {training[field]!r}, not one of {', '.join(known)}"


def _item_problems(items: list, where: str) -> Iterable[str]:
    if not items:
        yield f"{where} has no items"
    seen = set()
    for item in items:
        yield from _field_problems(item, {"id": str}, f"an item of {where}")
        if item["id"] in seen:
            yield f"{where} has two items with id {item['id']!r}"
        seen.add(item["id"])


def _metric_problems(name: str, metric: Any, items: list[dict], where: str) -> Iterable[str]:
    yield from _field_problems(metric, METRIC_FIELDS, where)
    if not has_items(items, name):
        return
    for item in items:
        if name not in item or not isinstance(item[name], NUMBER_OR_NULL):
            yield f"{where}: item {item['id']!r} has {item.get(name)!r}, not a number or null"
    if metric["num_items"] != len(items):
        yield f"{where} has num_items {metric['num_items']} for {len(items)} items"
    try:
        expected = metric_from_items(items, name, unit=metric["unit"])["value"]
    except UserError as error:  # no num_tokens for a unit per token
        yield f"{where}: {error}"
        return
    value = metric["value"]
    agrees = (
        value == expected if None in (value, expected) else math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9)
    )
    if not agrees:
        yield f"{where} has value {value}, its items give {expected}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")
