"""The picture of gain against forgetting: every method's path, the points that no other beats, the chosen ones.

Where its points come from, and how all three parts fit together: `maskft_lab.results.gains`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from maskft_common import layout
from maskft_common.files import read_json

from ..results.compare import compare
from ..results.comparison import Settings
from ..results.gains import gains_of
from ..results.tables import Table
from .charts import COLOURS, Chart, Entry, Panel, plain
from .evidence import CURVES, Evidence, NotComputed, test_name
from .methods import number, series_looks
from .scale import FAR, Ends, few_ticks, limits, mark_ends_beyond

PALE = 0.35  # opacity of points that others beat
MAX_NAMED = 6  # off-scale points with their numbers; further ones are counted
MAX_LOSS = 1.5  # times the largest gain; points that lose more are off scale
HELD_OUT = "held-out"
TEST = "test"


class Point(NamedTuple):
    """One model: means over seeds, after minus before."""

    method: str
    path: str  # points of one path are joined: the checkpoints of a run, the scales of a checkpoint
    label: str  # where on the path it lies
    gained: float  # in ``units[0]`` of the picture, points or nats; above 0 is better
    forgotten: float  # in ``units[1]``; below is better
    gained_ends: Ends | None = None  # simultaneous interval, of chosen points
    forgotten_ends: Ends | None = None
    num_bytes: int | None = None  # of its stored change, where that is known
    num_seeds: int = 1
    score: float | None = None  # the accuracy itself, a fraction
    rows: str = TEST  # on which it was measured: ``held-out`` of a path, of which some are chosen
    budget: float | None = None  # limit on the KL to the base in its training, in nats per token


class Curve(NamedTuple):
    """The points of one task and one probe of earlier abilities, against one model."""

    task: str
    probe: str
    against: str
    points: Sequence[Point]
    units: tuple[str, str] = ("points", "nats")


def curves_of(evidence: Evidence) -> list[Curve]:
    """The curves that a study has written, else one of its comparison, against the pre-trained model where it has that.

    Raises:
        NotComputed: If the study measures no earlier abilities.
    """
    # The name of a published folder need not be that of its study.
    is_published = not (evidence.folder / layout.RUNS).is_dir()
    written = []
    for file in sorted(evidence.folder.glob(CURVES)):
        record = read_json(file)
        if is_published or file.name == layout.CURVE.format(evidence.name, record["probe"]):
            written.append(record)
    if written:
        for record in written:
            record["task"] = test_name(evidence, record["task"])
        return [curve_of_record(record) for record in written]

    comparison = evidence.comparison
    records = gains_of(comparison.differences) if comparison else []
    if comparison is None or not records:
        raise NotComputed("this study measures nothing that the model could do before (evaluation.before)")

    # Gains from the pre-trained model, if its answers are here and it is not the baseline already.
    pretrained = []
    for name in comparison.methods:
        method, _ = evidence.methods.get(name, ("", False))
        if method == "pretrained":
            pretrained.append(name)
    with_answers = {result["name"] for result in evidence.results}
    if pretrained and with_answers >= {comparison.baseline, *comparison.methods}:
        settings = Settings(fixed_seeds=comparison.fixed_seeds)
        comparison = compare(evidence.results, pretrained[0], settings=settings)
        records = gains_of(comparison.differences)
    return [curve_of_record(record | {"model": comparison.baseline}) for record in records]


def curve_of_record(record: Mapping[str, Any]) -> Curve:
    """The curve of a file that a study has written (its rates, checkpoints and scales), or of a comparison."""
    checkpoints: dict[str, set[float]] = {}
    for each in record["points"]:
        checkpoints.setdefault(_path(each), set()).add(_share(each))

    points: list[Point] = []
    for each in sorted(record["points"], key=lambda each: (_share(each), _scale(each))):
        num_checkpoints = len(checkpoints[_path(each)])
        points.append(
            Point(
                method=each["method"],
                path=_line(each, num_checkpoints),
                label=each.get("label", ""),
                gained=each["points_gained"],
                forgotten=each["nats_forgotten"],
                gained_ends=_ends(each.get("points_gained_interval")),
                forgotten_ends=_ends(each.get("nats_forgotten_interval")),
                num_bytes=each.get("num_bytes"),
                num_seeds=each.get("num_seeds", 1),
                score=each.get("accuracy"),
                rows=each.get("rows", HELD_OUT),
                budget=each.get("budget"),
            )
        )
    units = (record.get("unit", "points"), record.get("forgotten_unit", "nats"))
    return Curve(record["task"], record["probe"], record["model"], points, units)


def _path(point: Mapping[str, Any]) -> str:
    return point.get("path", point["method"])


def _share(point: Mapping[str, Any]) -> float:
    """The part of training until the checkpoint of a point."""
    return point.get("share", 1.0)


def _scale(point: Mapping[str, Any]) -> float:
    """The factor by which the change of the weights was multiplied after training."""
    return point.get("scale", 1.0)


def _line(point: Mapping[str, Any], num_checkpoints: int) -> str:
    """The line of a point: one joins the checkpoints of a run, and one the scales of each checkpoint.

    A run with one checkpoint has one line for both.
    """
    path = _path(point)
    is_joined = _scale(point) == 1.0 or num_checkpoints == 1
    return path if is_joined else f"{path}, {point['share']:g} of training scaled"


def gain_chart(evidence: Evidence) -> Chart:
    """One panel for each set of earlier abilities."""
    return chart_of(curves_of(evidence))


def chart_of(curves: Sequence[Curve]) -> Chart:
    """One panel per curve."""
    methods: dict[str, None] = {}
    for curve in curves:
        methods |= dict.fromkeys(point.method for point in curve.points)
    looks = series_looks(methods)

    panels: list[Panel] = []
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, Any]] = []
    budgets: set[float] = set()
    for curve in curves:
        title = f"{curve.task}, against {curve.against}"
        draw = partial(_draw, curve=curve, looks=looks)
        panels.append(Panel(title, draw, True, 3.6))
        rows += [_cells(curve, point) for point in curve.points]
        records += peft_records(curve)
        budgets |= _budgets(curve)
    columns = (
        "method",
        "where on its path",
        "rows",
        "gained",
        "simultaneous",
        "forgotten",
        "simultaneous",
        "bytes",
        "seeds",
    )

    text = (
        "Up is gained, left is kept: the best corner is the upper left. The black line joins the points that no other "
        "beats on both axes, beginning at the model before training; all others are pale, and thin lines are the path "
        "of one run or of one checkpoint's scales, on held-out rows. Chosen points are on test rows, with simultaneous "
        "95 % intervals (of two seeds none). A point off scale is an arrow with its number, or counted."
    )
    entries = [Entry("not beaten on both axes", "ink", "-"), *looks.values()]
    if budgets:
        text += (
            " A dotted line is a budget: the KL to the base, in nats per token, that training was allowed on its own "
            "rows; points lie near it as far as the probe is like these."
        )
        entries.append(Entry("budget", "muted", ":"))
    return Chart(text, panels, Table(columns, rows), entries, records)


def _cells(curve: Curve, point: Point) -> tuple[str, ...]:
    return (
        point.method,
        _where(point),
        point.rows,
        f"{number(point.gained)} {curve.units[0]}",
        _ends_text(point.gained_ends),
        f"{number(point.forgotten)} {curve.units[1]}",
        _ends_text(point.forgotten_ends),
        number(point.num_bytes),
        str(point.num_seeds),
    )


def _where(point: Point) -> str:
    """The place of a point on its method's path."""
    parts: list[str] = []
    if point.path != point.method:
        parts.append(point.path)
    parts.append(point.label)
    if point.budget is not None:
        parts.append(f"budget {number(point.budget)}")
    return " ".join(part for part in parts if part)


def _budgets(curve: Curve) -> set[float]:
    return {point.budget for point in curve.points if point.budget is not None}


def is_chosen(curve: Curve, point: Point) -> bool:
    """Whether a point is one of those that were chosen from paths, and measured on the test rows."""
    return point.rows == TEST and any(other.rows == HELD_OUT for other in curve.points)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats on both axes, by their forgetting.

    If there are paths, only their points: all of these are measured on the same rows.
    """
    on_paths = [point for point in points if point.rows == HELD_OUT]
    candidates = on_paths or points

    # From the least forgetting on: a point is not beaten if it gains more than all before it.
    best: list[Point] = []
    highest = 0.0
    for point in sorted(candidates, key=lambda each: (each.forgotten, -each.gained)):
        if point.gained > highest:
            best.append(point)
            highest = point.gained
    return best


def peft_records(curve: Curve) -> list[dict[str, Any]]:
    """Every point as a result of PEFT's method comparison, which gives accuracies as fractions."""
    records = []
    for point in curve.points:
        metrics = {
            f"{point.rows} accuracy": point.score,
            "points gained": point.gained,
            "forgetting": point.forgotten,
        }
        records.append(
            {
                "run_info": {
                    "experiment_name": f"{point.method}/{_where(point)}",
                    "train_config": {"seeds": point.num_seeds},
                },
                "train_info": {
                    "status": "success",
                    "file_size": point.num_bytes,
                    "metrics": [metrics],
                },
                "meta_info": {
                    "model_info": {"name": curve.against},
                    "dataset_info": {"task": curve.task, "probe": curve.probe},
                },
            }
        )
    return records


# The drawing


def _draw(axes: Axes, curve: Curve, looks: Mapping[str, Entry]) -> None:
    best = frontier(curve.points)
    strong: list[Point] = []
    for point in curve.points:
        has_interval = bool(point.gained_ends or point.forgotten_ends)
        if has_interval or point in best or is_chosen(curve, point):
            strong.append(point)

    _set_limits(axes, curve)
    axes.axhline(0, color=COLOURS["rule"], linewidth=0.8, zorder=0)
    axes.axvline(0, color=COLOURS["rule"], linewidth=0.8, zorder=0)
    _draw_budgets(axes, curve)
    _draw_paths(axes, curve, looks)
    _draw_frontier(axes, best)
    for point in curve.points:
        _draw_point(axes, point, looks[point.method], point in strong)
    _name_those_beyond(axes, curve, looks, strong)

    few_ticks(axes, "x", 7)
    axes.set_xlabel(plain(f"{curve.units[1]} forgotten ({curve.probe})"))
    axes.set_ylabel(plain(f"{curve.units[0]} gained ({curve.task})"))


def _set_limits(axes: Axes, curve: Curve) -> None:
    """End the axes where useful points end: those that gain at least half of the largest gain."""
    most = max(point.gained for point in curve.points)
    least_useful = most / 2 if most > 0 else most  # if all lose: half of the smallest loss is less than any
    useful = [abs(point.forgotten) for point in curve.points if point.gained >= least_useful]
    farthest = FAR * float(np.median(useful))
    median_change = float(np.median([abs(point.gained) for point in curve.points]))
    largest_loss = MAX_LOSS * max(most, median_change)

    shown: list[Point] = []
    for point in curve.points:
        if abs(point.forgotten) <= farthest and point.gained >= -largest_loss:
            shown.append(point)
    if not shown:
        shown = list(curve.points)
    x_ends: list[float] = []
    y_ends: list[float] = []
    for point in shown:
        x_ends += point.forgotten_ends or ()
        y_ends += point.gained_ends or ()
    axes.set_xlim(limits([point.forgotten for point in shown], x_ends))
    axes.set_ylim(limits([point.gained for point in shown], y_ends))


def _draw_budgets(axes: Axes, curve: Curve) -> None:
    left, right = axes.get_xlim()
    for budget in sorted(_budgets(curve)):
        if left <= budget <= right:
            axes.axvline(
                budget,
                color=COLOURS["muted"],
                linestyle=":",
                linewidth=0.9,
                zorder=1,
            )


def _draw_paths(axes: Axes, curve: Curve, looks: Mapping[str, Entry]) -> None:
    paths: dict[tuple[str, str], list[Point]] = {}
    for point in curve.points:
        if not is_chosen(curve, point):
            paths.setdefault((point.method, point.path), []).append(point)
    for (method, _), members in paths.items():
        if len(members) > 1:
            x = [point.forgotten for point in members]
            y = [point.gained for point in members]
            colour = COLOURS[looks[method].colour]
            axes.plot(
                x,
                y,
                color=colour,
                alpha=PALE,
                linewidth=0.8,
            )


def _draw_frontier(axes: Axes, best: Sequence[Point]) -> None:
    joined = [(point.forgotten, point.gained) for point in best]
    # The line begins at the model before training, unless a point beats that too.
    if not best or best[0].forgotten >= 0:
        joined.insert(0, (0.0, 0.0))
    axes.plot(*np.transpose(joined), color=COLOURS["ink"], linewidth=1.1)
    axes.plot(0, 0, "x", color=COLOURS["ink"])


def _draw_point(
    axes: Axes,
    point: Point,
    look: Entry,
    is_strong: bool,
) -> None:
    x, y = _inside(axes, point)
    colour = COLOURS[look.colour]
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


def _inside(axes: Axes, point: Point) -> tuple[float, float]:
    """Where a point is drawn: one beyond the axes at their end."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    x = min(max(point.forgotten, left), right)
    y = min(max(point.gained, bottom), top)
    return x, y


def _name_those_beyond(
    axes: Axes,
    curve: Curve,
    looks: Mapping[str, Entry],
    strong: Sequence[Point],
) -> None:
    """The numbers of points beyond the axes, one below the other in the order of the numbers where they are close."""
    beyond = [point for point in curve.points if _inside(axes, point) != (point.forgotten, point.gained)]
    # Chosen points first, then strong ones; pale ones only if there is room for all.
    named = sorted(beyond, key=lambda point: (not is_chosen(curve, point), point not in strong))
    if len(beyond) > MAX_NAMED:
        named = [point for point in named if point in strong]
    named = named[:MAX_NAMED]

    bottom, top = axes.get_ylim()
    step = (top - bottom) / 25  # height of a number
    below = bottom - step
    for cluster in _clusters(axes, named, step):
        for point in cluster:
            height = max(_inside(axes, point)[1], below + step)
            below = min(height, top)
            _name_beyond(axes, point, below, COLOURS[looks[point.method].colour])
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


def _clusters(axes: Axes, points: Sequence[Point], step: float) -> list[list[Point]]:
    """Points in groups whose numbers would overlap, from below; within a group by their forgetting."""
    clusters: list[list[Point]] = []
    highest = -np.inf
    for point in sorted(points, key=lambda point: _inside(axes, point)[1]):
        height = _inside(axes, point)[1]
        if not clusters or height > highest + step:
            clusters.append([])
        clusters[-1].append(point)
        # Where the number of this point will be, at the least.
        is_first = len(clusters[-1]) == 1
        highest = height if is_first else max(height, highest + step)
    # The last of a group is the topmost: the smallest number, next to the axis' end.
    return [sorted(cluster, key=lambda point: -point.forgotten) for cluster in clusters]


def _name_beyond(
    axes: Axes,
    point: Point,
    height: float,
    colour: str,
) -> None:
    """The number of a point that lies beyond the axes, with an arrow to where it lies."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    x, _ = _inside(axes, point)
    texts = []
    if x != point.forgotten:
        arrow = "→" if point.forgotten > x else "←"
        texts.append(f"{number(point.forgotten, 3)} {arrow}")
    if not bottom <= point.gained <= top:
        arrow = "↑" if point.gained > top else "↓"
        texts.append(f"{number(point.gained, 3)} {arrow}")

    is_right = x > (left + right) / 2
    axes.annotate(
        ", ".join(texts),
        (x, height),
        (-5, 0) if is_right else (5, 0),
        textcoords="offset points",
        ha="right" if is_right else "left",
        va="center",
        fontsize="small",
        color=colour,
        # A ground under the number, which may lie over a line; by name, since it is dark in a dark picture.
        bbox={
            "facecolor": COLOURS["paper"],
            "edgecolor": "none",
            "pad": 0.5,
        },
    )


def _ends(pair: Sequence[float] | None) -> Ends | None:
    if not pair:
        return None
    return pair[0], pair[1]


def _ends_text(ends: Ends | None) -> str:
    if not ends:
        return ""
    low, high = ends
    return f"[{number(low)}, {number(high)}]"
