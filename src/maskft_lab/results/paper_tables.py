"""The paper's Tables 1, 2, 4, 5 and 6 with the user's figures beside the paper's, from result files only.

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

from .schema import MetricRecord, Result, run_identity
from .tables import Table, draw, latex_text, markdown_text, wrap

NO_RESULT = "–"
_HELDOUT = "heldout"  # the task of a result that is rows of the user's own file
_BACKBONES = {"llama27b": "LLaMA2-7B", "llama318b": "LLaMA3.1-8B"}  # in a base model's name -> the paper's name


class Cell(NamedTuple):
    """The paper's score and the number that it gives after ±; and ours of each seed, of one study; in percent."""

    paper: list[float]
    ours: list[float]
    study: str | None


@cache
def paper() -> dict[str, Any]:
    """Return the content of ``paper.yaml``."""
    file = resources.files(__package__).joinpath("paper.yaml")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return cast(dict[str, Any], content)


def paper_tables(results: Sequence[Result]) -> tuple[list[tuple[str, Table]], list[str]]:
    """Fill the paper's tables.

    Args:
        results: Results of this schema, maybe none; of several studies for one cell the first counts.

    Returns:
        Caption and cells of each table, and the names of the results that are in none of them.

    Raises:
        UserError: If two results of one study and seed claim one cell.
    """
    tables: list[tuple[str, Table]] = []
    used: set[int] = set()  # by identity: several results may have one name
    for number in paper()["tables"]:
        caption, table, in_table = _fill(number, results)
        tables.append((caption, table))
        used |= {id(result) for result in in_table}

    # Names in the order of the results, each once: seeds share one.
    left_over: dict[str, None] = {}
    for result in results:
        if id(result) not in used:
            left_over[_name_of(result)] = None
    return tables, list(left_over)


def render_tables(
    tables: Sequence[tuple[str, Table]],
    left_over: Sequence[str],
    output_format: str,
) -> str:
    """Return tables as text: ``terminal``, ``markdown`` or ``latex``, where captions are comments."""

    def plain(text: str) -> str:
        if output_format == "terminal":
            return wrap(printable(text))
        if output_format == "latex":
            return f"% {latex_text(text)}"
        return markdown_text(text)

    parts = []
    for caption, table in tables:
        head = plain(caption)
        if output_format == "markdown":
            head = f"**{head}**\n"
        parts.append(f"{head}\n{draw(table, output_format)}")
    if left_over:
        names = ", ".join(left_over)
        parts.append(plain(f"In none of these tables: {names}."))
    return "\n".join(parts).rstrip() + "\n"


def _fill(
    number: str,
    results: Sequence[Result],
) -> tuple[str, Table, list[Result]]:
    """Return caption, cells and the results in them."""
    spec = paper()["tables"][number]
    benchmarks = paper()["benchmarks"]
    columns = spec["columns"]
    rows: list[tuple[str, ...]] = []
    used: list[Result] = []
    best: list[Cell] = []  # of the last row of full fine-tuning at its best checkpoint
    sizes: dict[str, set[int]] = {key: set() for key in columns}  # numbers of test items of our scores
    block = None
    for row in spec["rows"]:
        # A block begins with its heading.
        # Rows without either have the heading None, with which ``block`` begins.
        heading = row.get("block", row.get("backbone"))
        if heading != block:
            block = heading
            empty = [""] * len(columns)
            rows.append((block, *empty))

        # A table is of one base model, or each of its blocks is.
        backbone = row.get("backbone", spec.get("backbone"))
        fitting = _of_backbone(results, backbone)

        cells: list[Cell] = []
        for key, figure in zip(columns, row["cells"], strict=True):
            # How the column is measured and the row trained; of their labels, that of the row.
            asked = benchmarks[key] | row
            chosen = _choose(fitting, asked)
            study = None
            if chosen:
                first, _ = chosen[0]
                study = _study_of(first)
            scores: list[float] = []
            for _, metric in chosen:
                # `_choose` leaves out metrics without a value.
                scores.append(100 * cast(float, metric["value"]))
                sizes[key].add(metric["num_items"])
            cells.append(Cell(figure, scores, study))
            used += [result for result, _ in chosen]
        texts = [_cell_text(cell) for cell in cells]
        rows.append((row["label"], *texts))

        # Masks are below the full fine-tuning that they are compared with.
        if row["method"] == "full" and "checkpoint" not in row:
            best = cells
        if row.get("delta"):
            deltas: list[str] = []
            for cell, best_cell in zip(cells, best, strict=True):
                deltas.append(_delta_text(cell, best_cell))
            rows.append(("  against Best FFT", *deltas))

    # The caption names both base models: figures of one are no reproduction of figures of another.
    theirs = spec.get("backbone", "of the block's model")
    bases = {_base(result) or "a base model that is not stated" for result in used}
    ours = ", ".join(sorted(bases)) or "no results"
    caption = f"Table {number} ({spec['place']}): {spec['title']}. The paper's figure, {theirs} / ours, {ours}"
    # A score of a part of a benchmark must not be read as one of all its items.
    parts: list[str] = []
    for key in columns:
        if sizes[key]:
            numbers = " or ".join(f"{size:,}" for size in sorted(sizes[key]))
            parts.append(f"{benchmarks[key]['label']} {numbers}")
    if parts:
        caption += f". Test items of ours: {', '.join(parts)}"
    labels = [benchmarks[key]["label"] for key in columns]
    return caption, Table(("Method", *labels), rows), used


def _choose(
    results: Sequence[Result],
    asked: Mapping[str, Any],
) -> list[tuple[Result, MetricRecord]]:
    """Return the results of one study for a cell, one per seed, each with its metric.

    Args:
        results: Results to choose from.
        asked: The row and the column of the cell, as in ``paper.yaml``.
    """
    by_seed: dict[int | None, tuple[Result, MetricRecord]] = {}
    study: str | None = None
    for result in results:
        metric = _metric(result, asked)
        if metric is None or metric["value"] is None or not _fits(result, asked):
            continue

        # The first study with a fitting result has the cell: seeds of two studies are not seeds of one method.
        if not by_seed:
            study = _study_of(result)
        elif _study_of(result) != study:
            continue

        seed = result["model"]["seed"]
        if asked["method"] == "pretrained":
            seed = None  # without training it means nothing
        # `setdefault` keeps the first result of a seed, and returns it.
        other, other_metric = by_seed.setdefault(seed, (result, metric))
        # Several studies may have measured the same model without a seed, and a study may have been given twice, as
        # its folder and as its published results.
        is_one_run = _run_of(result)[0] is not None and _run_of(other) == _run_of(result)
        is_same = (seed is None or is_one_run) and other_metric["value"] == metric["value"]
        if other is not result and not is_same:
            raise UserError(
                f"{other['name']!r} and {result['name']!r} are of one seed and both belong to {asked['label']}: give "
                "one of them, or say in their block 'training' how they differ"
            )
    return list(by_seed.values())


def _metric(
    result: Result,
    asked: Mapping[str, Any],
) -> MetricRecord | None:
    """Return the column's first metric that the first of its tasks has; None if it has none.

    Without any of its tasks, the accuracy on held-out rows whose file has the column's name.
    """
    for task in asked["tasks"]:
        if task not in result["tasks"]:
            continue
        # The first task that the result has decides, even without the metric: others are other variants of the
        # benchmark.
        metrics = result["tasks"][task]["metrics"]
        for metric in asked["metrics"]:
            if metric in metrics:
                return metrics[metric]
        return None

    # Held-out rows that are the benchmark's own test items, by the name of their file: gsm8k_test.jsonl.gz.
    if _HELDOUT not in result["tasks"]:
        return None
    rows = result["tasks"][_HELDOUT]
    stem, _, _ = rows.get("data_file", "").partition(".")
    if stem == asked.get("rows") and "accuracy" in rows["metrics"]:
        return rows["metrics"]["accuracy"]
    return None


def _fits(
    result: Result,
    asked: Mapping[str, Any],
) -> bool:
    """Whether a result was trained as the row and the column say."""
    training = result.get("training", {})
    method = result["model"]["method"]
    # Evaluated outside of a study: a model without training is the pre-trained one.
    if training.get("num_train_tokens") == 0 and method is None:
        method = "pretrained"
    if method != asked["method"]:
        return False
    if training.get("variant"):  # a control that the paper does not have
        return False
    if method == "pretrained":
        return True

    # Null or missing counts as the usual: one domain, top-k, the best checkpoint.
    is_mixed = training.get("mixed") or False
    selection = training.get("selection") or "topk"
    checkpoint = training.get("checkpoint") or "best"
    # A row may name the domain of its training data. Others were trained on the domain that the column tests, or on
    # data of no stated domain.
    if "trained_on" in asked:
        domains = [asked["trained_on"]]
    else:
        domains = [asked["domain"], None]
    return (
        is_mixed == asked["mixed"]
        and selection == asked.get("selection", "topk")
        and checkpoint == asked.get("checkpoint", "best")
        and training.get("domain") in domains
    )


def _of_backbone(
    results: Sequence[Result],
    backbone: str,
) -> list[Result]:
    """Choose the results of the paper's base model; without any, those of a base model not in the paper.

    Raises:
        UserError: If these are of several base models.
    """
    # Results of the paper's own base model reproduce it. Those of another one are shown beside it, under its name in
    # the caption.
    theirs = [result for result in results if _backbone(result) == backbone]
    if theirs:
        return theirs

    others = [result for result in results if _backbone(result) is None]
    bases: set[str] = set()
    for result in others:
        base = _base(result)
        # A result with a variant is in no table, so its base model is no contradiction.
        if base and not result["training"].get("variant"):
            bases.add(base)
    if len(bases) > 1:
        raise UserError(f"the results are of several base models, {', '.join(sorted(bases))}: give those of one")
    return others


def _base(result: Result) -> str | None:
    """Return the pre-trained model under a result, where it is stated."""
    return result.get("training", {}).get("base")


def _backbone(result: Result) -> str | None:
    """Return the paper's name of a result's base model; None if it is another model."""
    # Names of one model differ in case and punctuation: meta-llama/Llama-2-7b-hf, llama2_7b.
    base = (_base(result) or "").lower()
    letters = re.sub(r"[^a-z0-9]", "", base)
    for word, name in _BACKBONES.items():
        if word in letters:
            return name
    return None


def _study_of(result: Result) -> str | None:
    """Return the name of the study that a result is of; None outside of studies."""
    return result.get("study", {}).get("study")


def _run_of(result: Result) -> tuple[str | None, str | None]:
    """Return the hash of the run that a result is of, and the role of its model in it; None outside of studies."""
    study = result.get("study", {})
    run = study.get("run")
    # By the hash: another study may have another name for the run.
    identity = None if run is None else run_identity(run)
    return identity, study.get("role")


def _name_of(result: Result) -> str:
    name = result["name"]
    study = _study_of(result)
    return name if study is None else f"{name} of {study}"


def _cell_text(cell: Cell) -> str:
    """Return ``paper / ours``, with the deviation between seeds where there are several."""
    # The paper gives a score, and for some cells what follows its ±.
    score, *deviation = cell.paper
    theirs = f"{score:.1f}"
    if deviation:
        theirs += f" ± {deviation[0]:.2f}"

    ours = NO_RESULT
    if cell.ours:
        ours = f"{statistics.fmean(cell.ours):.1f}"
    # The standard deviation between seeds, not the standard error of their mean.
    if len(cell.ours) > 1:
        ours += f" ± {statistics.stdev(cell.ours):.2f}"
    return f"{theirs} / {ours}"


def _delta_text(cell: Cell, best: Cell) -> str:
    """Return the difference from the best full fine-tuning, ``paper / ours``."""
    paper_difference = cell.paper[0] - best.paper[0]
    theirs = f"{paper_difference:+.1f}"

    # Figures of two studies may be of two models.
    are_both_there = cell.ours and best.ours
    if not are_both_there or cell.study != best.study:
        return f"{theirs} / {NO_RESULT}"
    our_mean = statistics.fmean(cell.ours)
    our_best_mean = statistics.fmean(best.ours)
    difference = our_mean - our_best_mean
    return f"{theirs} / {difference:+.1f}"
