"""Items that a method won and lost against the baseline, with their texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

from ..results.comparison import Difference
from ..results.schema import Result, has_items
from .evidence import Evidence

MAX_TEXT = 500  # characters of one text
MAX_BYTES = 500_000  # of all texts in a page
MAX_ROWS = 300  # of one method and task


def won_and_lost(evidence: Evidence) -> list[dict[str, Any]]:
    """For every task, and every method of which an item changed, the items that changed most.

    Returns:
        Records with ``method``, ``baseline``, ``task``, ``metric``, ``unit``; ``won``, ``lost``, ``tied`` as in the
        comparison; ``num_seeds``; ``rows``: ``id``, ``gain`` (above 0: won), ``baseline``, ``method`` (means over
        seeds), and ``texts`` of the lowest seed: ``prompt``, ``answer``, ``output_baseline``, ``output_method``.
    """
    groups: dict[tuple[str, str], list[Difference]] = {}
    for row in evidence.comparison.differences if evidence.comparison else ():
        groups.setdefault((row.method, row.task), []).append(row)
    records = []
    for rows in groups.values():
        # A metric of right or wrong first: there a text explains a number.
        for row in sorted(rows, key=lambda row: row.unit != "fraction"):
            pairs = _paired(evidence.results_of(row.method), evidence.results_of(row.baseline), row)
            record = _record(row, pairs) if pairs else None
            if record and record["rows"]:
                records.append(record)
                break
    records.sort(key=lambda record: record["method"] not in evidence.masks)
    budget = MAX_BYTES / max(1, len(records))
    for record in records:
        _shorten(record, budget)
    return records


def _paired(ours: Sequence[Result], theirs: Sequence[Result], row: Difference) -> list[tuple[Result, Result]]:
    """By seed; a baseline of one result, such as a pre-trained model, stands beside every seed."""
    by_seed = {result["model"]["seed"]: result for result in theirs}
    only = theirs[0] if len(theirs) == 1 else None
    pairs = [(one, by_seed.get(one["model"]["seed"], only)) for one in ours]
    found = [(one, other) for one, other in pairs if other is not None]
    is_measured = all(
        row.task in result["tasks"] and has_items(result["tasks"][row.task]["items"], row.metric)
        for pair in found
        for result in pair
    )
    return found if is_measured else []


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
    rows.sort(key=lambda each: -abs(each["gain"]))
    won, lost = [each for each in rows if each["gain"] > 0], [each for each in rows if each["gain"] < 0]
    shown = [each for each in chain.from_iterable(zip_longest(won, lost)) if each][:MAX_ROWS]
    ours, theirs = ({item["id"]: item for item in result["tasks"][row.task]["items"]} for result in pairs[0])
    for each in shown:
        each["texts"] = _texts(ours[each["id"]], theirs[each["id"]])
    return {
        **{name: getattr(row, name) for name in ("method", "baseline", "task", "metric", "unit")},
        **{"won": len(won), "lost": len(lost), "tied": len(rows) - len(won) - len(lost)},
        "num_seeds": len(pairs),
        "rows": shown,
    }


def _texts(ours: Mapping, theirs: Mapping) -> dict[str, str]:
    texts = {"prompt": ours.get("prompt"), "answer": ours.get("answer")}
    texts |= {"output_baseline": theirs.get("output"), "output_method": ours.get("output")}
    short = {name: str(text).strip() for name, text in texts.items() if text is not None}
    return {name: text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…" for name, text in short.items()}


def _shorten(record: dict, budget: float) -> None:
    """Leave out the smallest changes until the texts fit into the page."""
    size = 0
    for index, row in enumerate(record["rows"]):
        size += len(json.dumps(row, ensure_ascii=False).encode())
        if size > budget:
            del record["rows"][index:]
            return
