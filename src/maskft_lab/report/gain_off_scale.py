"""Where the axes of a gain-forgetting curve end, and the numbers of the points that lie beyond them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from .charts import COLOURS, GROUND, Entry
from .gain_points import Curve, Point, is_chosen
from .methods import number
from .scale import FAR, limits

MAX_NAMED = 6  # off-scale points with their numbers; others are counted
MAX_LOSS = 1.5  # points that lose more than this times the largest gain are off scale
NUMBERS_IN_HEIGHT = 25  # how many numbers fit one above the other


def set_limits(axes: Axes, curve: Curve) -> None:
    """End the axes where useful points end: those that gain at least half of the largest gain.

    Limits around all points would be decided by those that forget or lose everything, and squash the others.
    """
    # Sideways: the forgetting of useful points.
    gains = [point.gained for point in curve.points]
    most = max(gains)
    # If all points lose, half of the smallest loss would be above all of them, and none would be useful.
    least_useful = most / 2 if most > 0 else most
    useful = [point for point in curve.points if point.gained >= least_useful]
    forgetting = [abs(point.forgotten) for point in useful]
    median_forgetting = float(np.median(forgetting))
    farthest = FAR * median_forgetting

    # Downwards: the largest gain, or the median change where hardly any point gains; otherwise every loss would be off
    # scale.
    median_change = float(np.median(np.abs(gains)))
    largest_loss = MAX_LOSS * max(most, median_change)

    # The points that the axes are made for, with their intervals. There is at least one: of the useful points, the one
    # that forgets least is within both limits.
    shown = []
    for point in curve.points:
        if abs(point.forgotten) <= farthest and point.gained >= -largest_loss:
            shown.append(point)

    x_ends = []
    y_ends = []
    for point in shown:
        x_ends += point.forgotten_ends or ()
        y_ends += point.gained_ends or ()
    # Both axes get room for zero, where the model before training is.
    x_limits = limits([point.forgotten for point in shown], x_ends)
    y_limits = limits([point.gained for point in shown], y_ends)
    axes.set_xlim(x_limits)
    axes.set_ylim(y_limits)


def place_inside(axes: Axes, point: Point) -> tuple[float, float]:
    """Where a point is drawn. Points beyond the axes are drawn at their end."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    x = min(max(point.forgotten, left), right)
    y = min(max(point.gained, bottom), top)
    return x, y


def label_points_beyond(
    axes: Axes,
    curve: Curve,
    looks: Mapping[str, Entry],
    strong: Sequence[Point],
) -> None:
    """Write the numbers of points beyond the axes next to the axes' ends; of too many, count the rest.

    Args:
        axes: The axes, whose limits are set.
        curve: All points.
        looks: Name of a method -> how its points look.
        strong: Points that are not pale.
    """
    beyond = []
    for point in curve.points:
        if place_inside(axes, point) != (point.forgotten, point.gained):
            beyond.append(point)

    # Few numbers can be read. Chosen points first, then strong ones; pale ones only if there is room for all.
    def order(point: Point) -> tuple[bool, bool]:
        return not is_chosen(curve, point), point not in strong

    named = sorted(beyond, key=order)
    if len(beyond) > MAX_NAMED:
        named = [point for point in named if point in strong]
    named = named[:MAX_NAMED]

    # Upwards: each number at the height of its point, or just above the number before it.
    bottom, top = axes.get_ylim()
    step = (top - bottom) / NUMBERS_IN_HEIGHT
    # So that the first number may be at the very bottom.
    below = bottom - step
    for cluster in _clusters(axes, named, step):
        for point in cluster:
            _, own_height = place_inside(axes, point)
            height = max(own_height, below + step)
            # Too many numbers at the top overlap rather than leave the axes.
            height = min(height, top)
            below = height
            colour = looks[point.method].colour
            _label_point(axes, point, height, COLOURS[colour])

    # In the lower right corner, where points that forget much and gain little would be.
    num_others = len(beyond) - len(named)
    if num_others:
        axes.text(
            0.98,
            0.02,
            f"{num_others} more points off scale",
            ha="right",
            va="bottom",
            fontsize="small",
            transform=axes.transAxes,
        )


def _clusters(
    axes: Axes,
    points: Sequence[Point],
    step: float,
) -> list[list[Point]]:
    """Points in groups whose numbers would overlap, from below; within a group by their forgetting.

    Overlapping numbers are moved apart, away from the heights of their points. In the order of the numbers they read
    as a list; in the order of the points' heights they would be a jumble.

    Args:
        axes: The axes, whose limits are set.
        points: The points to label.
        step: Height of a number, in the unit of the y axis.
    """
    heights = []
    for point in points:
        _, height = place_inside(axes, point)
        heights.append((height, point))
    # By height alone: points of one height keep the order of the curve.
    heights.sort(key=lambda pair: pair[0])

    clusters = []
    highest = -np.inf  # height of the last number, after the one before it has moved it up
    for height, point in heights:
        # Enough room above the last number: a new group.
        if not clusters or height > highest + step:
            clusters.append([point])
            highest = height
        else:
            clusters[-1].append(point)
            highest = max(height, highest + step)

    # The largest forgetting at the bottom, the smallest at the top.
    for cluster in clusters:
        cluster.sort(key=lambda point: -point.forgotten)
    return clusters


def _label_point(
    axes: Axes,
    point: Point,
    height: float,
    colour: str,
) -> None:
    """Write the numbers of a point that lies beyond the axes, each with an arrow to where it lies.

    Args:
        axes: The axes, whose limits are set.
        point: The point.
        height: Of the text, in the unit of the y axis.
        colour: Of the text, as matplotlib takes it.
    """
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    x, _ = place_inside(axes, point)

    # A point may lie beyond both axes.
    texts = []
    if x != point.forgotten:
        arrow = "→" if point.forgotten > x else "←"
        texts.append(f"{number(point.forgotten, 3)} {arrow}")
    if not bottom <= point.gained <= top:
        arrow = "↑" if point.gained > top else "↓"
        texts.append(f"{number(point.gained, 3)} {arrow}")

    # The text lies on the side where there is room.
    is_right = x > (left + right) / 2
    offset = (-5, 0) if is_right else (5, 0)
    axes.annotate(
        ", ".join(texts),
        xy=(x, height),
        xytext=offset,
        textcoords="offset points",
        ha="right" if is_right else "left",
        va="center",
        fontsize="small",
        color=colour,
        bbox=GROUND,
    )
