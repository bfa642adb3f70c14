"""A whole comparison as text: one page for a terminal, everything as Markdown, LaTeX or JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from maskft_common.errors import printable

from .comparison import BETTER, NOT_DISTINGUISHABLE, SCHEMA_VERSION, WORSE, Comparison, Difference, Score
from .tables import Table, draw, latex_text, markdown_text
from .verdict import brief_metric
from .words import (
    difference_text,
    p_text,
    scale_and_digits,
    score_text,
    sentence,
    shows_interval,
    task_text,
    unit_text,
)

PAGE_LINES = 25
PAGE_WIDTH = 80
MIN_TABLE_LINES = 6  # of a page, however long its sentences are
MIN_NAME = 12  # characters of a name that a page's table leaves at least

Place = tuple[str, str]  # task and metric


def render(comparison: Comparison, output_format: str) -> str:
    """Return a comparison as text: ``terminal`` is a page at most, every other form has all of it."""
    if output_format == "json":
        return to_json(comparison.to_dict())
    if output_format == "terminal":
        return _page(comparison)

    sentences = [f"Verdict: {verdict.text}" for verdict in comparison.verdicts]
    sentences += [sentence(row) for row in comparison.differences]
    sentences += [_note(note) for note in comparison.notes]
    sentences.append(_how_to_read(comparison))
    tables = [cross_domain_table(comparison.scores), difference_table(comparison)]

    if output_format == "latex":
        # Comments: the paper takes the tables, its author reads the claims.
        lines = [f"% {latex_text(text)}" for text in sentences]
    else:
        output_format = "markdown"
        lines = [f"- {markdown_text(text)}" for text in sentences]
    blocks = [draw(table, output_format) for table in tables]
    return "\n".join([*blocks, *lines]) + "\n"


def render_scores(scores: Sequence[Score], output_format: str) -> str:
    """Return scores as text: for one model there is no comparison."""
    if output_format == "json":
        record = {
            "schema_version": SCHEMA_VERSION,
            "kind": "scores",
            "scores": [asdict(score) for score in scores],
        }
        return to_json(record)
    return draw(cross_domain_table(scores), output_format)


def to_json(record: dict[str, Any]) -> str:
    """Return a record as text for a file."""
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# The tables


def difference_table(comparison: Comparison) -> Table:
    """Return the differences as a table, fractions in percent, with the intervals that hold all at once."""
    columns = (
        "method",
        "task",
        "metric",
        "n",
        f"difference, {100 * comparison.confidence:g} % interval",
        "p (Holm)",
        "won / lost / tied",
        "verdict",
    )
    return Table(columns, [_difference_cells(row) for row in comparison.differences])


def _difference_cells(row: Difference) -> tuple[str, ...]:
    seeds = f" x {row.num_seeds} seeds" if row.num_seeds > 1 else ""
    return (
        row.method,
        task_text(row),
        f"{row.metric} ({unit_text(row.unit)})",
        f"{row.num_items:,}{seeds}",
        difference_text(row),
        p_text(row.p_adjusted),
        f"{row.won} / {row.lost} / {row.tied}",
        row.verdict,
    )


def cross_domain_table(scores: Sequence[Score]) -> Table:
    """Return a row per model, a column per metric of a task, cells ``value ± standard error``; fractions in percent.

    At an edge, where an error would say nothing, a cell is ``value [low, high]`` with the bounds of a 95 % interval.
    A model that has a metric of one task at some of its seeds only counts as without.
    """
    # Columns, the metrics of a task side by side.
    units = {(score.task, score.metric): score.unit for score in scores}
    tasks = list(dict.fromkeys(score.task for score in scores))
    places = sorted(units, key=lambda place: tasks.index(place[0]))

    task_names = {score.task: task_text(score) for score in scores}
    labels = []
    for task, metric in places:
        name = f"{task_names[task]} {metric}".strip()
        labels.append(f"{name} ({unit_text(units[task, metric])})")

    texts: dict[str, dict[Place, str]] = {}
    for score in scores:
        seeds = f" ({score.num_seeds} seeds)" if score.num_seeds > 1 else ""
        of_model = texts.setdefault(score.model + seeds, {})
        of_model[score.task, score.metric] = score_text(score)

    rows: list[tuple[str, ...]] = []
    for label, of_model in texts.items():
        cells = [of_model.get(place, "–") for place in places]
        rows.append((label, *cells))
    return Table(("model", *labels), rows)


# The page


def _page(comparison: Comparison) -> str:
    """Return a page of 80 columns, 25 lines: one metric of each task, masks first, the verdict, a count of the rest.

    Further metrics of a task follow if they support a claim and the page has room, so that a better loss is not hidden
    behind an accuracy that is not distinguishable.
    """
    rows = comparison.differences
    first = brief_metric(rows)
    places = _first_places(comparison, first)
    shown = [row for row in rows if (row.task, row.metric) in places]
    of_first_method = [row for row in rows if row.method == rows[0].method]

    tail = _wrapped(_page_sentences(comparison, shown, of_first_method))
    room = max(MIN_TABLE_LINES, PAGE_LINES - 1 - len(tail))

    lines = _page_lines(comparison, places)
    for place in _claiming_places(comparison, places):
        longer = _page_lines(comparison, [*places, place])
        if len(longer) <= room:
            places.append(place)
            lines = longer
    lines = lines[:room]

    tail.append(_left_out(comparison, lines))
    return "\n".join([*lines, *tail]) + "\n"


def _first_places(comparison: Comparison, first: Place) -> list[Place]:
    """Return the place that represents the comparison, that of the first verdict, and one of each other task."""
    rows = sorted(comparison.differences, key=lambda row: (row.task, row.metric) != first)
    places = [first]
    for verdict in comparison.verdicts[:1]:
        places.append((verdict.parent.task, verdict.parent.metric))
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        places.append(brief_metric(of_task))

    in_rows = {(row.task, row.metric) for row in rows}
    return [place for place in dict.fromkeys(places) if place in in_rows]


def _claiming_places(comparison: Comparison, shown: Sequence[Place]) -> list[Place]:
    """Return the places that are not shown and in which something is better or worse."""
    claims = [row for row in comparison.differences if row.verdict != NOT_DISTINGUISHABLE]
    places = dict.fromkeys((row.task, row.metric) for row in claims)
    return [place for place in places if place not in shown]


def _page_sentences(
    comparison: Comparison,
    shown: Sequence[Difference],
    of_first_method: Sequence[Difference],
) -> list[str]:
    if comparison.verdicts:
        sentences = [f"Verdict: {comparison.verdicts[0].text}"]
    else:
        sentences = [sentence(row) for row in of_first_method if row in shown][:2]

    has_two_seeds = any(row.num_seeds == 2 for row in shown)
    if has_two_seeds and not comparison.fixed_seeds:
        sentences.append("Two seeds: what is not distinguishable is no claim over seeds.")
    sentences += [_note(note) for note in comparison.notes[:2]]
    return sentences


def _wrapped(sentences: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for text in sentences:
        lines += textwrap.wrap(printable(text), PAGE_WIDTH, subsequent_indent="  ")
    return lines


def _page_lines(comparison: Comparison, places: Sequence[Place]) -> list[str]:
    return draw(_page_table(comparison, places), "terminal", PAGE_WIDTH).splitlines()


def _left_out(comparison: Comparison, lines: Sequence[str]) -> str:
    """Return how many differences, and how many claims among them, have no line on the page."""
    # A line of the page ends with its verdict.
    num_shown = sum(line.endswith((BETTER, WORSE, NOT_DISTINGUISHABLE)) for line in lines)
    num_shown_claims = sum(line.endswith((BETTER, WORSE)) for line in lines)
    num_claims = sum(row.verdict != NOT_DISTINGUISHABLE for row in comparison.differences)
    num_left = len(comparison.differences) - num_shown
    num_claims_left = num_claims - num_shown_claims

    text = "P-values, errors"
    if num_left:
        text = f"{num_left} more difference{'s' if num_left > 1 else ''}"
        if num_claims_left:
            text += f" ({num_claims_left} better or worse)"
    return f"{text}: --format markdown, or a study's table."


def _page_table(comparison: Comparison, places: Sequence[Place]) -> Table:
    """Return a block of rows for each metric of a task, under its heading, with names cut where the page ends."""
    masks = {verdict.parent.method for verdict in comparison.verdicts}
    table: list[tuple[str, ...]] = []
    for place in places:
        block = [row for row in comparison.differences if (row.task, row.metric) == place]
        block.sort(key=lambda row: row.method not in masks)
        table += _block(comparison, block)

    over = " over items" if comparison.fixed_seeds else ""
    columns = ("", "value", f"difference, {100 * comparison.confidence:g} %{over}", "verdict")
    # The width that the other columns leave to names, two blanks before each.
    width = PAGE_WIDTH
    for index in (1, 2, 3):
        width -= 2 + max(len(row[index]) for row in [columns, *table])
    width = max(MIN_NAME, width)

    rows: list[tuple[str, ...]] = []
    for name, *cells in table:
        is_heading = not any(cells)
        shown = name if is_heading else _cut(name, width)
        rows.append((shown, *cells))
    return Table(columns, rows)


def _block(comparison: Comparison, rows: Sequence[Difference]) -> list[tuple[str, ...]]:
    """Return a heading, a row per method, and the row of the baseline."""
    most = max(rows, key=lambda row: row.num_seeds)
    scale, digits = scale_and_digits(most.unit)
    seeds = f", {most.num_seeds} seeds" if most.num_seeds > 1 else ""
    heading = f"{most.metric} on {task_text(most)} ({unit_text(most.unit)}), {most.num_items:,} items{seeds}"

    block: list[tuple[str, ...]] = [(_cut(heading, PAGE_WIDTH), "", "", "")]
    for row in rows:
        value = f"{scale * row.value:.{digits}f}"
        block.append(("  " + row.method, value, difference_text(row), row.verdict))
    of_baseline = f"{scale * most.baseline_value:.{digits}f}"
    block.append(("  " + comparison.baseline, of_baseline, "", "(baseline)"))
    return block


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    return text[: width - 1] + "…"


def _note(note: str) -> str:
    end = "" if note.endswith("?") else "."
    return f"Note: {note}{end}"


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
    text += "± is one standard error, over items"
    if not comparison.fixed_seeds:
        text += " or several seeds"
    if any(shows_interval(score) for score in comparison.scores):
        text += "; brackets beside a score are its 95 % interval, where an error would say nothing"
    return text + "."
