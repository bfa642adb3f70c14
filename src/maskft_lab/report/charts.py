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

# Every colour has its own value, so that a page can replace it by a name, which is light or dark there.
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
COLOURS = {name: light for name, (light, _) in _PALETTE.items()}
DARK = {name: dark for name, (_, dark) in _PALETTE.items()}
# A ground under numbers, which may lie over lines. By its colour's name, since it is dark in a dark picture.
GROUND = {
    "facecolor": COLOURS["paper"],
    "edgecolor": "none",
    "pad": 0.5,
}
SERIES = ("red", "blue", "green", "orange", "purple", "teal")  # of lines that are not methods
SHADES = "viridis"  # of maps: read on white and on black, and in grey

# Inches: the width of a column of a paper and of a wide panel, and the height of either.
NARROW = 3.3
PAGE = 4.6
HEIGHT = 2.4
ROW_HEIGHT = 0.24  # of a row of bars, whose name may have two lines
TITLE_CHARACTERS = 11  # of a panel's title in an inch
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
    "axes.formatter.useoffset": False,
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
    """A text in which matplotlib reads no mathematics."""
    return text.replace("$", r"\$")


def row_name(name: str) -> str:
    """A name for a row of bars, in two lines where it is long."""
    lines = textwrap.wrap(name, 24, max_lines=2, placeholder="…")
    return plain("\n".join(lines))


def to_svg(panel: Panel, prefix: str) -> str:
    """One panel as an SVG element for a page: colours by name, sizes by the page, ids beginning with ``prefix``."""
    width = PAGE if panel.is_wide else NARROW
    with matplotlib.rc_context(_STYLE | _ON_A_PAGE):
        figure = Figure((width, panel.height), layout="constrained")
        panel.draw(figure.add_subplot())
        text = _saved(figure, "svg", is_transparent=True).decode()  # the page has the ground

    start = text.index("<svg")
    text = text[start:]  # without the XML declaration
    # Colours by name, which are light or dark as the page is.
    for name, value in COLOURS.items():
        text = text.replace(value, f"var(--{name})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids and references to them: a page holds many pictures.
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    # The size of the page's column; the viewBox keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"\n\s*", "\n", text)
    # Texts, which hold the numbers that are read, stay as they are.
    text = re.sub(r"<[^>]*>", _with_short_coordinates, text)
    # Hidden from screen readers, which get the numbers from the table below the picture.
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _with_short_coordinates(tag: re.Match) -> str:
    """A tag whose coordinates have two decimals: enough, and a third of the bytes."""
    return re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0])


def draw_panel(panel: Panel, legend: Sequence[Entry]) -> Figure:
    """A panel for a paper: its title above, the legend of its chart below."""
    width = PAGE if panel.is_wide else NARROW

    # As many columns as fit, at most three.
    longest = max((len(entry.name) for entry in legend), default=0)
    # 17 characters of a legend are an inch, and its line takes 8 of them.
    num_fitting = int(17 * width / (longest + 8))
    num_columns = min(3, max(1, num_fitting))
    num_lines = math.ceil(len(legend) / num_columns)
    height = panel.height + 0.2 * num_lines

    with matplotlib.rc_context(_STYLE):
        # Not pyplot.figure, which would keep every figure in memory until it is closed.
        figure = Figure((width, height), layout="constrained")
        axes = figure.add_subplot()
        panel.draw(axes)

        characters = int(width * TITLE_CHARACTERS)
        title = textwrap.fill(panel.title, characters, break_on_hyphens=False)
        axes.set_title(plain(title))

        if legend:
            # Lines without points: only their style is shown.
            lines = [Line2D([], [], **line_style(entry)) for entry in legend]
            names = [plain(entry.name) for entry in legend]
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
    if not chart.panels:
        table = draw_table(chart.table, "markdown")
        return {f"{key}.md": table.encode()}

    contents: dict[str, bytes] = {}
    if chart.records:
        text = json.dumps(chart.records, indent=1) + "\n"
        contents[f"{key}.json"] = text.encode()
    for number, panel in enumerate(chart.panels, 1):
        name = key if number == 1 else f"{key}_{number}"
        figure = draw_panel(panel, chart.legend)
        # Again: fonts of PDF and SVG and the dots of PNG are looked up when a file is written.
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
    """The bytes of a file; with a ground, so that it can be read wherever it is opened."""
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

    # The dark picture is the light one with other colours: drawn twice, the two could differ.
    text = out.getvalue().decode()
    for name, value in COLOURS.items():
        text = text.replace(value, DARK[name])
    return text.encode()


def line_style(of: Entry) -> dict[str, Any]:
    """Arguments of matplotlib's ``plot``."""
    return {
        "color": COLOURS[of.colour],
        "linestyle": of.dash or "none",
        "marker": of.marker or None,
    }
