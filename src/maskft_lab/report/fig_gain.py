"""What methods gain against what they forget: every method's path, the points that no other beats, chosen ones."""

from __future__ import annotations

from collections import Counter
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
from .evidence import CURVES, Evidence, NotComputed
from .methods import number, series_looks

_ROOM = 0.08  # of the span of what is shown, beyond it; what lies farther has an arrow
_SHOWN = 4.0  # times the median of what those forget that gain at least half of the most
_PALE, _NAMED = 0.35, 6  # how pale; of more points off scale, those that are have no number

Ends = tuple[float, float]


class Point(NamedTuple):
    """One model: means over seeds, after minus before."""

    method: str
    path: str  # points of one path are joined: the checkpoints of a run, the scales of a checkpoint
    label: str  # where on the path it lies
    gained: float  # in ``units[0]`` of the picture, points or nats; above 0 is better
    forgotten: float  # in ``units[1]``; below is better
    gained_ends: Ends | None = None  # simultaneous interval, of chosen points
    forgotten_ends: Ends | None = None
    num_bytes: int | None = None  # of what is stored of it, where that is known
    num_seeds: int = 1
    score: float | None = None  # the accuracy itself, a fraction
    rows: str = "test"  # on which it was measured: ``held-out`` of a path, of which some are chosen


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
    is_published = not (evidence.folder / layout.RUNS).is_dir()  # under any name
    records = {file.name: read_json(file) for file in sorted(evidence.folder.glob(CURVES))}
    if own := [r for n, r in records.items() if is_published or n == layout.CURVE.format(evidence.name, r["probe"])]:
        return list(map(curve_of_record, own))
    comparison = evidence.comparison
    records = gains_of(comparison.differences) if comparison else []
    if comparison is None or not records:
        raise NotComputed("this study measures nothing that the model could do before (evaluation.before)")
    names = {result["name"] for result in evidence.results}
    before = [name for name in comparison.methods if evidence.methods.get(name, ("", False))[0] == "pretrained"]
    if before and names >= {comparison.baseline, *comparison.methods}:
        settings = Settings(fixed_seeds=comparison.fixed_seeds)
        comparison = compare(evidence.results, before[0], settings=settings)
        records = gains_of(comparison.differences)
    return [curve_of_record(record | {"model": comparison.baseline}) for record in records]


def curve_of_record(record: Mapping[str, Any]) -> Curve:
    """The curve of a file that a study has written (its rates, checkpoints and scales), or of a comparison."""
    checkpoints = Counter(path for path, _ in {(_path(each), each.get("share", 1.0)) for each in record["points"]})
    points = [
        Point(
            each["method"],
            _line(each, checkpoints),
            each.get("label", ""),
            each["points_gained"],
            each["nats_forgotten"],
            _ends(each.get("points_gained_interval")),
            _ends(each.get("nats_forgotten_interval")),
            each.get("num_bytes"),
            each.get("num_seeds", 1),
            each.get("accuracy"),
            each.get("rows", "held-out"),
        )
        for each in sorted(record["points"], key=lambda each: (each.get("share", 1.0), each.get("scale", 1.0)))
    ]
    units = (record.get("unit", "points"), record.get("forgotten_unit", "nats"))
    return Curve(record["task"], record["probe"], record["model"], points, units)


def _path(point: Mapping[str, Any]) -> str:
    return point.get("path", point["method"])


def _line(point: Mapping[str, Any], checkpoints: Mapping[str, int]) -> str:
    """What a point is joined with: checkpoints of a run as they are, and scales of each; of one checkpoint, all."""
    path = _path(point)
    is_joined = point.get("scale", 1.0) == 1.0 or checkpoints[path] == 1
    return path if is_joined else f"{path}, {point['share']:g} of training scaled"


def gain_chart(evidence: Evidence) -> Chart:
    """One panel for each set of earlier abilities."""
    return chart_of(curves_of(evidence))


def chart_of(curves: Sequence[Curve]) -> Chart:
    """One panel per curve."""
    looks = series_looks(dict.fromkeys(point.method for curve in curves for point in curve.points))
    panels = [
        Panel(f"{curve.task}, against {curve.against}", partial(_draw, curve=curve, looks=looks), True, 3.6)
        for curve in curves
    ]
    columns = ("method", "where on its path", "rows", "gained", "simultaneous", "forgotten", "simultaneous")
    columns += ("bytes", "seeds")
    rows = [
        (
            point.method,
            " ".join(filter(None, (point.path if point.path != point.method else "", point.label))),
            point.rows,
            f"{number(point.gained)} {curve.units[0]}",
            _ends_text(point.gained_ends),
            f"{number(point.forgotten)} {curve.units[1]}",
            _ends_text(point.forgotten_ends),
            number(point.num_bytes),
            str(point.num_seeds),
        )
        for curve in curves
        for point in curve.points
    ]
    records = [record for curve in curves for record in peft_records(curve)]
    text = (
        "Up is gained, left is kept: the best corner is the upper left. The black line joins the points that no other "
        "beats on both axes, beginning at the model before training; all others are pale, and thin lines are the path "
        "of one run or of one checkpoint's scales, on held-out rows. Chosen points are on test rows, with simultaneous "
        "95 % intervals (of two seeds none). What lies off scale is an arrow with its number, or counted."
    )
    entries = [Entry("not beaten on both axes", "ink", "-"), *looks.values()]
    return Chart(text, panels, Table(columns, rows), entries, records)


def is_chosen(curve: Curve, point: Point) -> bool:
    """Whether a point is one of those that were chosen from paths, and measured on the test rows."""
    return point.rows == "test" and any(other.rows == "held-out" for other in curve.points)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats on both axes, by what they forget.

    Of paths, where there are any: all of them are measured on the same rows.
    """
    best: list[Point] = []
    paths = [point for point in points if point.rows == "held-out"]
    for point in sorted(paths or points, key=lambda each: (each.forgotten, -each.gained)):
        if point.gained > (best[-1].gained if best else 0.0):
            best.append(point)
    return best


def peft_records(curve: Curve) -> list[dict[str, Any]]:
    """Every point as a result of PEFT's method comparison, which gives accuracies as fractions."""
    records = []
    for point in curve.points:
        measured = {f"{point.rows} accuracy": point.score, "points gained": point.gained, "forgetting": point.forgotten}
        name = " ".join(filter(None, (point.path if point.path != point.method else "", point.label)))
        about = {"name": curve.against}
        records.append(
            {
                "run_info": {"experiment_name": f"{point.method}/{name}", "train_config": {"seeds": point.num_seeds}},
                "train_info": {"status": "success", "file_size": point.num_bytes, "metrics": [measured]},
                "meta_info": {"model_info": about, "dataset_info": {"task": curve.task, "probe": curve.probe}},
            }
        )
    return records


def _draw(axes: Axes, curve: Curve, looks: Mapping[str, Entry]) -> None:
    best = frontier(curve.points)
    strong = [p for p in curve.points if p in best or p.gained_ends or p.forgotten_ends or is_chosen(curve, p)]
    most = max(point.gained for point in curve.points)
    useful = [abs(point.forgotten) for point in curve.points if point.gained >= min(most, most / 2)]  # also of losses
    near = _SHOWN * float(np.median(useful))
    shown = [point for point in curve.points if abs(point.forgotten) <= near]
    left, right = _limits([p.forgotten for p in shown], [end for p in shown for end in p.forgotten_ends or ()])
    bottom, top = _limits([p.gained for p in shown], [end for p in shown for end in p.gained_ends or ()])
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    paths: dict[tuple[str, str], list[Point]] = {}
    for point in (each for each in curve.points if not is_chosen(curve, each)):
        paths.setdefault((point.method, point.path), []).append(point)
    for (method, _), members in paths.items():
        if len(members) == 1:
            continue
        colour = COLOURS[looks[method].colour]
        axes.plot([p.forgotten for p in members], [p.gained for p in members], color=colour, alpha=_PALE, linewidth=0.8)
    joined = [(point.forgotten, point.gained) for point in best]
    if not best or best[0].forgotten >= 0:  # else a point beats the model before training too
        joined.insert(0, (0.0, 0.0))
    axes.plot(*np.transpose(joined), color=COLOURS["ink"], linewidth=1.1)
    axes.plot(0, 0, "x", color=COLOURS["ink"])
    for point in curve.points:
        look = looks[point.method]
        colour, is_strong = COLOURS[look.colour], point in strong
        x, y = min(max(point.forgotten, left), right), min(max(point.gained, bottom), top)
        style: dict[str, Any] = {"color": colour, "marker": look.marker, "linestyle": "none", "clip_on": False}
        axes.plot(x, y, **style, alpha=1.0 if is_strong else _PALE, markersize=5.5 if is_strong else 4, zorder=3)
        for ends, along in ((point.forgotten_ends, "x"), (point.gained_ends, "y")):
            if ends:
                line = (ends, [y, y]) if along == "x" else ([x, x], ends)
                axes.plot(*line, color=colour, linewidth=1.0, solid_capstyle="butt")
                _end_beyond(axes, ends, (x, y), along, colour)
    step = (top - bottom) / 25  # that a number takes
    below = bottom - step
    beyond = [p for p in curve.points if not (left <= p.forgotten <= right and bottom <= p.gained <= top)]
    named = [point for point in beyond if point in strong or len(beyond) <= _NAMED]
    for point in sorted(named, key=lambda each: each.gained):
        below = max(min(max(point.gained, bottom), top), below + step)
        _name_beyond(axes, point, below, COLOURS[looks[point.method].colour])
    if num_others := len(beyond) - len(named):
        text = f"pale points off scale: {num_others}"
        axes.text(0.98, 0.02, text, ha="right", va="bottom", fontsize="small", transform=axes.transAxes)
    for line in (axes.axhline, axes.axvline):
        line(0, color=COLOURS["rule"], linewidth=0.8, zorder=0)
    axes.set_xlabel(plain(f"{curve.units[1]} forgotten ({curve.probe})"))
    axes.set_ylabel(plain(f"{curve.units[0]} gained ({curve.task})"))


def _end_beyond(axes: Axes, ends: Ends, place: tuple[float, float], along: str, colour: str) -> None:
    """An arrow where an interval goes on beyond the axes."""
    edges, markers = (axes.get_xlim(), "<>") if along == "x" else (axes.get_ylim(), "v^")
    for end, edge, marker in zip(ends, edges, markers, strict=True):
        if (end < edge) == (marker in "<v") and end != edge:
            at = (edge, place[1]) if along == "x" else (place[0], edge)
            axes.plot(*at, marker, color=colour, markersize=3.5, clip_on=False)


def _name_beyond(axes: Axes, point: Point, height: float, colour: str) -> None:
    """The number of a point that lies beyond the axes, with an arrow to where it lies."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x, texts = min(max(point.forgotten, left), right), []
    if x != point.forgotten:
        texts.append(f"{number(point.forgotten, 3)} {'→' if point.forgotten > x else '←'}")
    if not bottom <= point.gained <= top:
        texts.append(f"{number(point.gained, 3)} {'↑' if point.gained > top else '↓'}")
    offset, side = ((-5, 0), "right") if x > (left + right) / 2 else ((5, 0), "left")
    style: dict[str, Any] = {"ha": side, "va": "center", "fontsize": "small", "color": colour}
    style["bbox"] = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 0.5}  # over the line
    axes.annotate(", ".join(texts), (x, height), offset, textcoords="offset points", **style)


def _limits(values: Sequence[float], ends: Sequence[float]) -> Ends:
    """Room for all values, and for intervals as far as they do not take a quarter of the axes each side."""
    low, high = min(0.0, *values), max(0.0, *values)
    span = (high - low) or 1.0
    wide = max(low - span / 4, min([low, *ends])), min(high + span / 4, max([high, *ends]))
    return wide[0] - _ROOM * span, wide[1] + _ROOM * span


def _ends(pair: Sequence[float] | None) -> Ends | None:
    return (pair[0], pair[1]) if pair else None


def _ends_text(ends: Ends | None) -> str:
    return f"[{number(ends[0])}, {number(ends[1])}]" if ends else ""
