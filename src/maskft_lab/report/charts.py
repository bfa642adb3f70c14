"""A chart: panels drawn by matplotlib, the numbers as a table, and its forms: SVG in a page, files for a paper."""

from __future__ import annotations

import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..results.tables import Table
from ..results.tables import draw as draw_table

Draw = Callable[[Axes], None]

# Light and dark. No two light colours are equal, because `to_svg` finds a colour in a picture by its value.
_PALETTE = {
    "paper": ("#fdfdfc", "#101418"),  # the ground of a page, of files, and under numbers that lie over lines
    "ink": ("#1c2126", "#e8eaed"),
    "muted": ("#5c6670", "#a5afb9"),
    "rule": ("#d8dde3", "#394149"),
    "blue": ("#2166ac", "#7ab3e8"),
    "red": ("#c0392b", "#f0897d"),
    "green": ("#1f7a4d", "#6cc799"),
    "orange": ("#c26a00", "#eaa353"),
    "purple": ("#7a4ea3", "#c0a0e3"),
    "teal": ("#0e7c86", "#5cc4cc"),
    "grey": ("#7f8993", "#98a2ad"),
}
# By name, as other files of the report use them.
COLOURS = {name: light for name, (light, _) in _PALETTE.items()}
DARK = {name: dark for name, (_, dark) in _PALETTE.items()}
# The box under numbers that may lie over lines. In the colour of the paper, which becomes dark in a dark picture; white
# would stay white.
GROUND = {
    "facecolor": COLOURS["paper"],
    "edgecolor": "none",
    "pad": 0.5,
}
SERIES = ("red", "blue", "green", "orange", "purple", "teal")  # colours of lines that are not methods
SHADES = "viridis"  # colours of maps: can be read on white and on black, and in grey

# Sizes in inches.
NARROW = 3.3  # width of a column of a paper
PAGE = 4.6  # width of a wide panel
HEIGHT = 2.4  # of either
ROW_HEIGHT = 0.24  # of a row of bars, whose name may have two lines
TITLE_CHARACTERS = 11  # characters of a panel's title in an inch
FORMATS = ("svg", "dark.svg", "pdf", "png")

_STYLE = {
    "font.size": 8,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "figure.facecolor": COLOURS["paper"],
    "axes.facecolor": COLOURS["paper"],
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
    "axes.formatter.useoffset": False,  # else ticks may be differences from a number in the corner
    "axes.unicode_minus": True,
    "pdf.fonttype": 42,  # TrueType, which editors can change; venues refuse matplotlib's default, Type 3
    "svg.fonttype": "none",  # texts as text, not as paths: small, searchable, in the fonts of the page
    "svg.hashsalt": "maskft",  # ids that are the same in every run
    "savefig.dpi": 300,
}

# Larger, because a page is read on a phone.
_ON_A_PAGE = {
    "font.size": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.labelsize": 9,
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
    """Panels with one legend and one table.

    Attributes:
        text: How to read it, and its limits.
        panels: Empty for a table alone.
        table: The numbers.
        legend: Common to all panels.
        records: The numbers for other programs, written beside the pictures as JSON.
    """

    text: str
    panels: Sequence[Panel]
    table: Table
    legend: Sequence[Entry] = field(default_factory=tuple)
    records: Sequence[Mapping] = ()


def plain(text: str) -> str:
    """Escape a text for matplotlib, which would read mathematics between two dollar signs."""
    return text.replace("$", r"\$")


def row_name(name: str) -> str:
    """A name for a row of bars, broken into at most three lines."""
    lines = textwrap.wrap(name, 24, max_lines=3, placeholder="…")
    return plain("\n".join(lines))


def to_svg(panel: Panel, prefix: str) -> str:
    """One panel as an SVG element for a page: colours by name, sizes by the page, ids beginning with ``prefix``."""
    width = PAGE if panel.is_wide else NARROW
    # matplotlib reads most of these settings when axes are made, so the drawing is inside.
    with matplotlib.rc_context(_STYLE | _ON_A_PAGE):
        figure = Figure((width, panel.height), layout="constrained")
        panel.draw(figure.add_subplot())
        # Transparent, because the page has its own background.
        content = _saved(figure, "svg", is_transparent=True)
    text = content.decode()

    # An element inside HTML has no XML declaration.
    start = text.index("<svg")
    text = text[start:]
    # Hundreds of bytes of RDF in each picture, which no reader sees.
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)

    # Colours by name: they are light or dark as the page is, and change with it.
    for name, value in COLOURS.items():
        text = text.replace(value, f"var(--{name})")

    # matplotlib gives the same ids to parts of every picture, and a page holds many.
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)

    # Without a size of its own a picture is as wide as the page's column. The viewBox keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)

    # Smaller: no indentation, and shorter coordinates inside tags. Texts between tags, among them the numbers that
    # people read, stay as they are.
    text = re.sub(r"\n\s*", "\n", text)
    text = re.sub(r"<[^>]*>", _with_short_coordinates, text)

    # Hidden from screen readers, which get the numbers from the table below the picture.
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _with_short_coordinates(tag: re.Match) -> str:
    """A tag whose coordinates have two decimals: enough, and a third of the bytes."""
    return re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0])


def draw_panel(panel: Panel, legend: Sequence[Entry]) -> Figure:
    """A panel for a paper: its title above, the legend of its chart below."""
    width = PAGE if panel.is_wide else NARROW

    # As many columns as fit, at most three. An inch holds 17 characters of a legend, and the line before a name takes
    # as much room as 8.
    lengths = [len(entry.name) for entry in legend]
    longest = max(lengths, default=0)
    num_fitting = int(17 * width / (longest + 8))
    num_columns = min(3, max(1, num_fitting))
    num_lines = math.ceil(len(legend) / num_columns)
    # 0.2 inches for a line of the legend, below the panel, which keeps its own height.
    height = panel.height + 0.2 * num_lines

    with matplotlib.rc_context(_STYLE):
        # Not pyplot.figure, which would keep every figure in memory until it is closed.
        figure = Figure((width, height), layout="constrained")
        axes = figure.add_subplot()
        panel.draw(axes)

        # Broken here, because matplotlib does not fit a title to its axes.
        characters = int(width * TITLE_CHARACTERS)
        title = textwrap.fill(panel.title, characters, break_on_hyphens=False)
        axes.set_title(plain(title))

        if legend:
            lines = []
            names = []
            for entry in legend:
                # A line without points, of which the legend shows the style. Not the lines of the panel: the legend
                # is that of the whole chart.
                lines.append(Line2D([], [], **line_style(entry)))
                names.append(plain(entry.name))
            figure.legend(
                lines,
                names,
                loc="outside lower center",
                ncols=min(num_columns, len(names)),
            )
    return figure


def files_of(chart: Chart, key: str) -> dict[str, bytes]:
    """A chart's panels, ``KEY``, ``KEY_2``, as SVG (light and dark), PDF and PNG (300 dots per inch), by file name.

    Without panels, its table as Markdown.
    """
    # Some charts are tables: the paper draws no picture of these numbers either.
    if not chart.panels:
        table = draw_table(chart.table, "markdown")
        return {f"{key}.md": table.encode()}

    contents = {}  # name of a file -> its bytes
    if chart.records:
        text = json.dumps(chart.records, indent=1) + "\n"
        contents[f"{key}.json"] = text.encode()
    for number, panel in enumerate(chart.panels, 1):
        name = key if number == 1 else f"{key}_{number}"
        figure = draw_panel(panel, chart.legend)
        # The style again, because matplotlib reads the fonts of PDF and SVG and the dots of PNG when it writes a file.
        with matplotlib.rc_context(_STYLE):
            for suffix in FORMATS:
                contents[f"{name}.{suffix}"] = _saved(figure, suffix)
    return contents


# No dates and no names of programs: the same data gives the same file.
_NO_METADATA = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {
        "CreationDate": None,
        "Creator": None,
        "Producer": None,
    },
    "png": {"Software": None},
}


def _saved(
    figure: Figure,
    suffix: str,
    is_transparent: bool = False,
) -> bytes:
    """The bytes of a file; with a background, so that it can be read wherever it is opened."""
    out = io.BytesIO()
    form = suffix.removeprefix("dark.")
    figure.savefig(
        out,
        format=form,
        metadata=_NO_METADATA[form],
        transparent=is_transparent,
    )
    if suffix != "dark.svg":
        return out.getvalue()

    # The dark picture is the light one with other colours. Two drawings could differ in more than colours.
    # No dark colour is the light one of another name: otherwise a colour that was replaced would be replaced again.
    text = out.getvalue().decode()
    for name, value in COLOURS.items():
        text = text.replace(value, DARK[name])
    return text.encode()


def line_style(of: Entry) -> dict[str, Any]:
    """Arguments of matplotlib's ``plot`` for a line that looks like an entry of a legend."""
    return {
        "color": COLOURS[of.colour],
        "linestyle": of.dash or "none",
        "marker": of.marker or None,
    }
