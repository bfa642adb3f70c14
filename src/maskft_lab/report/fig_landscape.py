"""Loss between models (Figs 5 and 12): the plane through three of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from ..results.tables import Table
from .charts import COLOURS, Chart, Entry, Panel
from .evidence import Evidence
from .methods import number

# Key of the record -> words for the reader.
_SPLITS = {"heldout": "held-out rows", "train": "training rows"}
# In the order of the record's points, with the shapes of the paper.
_MODELS = (
    Entry("best full fine-tuning", "green", "", "*"),
    Entry("continued full fine-tuning", "purple", "", "s"),
    Entry("mask", "red", "", "^"),
)


def plane_chart(evidence: Evidence) -> Chart:
    """The plane through three models: a panel of held-out rows, one of training rows.

    Raises:
        NotComputed: If the landscape was not computed.
    """
    plane = evidence.record("landscape")["plane"]
    columns = ("rows", "lowest", "mean", "highest")
    panels = []
    rows = []
    for split, name in _SPLITS.items():
        # The same plane with two losses: the models have the same places in both panels.
        draw = partial(_plane, plane=plane, split=split)
        panels.append(Panel(f"Loss on {name}", draw, height=2.7))

        losses = np.asarray(plane[split])
        lowest = number(float(losses.min()))
        mean = number(float(losses.mean()))
        highest = number(float(losses.max()))
        rows.append((name, lowest, mean, highest))

    text = (
        "Loss in nats per token over the plane that holds the three models; axes are distances of all weights "
        "together. Models beside the plane are not shown."
    )
    return Chart(text, panels, Table(columns, rows), _MODELS)


def _plane(
    axes: Axes,
    plane: Mapping[str, Any],
    split: str,
) -> None:
    """Draw the loss on a grid of the plane, and its three models.

    Args:
        axes: Empty axes.
        plane: Record of ``maskft analyze``: coordinates ``x`` and ``y``, a loss for each pair, the models' ``points``.
        split: Rows on which the loss was measured, a key of `_SPLITS`.
    """
    x = plane["x"]
    y = plane["y"]
    values_YX = np.transpose(plane[split])  # the file has x first, an image has its rows (y) first
    low = float(values_YX.min())
    high = float(values_YX.max())

    # Lines of equal loss. With equal distances most lines would be at the edges, where the loss is high, and none near
    # the models; squares are closer where it is low. Colours have the same spacing.
    span = max(high - low, 1e-6)  # above 0, because matplotlib requires levels that rise
    levels = low + span * np.linspace(0, 1, 13) ** 2
    norm = PowerNorm(0.5, levels[0], levels[-1])

    # The image has a cell around each point, and so ends half a cell beyond the outer points.
    half_x = (x[1] - x[0]) / 2
    half_y = (y[1] - y[0]) / 2
    left = x[0] - half_x
    right = x[-1] + half_x
    bottom = y[0] - half_y
    top = y[-1] + half_y
    # The file has the lowest y first, where an image would have it at the top.
    image = axes.imshow(
        values_YX,
        extent=(left, right, bottom, top),
        origin="lower",
        aspect="auto",
        norm=norm,
    )
    axes.contour(
        x,
        y,
        values_YX,
        # The first and the last level are the extremes themselves, where a line would be a dot or nothing.
        levels=levels[1:-1],
        colors="#ffffff",
        linewidths=0.4,
        alpha=0.7,
    )
    bar = axes.figure.colorbar(
        image,
        ax=axes,
        ticks=levels[::3],  # every third: more would overlap where levels are close
        format="%.3g",
        label="nats/token",
    )
    bar.outline.set_visible(False)

    # The models, over the map.
    for place, entry in zip(plane["points"], _MODELS, strict=True):
        at_x, at_y = place
        size = 9 if entry.marker == "*" else 6  # a star of 6 looks smaller than other shapes
        axes.plot(
            at_x,
            at_y,
            entry.marker,
            color=COLOURS[entry.colour],
            markersize=size,
            markeredgecolor="#ffffff",  # to be seen on any colour of the map
        )

    axes.set_xlabel("distance of weights (L2)")
    axes.set_ylabel("distance of weights (L2)")
    axes.grid(False)
