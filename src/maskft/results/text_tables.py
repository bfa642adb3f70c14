"""Tables of text in the forms they are read in: a terminal, Markdown, LaTeX."""

from __future__ import annotations

import io
import re
import shutil
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

TERMINAL_WIDTH = 140
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "–": "--",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    **{character: "\\" + character for character in "&%$#_{}"},
}


class Table(NamedTuple):
    """Cells of text, ready for any of the renderers."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def terminal_table(table: Table) -> str:
    """Return a table drawn for the width of the terminal, or for 140 columns where there is none."""
    drawn = RichTable(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for index, column in enumerate(table.columns):
        drawn.add_column(Text(column), overflow="fold", justify="left" if index == 0 else "right")
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))  # Text: a name like [red] is no markup
    text = io.StringIO()
    width = shutil.get_terminal_size(fallback=(TERMINAL_WIDTH, 24)).columns
    Console(file=text, width=width).print(drawn)
    return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines() if line.strip()) + "\n"


def markdown_table(table: Table) -> str:
    """Return a table in GitHub's Markdown."""
    rows = [table.columns, *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" + " ---: |" * (len(table.columns) - 1))
    return "\n".join(lines)


def latex_table(table: Table) -> str:
    """Return a tabular for LaTeX with the booktabs package."""
    rows = [" & ".join(latex_text(cell) for cell in row) + r" \\" for row in [table.columns, *table.rows]]
    alignment = "l" + "r" * (len(table.columns) - 1)
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"])


def latex_text(text: str) -> str:
    """Escape what LaTeX would read as commands."""
    escaped = "".join(LATEX_ESCAPES.get(character, character) for character in text)
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", escaped)
