r"""A table of text and its forms: columns for a terminal, Markdown, LaTeX.

Texts of a table may come from a stranger's result file. Each form escapes everything that is not plain text in it.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable
from typing import NamedTuple

from maskft_common.errors import printable

# Characters that Markdown reads as an escape, code, a tag or a link.
MARKDOWN_SPECIAL = re.compile(r"[\\`]|<(?=[a-zA-Z/!?])|(?<=\])\(")

_LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "–": "--",
    "…": r"\dots{}",
}
# Not the hyphens of names and dates, which follow a letter or a digit.
_LATEX_SIGN = re.compile(r"(?<![\w.-])-(?=\d)")


class Table(NamedTuple):
    """Cells of text, ready for any form; a row with text in its first cell only is a heading."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def draw(
    table: Table,
    output_format: str,
    width: int | None = None,
) -> str:
    """Return a table as text.

    Args:
        table: Its cells.
        output_format: ``terminal``, ``markdown`` or ``latex``.
        width: Columns of the terminal; by default those of the one that is used.
    """
    # Texts are escaped before they are measured: an escape may change their length.
    # Each form has its own escapes: text for a terminal must not hold control characters, and text for Markdown no
    # markup.
    if output_format == "terminal":
        cleaned = _cleaned(table, printable)
        return _terminal_table(cleaned, width or _terminal_width())

    if output_format == "latex":
        cleaned = _cleaned(table, latex_text)
        return _latex_table(cleaned)

    cleaned = _cleaned(table, markdown_cell)
    return _markdown_table(cleaned)


def wrap(line: str) -> str:
    """Break a line where the terminal ends."""
    return textwrap.fill(
        line,
        _terminal_width(),
        subsequent_indent="  ",
        break_on_hyphens=False,
    )


def markdown_text(text: str) -> str:
    """Escape the characters that Markdown gives a meaning."""
    return MARKDOWN_SPECIAL.sub(r"\\\g<0>", printable(text))


def markdown_cell(text: str) -> str:
    """Escape for a cell of a table, which a bar would end."""
    return markdown_text(text).replace("|", r"\|")


def latex_text(text: str) -> str:
    """Escape the characters that LaTeX reads as commands, and set the sign of a number as a minus."""
    out: list[str] = []
    # One pass over the characters: replacing one after another would escape the braces of earlier replacements again.
    for character in printable(text):
        out.append(_LATEX_SPECIAL.get(character, character))
    escaped = "".join(out)
    # In text a "-" is a hyphen, shorter than the plus of the row above.
    return _LATEX_SIGN.sub(r"$-$", escaped)


def _cleaned(
    table: Table,
    clean: Callable[[str], str],
) -> Table:
    columns = tuple(map(clean, table.columns))
    rows = [tuple(map(clean, row)) for row in table.rows]
    return Table(columns, rows)


def _is_heading(row: tuple[str, ...]) -> bool:
    """Whether a row has text in its first cell only."""
    _, *others = row
    return not any(others)


def _markdown_table(table: Table) -> str:
    # The first column is text, aligned to the left; the others are numbers, aligned to the right.
    num_numbers = len(table.columns) - 1
    rule = "| --- |" + " ---: |" * num_numbers

    head = " | ".join(table.columns)
    lines = [f"| {head} |", rule]
    for row in table.rows:
        cells = " | ".join(row)
        lines.append(f"| {cells} |")
    return "\n".join(lines) + "\n"


def _latex_table(table: Table) -> str:
    r"""Return a ``tabular`` with the rules of booktabs, for ``\input`` into a ``table``."""
    num_columns = len(table.columns)
    alignment = "l" + "r" * (num_columns - 1)
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        _latex_row(table.columns),
        r"\midrule",
    ]
    for row in table.rows:
        if _is_heading(row):
            lines.append(rf"\multicolumn{{{num_columns}}}{{l}}{{{row[0]}}} \\")
        else:
            lines.append(_latex_row(row))
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: tuple[str, ...]) -> str:
    # A bracket or a star at the start of a row would be an argument of the \\ before it.
    first, *others = cells
    if first.startswith(("[", "*")):
        first = "{}" + first
    return " & ".join([first, *others]) + r" \\"


def _terminal_width() -> int:
    # The fallback is for a pipe or a file.
    size = shutil.get_terminal_size(fallback=(80, 24))
    return size.columns


def _terminal_table(table: Table, width: int) -> str:
    """Return columns side by side; if the width is too small, further ones follow below, with the labels again."""
    # Headings may be longer than their column.
    # Headings span columns, so they do not count.
    measured = [table.columns]
    measured += [row for row in table.rows if not _is_heading(row)]
    widths: list[int] = []
    for column in zip(*measured, strict=True):
        longest = max(len(cell) for cell in column)
        widths.append(longest)

    # Indices of the columns of each block; the first column is in all of them.
    blocks: list[list[int]] = []
    for index in range(1, len(widths)):
        # The first block, or one more where the last has no room.
        # A column that is wider than the terminal gets a block to itself.
        if not blocks or _width_of([*blocks[-1], index], widths) > width:
            blocks.append([])
        blocks[-1].append(index)

    # Names to the left, numbers to the right.
    lines: list[str] = []
    for block in blocks:
        drawn = []
        for row in (table.columns, *table.rows):
            # A heading is longer than its column, and has no other cells that it could push aside.
            cells = [row[0].ljust(widths[0])]
            for index in block:
                cells.append(row[index].rjust(widths[index]))
            line = "  ".join(cells)
            drawn.append(line.rstrip())
        heads, *others = drawn
        rule = "─" * _width_of(block, widths)
        lines += [heads, rule, *others, ""]
    return "\n".join(lines)


def _width_of(
    block: list[int],
    widths: list[int],
) -> int:
    """Return the width of the first column and those of a block, two blanks between them."""
    total = widths[0]
    for index in block:
        total += 2 + widths[index]
    return total
