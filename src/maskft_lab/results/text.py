"""Comparisons and tables as text: for a terminal, Markdown or JSON."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from maskft_common.errors import printable

from .comparison import BETTER, NOT_DISTINGUISHABLE, SCHEMA_VERSION, WORSE, Comparison, Difference, Score
from .schema import BEFORE

PAGE_LINES, PAGE_WIDTH = 25, 80
MIN_NAME = 12  # characters of a name that a page's table leaves at least

# What Markdown would take for an escape, code, a tag or a link.
MARKDOWN_SPECIAL = re.compile(r"[\\`]|<(?=[a-zA-Z/!?])|(?<=\])\(")


class Table(NamedTuple):
    """Cells of text, ready for any form; a row with text in its first cell only is a heading."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def render(comparison: Comparison, output_format: str) -> str:
    """Return a comparison as text: ``markdown`` and ``json`` have all of it, ``terminal`` a page at most."""
    if output_format == "json":
        return to_json(comparison.to_dict())
    if output_format == "terminal":
        return _page(comparison)
    sentences = [f"Verdict: {verdict.text}" for verdict in comparison.verdicts]
    sentences += [sentence(row) for row in comparison.differences]
    sentences += [_note(note) for note in comparison.notes]
    tables = [
        draw(table, "markdown") for table in (cross_domain_table(comparison.scores), difference_table(comparison))
    ]
    lines = [f"- {markdown_text(line)}" for line in (*sentences, _how_to_read(comparison))]
    return "\n".join([*tables, *lines]) + "\n"


def brief_metric(differences: Sequence[Difference]) -> tuple[str, str]:
    """Return task and metric that stand for a comparison where there is room for one.

    What was trained for goes before probes of earlier abilities, accuracy before other metrics; all 0 says nothing.
    """
    told = {(row.task, row.metric) for row in differences if row.value or row.baseline_value}

    def order(row: Difference) -> tuple[bool, ...]:
        is_silent = (row.task, row.metric) not in told
        return row.task.startswith(BEFORE), is_silent, row.metric != "accuracy", not row.is_main

    first = min(differences, key=order)
    return first.task, first.metric


def _page(comparison: Comparison) -> str:
    """Return a page of 80 columns, 25 lines: one metric of each task, masks first, the verdict, what is left out."""
    first = brief_metric(comparison.differences)
    rows = sorted(comparison.differences, key=lambda row: (row.task, row.metric) != first)
    metrics = {task: brief_metric([row for row in rows if row.task == task]) for task in {row.task for row in rows}}
    shown = [row for row in rows if (row.task, row.metric) == metrics[row.task]]
    if comparison.verdicts:
        sentences = [f"Verdict: {comparison.verdicts[0].text}"]
    else:
        sentences = [sentence(row) for row in shown if row.method == rows[0].method][:2]
    if not comparison.fixed_seeds and any(row.num_seeds == 2 for row in shown):
        sentences.append("Two seeds: what is not distinguishable is no claim over seeds.")
    sentences += [_note(note) for note in comparison.notes[:2]]
    tail = [line for text in sentences for line in textwrap.wrap(printable(text), PAGE_WIDTH, subsequent_indent="  ")]
    lines = draw(_page_table(comparison, shown), "terminal", PAGE_WIDTH).splitlines()
    lines = lines[: max(6, PAGE_LINES - 1 - len(tail))]
    num_left = len(rows) - sum(line.endswith((BETTER, WORSE, NOT_DISTINGUISHABLE)) for line in lines)
    num_claims = sum(row.verdict != NOT_DISTINGUISHABLE for row in rows)
    num_claims -= sum(line.endswith((BETTER, WORSE)) for line in lines)
    claims = f" ({num_claims} better or worse)" if num_claims else ""
    left_out = f"{num_left} more difference{'s' * (num_left > 1)}{claims}" if num_left else "p-values, errors"
    tail.append(f"{left_out}: --format markdown, or a study's table.".capitalize())
    return "\n".join([*lines, *tail]) + "\n"


def _page_table(comparison: Comparison, shown: Sequence[Difference]) -> Table:
    """Return a block of rows for each metric of a task, under its heading, with names cut where the page ends."""
    masks = {verdict.parent.method for verdict in comparison.verdicts}
    blocks: dict[tuple[str, str], list[Difference]] = {}
    for row in sorted(shown, key=lambda row: row.method not in masks):
        blocks.setdefault((row.task, row.metric), []).append(row)
    table: list[tuple[str, ...]] = []
    for place in dict.fromkeys((row.task, row.metric) for row in shown):
        most = max(blocks[place], key=lambda row: row.num_seeds)
        scale, digits = _scale_and_digits(most.unit)
        seeds = f", {most.num_seeds} seeds" if most.num_seeds > 1 else ""
        what = f"{most.metric} on {task_text(most)} ({_unit_text(most.unit)}), {most.num_items:,} items{seeds}"
        table.append((_cut(what, PAGE_WIDTH), "", "", ""))
        for row in blocks[place]:
            value = f"{scale * row.value:.{digits}f}"
            table.append(("  " + row.method, value, difference_text(row), row.verdict))
        table.append(("  " + comparison.baseline, f"{scale * most.baseline_value:.{digits}f}", "", "(baseline)"))
    of = " over items" if comparison.fixed_seeds else ""
    columns = ("", "value", f"difference, {100 * comparison.confidence:g} %{of}", "verdict")
    others = sum(2 + max(len(row[index]) for row in [columns, *table]) for index in (1, 2, 3))
    width = max(MIN_NAME, PAGE_WIDTH - others)
    return Table(columns, [(_cut(row[0], width) if any(row[1:]) else row[0], *row[1:]) for row in table])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _note(note: str) -> str:
    return f"Note: {note}" + ("" if note.endswith("?") else ".")


def _how_to_read(comparison: Comparison) -> str:
    text = (
        f"Differences are method - {comparison.baseline}, with {100 * comparison.confidence:g} % intervals of "
        f"{comparison.num_resamples:,} bootstrap samples; "
    )
    if any(row.num_comparisons > 1 for row in comparison.differences):
        text += "they are simultaneous and go with the verdicts, those marked unadjusted do not; "
    if any(row.is_cut_at_zero for row in comparison.differences):
        text += "a round bracket at 0 claims a sign and no size; "
    if comparison.fixed_seeds:
        text += "seeds are fixed, so all of it is about these trained models and not about other seeds; "
    text += "± is one standard error, over items" + ("" if comparison.fixed_seeds else " or several seeds")
    if any(_shows_interval(score) for score in comparison.scores):
        text += "; brackets beside a score are its 95 % interval, where an error would say nothing"
    return text + "."


def render_scores(scores: Sequence[Score], output_format: str) -> str:
    """Return scores as text: one model has nothing to be compared with."""
    if output_format == "json":
        return to_json({"schema_version": SCHEMA_VERSION, "kind": "scores", "scores": [asdict(s) for s in scores]})
    return draw(cross_domain_table(scores), output_format)


def to_json(record: dict[str, Any]) -> str:
    """Return a record as text for a file."""
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sentence(row: Difference) -> str:
    """Return a difference in words, claiming no more than the interval and the adjusted p support.

    Of several comparisons the interval beside the verdict is simultaneous; the unadjusted one is labelled, since it may
    leave zero out where nothing is claimed.
    """
    seeds = f", {'these ' if row.by_seed else ''}{row.num_seeds} seeds" if row.num_seeds > 1 else ""
    seeds += f", {row.num_clusters:,} clusters" if row.num_clusters else ""
    unit = "points" if row.unit == "fraction" else row.unit
    text = (
        f"{row.method} vs {row.baseline}, {row.metric} on {task_text(row)}{seeds}: "
        f"{difference_text(row, unit)}{_unadjusted_text(row)}, {row.test} p {_p_text(row.p_value)}"
    )
    if row.num_comparisons > 1:
        text += f" ({_p_text(row.p_adjusted)} after Holm over {row.num_comparisons} comparisons)"
    text += f": {row.verdict}"
    if row.num_seeds == 2 and not row.by_seed and row.verdict == NOT_DISTINGUISHABLE:
        text += "; two seeds: no claim over seeds"
    if row.by_seed:
        text += f"; by seed {numbers_text(row.by_seed, row.unit)}"
    return text + "."


def difference_table(comparison: Comparison) -> Table:
    """Return the differences as a table, fractions in percent, with the intervals that hold all at once."""
    difference = f"difference, {100 * comparison.confidence:g} % interval"
    columns = ("method", "task", "metric", "n", difference, "p (Holm)", "won / lost / tied", "verdict")
    rows: list[tuple[str, ...]] = [
        (
            row.method,
            task_text(row),
            f"{row.metric} ({_unit_text(row.unit)})",
            f"{row.num_items:,}" + (f" x {row.num_seeds} seeds" if row.num_seeds > 1 else ""),
            difference_text(row),
            _p_text(row.p_adjusted),
            f"{row.won} / {row.lost} / {row.tied}",
            row.verdict,
        )
        for row in comparison.differences
    ]
    return Table(columns, rows)


def cross_domain_table(scores: Sequence[Score]) -> Table:
    """Return a row per model, a column per metric of a task, cells ``value ± standard error``; fractions in percent.

    At an edge, where an error would say nothing, a cell is ``value [low, high]`` with the bounds of a 95 % interval.
    A model that has a metric of one task at some of its seeds only counts as without.
    """
    tasks = list(dict.fromkeys(score.task for score in scores))
    units = {(score.task, score.metric): score.unit for score in scores}
    units = dict(sorted(units.items(), key=lambda entry: tasks.index(entry[0][0])))  # a task's metrics side by side
    shown = {score.task: task_text(score) for score in scores}
    labels = [f"{shown[task]} {metric}".strip() + f" ({_unit_text(unit)})" for (task, metric), unit in units.items()]
    columns = ("model", *labels)
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for score in scores:
        label = score.model + (f" ({score.num_seeds} seeds)" if score.num_seeds > 1 else "")
        rows.setdefault(label, {})[score.task, score.metric] = score_text(score)
    return Table(columns, [(label, *(cells.get(column, "–") for column in units)) for label, cells in rows.items()])


def draw(table: Table, output_format: str, width: int | None = None) -> str:
    """Return a table as text: ``terminal`` (of ``width`` columns, by default its own) or ``markdown``."""
    clean = printable if output_format == "terminal" else markdown_cell
    cells = [tuple(map(clean, row)) for row in (table.columns, *table.rows)]
    if output_format == "terminal":
        return _terminal_table(Table(cells[0], cells[1:]), width or _terminal_width())
    lines = [f"| {' | '.join(row)} |" for row in cells]
    lines.insert(1, "|" + " --- |" + " ---: |" * (len(table.columns) - 1))
    return "\n".join(lines) + "\n"


def wrap(line: str) -> str:
    """Break a line where the terminal ends."""
    return textwrap.fill(line, _terminal_width(), subsequent_indent="  ", break_on_hyphens=False)


def _terminal_width() -> int:
    return shutil.get_terminal_size(fallback=(80, 24)).columns


def _terminal_table(table: Table, width: int) -> str:
    """Return columns side by side; those for which the width does not suffice follow below, with the labels again."""
    rows = [table.columns, *(row for row in table.rows if any(row[1:]))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks: list[list[int]] = []
    for index in range(1, len(widths)):
        if not blocks or sum(widths[i] + 2 for i in [0, *blocks[-1], index]) - 2 > width:
            blocks.append([])
        blocks[-1].append(index)
    lines: list[str] = []
    for block in blocks:
        rule = "─" * (sum(widths[i] + 2 for i in [0, *block]) - 2)
        drawn = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in block)]).rstrip()
            for row in [table.columns, *table.rows]
        ]
        lines += [drawn[0], rule, *drawn[1:], ""]
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """Escape what Markdown would read as more than text."""
    return MARKDOWN_SPECIAL.sub(r"\\\g<0>", printable(text))


def markdown_cell(text: str) -> str:
    """Escape also what would end a cell of a table."""
    return markdown_text(text).replace("|", r"\|")


def score_text(score: Score) -> str:
    """Return ``46.8 ± 1.4``, in percent for fractions; at an edge ``0.0 [0.0, 1.3]``, never ``± 0.0``."""
    if score.value is None:
        return "no value"
    scale, digits = _scale_and_digits(score.unit)
    return f"{scale * score.value:.{digits}f}{error_text(score, digits, scale)}"


def error_text(score: Score, digits: int = 4, scale: float = 1.0) -> str:
    """Return what stands behind a value, by default in the metric's own unit: `` ± 0.0137``, `` [0.0000, 0.0126]``."""
    if score.low is not None and score.high is not None and _shows_interval(score):
        return f" [{scale * score.low:.{digits}f}, {scale * score.high:.{digits}f}]"
    return "" if score.stderr is None else f" ± {scale * score.stderr:.{digits}f}"


def _shows_interval(score: Score) -> bool:
    is_shown_as_zero = score.stderr is not None and round(100 * score.stderr, 1) == 0
    return score.low is not None and (score.is_at_edge or is_shown_as_zero)


def task_text(row: Difference | Score) -> str:
    """Return what a task is called: rows of one's own by the file of the test set."""
    return row.test_set or row.task


def difference_text(row: Difference, unit: str = "") -> str:
    """Return ``+1.2 [0.3, 2.1]`` with the interval that agrees with the verdict: the simultaneous one.

    A round bracket is the bound at zero of a difference whose sign is claimed and no more. Comparisons written before
    intervals were simultaneous have only unadjusted ones, which then say so.
    """
    label = " unadjusted" if row.num_comparisons > 1 and row.unadjusted_low is None else ""
    return _with_interval(row, (row.ci_low, row.ci_high), unit) + label


def numbers_text(numbers: Sequence[float], unit: str) -> str:
    """Return differences with their signs, such as those of several seeds."""
    scale, digits = _scale_and_digits(unit)
    return ", ".join(f"{scale * number:+.{digits}f}" for number in numbers)


def _unadjusted_text(row: Difference) -> str:
    """Return ``, unadjusted [0.6, 1.8]`` where another interval stands beside the verdict."""
    if row.num_comparisons == 1 or row.unadjusted_low is None or row.unadjusted_high is None:
        return ""
    _, interval = _with_interval(row, (row.unadjusted_low, row.unadjusted_high)).split(" ", 1)
    return f", unadjusted {interval}"


def _with_interval(row: Difference, bounds: tuple[float, float], unit: str = "") -> str:
    """Return a difference and bounds, with so many decimals that no number which is not zero is rounded to it."""
    scale, digits = _scale_and_digits(row.unit)
    numbers = [scale * number for number in (row.difference, *bounds)]
    smallest = min((abs(number) for number in numbers if number), default=1.0)
    while smallest < 0.5 * 10**-digits and digits < 8:
        digits += 1
    value, low, high = (round(number, digits) + 0.0 for number in numbers)  # + 0.0: no minus before zero
    is_claimed = row.verdict != NOT_DISTINGUISHABLE
    left, right = "(" if is_claimed and low == 0 else "[", ")" if is_claimed and high == 0 else "]"
    return f"{value:+.{digits}f}{unit and ' ' + unit} {left}{low:.{digits}f}, {high:.{digits}f}{right}"


def _scale_and_digits(unit: str) -> tuple[float, int]:
    """Return by what values of a unit are multiplied to be shown, and with how many decimals at least."""
    return (100.0, 1) if unit == "fraction" else (1.0, 4)


def _unit_text(unit: str) -> str:
    return "%" if unit == "fraction" else unit


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}"
