"""The result file: one evaluation of one model, item by item. ``docs/results.md`` shows one in full.

Results are plain dictionaries, in memory as on disk; the types below name their fields, and pydantic checks a file
against them. Keys that are not named here are kept and ignored.

Values are in [0, 1] (unit "fraction") or in their unit (nll: "nats/token"), never in percent. A metric whose unit ends
in "/token" is a mean over tokens: an item's number is its own mean per token and counts ``num_tokens`` times. A number
that could not be computed is null, in the item and then in the metric. A metric that no item has is a summary of the
task (a fitted win rate, say): it appears in tables and is not compared item by item.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeGuard, cast, get_args

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from maskft_common import __version__, layout, schema
from maskft_common.environment import environment
from maskft_common.errors import UserError
from maskft_common.files import digest, parse_json, read_text, write_text
from maskft_common.schema import first_problem

from .statistics import weighted_mean

SCHEMA_VERSION = 1
# Characters of a result: some 300,000 answered rows. A compressed file of a stranger must not fill the memory.
MAX_RESULT_LENGTH = 2**29
BEFORE = "before: "  # begins the name of a task that measures an ability from before the training

Domain = Literal["math", "coding", "instruction"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)

# One evaluated item: a text ``id``, a number or null per metric, ``num_tokens`` for units per token, and anything else.
# ``cluster_id``: items of one label (questions on one passage) depend on each other.
Item = dict[str, Any]


class ModelRecord(TypedDict):
    """The evaluated model; null where there is none (a plain model has no adapter)."""

    name_or_path: str
    fingerprint: str | None
    adapter: str | None
    mask_fingerprint: str | None
    method: str | None
    seed: int | None
    adapter_sha256: NotRequired[str | None]
    num_bytes: NotRequired[int | None]  # of the adapter or change: masks coded, all other numbers in bfloat16
    config_sha256: NotRequired[str | None]


class TrainingBlock(TypedDict, total=False):
    """How the model came about, for the tables of the paper.

    Epochs and tokens count from the pre-trained model, so those of a mask include the run it started from.
    """

    base: str | None  # the pre-trained model, e.g. meta-llama/Llama-2-7b-hf
    domain: Domain | None  # of the data the model was last trained on
    mixed: bool | None  # whether full fine-tuning (of a mask: of its start) used all domains
    checkpoint: Literal["best", "last"] | None  # best on held-out data, or as the last step left it
    selection: str | None  # of a mask: topk or threshold
    variant: str | None  # name of a control that is not in the paper; keeps it out of the paper's tables
    num_epochs: float | None  # until this checkpoint
    num_train_tokens: int | None
    complete_num_epochs: float | None  # until the end of the run, whichever checkpoint this is
    complete_num_train_tokens: int | None


class MetricRecord(TypedDict):
    """One metric of a task, in its unit; ``value`` is null where an item has none, ``stderr`` also for one item."""

    value: float | None
    stderr: float | None
    num_items: int
    higher_is_better: bool
    unit: str


class TaskRecord(TypedDict):
    """One task: how it was asked, its metrics (the first is the main one) and every item."""

    version: str | int | float | None
    num_fewshot: int | None
    items_fingerprint: str
    chat_template_hash: str | None
    metrics: dict[schema.Name, MetricRecord]
    items: Annotated[list[Item], Field(min_length=1)]
    data_sha256: NotRequired[str]
    generation_kwargs: NotRequired[dict[str, Any] | None]
    data_file: NotRequired[str]  # of the user's own rows: the test set's file, by which tables name it


# A lambda, because `_check_task` is defined below the types.
CheckedTask = Annotated[TaskRecord, AfterValidator(lambda task: _check_task(task))]


class EnvironmentRecord(TypedDict):
    """The software that made a result; further keys are kept and ignored."""

    packages: dict[str, Any]


class Result(TypedDict):
    """The whole file. Results of one name and different seeds are seeds of one method."""

    schema_version: int
    kind: Literal["evaluation"]
    name: schema.Name
    created: str  # ISO 8601, UTC
    maskft_version: str
    model: ModelRecord
    settings: dict[str, Any]  # other influences on the numbers: dtype, batch size, ...
    environment: EnvironmentRecord
    tasks: Annotated[dict[schema.Name, CheckedTask], Field(min_length=1)]
    training: NotRequired[TrainingBlock]
    study: NotRequired[dict[str, Any]]  # of a result of `maskft study`: study, run, role, ...


def build_result(
    name: str,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    tasks: Mapping[str, TaskRecord],
    training: TrainingBlock | None = None,
    device: str | None = None,
) -> Result:
    """Return a result of this schema version, dated now, with the environment it was made in.

    Args:
        name: Label of the model in tables, e.g. ``"mask"``.
        model: The fields of `ModelRecord`; those left out are null.
        settings: Other influences on the numbers (JSON-able).
        tasks: Task name -> `build_task`.
        training: How the model came about, where known.
        device: Device that the model ran on, where known: the name of a GPU, or ``cpu``.

    Raises:
        UserError: If it is not of this schema.
    """
    # Every key of a model is there, null where it is not known, so that readers need no defaults.
    all_null = dict.fromkeys(ModelRecord.__annotations__)
    task_records = {task: dict(record) for task, record in tasks.items()}
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluation",
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "maskft_version": __version__,
        "model": all_null | dict(model),
        "settings": dict(settings),
        "environment": environment() | {"device": device},
        "tasks": task_records,
    }
    if training is not None:
        result["training"] = dict(training)
    return check_result(result)


def build_task(
    items: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, MetricRecord],
    *,
    version: str | int | float | None,
    num_fewshot: int | None,
    fingerprint: str,
    chat_template_hash: str | None = None,
) -> TaskRecord:
    """Return the record of one task: ``metrics`` from `metric_from_items`, ``fingerprint`` from `items_fingerprint`."""
    # Copies of the dictionaries: what the caller does with its own later is not part of the result.
    return {
        "version": version,
        "num_fewshot": num_fewshot,
        "items_fingerprint": fingerprint,
        "chat_template_hash": chat_template_hash,
        "metrics": dict(metrics),
        "items": [dict(item) for item in items],
    }


def metric_from_items(
    items: Sequence[Mapping[str, Any]],
    name: str,
    *,
    unit: str | None = None,
    higher_is_better: bool | None = None,
) -> MetricRecord:
    """Summarise the per-item numbers called ``name`` as a metric with its standard error.

    Args:
        items: Items, each with a number under ``name`` (null where it could not be computed).
        name: Key of the items.
        unit: "fraction", "nats/token", ...; by default "nats/token" for ``nll``, "fraction" for values in [0, 1], else
            "score". With a unit per token the items are weighted by their ``num_tokens``.
        higher_is_better: By default true, except for ``nll``.

    Returns:
        The metric; value and stderr are None if an item has no finite number, only stderr for a single item.

    Raises:
        UserError: If there are no items, or one lacks ``name`` or the number of tokens that its unit needs.
    """
    if not items:
        raise UserError(f"no items to compute {name!r} from: give at least one")
    for item in items:
        if name not in item:
            raise UserError(f"item {item.get('id')!r} has no {name!r}: give every item a number, or null")
    # Python reads NaN and infinity, and integers beyond the floats, from JSON: none of them is a value.
    values = [item[name] for item in items]
    finite = [value for value in values if is_finite(value)]

    is_nll = name == "nll"
    # A guess, which `comparable` allows for: the values of one model may be in [0, 1] by chance.
    if unit is None:
        is_share = all(0 <= value <= 1 for value in finite)
        unit = "fraction" if is_share else "score"
        if is_nll:
            unit = "nats/token"
    if higher_is_better is None:
        higher_is_better = not is_nll

    # No mean over the items that have a number: they may be the easy ones.
    weights = item_weights(items, unit)
    value = None
    stderr = None
    if len(finite) == len(values):
        clusters = cluster_ids(items)
        value, stderr = weighted_mean(values, weights, clusters)
        if not math.isfinite(stderr):
            stderr = None
    return {
        "value": value,
        "stderr": stderr,
        "num_items": len(items),
        "higher_is_better": higher_is_better,
        "unit": unit,
    }


def item_weights(
    items: Sequence[Mapping[str, Any]],
    unit: str,
) -> list[float] | None:
    """Return the items' ``num_tokens`` for a unit per token, None (equal weights) for any other unit.

    Raises:
        UserError: If an item has no number of tokens above 0, where its unit needs one.
    """
    if not unit.endswith("/token"):
        return None
    for item in items:
        num_tokens: object = item.get("num_tokens")  # of anyone's file, so of any type
        if not is_finite(num_tokens) or num_tokens <= 0:
            raise UserError(f"item {item.get('id')!r} has num_tokens {num_tokens!r}: {unit} needs a number above 0")
    # Whole numbers as they are: numpy makes floats of them.
    return [item["num_tokens"] for item in items]


def cluster_ids(items: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the items' ``cluster_id``, None where no item has one.

    Raises:
        UserError: If only some items have one, or one is neither a text nor a whole number.
    """
    found = [item.get("cluster_id") for item in items]
    if all(each is None for each in found):
        return None

    # All or none: an item without a label may belong to any cluster.
    for item, each in zip(items, found, strict=True):
        if not isinstance(each, str | int):
            raise UserError(f"item {item.get('id')!r} has cluster_id {each!r}: give every item a text, or none of them")
    # As texts: a file may have numbers and texts, which cannot be sorted together.
    return [str(each) for each in found]


def has_items(
    items: Sequence[Mapping[str, Any]],
    metric: str,
) -> bool:
    """Tell whether a metric is measured item by item, and is not a summary of the task."""
    return any(metric in item for item in items)


def items_fingerprint(items: Iterable[Mapping[str, Any]]) -> str:
    """Return the sha256 of the items' ``id``, ``prompt`` and ``reference``, whatever the order of the items.

    Two results with the same fingerprint were measured on the same questions, worded alike. Prompts and references may
    be anything JSON can hold (text, a list of messages, None).
    """
    # Sorted below, because files may have the same items in different orders.
    lines: list[str] = []
    for item in items:
        # As JSON, which keeps the parts apart: joined texts could be equal with the parts divided in another way.
        question = [item["id"], item["prompt"], item["reference"]]
        lines.append(json.dumps(question, sort_keys=True))
    return digest("\n".join(sorted(lines)))


def data_sha256(rows: Iterable[Any]) -> str:
    """Return the sha256 of rows of data in their order: the identity of a data source, whatever its path."""
    lines: list[str] = []
    for row in rows:
        # Rows may hold dates and other values that JSON lacks: they count by their text.
        line = json.dumps(row, sort_keys=True, default=str)
        lines.append(f"{line}\n")
    return digest("".join(lines))


def write_result(
    path: str | os.PathLike[str],
    result: Result,
) -> None:
    """Validate ``result`` and write it to ``path``, whole or not at all; missing folders are created.

    Raises:
        UserError: If the result is not of this schema, holds NaN or infinity, or the file cannot be written.
    """
    # Before the file is opened: a wrong result must not replace a good one.
    check_result(result, path)
    try:
        text = json.dumps(
            result,
            indent=1,
            ensure_ascii=False,
            allow_nan=False,
        )
    except ValueError as error:
        raise UserError(f"{path}: a result cannot hold NaN or infinity: give null where there is no value") from error
    write_text(path, text + "\n")


def read_result(path: str | os.PathLike[str]) -> Result:
    """Read and validate a result from a file, which may be gzipped (``.json.gz``), or the ``result.json`` of a folder.

    Raises:
        UserError: If it is missing, not JSON, not a result, or of a newer schema.
    """
    file = result_file(path)
    try:
        result = parse_json(read_text(file, MAX_RESULT_LENGTH), parse_constant=refuse_constant)
    except FileNotFoundError:
        raise UserError(f"{file}: no such result file: give one that `maskft evaluate` wrote, or its folder") from None
    except OSError as error:
        raise UserError(f"{file}: the result cannot be read ({error.strerror or error}): check the path") from error
    except (ValueError, EOFError, zlib.error) as error:
        # The last two come from a damaged gzip file.
        raise UserError(
            f"{file}: not a result file, not JSON ({error}): evaluate again with `maskft evaluate`"
        ) from error
    return check_result(result, file)


def result_file(path: str | os.PathLike[str]) -> Path:
    """Return ``path``, or the result file in it if it is a folder."""
    path = Path(path)
    if path.is_dir():
        return path / layout.RESULT
    return path


def check_result(
    result: Any,
    source: str | os.PathLike[str] = "result",
) -> Result:
    """Return ``result`` if it is of this schema and its metrics agree with its items; ``source`` names it in errors.

    Raises:
        UserError: The first thing that is wrong, in one line.
    """
    # The version before anything else: a newer schema may break every other check.
    version = None
    if isinstance(result, dict):
        version = result.get("schema_version")
    if not isinstance(version, int):
        raise UserError(f"{source}: not a result file, no schema_version: give one that `maskft evaluate` wrote")
    # Version 1 is the first: there are no earlier ones to convert.
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{source}: schema version {version} is newer than this maskft reads ({SCHEMA_VERSION}): upgrade maskft"
        )
    # Strict: without it pydantic would accept the text "1" for a number.
    try:
        _adapter().validate_python(result, strict=True)
    except ValidationError as error:
        raise UserError(
            f"{source}: not a valid result: {first_problem(error, Result)}; evaluate again with `maskft evaluate`"
        ) from None
    return cast(Result, result)


@cache
def _adapter() -> TypeAdapter[Result]:
    # Cached, and not made at import: pydantic compiles the whole schema.
    return TypeAdapter(Result)


def _check_task(task: TaskRecord) -> TaskRecord:
    """Raise for items without an id or with equal ids, and for metrics that differ from those of the items."""
    # Items are paired by their ids.
    items = task["items"]
    seen: set[str] = set()
    for index, item in enumerate(items):
        identity = item.get("id")
        if not isinstance(identity, str):
            raise ValueError(f"item {index} has id {identity!r}: every item needs a text")
        if identity in seen:
            raise ValueError(f"two items have the id {identity!r}")
        seen.add(identity)

    try:
        cluster_ids(items)
    except UserError as error:
        # pydantic reports a ValueError with its place in the file.
        raise ValueError(str(error)) from None

    for name, metric in task["metrics"].items():
        # Items first, so that the message names the one that is wrong. A metric without items is a summary of the task,
        # which nothing can be checked against.
        if has_items(items, name):
            _check_metric(name, metric, items)
        _check_numbers(name, metric)
    return task


def _check_numbers(name: str, metric: MetricRecord) -> None:
    """Raise for a value or an error that no metric can have."""
    value = metric["value"]
    stderr = metric["stderr"]
    # JSON has no infinity, but 1e400 is read as one.
    for key, number in (("value", value), ("stderr", stderr)):
        if number is not None and not is_finite(number):
            raise ValueError(f"{name} has {key} {number}: give a number, or null")
    if stderr is not None and stderr < 0:
        raise ValueError(f"{name} has stderr {stderr}: an error is not below 0")
    if metric["unit"] == "fraction" and value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name} has value {value}, and a fraction is in [0, 1], not percent")


def _check_metric(
    name: str,
    metric: MetricRecord,
    items: list[Item],
) -> None:
    """Raise for values of items that are not numbers or out of range, and for a metric that is not their mean."""
    # Items are checked one by one, so that the message names the first that is wrong.
    is_fraction = metric["unit"] == "fraction"
    for item in items:
        identity = item["id"]
        has_number = name in item and isinstance(item[name], int | float | None)
        if not has_number:
            raise ValueError(f"item {identity!r} has {name} {item.get(name)!r}, not a number or null")
        value = item[name]
        if value is not None and abs(value) > sys.float_info.max:  # 1e400 is read as infinity
            raise ValueError(f"item {identity!r} has a {name} of more than {sys.float_info.max:.0e}")
        if is_fraction and is_finite(value) and not 0 <= value <= 1:
            raise ValueError(f"item {identity!r} has {name} {value}, and a fraction is in [0, 1], not percent")

    if metric["num_items"] != len(items):
        raise ValueError(f"{name} has num_items {metric['num_items']} for {len(items)} items")

    value = metric["value"]
    # The mean alone is compared. Errors of an earlier version, or of another program, may be computed in another way.
    recomputed = metric_from_items(items, name, unit=metric["unit"])
    expected = recomputed["value"]
    if value is None or expected is None:
        agrees = value is expected
    else:
        # Close, and not equal: another machine may add the items in another order.
        agrees = math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9)
    if not agrees:
        raise ValueError(f"{name} has value {value}, its items give {expected}")


def run_identity(run_id: str) -> str:
    """Return the hash in the id of a study's run, by which runs are compared; an id without a hash stays as it is.

    The id is METHOD-sSEED-HASH. The hash is of all settings, so equal runs have equal hashes. The rest is a label: the
    method may be renamed, and studies that share a folder share runs, which each may name differently.
    """
    # A stranger's file may have anything in its block `study`.
    found = re.search(r"-([0-9a-f]{10})$", str(run_id))
    return found[1] if found else run_id


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that a float can hold; JSON's integers have any size."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def refuse_constant(name: str) -> None:
    """Raise for NaN and infinity where JSON is parsed: Python reads them, and other programs cannot.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"it holds {name}")
