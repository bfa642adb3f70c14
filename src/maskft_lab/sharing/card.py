"""The card of an adapter with what ``maskft evaluate`` has measured of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from maskft.adapter.mask_set import AdapterConfig, read_config
from maskft.tuner.card import write_card
from maskft_base import files
from maskft_base.errors import UserError

from ..results.schema import Result, item_weights, read_result
from ..results.scores import scores
from ..results.statistics import Bootstrap, as_block
from ..results.text import markdown_cell


def write_scored_card(folder: str | Path) -> None:
    """Write the card of an adapter folder with the scores of its ``result.json``, unless its author has written one."""
    config = read_config(folder)
    write_card(folder, config, list(score_lines(folder, config)))


def score_lines(folder: str | Path, config: AdapterConfig) -> Iterator[str]:
    """A table of ``result.json``, if it is about this mask; evaluate and compare say what is wrong with it."""
    file = Path(folder) / files.RESULT
    try:
        result = read_result(file) if file.is_file() else None
    except UserError:
        result = None
    if result is None or result["model"]["mask_fingerprint"] not in (None, config.mask_sha256):
        return
    yield from ("## Scores", "", "| task | metric | value | 95 % interval | items |", "| --- | --- | --- | --- | --- |")
    for score in scores([result]):
        entry = result["tasks"][score.task]["metrics"][score.metric]
        value = "not finite" if entry["value"] is None else f"{entry['value']:.4f}"
        # That of a share is not empty at 0 and 1; others have one by bootstrap.
        known = score.low is not None and score.high is not None
        interval = (score.low, score.high) if known else _bootstrapped(result, score.task, score.metric)
        shown = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        names = f"{markdown_cell(score.task)} | {markdown_cell(score.metric)}"
        yield f"| {names} | {value} | {shown} | {entry['num_items']} |"
    yield from ("", "Intervals are over the items. The base's scores on the same items are not in this table.", "")


def _bootstrapped(result: Result, task: str, metric: str) -> tuple[float, float] | None:
    items = result["tasks"][task]["items"]
    values = [item.get(metric) for item in items]
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return None
    weights = item_weights(items, result["tasks"][task]["metrics"][metric]["unit"])
    low, high = Bootstrap([as_block([values], weights)]).interval()
    return float(low), float(high)
