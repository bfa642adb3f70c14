"""The paper's tables with one's own figures in them: Tables 1, 2, 4, 5 and 6, from result files only.

The paper's figures are in ``paper.yaml``. The row of a result follows from its ``model.method`` and its block
``training`` (checkpoint, domain, base model), never from its name. A cell is of one study, one result per seed.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple, cast

import yaml

from maskft_common.errors import UserError, printable

from .schema import Result
from .tables import Table, draw, latex_text, markdown_text, wrap

NO_RESULT = "–"
_BACKBONES = {"llama27b": "LLaMA2-7B", "llama318b": "LLaMA3.1-8B"}  # in a base model's name -> the paper's name


class Cell(NamedTuple):
    """The paper's score, with what it writes after ±, and ours of each seed, of one study; in percent."""

    paper: list[float]
    ours: list[float]
    study: str | None


@cache
def paper() -> dict[str, Any]:
    """Return the content of ``paper.yaml``."""
    text = resources.files(__package__).joinpath("paper.yaml").read_text(encoding="utf-8")
    return cast(dict[str, Any], yaml.safe_load(text))


def paper_tables(results: Sequence[Result]) -> tuple[list[tuple[str, Table]], list[str]]:
    """Fill the paper's tables.

    Args:
        results: Results of this schema, none at all included; of several studies for one cell the first counts.

    Returns:
        Caption and cells of each table, and the names of the results that are in none of them.

    Raises:
        UserError: If two results of one study and seed claim one cell.
    """
    filled = [_fill(number, results) for number in paper()["tables"]]
    used = {id(result) for *_, of_table in filled for result in of_table}  # others may have the same name
    left_over = dict.fromkeys(_name_of(result) for result in results if id(result) not in used)
    return [(caption, table) for caption, table, _ in filled], list(left_over)


def render_tables(tables: Sequence[tuple[str, Table]], left_over: Sequence[str], output_format: str) -> str:
    """Return tables as text: ``terminal``, ``markdown`` or ``latex``, where captions are comments."""

    def plain(text: str) -> str:
        if output_format == "terminal":
            return wrap(printable(text))
        return f"% {latex_text(text)}" if output_format == "latex" else markdown_text(text)

    parts = []
    for caption, table in tables:
        head = f"**{plain(caption)}**\n" if output_format == "markdown" else plain(caption)
        parts.append(f"{head}\n{draw(table, output_format)}")
    if left_over:
        parts.append(plain(f"In none of these tables: {', '.join(left_over)}."))
    return "\n".join(parts).rstrip() + "\n"


def _fill(number: str, results: Sequence[Result]) -> tuple[str, Table, list[Result]]:
    """Return caption, cells and the results in them."""
    spec = paper()["tables"][number]
    benchmarks = paper()["benchmarks"]
    rows: list[tuple[str, ...]] = []
    used: list[Result] = []
    best: list[Cell] = []
    block = None
    for row in spec["rows"]:
        fitting = _of_backbone(results, row.get("backbone", spec.get("backbone")))
        heading = row.get("block", row.get("backbone"))
        if heading != block:
            block = heading
            rows.append((block, *[""] * len(spec["columns"])))
        line: list[Cell] = []
        for key, figure in zip(spec["columns"], row["cells"], strict=True):
            chosen = _choose(fitting, benchmarks[key] | row)
            used += [result for result, _ in chosen]
            study = _study_of(chosen[0][0]) if chosen else None
            line.append(Cell(figure, [value for _, value in chosen], study))
        rows.append((row["label"], *map(_cell_text, line)))
        if row["method"] == "full" and "checkpoint" not in row:
            best = line
        if row.get("delta"):
            rows.append(("  against Best FFT", *map(_delta_text, line, best)))
    bases = sorted({_base(result) or "a base model that is not stated" for result in used})
    caption = f"Table {number} ({spec['place']}): {spec['title']}. The paper's figure, "
    theirs = spec.get("backbone", "of the block's model")
    caption += f"{theirs} / ours, {', '.join(bases) or 'no results'}"
    return caption, Table(("Method", *(benchmarks[key]["label"] for key in spec["columns"])), rows), used


def _choose(results: Sequence[Result], asked: Mapping[str, Any]) -> list[tuple[Result, float]]:
    """Return the results of one study, one per seed, that stand in a cell, each with its score in percent."""
    by_seed: dict[int | None, tuple[Result, float]] = {}
    for result in (result for result in results if _fits(result, asked)):
        metrics = next((result["tasks"][name]["metrics"] for name in asked["tasks"] if name in result["tasks"]), {})
        value = next((metrics[name]["value"] for name in asked["metrics"] if name in metrics), None)
        first = next(iter(by_seed.values()))[0] if by_seed else result
        if value is None or _study_of(result) != _study_of(first):
            continue
        # Nothing was trained in a pre-trained model, whatever its seed.
        seed = None if asked["method"] == "pretrained" else result["model"]["seed"]
        other, its_value = by_seed.setdefault(seed, (result, 100 * value))
        if other is not result and not (seed is None and its_value == 100 * value):
            raise UserError(
                f"{other['name']!r} and {result['name']!r} are of one seed and both belong to {asked['label']}: give "
                "one of them, or say in their block 'training' how they differ"
            )
    return list(by_seed.values())


def _fits(result: Result, asked: Mapping[str, Any]) -> bool:
    training = result.get("training", {})
    method = result["model"]["method"]
    if training.get("num_train_tokens") == 0 and method is None:
        method = "pretrained"
    if method != asked["method"] or training.get("variant"):  # controls that the paper does not have
        return False
    return method == "pretrained" or (
        (training.get("mixed") or False) == asked["mixed"]
        and (training.get("selection") or "topk") == asked.get("selection", "topk")
        and (training.get("checkpoint") or "best") == asked.get("checkpoint", "best")
        and training.get("domain") in ([asked["trained_on"]] if "trained_on" in asked else [asked["domain"], None])
    )


def _of_backbone(results: Sequence[Result], backbone: str) -> list[Result]:
    """Choose the results of the paper's base model, or, where there is none, those of one that is not in the paper."""
    theirs = [result for result in results if _backbone(result) == backbone]
    others = [result for result in results if _backbone(result) is None]
    bases = sorted({base for result in others if (base := _base(result)) and not result["training"].get("variant")})
    if not theirs and len(bases) > 1:
        raise UserError(f"the results are of several base models, {', '.join(bases)}; give those of one")
    return theirs or others


def _base(result: Result) -> str | None:
    return result.get("training", {}).get("base")


def _backbone(result: Result) -> str | None:
    text = re.sub(r"[^a-z0-9]", "", (_base(result) or "").lower())
    return next((name for word, name in _BACKBONES.items() if word in text), None)


def _study_of(result: Result) -> str | None:
    return result.get("study", {}).get("study")


def _name_of(result: Result) -> str:
    study = _study_of(result)
    return result["name"] if study is None else f"{result['name']} of {study}"


def _cell_text(cell: Cell) -> str:
    theirs = f"{cell.paper[0]:.1f}"
    if len(cell.paper) > 1:
        theirs += f" ± {cell.paper[1]:.2f}"
    ours = f"{statistics.fmean(cell.ours):.1f}" if cell.ours else NO_RESULT
    if len(cell.ours) > 1:
        ours += f" ± {statistics.stdev(cell.ours):.2f}"
    return f"{theirs} / {ours}"


def _delta_text(cell: Cell, best: Cell) -> str:
    theirs = f"{cell.paper[0] - best.paper[0]:+.1f}"
    # Figures of two studies may be of two models.
    if not cell.ours or not best.ours or cell.study != best.study:
        return f"{theirs} / {NO_RESULT}"
    return f"{theirs} / {statistics.fmean(cell.ours) - statistics.fmean(best.ours):+.1f}"
