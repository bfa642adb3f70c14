"""A whole comparison as text: one page for a terminal, everything as Markdown, LaTeX or JSON."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from maskft_common.errors import printable

from .comparison import (
    BETTER,
    NOT_DISTINGUISHABLE,
    SCHEMA_VERSION,
    WORSE,
    Comparison,
    Difference,
    Place,
    Score,
)
from .tables import Table, draw, latex_text, markdown_text
from .verdict import brief_metric
from .words import (
    difference_text,
    number_text,
    p_text,
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


def render(comparison: Comparison, output_format: str) -> str:
    """Return a comparison as text: ``terminal`` is a page at most, every other form has all of it."""
    if output_format == "json":
        # Everything, in the units of the metrics: other programs read it.
        record = comparison.to_dict()
        return to_json(record)
    if output_format == "terminal":
        return _page(comparison)

    # Tables first, then every claim as a sentence.
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
    # A table ends with a line break, so that joining them leaves a blank line between them.
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
    text = json.dumps(
        record,
        indent=1,
        ensure_ascii=False,
        allow_nan=False,
    )
    return text + "\n"


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
    rows = [_difference_cells(row) for row in comparison.differences]
    return Table(columns, rows)


def _difference_cells(row: Difference) -> tuple[str, ...]:
    # n is the number of values in the mean: with several seeds each item has one for each.
    num_values = f"{row.num_items:,}"
    if row.num_seeds > 1:
        num_values += f" x {row.num_seeds} seeds"
    return (
        row.method,
        task_text(row),
        f"{row.metric} ({unit_text(row.unit)})",
        num_values,
        difference_text(row),
        p_text(row.p_adjusted, 1 - row.confidence),
        f"{row.won} / {row.lost} / {row.tied}",
        row.verdict,
    )


def cross_domain_table(scores: Sequence[Score]) -> Table:
    """Return a row per model, a column per metric of a task, cells ``value ± standard error``; fractions in percent.

    At an edge, where an error would say nothing, a cell is ``value [low, high]`` with the bounds of a 95 % interval.
    A model that has a metric of one task at some of its seeds only counts as without.
    """
    units: dict[Place, str] = {}
    task_names: dict[str, str] = {}
    for score in scores:
        units[score.place] = score.unit
        task_names[score.task] = task_text(score)

    # Columns, the metrics of a task side by side: scores come model by model, so a task's may lie apart.
    # A sort keeps the order of equals: metrics of one task stay as they came.
    tasks = list(task_names)
    places = sorted(units, key=lambda place: tasks.index(place[0]))
    labels = []
    for task, metric in places:
        name = f"{task_names[task]} {metric}".strip()
        unit = unit_text(units[task, metric])
        labels.append(f"{name} ({unit})")

    # Label of a model -> its cells by place.
    texts: dict[str, dict[Place, str]] = {}
    for score in scores:
        label = score.model
        if score.num_seeds > 1:
            label += f" ({score.num_seeds} seeds)"
        of_model = texts.setdefault(label, {})
        of_model[score.place] = score_text(score)

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
    # One metric of each task, so that a study with many probes and metrics still fits.
    first = brief_metric(rows)
    places = _first_places(comparison, first)
    shown = [row for row in rows if row.place in places]
    first_method = rows[0].method
    of_first_method = [row for row in rows if row.method == first_method]

    # Sentences first: they take the lines they need, and the table has the rest, less one for the count at the end.
    sentences = _page_sentences(comparison, shown, of_first_method)
    tail = _wrapped(sentences)
    room = max(MIN_TABLE_LINES, PAGE_LINES - 1 - len(tail))

    lines = _page_lines(comparison, places)
    for place in _claiming_places(comparison, places):
        # Drawn to be measured: how long a block is depends on the width of all others.
        longer = _page_lines(comparison, [*places, place])
        if len(longer) <= room:
            places.append(place)
            lines = longer
    # The table may be longer than the room without any further metric. Rows that are cut off are counted in the last
    # line.
    lines = lines[:room]

    tail.append(_left_out(comparison, lines))
    return "\n".join([*lines, *tail]) + "\n"


def _first_places(comparison: Comparison, first: Place) -> list[Place]:
    """Return the place that represents the comparison, that of the first verdict, and one of each other task."""
    # Its own rows first (False sorts before True), so that its task is the first of the tasks below.
    rows = sorted(
        comparison.differences,
        key=lambda row: row.place != first,
    )
    places = [first]
    for verdict in comparison.verdicts[:1]:
        places.append(verdict.parent.place)

    tasks = dict.fromkeys(row.task for row in rows)
    for task in tasks:
        of_task = [row for row in rows if row.task == task]
        places.append(brief_metric(of_task))

    in_rows = {row.place for row in rows}
    # A comparison that was read from a file may have a verdict in a metric without a row.
    unique_places = dict.fromkeys(places)
    return [place for place in unique_places if place in in_rows]


def _claiming_places(
    comparison: Comparison,
    shown: Sequence[Place],
) -> list[Place]:
    """Return the places that are not shown and in which something is better or worse."""
    claims = [row for row in comparison.differences if row.verdict != NOT_DISTINGUISHABLE]
    places = dict.fromkeys(row.place for row in claims)
    return [place for place in places if place not in shown]


def _page_sentences(
    comparison: Comparison,
    shown: Sequence[Difference],
    of_first_method: Sequence[Difference],
) -> list[str]:
    """Return the sentences below the page's table: the first verdict, or two differences, and two notes at most.

    Args:
        comparison: The comparison.
        shown: Differences that the table shows.
        of_first_method: Differences of the first method, for comparisons without a verdict on a mask.
    """
    if comparison.verdicts:
        sentences = [f"Verdict: {comparison.verdicts[0].text}"]
    else:
        rows = [row for row in of_first_method if row in shown]
        sentences = [sentence(row) for row in rows[:2]]

    # Seeds that are fixed are not a sample, and two of them are as good as three.
    has_two_seeds = any(row.num_seeds == 2 for row in shown)
    if has_two_seeds and not comparison.fixed_seeds:
        sentences.append("Two seeds: 'not distinguishable' supports no claim over seeds.")
    sentences += [_note(note) for note in comparison.notes[:2]]
    return sentences


def _wrapped(sentences: Sequence[str]) -> list[str]:
    # Continued lines are indented, so that one sees where a sentence begins.
    lines: list[str] = []
    for text in sentences:
        wrapped = textwrap.wrap(
            printable(text),
            PAGE_WIDTH,
            subsequent_indent="  ",
        )
        lines += wrapped
    return lines


def _page_lines(
    comparison: Comparison,
    places: Sequence[Place],
) -> list[str]:
    table = _page_table(comparison, places)
    text = draw(table, "terminal", PAGE_WIDTH)
    return text.splitlines()


def _left_out(comparison: Comparison, lines: Sequence[str]) -> str:
    """Return how many differences, and how many claims among them, have no line on the page."""
    # The lines are counted and not the rows, because the page may have cut the table's end. A line ends with its
    # verdict.
    num_shown = 0
    num_shown_claims = 0
    for line in lines:
        # The row of the baseline and headings end otherwise.
        num_shown += line.endswith((BETTER, WORSE, NOT_DISTINGUISHABLE))
        num_shown_claims += line.endswith((BETTER, WORSE))

    num_claims = 0
    for row in comparison.differences:
        num_claims += row.verdict != NOT_DISTINGUISHABLE
    num_left = len(comparison.differences) - num_shown
    num_claims_left = num_claims - num_shown_claims

    text = "P-values, errors"
    if num_left:
        plural = "s" if num_left > 1 else ""
        text = f"{num_left} more difference{plural}"
        if num_claims_left:
            text += f" ({num_claims_left} better or worse)"
    return f"{text}: --format markdown, or a study's table."


def _page_table(comparison: Comparison, places: Sequence[Place]) -> Table:
    """Return a block of rows for each metric of a task, under its heading, with names cut where the page ends."""
    # Masks are the subject of the page, so their rows come first in each block.
    masks = {verdict.parent.method for verdict in comparison.verdicts}
    table: list[tuple[str, ...]] = []
    for place in places:
        block = [row for row in comparison.differences if row.place == place]
        block.sort(key=lambda row: row.method not in masks)  # masks first, the others in their order
        table += _block(comparison, block)

    over = " over items" if comparison.fixed_seeds else ""
    interval = f"difference, {100 * comparison.confidence:g} %{over}"
    columns = ("", "value", interval, "verdict")

    # The width that the other columns leave to names, two blanks before each.
    width = PAGE_WIDTH
    for index in (1, 2, 3):
        cells_of_column = [row[index] for row in [columns, *table]]
        longest = max(len(cell) for cell in cells_of_column)
        width -= 2 + longest
    width = max(MIN_NAME, width)

    # A heading spans all columns, and was cut to the page already.
    names = {name for name, *cells in table if any(cells)}
    shown_names = _cut_names(names, width)
    rows: list[tuple[str, ...]] = []
    for name, *cells in table:
        is_heading = not any(cells)
        shown = name if is_heading else shown_names[name]
        rows.append((shown, *cells))
    return Table(columns, rows)


def _block(
    comparison: Comparison,
    rows: Sequence[Difference],
) -> list[tuple[str, ...]]:
    """Return a heading, a row per method, and the row of the baseline."""
    # The baseline's value is over the seeds that it shares with a method: here with the method that has most of them.
    most = max(rows, key=lambda row: row.num_seeds)
    fewest = min(rows, key=lambda row: row.num_seeds)
    heading = f"{most.metric} on {task_text(most)} ({unit_text(most.unit)}), {most.num_items:,} items"
    if fewest.num_seeds < most.num_seeds:
        # Some runs are missing, and a claim about a method is of its own seeds alone.
        heading += f", {fewest.num_seeds} to {most.num_seeds} seeds"
    elif most.num_seeds > 1:
        heading += f", {most.num_seeds} seeds"

    block: list[tuple[str, ...]] = []
    shown_heading = _cut(heading, PAGE_WIDTH)
    block.append((shown_heading, "", "", ""))
    for row in rows:
        name = f"  {row.method}"
        value = number_text(row.value, row.unit)
        difference = difference_text(row)
        block.append((name, value, difference, row.verdict))
    baseline_name = f"  {comparison.baseline}"
    baseline_value = number_text(most.baseline_value, most.unit)
    block.append((baseline_name, baseline_value, "", "(baseline)"))
    return block


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    # The ellipsis takes one column itself.
    return text[: width - 1] + "…"


def _cut_names(names: Collection[str], width: int) -> dict[str, str]:
    """Names as they are shown: cut at the end, or in the middle where the end tells two of them apart."""
    cut = {name: _cut(name, width) for name in names}
    num_shown = Counter(cut.values())
    for name, shown in cut.items():
        # Values of a grid are at the end, as in "mask [sparsity=0.05]".
        has_values = name.endswith("]")
        if shown != name and (has_values or num_shown[shown] > 1):
            # The ellipsis takes one column.
            num_last = (width - 1) // 2
            num_first = width - 1 - num_last
            cut[name] = f"{name[:num_first]}…{name[-num_last:]}"
    return cut


def _note(note: str) -> str:
    # Some notes ask the reader something.
    end = "" if note.endswith("?") else "."
    return f"Note: {note}{end}"


def _how_to_read(comparison: Comparison) -> str:
    """Return one sentence about differences, intervals and errors, with what applies to this comparison."""
    # Each clause only where a reader of this comparison meets its subject.
    percent = f"{100 * comparison.confidence:g} %"
    text = (
        f"Differences are method - {comparison.baseline}, with {percent} intervals of "
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
