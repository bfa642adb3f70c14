"""Axes: limits and ticks.

One point far away must not squash all others, and points beyond an end are marked there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .charts import COLOURS

ROOM = 0.08  # free room beyond the shown values, as a share of their span
FAR = 4.0  # values farther from zero than this times the median distance are off scale

Ends = tuple[float, float]


def near(
    values: Sequence[float],
    far: float = FAR,
) -> list[float]:
    """The values that an axis is made for: those within ``far`` times the median distance from zero."""
    # The median, because one value far away moves it little. The mean of 1, 2 and 60 is 21, and would hide nothing.
    distances = np.abs(np.asarray(values, dtype=float))
    limit = far * float(np.median(distances))
    if limit == 0:
        # More than half of the values are 0, which gives no scale for the others.
        return list(values)
    return [value for value in values if abs(value) <= limit]


def limits(
    values: Sequence[float],
    ends: Sequence[float] = (),
    share: float = 0.25,
    at_least: float = 0.0,
) -> Ends:
    """Ends of an axis with room for zero, all values, and intervals.

    Args:
        values: Shown values.
        ends: Ends of their intervals.
        share: Part of the span of the values that intervals may add at most on each side.
        at_least: What intervals may add there if the span is small.
    """
    # Zero is always shown: it is the model that the others are compared with.
    low = min(0.0, *values)
    high = max(0.0, *values)
    span = high - low
    if span == 0:
        span = 1.0  # all values are 0, and matplotlib warns about an axis without length

    # As far as intervals reach, but not farther than their share: intervals over few seeds would fill the whole axis.
    lowest_end = min([low, *ends])
    highest_end = max([high, *ends])
    most = max(share * span, at_least)
    wide_low = max(low - most, lowest_end)
    wide_high = min(high + most, highest_end)
    # A marker at the very end would be cut in half.
    room = ROOM * max(span, at_least)
    return wide_low - room, wide_high + room


def few_ticks(
    axes: Axes,
    along: str = "x",
    count: int = 5,
) -> None:
    """Set few round ticks: numbers of four digits collide on a narrow panel.

    Args:
        axes: The axes.
        along: The axis, ``x`` or ``y``.
        count: Largest number of intervals between ticks.
    """
    axis = axes.xaxis if along == "x" else axes.yaxis
    # The steps of matplotlib's own axes. MaxNLocator's default has 1.5, 3, 4, 6 and 8 as well.
    locator = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10])
    axis.set_major_locator(locator)


def name_rows(
    axes: Axes,
    places: Sequence[int],
    names: Sequence[str],
) -> None:
    """Put names of rows in the place of a y axis, with row 0 at the top.

    Args:
        axes: The axes.
        places: Heights of the rows, rising; they are whole numbers.
        names: Their names.
    """
    axes.set_yticks(places, names)
    # The larger limit first turns the axis around, so that row 0 is at the top.
    axes.set_ylim(places[-1] + 0.6, -0.6)
    # Names need no marks on the axis, and rows no lines between them.
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.grid(False, axis="y")


def mark_ends_beyond(
    axes: Axes,
    ends: Ends,
    place: tuple[float, float],
    along: str,
    colour: str,
) -> None:
    """Draw an arrow where an interval continues beyond the axes.

    Args:
        axes: The axes, whose limits are set.
        ends: The interval.
        place: The point of the interval's value.
        along: Axis of the interval, ``x`` or ``y``.
        colour: Name of its colour.
    """
    low, high = ends
    x, y = place
    style: dict[str, Any] = {
        "color": COLOURS[colour],
        "markersize": 3.5,
        "clip_on": False,  # half of an arrow at the end of the axes would be cut off
    }
    # An interval may continue beyond both ends.
    if along == "x":
        left, right = axes.get_xlim()
        if low < left:
            axes.plot(left, y, "<", **style)
        if high > right:
            axes.plot(right, y, ">", **style)
    else:
        bottom, top = axes.get_ylim()
        if low < bottom:
            axes.plot(x, bottom, "v", **style)
        if high > top:
            axes.plot(x, top, "^", **style)
