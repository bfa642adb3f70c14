"""Where axes end: one point far away is not to squash all others, and what lies beyond an end is still told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .charts import COLOURS

ROOM = 0.08  # of the span of the shown values, beyond them
FAR = 4.0  # times the median distance from zero; values beyond are off scale

Ends = tuple[float, float]


def near(values: Sequence[float], far: float = FAR) -> list[float]:
    """The values that an axis is made for: those within ``far`` times the median distance from zero."""
    distances = np.abs(np.asarray(values, dtype=float))
    limit = far * float(np.median(distances))
    if limit == 0:
        return list(values)
    return [value for value in values if abs(value) <= limit]


def limits(values: Sequence[float], ends: Sequence[float] = (), share: float = 0.25) -> Ends:
    """Room for zero, all values, and intervals as far as they do not add more than a share of the span each side."""
    low = min(0.0, *values)
    high = max(0.0, *values)
    span = (high - low) or 1.0
    lowest_end = min([low, *ends])
    highest_end = max([high, *ends])
    wide_low = max(low - share * span, lowest_end)
    wide_high = min(high + share * span, highest_end)
    return wide_low - ROOM * span, wide_high + ROOM * span


def few_ticks(axes: Axes, along: str = "x", count: int = 5) -> None:
    """Few round ticks: numbers of four digits collide on a narrow panel."""
    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]))


def mark_ends_beyond(axes: Axes, ends: Ends, place: tuple[float, float], along: str, colour: str) -> None:
    """An arrow where an interval goes on beyond the axes."""
    edges, markers = (axes.get_xlim(), "<>") if along == "x" else (axes.get_ylim(), "v^")
    for end, edge, marker in zip(ends, edges, markers, strict=True):
        is_low = marker in "<v"
        is_beyond = end < edge if is_low else end > edge
        if is_beyond:
            at = (edge, place[1]) if along == "x" else (place[0], edge)
            axes.plot(*at, marker, color=COLOURS[colour], markersize=3.5, clip_on=False)
