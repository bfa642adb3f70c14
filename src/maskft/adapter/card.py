"""Cards with what a run knows: recipe, data, licence, scores with intervals; of adapters and of merged models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from maskft_base import files
from maskft_base.errors import UserError
from maskft_lab.results.comparison import Score
from maskft_lab.results.schema import Result, item_weights, read_result
from maskft_lab.results.scores import scores
from maskft_lab.results.statistics import hierarchical_bootstrap
from maskft_lab.results.text import markdown_cell

from .._version import __version__
from ..tuner.card import ASKING, about, head, loading, mask_infos, may_write
from .mask_set import AdapterConfig, MaskSet, read_config

_TOKENIZER = "tokenizer_config.json"


def write_card(folder: str | Path) -> None:
    """Write the card of an adapter folder, unless its author has written one."""
    if may_write(folder):
        files.write_text(Path(folder) / files.CARD, adapter_card(folder))


def adapter_card(
    folder: str | Path, base: str | None = None, repository: str | None = None, licence: str | None = None
) -> str:
    """The card of an adapter folder.

    Args:
        folder: Adapter folder; a ``result.json`` of ``maskft evaluate`` in it gives the scores.
        base: Name of the base; default: the one the adapter gives.
        repository: Name on the hub, for the lines that load it; default: the folder itself.
        licence: Of the base, as the hub names it; default: what the card in the base's folder says.
    """
    config = read_config(folder)
    base = base or config.base_model_name_or_path
    lines = [
        *head(base, ["peft"], "adapter", licence or licence_of(base), config.recipe.get("datasets") or ()),
        *about(base, mask_infos(folder)),
        *_beside(config),
        *_verdict(config),
        *loading(base, (Path(folder) / _TOKENIZER).is_file(), repository or "."),
        "",
        *_scores(folder, config),
        *_how(config),
    ]
    return "\n".join(lines).rstrip() + "\n"


def merged_card(adapter: str | Path, base: str, masks: MaskSet, target: str) -> str:
    """The card of a checkpoint that a mask was merged into.

    Args:
        adapter: Adapter folder.
        base: The model that was masked.
        masks: What the adapter removes.
        target: What removed weights were set to, in words.
    """
    config = read_config(adapter)
    infos = {name: {"shape": mask.shape, "num_removed": int((~mask).sum())} for name, mask in masks.items()}
    lines = [
        *head(base, ["transformers"], "finetune", licence_of(base), config.recipe.get("datasets") or ()),
        *about(base, infos),
        f"The mask is merged: {masks.num_removed:,} weights are set to {target}, and no library but transformers is "
        "needed.",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its name on the hub',
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *ASKING,
        "```",
        "",
        *_scores(adapter, config),
        *_how(config),
    ]
    return "\n".join(lines).rstrip() + "\n"


def licence_of(base: str | None) -> str | None:
    """What the card in the base's folder says; None where there is none to read."""
    file = Path(base or "") / files.CARD
    if not base or not file.is_file():
        return None
    _, start, rest = file.read_text(encoding="utf-8", errors="replace").partition("---\n")
    front, end, _ = rest.partition("\n---")
    try:
        data = yaml.safe_load(front) if start and end else None
    except yaml.YAMLError:
        return None
    licence = data.get("license") if isinstance(data, Mapping) else None
    return licence if isinstance(licence, str) else None


def _beside(config: AdapterConfig) -> Iterator[str]:
    """What a mask does beside setting weights to zero, where it does."""
    if config.removed_value == "base":
        yield from (f"A removed weight takes its value in `{Path(config.removed_value_model or '').name}`.", "")
    if config.weights_sha256:
        names = ", ".join(f"`{markdown_cell(name)}`" for name in config.weights_sha256)
        yield from (f"Trained beside the mask, and replaced in full: {names}.", "")


def _verdict(config: AdapterConfig) -> list[str]:
    verdict = config.recipe.get("verdict")
    return [f"On held-out rows of its training data, {markdown_cell(str(verdict))}.", ""] if verdict else []


def _how(config: AdapterConfig) -> Iterator[str]:
    """The recipe as a table, and what tells this mask from any other."""
    left_out = ("model_name_or_path", "datasets", "verdict")
    recipe = {name: value for name, value in config.recipe.items() if name not in left_out}
    facts = {
        **recipe,
        **({"base weights held as": config.base_quantisation} if config.base_quantisation else {}),
        "base fingerprint": f"`{(config.base_fingerprint or 'not recorded').partition(':')[0]}`",
        "mask fingerprint": f"`{config.mask_sha256}`",
        "made with": f"maskft {__version__}",
    }
    yield from ("## How it was made", "", "| | |", "| --- | --- |")
    for name, value in facts.items():
        shown = value if name.endswith("fingerprint") else markdown_cell(str(value))
        yield f"| {markdown_cell(name)} | {shown} |"


# Scores


def _scores(folder: str | Path, config: AdapterConfig) -> Iterator[str]:
    """A table of ``result.json``, if it is about this mask."""
    file = Path(folder) / files.RESULT
    try:
        result = read_result(file) if file.is_file() else None
    except UserError:
        result = None  # evaluate and compare say what is wrong with it
    if result is None or result["model"]["mask_fingerprint"] not in (None, config.mask_sha256):
        return
    yield from ("## Scores", "", "| task | metric | value | 95 % interval | items |", "| --- | --- | --- | --- | --- |")
    scored = {(score.task, score.metric): score for score in scores([result])}
    for task, record in result["tasks"].items():
        for metric, entry in record["metrics"].items():
            value = "not finite" if entry["value"] is None else f"{entry['value']:.4f}"
            interval = _interval(result, task, metric, scored[task, metric])
            shown = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
            yield f"| {markdown_cell(task)} | {markdown_cell(metric)} | {value} | {shown} | {entry['num_items']} |"
    yield from ("", "Intervals are over the items. The base's scores on the same items are not in this table.", "")


def _interval(result: Result, task: str, metric: str, score: Score) -> tuple[float, float] | None:
    """95 % interval over the items: that of a share, which is not empty at 0 and 1, else by bootstrap."""
    if score.low is not None and score.high is not None:
        return score.low, score.high
    items = result["tasks"][task]["items"]
    values: Sequence[Any] = [item.get(metric) for item in items]
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return None
    weights = item_weights(items, result["tasks"][task]["metrics"][metric]["unit"])
    _, low, high = hierarchical_bootstrap([values], weights)[:3]
    return float(low), float(high)
