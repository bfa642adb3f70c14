"""The card of an adapter with what ``maskft evaluate`` has measured of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from maskft.adapter.mask_set import AdapterConfig, read_config
from maskft.tuner.card import write_card
from maskft_base import files
from maskft_base.errors import UserError

from ..results.schema import read_result
from ..results.scores import scores
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
        interval = "" if score.low is None or score.high is None else f"{score.low:.4f} to {score.high:.4f}"
        names = f"{markdown_cell(score.task)} | {markdown_cell(score.metric)}"
        yield f"| {names} | {value} | {interval} | {entry['num_items']} |"
    yield from ("", "Intervals are over the items. The base's scores on the same items are not in this table.", "")
