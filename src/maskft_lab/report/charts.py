"""A chart: panels drawn by matplotlib, the numbers as a table, and its forms: SVG in a page, files for a paper."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..results.text import Table

Draw = Callable[[Axes], None]

# Every colour has its own value, so that a page can replace it by a name, which is light or dark there.
COLOURS = {
    "ink": "#1c2126",
    "muted": "#5c6670",
    "rule": "#d8dde3",
    "blue": "#2166ac",
    "red": "#c0392b",
    "green": "#1f7a4d",
    "orange": "#c26a00",
    "purple": "#7a4ea3",
    "teal": "#0e7c86",
    "grey": "#7f8993",
}
SERIES = ("red", "blue", "green", "orange", "purple", "teal")  # of lines that are no methods
SHADES = "viridis"  # of maps: read on white and on black, and in grey

NARROW, WIDE, HEIGHT = 3.3, 6.8, 2.4  # inches: a column and a page of a paper; height of one row of panels
PAGE_HEIGHT = 9.0  # inches that a page of a paper has for a figure
MANY = 6  # more narrow panels than these stand three in a row
TITLE_CHARACTERS = 11  # of a panel's title in an inch
FORMATS = ("svg", "pdf", "png")

_STYLE = {
    "font.size": 8,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 7,
    "image.cmap": SHADES,
    "image.interpolation": "none",  # a dot per number, in every format
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "maskft",
    "savefig.dpi": 300,
    "savefig.transparent": True,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its title, what draws on it, and how large it is, in inches."""

    title: str
    draw: Draw
    is_wide: bool = False
    height: float = HEIGHT


@dataclass(frozen=True)
class Entry:
    """One line of a legend; ``name`` may be in the words of a result file, which are anyone's."""

    name: str
    colour: str = "ink"
    dash: str = "-"  # of matplotlib: -, --, :, -.
    marker: str = ""


@dataclass(frozen=True)
class Chart:
    """What is drawn together.

    Attributes:
        key: Name of its files and its place in a page.
        title: What it shows.
        text: How to read it, and what it does not show.
        panels: One at least.
        table: The numbers.
        numbers: Figures of the paper that it is made after.
        legend: Common to all panels.
    """

    key: str
    title: str
    text: str
    panels: Sequence[Panel]
    table: Table
    numbers: tuple[int, ...] = ()
    legend: Sequence[Entry] = field(default_factory=tuple)


@dataclass(frozen=True)
class Missing:
    """A chart whose data is not there: why, and the command that makes it."""

    key: str
    title: str
    reason: str
    command: str
    numbers: tuple[int, ...] = ()


def figure_numbers(numbers: Sequence[int]) -> str:
    """``Fig. 5`` or ``Figs 5, 12``."""
    return f"Fig{'s' if len(numbers) > 1 else '.'} {', '.join(map(str, numbers))}" if numbers else ""


def plain(text: str) -> str:
    """A text without what matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


def to_svg(panel: Panel, prefix: str) -> str:
    """One panel as an SVG element for a page: colours by name, sizes by the page, ids beginning with ``prefix``."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure((WIDE if panel.is_wide else NARROW, panel.height), layout="constrained")
        panel.draw(figure.add_subplot())
        text = _saved(figure, "svg").decode()
    text = text[text.index("<svg") :]
    for name, value in COLOURS.items():
        text = text.replace(value, f"var(--{name})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"\n\s*", "\n", text)
    # Two decimals of a coordinate are enough; texts, which hold the numbers that are read, stay as they are.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0]), text)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def draw_pages(chart: Chart) -> list[Figure]:
    """A chart at the size of a paper: panels two or three in a row, the legend below; a page each of what is higher."""
    num_columns = 3 if sum(not panel.is_wide for panel in chart.panels) > MANY else 2
    num_entries = _entries_in_a_row(chart)
    room = PAGE_HEIGHT - 0.2 * math.ceil(len(chart.legend) / num_entries)
    pages: list[list[list[Panel]]] = [[]]
    for row in _rows(chart.panels, num_columns):
        if pages[-1] and sum(_height(each, num_columns) for each in (*pages[-1], row)) > room:
            pages.append([])
        pages[-1].append(row)
    return [_draw_page(chart, rows, num_columns, num_entries) for rows in pages]


def _draw_page(chart: Chart, rows: Sequence[Sequence[Panel]], num_columns: int, num_entries: int) -> Figure:
    with matplotlib.rc_context(_STYLE):
        width, heights = _width(chart), [_height(row, num_columns) for row in rows]
        height = sum(heights) + 0.2 * math.ceil(len(chart.legend) / num_entries)
        figure = Figure((width, height), layout="constrained")
        grid = figure.add_gridspec(len(rows), num_columns if width == WIDE else 1, height_ratios=heights)
        for index, row in enumerate(rows):
            for column, panel in enumerate(row):
                is_alone = panel.is_wide or width == NARROW
                axes = figure.add_subplot(grid[index, :] if is_alone else grid[index, column])
                panel.draw(axes)
                room = width if is_alone else width / num_columns
                axes.set_title(plain(textwrap.fill(panel.title, int(room * TITLE_CHARACTERS), break_on_hyphens=False)))
        if chart.legend:
            lines, names = [_line(entry) for entry in chart.legend], [plain(entry.name) for entry in chart.legend]
            figure.legend(lines, names, loc="outside lower center", ncols=min(num_entries, len(names)))
    return figure


def files_of(chart: Chart) -> dict[str, bytes]:
    """A chart as SVG, PDF and PNG (300 dots per inch), by file name; text stays text in the first two.

    The second page of a chart that is higher than one is ``KEY_2``.
    """
    contents = {}
    for index, figure in enumerate(draw_pages(chart)):
        name = f"{chart.key}_{index + 1}" if index else chart.key
        with matplotlib.rc_context(_STYLE):
            contents |= {f"{name}.{suffix}": _saved(figure, suffix) for suffix in FORMATS}
    return contents


def _width(chart: Chart) -> float:
    return NARROW if len(chart.panels) == 1 and not chart.panels[0].is_wide else WIDE


def _entries_in_a_row(chart: Chart) -> int:
    longest = max((len(entry.name) for entry in chart.legend), default=0)
    return min(3, max(1, int(17 * _width(chart) / (longest + 8))))  # 17 characters of a legend are an inch


def _height(row: Sequence[Panel], num_columns: int) -> float:
    """Of a row on paper: narrower panels are lower, but keep the room that labels and title take."""
    height = max(panel.height for panel in row)
    return height if num_columns == 2 or row[0].is_wide else 0.6 + 0.55 * height


def _saved(figure: Figure, suffix: str) -> bytes:
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    # No dates and no names of programs: the same data gives the same file.
    nothing = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    figure.savefig(out, format=suffix, metadata=nothing.get(suffix, {"Software": None}))
    return out.getvalue()


def _rows(panels: Sequence[Panel], num_columns: int) -> list[list[Panel]]:
    rows: list[list[Panel]] = []
    for panel in panels:
        if panel.is_wide or not rows or len(rows[-1]) == num_columns or rows[-1][0].is_wide:
            rows.append([])
        rows[-1].append(panel)
    return rows


def _line(entry: Entry):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=COLOURS[entry.colour], linestyle=entry.dash or "none", marker=entry.marker or None)
