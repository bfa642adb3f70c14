"""Items that a method won and lost against the baseline, with their texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..results.comparison import Comparison, Difference
from ..results.schema import Result, has_items
from .evidence import Evidence

MAX_TEXT = 500  # characters of one text
MAX_BYTES = 500_000  # of all texts in a page
MAX_ROWS = 300  # of one method and task
TEXTS = ("prompt", "answer", "output", "reason")


def won_and_lost(evidence: Evidence) -> list[dict[str, Any]]:
    """For every task, and every method of which an item changed, the items that changed most.

    Returns:
        Records with ``method``, ``baseline``, ``task``, ``metric``, ``unit``; ``won``, ``lost``, ``tied`` as in the
        comparison; ``num_seeds``; ``rows``: ``id``, ``gain`` (above 0: won), ``baseline``, ``method`` (means over
        seeds), and ``texts`` of the lowest seed: ``prompt``, ``answer``, ``output_baseline``, ``output_method``.
    """
    records = []
    for rows in _by_method(evidence.comparison).values():
        pairs = _paired(evidence.results_of(rows[0].method), evidence.results_of(rows[0].baseline))
        made = (
            _record(row, pairs)
            for row in rows
            if pairs and all(_measured(result, row) for pair in pairs for result in pair)
        )
        record = next((record for record in made if record["rows"]), None)
        records += [record] if record else []
    records.sort(key=lambda record: record["method"] not in evidence.masks)
    _shorten(records)
    return records


def _by_method(comparison: Comparison | None) -> dict[tuple[str, str], list[Difference]]:
    """Differences of each method and task; those of right or wrong first, for there a text explains a number."""
    groups: dict[tuple[str, str], list[Difference]] = {}
    for row in comparison.differences if comparison else ():
        groups.setdefault((row.method, row.task), []).append(row)
    return {key: sorted(rows, key=lambda row: row.unit != "fraction") for key, rows in groups.items()}


def _measured(result: Result, row: Difference) -> bool:
    return row.task in result["tasks"] and has_items(result["tasks"][row.task]["items"], row.metric)


def _paired(ours: Sequence[Result], theirs: Sequence[Result]) -> list[tuple[Result, Result]]:
    """By seed; one result stands beside all of the other."""
    if len(theirs) == 1 or len(ours) == 1:
        by_seed = {result["model"]["seed"]: result for result in theirs}
        return [(one, by_seed.get(one["model"]["seed"], theirs[0])) for one in ours if theirs]
    by_seed = {result["model"]["seed"]: result for result in theirs}
    return [(one, by_seed[one["model"]["seed"]]) for one in ours if one["model"]["seed"] in by_seed]


def _record(row: Difference, pairs: Sequence[tuple[Result, Result]]) -> dict[str, Any]:
    sign = 1 if row.higher_is_better else -1
    values: dict[str, list[list[float]]] = {}
    for pair in pairs:
        for side, result in enumerate(pair):
            for item in result["tasks"][row.task]["items"]:
                values.setdefault(item["id"], [[], []])[side].append(item[row.metric])
    rows: list[dict[str, Any]] = []
    for item, (ours, theirs) in values.items():
        if len(ours) == len(theirs) == len(pairs) and None not in (*ours, *theirs):
            method, baseline = sum(ours) / len(ours), sum(theirs) / len(theirs)
            rows.append({"id": item, "gain": sign * (method - baseline), "baseline": baseline, "method": method})
    won = sorted((each for each in rows if each["gain"] > 0), key=lambda each: -each["gain"])
    lost = sorted((each for each in rows if each["gain"] < 0), key=lambda each: each["gain"])
    texts = [{item["id"]: item for item in result["tasks"][row.task]["items"]} for result in pairs[0]]
    shown = [each for pair in zip(*_padded(won, lost), strict=True) for each in pair if each][:MAX_ROWS]
    for each in shown:
        each["texts"] = _texts(*(by_id[each["id"]] for by_id in texts))
    return {
        **{name: getattr(row, name) for name in ("method", "baseline", "task", "metric", "unit")},
        **{"won": len(won), "lost": len(lost), "tied": len(rows) - len(won) - len(lost)},
        "num_seeds": len(pairs),
        "rows": shown,
    }


def _padded(won: list, lost: list) -> tuple[list, list]:
    length = max(len(won), len(lost))
    return won + [None] * (length - len(won)), lost + [None] * (length - len(lost))


def _texts(ours: Mapping, theirs: Mapping) -> dict[str, str]:
    texts = {"prompt": ours.get("prompt"), "answer": ours.get("answer")}
    texts |= {"output_baseline": theirs.get("output"), "output_method": ours.get("output")}
    return {name: _short(text) for name, text in texts.items() if text is not None}


def _short(text: Any) -> str:
    text = str(text).strip()
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _shorten(records: list[dict]) -> None:
    """Leave out the smallest changes, of every record alike, until all fit into a page."""
    budget = MAX_BYTES / max(1, len(records))
    for record in records:
        size, kept = 0, []
        for row in record["rows"]:
            size += len(json.dumps(row, ensure_ascii=False).encode())
            if size > budget:
                break
            kept.append(row)
        record["rows"] = kept
