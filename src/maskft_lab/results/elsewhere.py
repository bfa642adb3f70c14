"""Results of other harnesses, read as results: the ground that lm-eval's samples and inspect-ai's logs share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskft_base.errors import UserError
from maskft_base.files import digest

from .proportions import pass_at_k
from .schema import SCHEMA_VERSION, MetricRecord, Result, TaskRecord, check_result, is_finite, metric_from_items

MAX_LABEL = 60  # characters of a cluster's label; longer ones (a passage) are known by their digest
# Words of a metric's name that tell, where its harness does not, whether more or less of it is better.
_HIGHER = {"acc", "accuracy", "bleu", "chrf", "correct", "em", "f1", "match", "mcc", "meteor", "pass", "rouge"}
_HIGHER |= {"rouge1", "rouge2", "rougel"}
_LOWER = {"bits", "brier", "cer", "error", "loss", "mae", "mse", "nll", "perplexity", "ppl", "rmse", "ter", "wer"}

Directions = Mapping[str, bool]  # metric -> whether more of it is better


class Asked(NamedTuple):
    """What the user says of logs that they do not say themselves.

    Attributes:
        cluster_by: Field of the documents or metadata whose values are the clusters; None: ``cluster_id``, where it is.
        directions: Metric -> whether more of it is better.
    """

    cluster_by: str | None = None
    directions: Directions = {}


class Log(NamedTuple):
    """One file: a task of a model."""

    source: Path
    model: str
    task: str
    record: TaskRecord
    settings: dict[str, Any]  # differences are noted in a comparison
    packages: dict[str, Any]  # package -> version, of the machine that measured
    created: str = ""  # ISO 8601


def as_number(value: Any) -> float | int | None:
    """Return a score as a number, None if it is none: true and false are 1 and 0."""
    if isinstance(value, bool):
        return int(value)
    return value if is_finite(value) else None


def set_cluster(item: dict[str, Any], fields: Mapping[str, Any], asked: Asked, place: str | Path) -> None:
    """Give an item its cluster where there is one: the value of the field that was asked for, or ``cluster_id``."""
    if asked.cluster_by is None and "cluster_id" not in fields:
        return
    value = fields.get(asked.cluster_by or "cluster_id")
    if value is None:
        raise UserError(f"{place}, {asked.cluster_by}: not a field of the items: name one that every item has")
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    item["cluster_id"] = text if len(text) <= MAX_LABEL else digest(text)[:16]


def add_samples(items: Sequence[dict[str, Any]], name: str, samples: Sequence[Sequence[float | int | None]]) -> None:
    """Give every item its score: the one it has, or of k samples ``avg@k`` and, for right and wrong, ``pass@j``.

    Args:
        items: The items, changed in place.
        name: Name of the score.
        samples: The scores of each item's samples, as many for each; None where there is no score.

    Raises:
        UserError: If items have different numbers of samples.
    """
    count = len(samples[0])
    for item, scores in zip(items, samples, strict=True):
        if len(scores) != count:
            raise UserError(
                f"{name}: item {items[0]['id']!r} has {count} samples, {item['id']!r} {len(scores)}: give a whole log"
            )
    is_binary = all(score in (0, 1) for scores in samples for score in scores)
    for item, scores in zip(items, samples, strict=True):
        known = [score for score in scores if score is not None]
        value = sum(known) / count if len(known) == count else None
        item[name if count == 1 else f"{name} avg@{count}"] = scores[0] if count == 1 else value
        for k in _powers_up_to(count) if is_binary and count > 1 else []:
            item[f"{name} pass@{k}"] = float(pass_at_k([sum(known)], count, k)[0])


def _powers_up_to(count: int) -> list[int]:
    powers = [2**power for power in range(1, count.bit_length()) if 2**power <= count]
    return powers if powers and powers[-1] == count else [*powers, count]


def metrics_of(
    items: Sequence[Mapping[str, Any]], known: Directions, asked: Asked, source: Path
) -> dict[str, MetricRecord]:
    """Summarise the scores that items hold, each with its direction: as asked for, as known, or by a word of its name.

    Raises:
        UserError: If a direction is not known.
    """
    found: dict[str, MetricRecord] = {}
    for name in (name for name in items[0] if name not in ("id", "cluster_id")):
        metric = base_name(name)
        said = [of[key] for of in (asked.directions, known) for key in (name, metric) if key in of]
        words = set(re.findall(r"[a-z0-9]+", metric.lower()))
        if not said and bool(words & _HIGHER) == bool(words & _LOWER):
            raise UserError(
                f"{source}: whether more or less of {metric} is better is not known: say --higher_is_better {metric} "
                f"or --lower_is_better {metric}"
            )
        found[name] = metric_from_items(items, name, higher_is_better=said[0] if said else bool(words & _HIGHER))
    return found


def base_name(name: str) -> str:
    """Return the metric of ``metric,filter`` and ``metric avg@4``."""
    return re.split(r",| (?:avg|pass)@", name)[0]


def results_of(name: str, logs: Sequence[Log]) -> list[Result]:
    """Return the results of one model: of several logs of a task the first is seed 0, the second seed 1."""
    by_task: dict[str, list[Log]] = {}
    for log in logs:
        by_task.setdefault(log.task, []).append(log)
    num_seeds = max(map(len, by_task.values()))
    results: list[Result] = []
    for seed in range(num_seeds):
        of_seed = [each[seed] for each in by_task.values() if seed < len(each)]
        model = dict.fromkeys(("fingerprint", "adapter", "mask_fingerprint", "method"))
        result = {
            "schema_version": SCHEMA_VERSION,
            "kind": "evaluation",
            "name": name,
            "created": of_seed[-1].created,
            "maskft_version": "",
            "model": {"name_or_path": name, **model, "seed": seed if num_seeds > 1 else None},
            "settings": {key: value for log in of_seed for key, value in log.settings.items()},
            "environment": {"packages": {key: value for log in of_seed for key, value in log.packages.items()}},
            "tasks": {log.task: log.record for log in of_seed},
        }
        results.append(check_result(result, of_seed[0].source))
    return results
