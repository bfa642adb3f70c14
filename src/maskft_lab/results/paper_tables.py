"""The paper's tables with one's own figures in them: Tables 1, 2, 4, 5 and 6, from result files only.

The paper's figures are in ``paper.yaml``. A result stands where its ``model.method`` and its block ``training`` say:
checkpoint, domain, base model; nothing is read from names. A cell is of one study and of one result per seed.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, cast

import yaml

from maskft_base.errors import UserError, did_you_mean, printable

from .schema import Result
from .text import Table, draw, markdown_text, to_json, wrap

NO_RESULT = "–"
_BACKBONES = {"llama27b": "LLaMA2-7B", "llama318b": "LLaMA3.1-8B"}  # in a base model's name -> the paper's name

Asked = Mapping[str, Any]  # what a cell asks for: the entries of its row and of its column


@dataclass(frozen=True)
class Figure:
    """One cell: the paper's figure and ours, in percent.

    ``spread`` is what the paper writes after ±, and ours the standard deviation over seeds. ``study`` is the study that
    ours is from, None where the results are of none.
    """

    row: str
    column: str
    paper: float
    paper_spread: float | None = None
    ours: float | None = None
    ours_spread: float | None = None
    study: str | None = None
    results: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper with our figures.

    Attributes:
        id: Its number.
        caption: The line above it, which names our base model.
        ours: The base model of our figures; None without any.
        figures: The cells that hold figures.
        table: All cells as text.
        results: The results that the figures are of.
    """

    id: str
    caption: str
    ours: str | None
    figures: list[Figure]
    table: Table
    results: list[Result] = field(repr=False)


@cache
def paper() -> dict[str, Any]:
    """Return the content of ``paper.yaml``."""
    text = resources.files(__package__).joinpath("paper.yaml").read_text(encoding="utf-8")
    return cast(dict[str, Any], yaml.safe_load(text))


def paper_tables(
    results: Sequence[Result], ids: Sequence[str] | None = None, measures: Mapping[str, str] | None = None
) -> tuple[list[PaperTable], list[str]]:
    """Fill the paper's tables.

    Args:
        results: Results of this schema, none at all included; of several studies for one cell the first counts.
        ids: Numbers of the tables. Default: all.
        measures: Benchmark -> the task, or ``task/metric``, that measures it in these results.

    Returns:
        The tables, and the names of the results that are in none of them.

    Raises:
        UserError: If a name is unknown, or two results of one study and seed claim one cell.
    """
    specs, known = paper()["tables"], paper()["benchmarks"]
    for asked in ids or ():
        if asked not in specs:
            raise UserError(f"there is no table {asked!r} here; there are {', '.join(specs)}")
    for benchmark in measures or {}:
        if benchmark not in known:
            raise UserError(f"no benchmark {benchmark!r}{did_you_mean(benchmark, known)}; there are {', '.join(known)}")
    tables = [_fill(number, results, measures or {}) for number in ids or specs]
    used = {id(result) for table in tables for result in table.results}  # others may have the same name
    return tables, list(dict.fromkeys(_name_of(result) for result in results if id(result) not in used))


def render_tables(tables: Sequence[PaperTable], left_over: Sequence[str], output_format: str) -> str:
    """Return tables as text: ``terminal``, ``markdown`` or ``json``."""
    if output_format == "json":
        records = [
            {"table": t.id, "caption": t.caption, "ours": t.ours, "figures": [vars(figure) for figure in t.figures]}
            for t in tables
        ]
        return to_json({"tables": records, "in_none": list(left_over)})
    parts: list[str] = []
    for table in tables:
        text = table.caption
        caption = {"markdown": f"**{markdown_text(text)}**\n"}
        parts.append(f"{caption.get(output_format) or wrap(printable(text))}\n{draw(table.table, output_format)}")
    if left_over:
        text = printable(f"In none of these tables: {', '.join(left_over)}.")
        parts.append({"terminal": wrap(text), "markdown": markdown_text(text)}[output_format])
    return "\n".join(parts).rstrip() + "\n"


def _fill(number: str, results: Sequence[Result], measures: Mapping[str, str]) -> PaperTable:
    spec, columns = paper()["tables"][number], paper()["benchmarks"]
    figures: list[Figure] = []
    rows: list[tuple[str, ...]] = []
    used: list[Result] = []
    best: list[Figure] = []
    block = None
    for row in spec["rows"]:
        fitting = _of_backbone(results, row.get("backbone", spec.get("backbone")))
        heading = row.get("block", row.get("backbone"))
        if heading != block:
            block = heading
            rows.append((block, *[""] * len(spec["columns"])))
        line: list[Figure] = []
        for key, cell in zip(spec["columns"], row["cells"], strict=True):
            place = f"{row['label']}, {columns[key]['label']} of Table {number}"
            chosen = _choose(fitting, columns[key] | row | {"column": key, "place": place}, measures)
            label = row["label"] if block is None else f"{block}: {row['label']}"
            line.append(_figure(label, key, cell, chosen))
            used += [result for result, _ in chosen]
        rows.append((row["label"], *map(_figure_text, line)))
        if row["method"] == "full" and "checkpoint" not in row:
            best = line
        if row.get("delta"):
            rows.append(("  against Best FFT", *map(_delta_text, line, best)))
        figures += line
    names = ("Method", *(columns[key]["label"] for key in spec["columns"]))
    bases = sorted({_base(result) or "a base model that is not stated" for result in used})
    ours = ", ".join(bases) or None
    theirs = spec.get("backbone", "of the block's model")
    caption = f"Table {number} ({spec['place']}): {spec['title']}. The paper's figure, {theirs} / ours, "
    return PaperTable(number, caption + (ours or "no results"), ours, figures, Table(names, rows), used)


def _choose(results: Iterable[Result], asked: Asked, measures: Mapping[str, str]) -> list[tuple[Result, float]]:
    """Return the results of one study, one per seed, that stand in a cell, each with its score in percent."""
    found = [
        (result, value)
        for result in results
        if _fits(result, asked) and (value := _value(result, asked, measures)) is not None
    ]
    by_seed: dict[int | None, tuple[Result, float]] = {}
    for result, value in found:
        if _study_of(result) != _study_of(found[0][0]):
            continue
        # Nothing was trained in a pre-trained model, whatever its seed.
        seed = None if asked["method"] == "pretrained" else result["model"]["seed"]
        other, its_value = by_seed.setdefault(seed, (result, value))
        if other is not result and not (seed is None and its_value == value):
            raise UserError(
                f"{other['name']!r} and {result['name']!r} are of one seed and both stand for {asked['place']}; give "
                "one of them, or say in their block 'training' how they differ"
            )
    return list(by_seed.values())


def _fits(result: Result, asked: Asked) -> bool:
    training, method = result.get("training", {}), result["model"]["method"]
    if training.get("num_train_tokens") == 0 and method is None:
        method = "pretrained"
    if method != asked["method"] or training.get("variant"):  # controls that the paper does not have
        return False
    if method == "pretrained":
        return True
    if (training.get("mixed") or False) != asked["mixed"]:
        return False
    if (training.get("selection") or "topk") != asked.get("selection", "topk"):
        return False
    if (training.get("checkpoint") or "best") != asked.get("checkpoint", "best"):
        return False
    return training.get("domain") in ([asked["trained_on"]] if "trained_on" in asked else [asked["domain"], None])


def _value(result: Result, asked: Asked, measures: Mapping[str, str]) -> float | None:
    """Return what a result has for a cell, in percent; None for nothing."""
    task, _, metric = measures.get(asked["column"], "").partition("/")
    for name in [task] if task else asked["tasks"]:
        metrics = result["tasks"][name]["metrics"] if name in result["tasks"] else {}
        for known in [metric] if metric else asked["metrics"]:
            if known in metrics and (value := metrics[known]["value"]) is not None:
                if metrics[known]["unit"] != "fraction":
                    raise UserError(
                        f"{name}/{known} of {result['name']!r} has the unit {metrics[known]['unit']}, and scores stand "
                        f"in percent; measure {asked['column']} by a fraction, such as {name}/accuracy"
                    )
                return 100.0 * value
    return None


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


def _figure(row: str, column: str, cell: list[float], chosen: Sequence[tuple[Result, float]]) -> Figure:
    values = [value for _, value in chosen]
    return Figure(
        row=row,
        column=column,
        paper=cell[0],
        paper_spread=cell[1] if len(cell) > 1 else None,
        ours=statistics.fmean(values) if values else None,
        ours_spread=statistics.stdev(values) if len(values) > 1 else None,
        study=_study_of(chosen[0][0]) if chosen else None,
        results=[_name_of(result) for result, _ in chosen],
    )


def _figure_text(figure: Figure) -> str:
    theirs, ours = f"{figure.paper:.1f}", NO_RESULT if figure.ours is None else f"{figure.ours:.1f}"
    theirs += "" if figure.paper_spread is None else f" ± {figure.paper_spread:.2f}"
    return f"{theirs} / {ours}" + ("" if figure.ours_spread is None else f" ± {figure.ours_spread:.2f}")


def _delta_text(figure: Figure, best: Figure) -> str:
    theirs = f"{figure.paper - best.paper:+.1f}"
    # Figures of two studies may be of two models.
    if figure.ours is None or best.ours is None or figure.study != best.study:
        return f"{theirs} / {NO_RESULT}"
    return f"{theirs} / {figure.ours - best.ours:+.1f}"
