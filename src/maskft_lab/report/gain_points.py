"""The points of the gain-forgetting figure: their types, the files and comparisons they are read from, the frontier.

How the parts of the figure fit together: `maskft_lab.results.gains`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from maskft_common import layout
from maskft_common.files import read_json

from ..results.compare import compare_measured
from ..results.comparison import Comparison, Settings
from ..results.gains import gains_of
from .evidence import CURVES, Evidence, NotComputed, test_name
from .scale import Ends

HELD_OUT = "held-out"
TEST = "test"

Record = Mapping[str, Any]  # a point or a curve as JSON has it


class Point(NamedTuple):
    """One model: means over seeds, after minus before."""

    method: str
    path: str  # points of one path are joined: the checkpoints of a run, the scales of a checkpoint
    label: str  # where on the path it lies
    gained: float  # in ``units[0]`` of its curve; more is better
    forgotten: float  # in ``units[1]`` of its curve; less is better
    gained_ends: Ends | None = None  # interval, of chosen points
    forgotten_ends: Ends | None = None
    num_bytes: int | None = None  # size of its stored change, if known
    num_seeds: int = 1
    score: float | None = None  # the accuracy itself, a fraction
    rows: str = TEST  # rows on which it was measured; points of a path are on ``held-out`` ones
    budget: float | None = None  # limit on the KL to the base in its training, in nats per token


class Curve(NamedTuple):
    """The points of one task and one probe of earlier abilities, against one model."""

    task: str
    probe: str
    against: str
    points: Sequence[Point]
    units: tuple[str, str] = ("points", "nats")
    kind_of_interval: str = "simultaneous"  # or ``unadjusted``: of a comparison that was published with no other one

    @property
    def budgets(self) -> set[float]:
        """The KL budgets of its points, in nats per token."""
        return {point.budget for point in self.points if point.budget is not None}


# From files and comparisons


def curves_of(evidence: Evidence) -> list[Curve]:
    """The curves that a study has written, else one made from its comparison.

    The latter is against the pre-trained model, if the study has its answers.

    Raises:
        NotComputed: If the study measures no earlier abilities.
    """
    written = _written_curves(evidence)
    if written:
        return written

    # A study without a path compares its methods only.
    comparison = evidence.comparison
    records = gains_of(comparison.differences) if comparison else []
    if comparison is None or not records:
        raise NotComputed("this study measures nothing that the model could do before (evaluation.before)")

    # The figure begins at the model before training. A study's own baseline may be a trained model, and then only a
    # new comparison has the differences from the pre-trained one.
    pretrained = _pretrained_name(evidence, comparison)
    if pretrained is not None:
        settings = Settings(fixed_seeds=comparison.fixed_seeds)
        comparison = compare_measured(evidence.results, pretrained, settings=settings)
        records = gains_of(comparison.differences)

    curves = []
    for record in records:
        # Differences have the name of the task, the figure that of the test set.
        task = test_name(evidence, record["task"])
        record = record | {"model": comparison.baseline, "task": task}
        curve = curve_of_record(record)
        curves.append(curve._replace(kind_of_interval=comparison.kind_of_interval))
    return curves


def _written_curves(evidence: Evidence) -> list[Curve]:
    """The curves in the study's folder, one file per probe."""
    # A folder of runs may be shared by several studies, whose names tell their curves apart. A published folder holds
    # one study, and may have another name than it.
    is_published = not (evidence.folder / layout.RUNS).is_dir()

    curves = []
    for file in sorted(evidence.folder.glob(CURVES)):
        record = read_json(file)
        own_name = layout.CURVE.format(evidence.name, record["probe"])
        if is_published or file.name == own_name:
            # The file has the name of the task, the figure that of the test set.
            record["task"] = test_name(evidence, record["task"])
            curves.append(curve_of_record(record))
    return curves


def _pretrained_name(evidence: Evidence, comparison: Comparison) -> str | None:
    """The pre-trained model of a comparison with another baseline; None if it, or any model's answers, are missing."""
    compared = {comparison.baseline, *comparison.methods}
    with_answers = {result["name"] for result in evidence.results}
    # A comparison without some of the models would show fewer points than the table.
    if not compared <= with_answers:
        return None

    for name in comparison.methods:
        method, _ = evidence.methods.get(name, ("", False))
        if method == "pretrained":
            return name
    return None


def curve_of_record(record: Record) -> Curve:
    """The curve of a file that a study has written (its rates, checkpoints and scales), or of a comparison."""
    # A path with several checkpoints is drawn as several lines, see `_line`.
    checkpoints_of_path = {}
    for each in record["points"]:
        shares = checkpoints_of_path.setdefault(_path(each), set())
        shares.add(_share(each))

    # Lines join their points in this order: along the training, and along the scales of a checkpoint.
    in_order = sorted(
        record["points"],
        key=lambda each: (_share(each), _scale(each)),
    )

    points = []
    for each in in_order:
        num_checkpoints = len(checkpoints_of_path[_path(each)])
        point = Point(
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
        points.append(point)

    # The first published files have no units: they are of accuracies in points and losses in nats.
    gained_unit = record.get("unit", "points")
    forgotten_unit = record.get("forgotten_unit", "nats")
    return Curve(
        task=record["task"],
        probe=record["probe"],
        against=record["model"],
        points=points,
        units=(gained_unit, forgotten_unit),
    )


def _path(point: Record) -> str:
    return point.get("path", point["method"])


def _share(point: Record) -> float:
    """The part of training until the checkpoint of a point, in [0, 1]."""
    # Left out where a path has no checkpoints: the end of training.
    return point.get("share", 1.0)


def _scale(point: Record) -> float:
    """The factor by which the change of the weights was multiplied after training."""
    # Left out where nothing was scaled.
    return point.get("scale", 1.0)


def _line(point: Record, num_checkpoints: int) -> str:
    """The line of a point: one joins the checkpoints of a run, and one the scales of each checkpoint.

    A run with one checkpoint has one line for both.
    """
    path = _path(point)
    is_unscaled = _scale(point) == 1.0
    if num_checkpoints == 1 or is_unscaled:
        return path
    return f"{path}, {_share(point):g} of training scaled"


def _ends(pair: Sequence[float] | None) -> Ends | None:
    if not pair:
        return None
    return pair[0], pair[1]


# Questions about points


def is_chosen(curve: Curve, point: Point) -> bool:
    """Whether a point was chosen from the points of paths, and then measured on the test rows."""
    # A curve of a comparison has no paths: all of its points are on test rows, and none was chosen from the others.
    has_paths = any(other.rows == HELD_OUT for other in curve.points)
    return has_paths and point.rows == TEST


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats on both axes, by their forgetting.

    If there are paths, only their points: all of these are measured on the same rows.
    """
    on_paths = [point for point in points if point.rows == HELD_OUT]
    # Test rows and held-out rows differ in their luck, so points of both are never compared.
    candidates = on_paths or points

    # In the order of their forgetting, a point is not beaten if it gains more than all points before it. The search
    # begins at 0, the gain of the model before training.
    by_forgetting = sorted(
        candidates,
        key=lambda point: (point.forgotten, -point.gained),
    )
    best = []
    highest = 0.0
    for point in by_forgetting:
        # Points of one forgetting and gain beat each other in neither axis: the first is kept.
        if point.gained > highest:
            best.append(point)
            highest = point.gained
    return best
