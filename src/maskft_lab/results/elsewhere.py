"""Results of other harnesses, read as results: the ground that lm-eval's samples and inspect-ai's logs share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskft_base.errors import UserError
from maskft_base.files import digest, open_text, parse_json

from .proportions import pass_at_k
from .schema import SCHEMA_VERSION, MetricRecord, Result, TaskRecord, is_finite, metric_from_items, validate_result

MAX_LABEL = 60  # characters of a cluster's label; longer ones (a passage) are known by their digest
# Where a harness does not say: of these less is better.
LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "loss", "brier", "ter", "wer", "nll")


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one per line, which may be gzipped."""
    try:
        with open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _object(line, f"{file}, line {number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}): check the path") from None


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        row = parse_json(text)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}): is the file whole?") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: not an object of sample fields but {type(row).__name__}")
    return row


def as_number(value: Any) -> float | int | None:
    """Return a score as a number, None if it is none: true and false are 1 and 0."""
    if isinstance(value, bool):
        return int(value)
    return value if is_finite(value) else None


def cluster_label(value: Any, place: str) -> str:
    """Return a field's value as the label of a cluster."""
    if value is None:
        raise UserError(f"{place}: no such field to take clusters from: name one that every item has")
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= MAX_LABEL else digest(text)[:16]


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
    for item, scores in zip(items, samples, strict=True):
        known = [score for score in scores if score is not None]
        value = sum(known) / count if len(known) == count else None
        if count == 1:
            item[name] = known[0] if known else None
            continue
        item[f"{name} avg@{count}"] = value
        if all(score in (0, 1) for each in samples for score in each):
            for k in _powers_up_to(count):
                item[f"{name} pass@{k}"] = float(pass_at_k([sum(known)], count, k)[0])


def _powers_up_to(count: int) -> list[int]:
    powers = [2**power for power in range(1, count.bit_length()) if 2**power <= count]
    return powers if powers and powers[-1] == count else [*powers, count]


def metrics_of(
    items: Sequence[Mapping[str, Any]], names: Iterable[str], higher_is_better: Mapping[str, bool]
) -> dict[str, MetricRecord]:
    """Summarise what items hold under these names; what less of is better is guessed from the name if not given."""
    return {
        name: metric_from_items(
            items,
            name,
            higher_is_better=higher_is_better.get(name, not any(word in name for word in LOWER_IS_BETTER)),
        )
        for name in names
    }


def result_from(
    name: str,
    source: Path,
    tasks: dict[str, TaskRecord],
    settings: dict[str, Any],
    packages: dict[str, Any],
    created: str = "",
) -> Result:
    """Return a result of what another harness measured.

    Args:
        name: The model, as it is shown.
        source: File it was read from, for messages.
        tasks: Task name -> record.
        settings: What else shaped the numbers; differences are noted in a comparison.
        packages: Package -> version, of the machine that measured.
        created: When, ISO 8601.
    """
    model = dict.fromkeys(("fingerprint", "adapter", "mask_fingerprint", "method", "seed"))
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluation",
        "name": name,
        "created": created,
        "maskft_version": "",
        "model": {"name_or_path": name, **model},
        "settings": settings,
        "environment": {"packages": packages},
        "tasks": tasks,
    }
    return validate_result(result, source)
