"""Loss around and between models (Figs 5 and 12): the plane through them, lines, and surfaces that share directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from ..results.text import Table
from .charts import COLOURS, Chart, Entry, Panel
from .methods import number

# Shapes as in the paper: star, square, triangle.
_MODELS = {
    "fft": Entry("best full fine-tuning", "green", "", "*"),
    "continued": Entry("continued full fine-tuning", "purple", "", "s"),
    "mask": Entry("mask", "red", "", "^"),
}
_SHORT = {"fft": "best FFT", "continued": "continued FFT", "mask": "mask"}
_SPLITS = {"heldout": "held-out rows", "train": "training rows"}


_OTHERS = ("blue", "orange", "teal", "grey")  # of models that the paper's figure does not have


def landscape_chart(record: Mapping) -> Chart:
    """The plane through three models, the straight lines between them, and the loss along shared directions."""
    panels = []
    for split in (split for split in _SPLITS if split in record["plane"]):
        rows = _SPLITS[split]
        panels.append(Panel(f"Plane through three models, {rows}", lambda axes, s=split: _plane(axes, record, s)))
        panels.append(Panel(f"Straight lines, {rows}", lambda axes, s=split: _lines(axes, record, s)))
        panels += [
            Panel(
                f"Around {_SHORT.get(model, model)}, {rows}",
                lambda axes, m=model, s=split: _surface(axes, record, m, s),
            )
            for model in record["surfaces"]
        ]
    text = (
        "Nats per token. The plane holds the three models, in distance of their weights; the lines go straight from "
        "one to another, and a little beyond. The surfaces are two random directions of millions, in lengths of the "
        "filters after full fine-tuning; all models share the pair and the colours of a split, so they can be "
        "compared. They also move weights that the mask has removed."
    )
    columns = ("model", "rows", "loss at the model", "mean around it", "lowest", "highest")
    table, entries = Table(columns, _rows(record)), [*_entries(record).values(), *_line_entries(record)]
    return Chart("fig05_12_landscape", "Loss landscape", text, panels, table, (5, 12), entries)


def _entries(record: Mapping) -> dict[str, Entry]:
    others = [name for name in record["surfaces"] if name not in _MODELS]
    more = {name: Entry(name, _OTHERS[i % len(_OTHERS)], "", "opDX"[i % 4]) for i, name in enumerate(others)}
    return {name: _MODELS.get(name) or more[name] for name in record["surfaces"]}


def _rows(record: Mapping) -> list[tuple[str, ...]]:
    middle = len(record["axis"]) // 2
    rows = []
    for model, surfaces in record["surfaces"].items():
        for split, values in surfaces.items():
            numbers = (values[middle][middle], np.mean(values), np.min(values), np.max(values))
            name = _entries(record)[model].name
            rows.append((name, _SPLITS.get(split, split), *(number(float(each)) for each in numbers)))
    return rows


def _levels(values: Sequence) -> np.ndarray:
    """Lines of equal loss, closer where it is low: most of the height is at the edges."""
    low, high = float(np.min(values)), float(np.max(values))
    if not high > low:
        return np.array([low, low + 1e-6])
    return low + (high - low) * np.linspace(0, 1, 13) ** 2


def _contours(axes: Axes, x: Sequence[float], y: Sequence[float], values: Sequence, levels: np.ndarray) -> None:
    """A dot per point of the grid, and lines of equal loss."""
    half_x, half_y = (x[1] - x[0]) / 2, (y[1] - y[0]) / 2
    extent = (x[0] - half_x, x[-1] + half_x, y[0] - half_y, y[-1] + half_y)
    norm = PowerNorm(0.5, levels[0], levels[-1])
    image = axes.imshow(np.transpose(values), extent=extent, origin="lower", aspect="auto", norm=norm)
    axes.contour(x, y, np.transpose(values), levels=levels[1:-1], colors="#ffffff", linewidths=0.4, alpha=0.7)
    bar = axes.figure.colorbar(image, ax=axes, ticks=levels[::3], format="%.3g")
    bar.outline.set_visible(False)
    axes.grid(False)


def _point(axes: Axes, x: float, y: float, entry: Entry) -> None:
    size = 9 if entry.marker == "*" else 6
    axes.plot(x, y, marker=entry.marker, color=COLOURS[entry.colour], markersize=size, markeredgecolor="#ffffff")


def _plane(axes: Axes, record: Mapping, split: str) -> None:
    plane = record["plane"]
    _contours(axes, plane["x"], plane["y"], plane[split], _levels(plane[split]))
    for model, point in zip(plane["models"], plane["points"], strict=True):
        _point(axes, point[0], point[1], _entries(record)[model])
    axes.set_xlabel("L2 distance of weights")


def _surface(axes: Axes, record: Mapping, model: str, split: str) -> None:
    every = [surfaces[split] for surfaces in record["surfaces"].values()]
    _contours(axes, record["axis"], record["axis"], record["surfaces"][model][split], _levels(every))
    _point(axes, 0, 0, _entries(record)[model])
    axes.set_xlabel("first direction")


def _line_entries(record: Mapping) -> list[Entry]:
    looks = zip(("-", "--", "-."), ("purple", "red", "teal"), strict=True)
    pairs = [" to ".join(_SHORT.get(end, end) for end in pair) for pair in record["lines"]["pairs"]]
    return [Entry(name, colour, dash) for name, (dash, colour) in zip(pairs, looks, strict=True)]


def _lines(axes: Axes, record: Mapping, split: str) -> None:
    lines = record["lines"]
    for entry, values in zip(_line_entries(record), lines[split], strict=True):
        axes.plot(lines["t"], values, entry.dash, color=COLOURS[entry.colour])
    for end in (0, 1):
        axes.axvline(end, color=COLOURS["muted"], linewidth=0.6, linestyle=":")
    axes.set_xlabel("first model (0) to second (1)")
    axes.set_ylabel("nats/token")
