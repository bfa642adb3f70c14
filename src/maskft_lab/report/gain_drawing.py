"""Drawing one curve of gain against forgetting: budgets, paths, the frontier, points with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from .charts import COLOURS, Entry, plain
from .gain_off_scale import label_points_beyond, place_inside, set_limits
from .gain_points import Curve, Point, frontier, is_chosen
from .scale import few_ticks, mark_ends_beyond

PALE = 0.35  # opacity of points that others beat


def draw_curve(
    axes: Axes,
    curve: Curve,
    looks: Mapping[str, Entry],
) -> None:
    """Draw a curve on empty axes.

    Args:
        axes: The axes.
        curve: Its points.
        looks: Name of a method -> how its points look.
    """
    # The points that a reader should see first: all others are pale.
    best = frontier(curve.points)
    strong = _strong_points(curve, best)

    # Before anything is drawn: points beyond the limits are drawn at the end of an axis.
    set_limits(axes, curve)

    # The model before training is where these two lines cross.
    style = {
        "color": COLOURS["rule"],
        "linewidth": 0.8,
        "zorder": 0,
    }
    axes.axhline(0, **style)
    axes.axvline(0, **style)

    _draw_budgets(axes, curve)
    _draw_paths(axes, curve, looks)
    _draw_frontier(axes, best)
    for point in curve.points:
        look = looks[point.method]
        _draw_point(axes, point, look, is_strong=point in strong)
    label_points_beyond(axes, curve, looks, strong)

    gained_unit, forgotten_unit = curve.units
    few_ticks(axes, "x", 7)
    axes.set_xlabel(plain(f"{forgotten_unit} forgotten ({curve.probe})"))
    axes.set_ylabel(plain(f"{gained_unit} gained ({curve.task})"))


def _strong_points(curve: Curve, best: Sequence[Point]) -> list[Point]:
    """Points that are not pale: the frontier, and those on test rows with their intervals."""
    strong = []
    for point in curve.points:
        # Points with an interval were chosen, or belong to a comparison, where all points are on test rows.
        has_interval = bool(point.gained_ends or point.forgotten_ends)
        if has_interval or point in best or is_chosen(curve, point):
            strong.append(point)
    return strong


def _draw_budgets(axes: Axes, curve: Curve) -> None:
    # A budget is in nats per token, as forgetting is. Training kept it on other rows than the probe's, so a point need
    # not lie on its line.
    left, right = axes.get_xlim()
    for budget in sorted(curve.budgets):
        if left <= budget <= right:
            axes.axvline(
                budget,
                color=COLOURS["muted"],
                linestyle=":",
                linewidth=0.9,
                zorder=1,
            )


def _draw_paths(
    axes: Axes,
    curve: Curve,
    looks: Mapping[str, Entry],
) -> None:
    # Chosen points are left out: they were measured on other rows than their path.
    paths = {}  # method and path -> points
    for point in curve.points:
        if is_chosen(curve, point):
            continue
        members = paths.setdefault((point.method, point.path), [])
        members.append(point)

    for (method, _), members in paths.items():
        if len(members) == 1:
            continue  # one point has no line
        colour = looks[method].colour
        axes.plot(
            [point.forgotten for point in members],
            [point.gained for point in members],
            color=COLOURS[colour],
            alpha=PALE,
            linewidth=0.8,
        )


def _draw_frontier(axes: Axes, best: Sequence[Point]) -> None:
    x = [point.forgotten for point in best]
    y = [point.gained for point in best]

    # The line begins at the model before training, unless a point beats that too.
    if not best or best[0].forgotten >= 0:
        # The model before training gains nothing and forgets nothing: the origin.
        x.insert(0, 0.0)
        y.insert(0, 0.0)

    axes.plot(x, y, color=COLOURS["ink"], linewidth=1.1)
    # The model before training.
    axes.plot(0, 0, "x", color=COLOURS["ink"])


def _draw_point(
    axes: Axes,
    point: Point,
    look: Entry,
    is_strong: bool,
) -> None:
    """A point, at the end of an axis if it lies beyond, and its intervals on both axes."""
    x, y = place_inside(axes, point)
    colour = COLOURS[look.colour]

    # Not clipped: half of a marker at the end of an axis would be cut off.
    axes.plot(
        x,
        y,
        color=colour,
        marker=look.marker,
        linestyle="none",
        clip_on=False,
        alpha=1.0 if is_strong else PALE,
        markersize=5.5 if is_strong else 4,
        zorder=3,
    )

    # Intervals are clipped by the axes, with an arrow where they continue.
    if point.forgotten_ends:
        axes.plot(
            point.forgotten_ends,
            [y, y],
            color=colour,
            linewidth=1.0,
            solid_capstyle="butt",
        )
        mark_ends_beyond(axes, point.forgotten_ends, (x, y), "x", look.colour)

    if point.gained_ends:
        axes.plot(
            [x, x],
            point.gained_ends,
            color=colour,
            linewidth=1.0,
            solid_capstyle="butt",
        )
        mark_ends_beyond(axes, point.gained_ends, (x, y), "y", look.colour)
