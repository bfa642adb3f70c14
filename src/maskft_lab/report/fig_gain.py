"""The figure of gain against forgetting: its chart, table and records.

Points are read in `gain_points`, drawn in `gain_drawing`, and those beyond the axes labelled in `gain_off_scale`. How
this fits to the files of a study: `maskft_lab.results.gains`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ..results.tables import Table
from .charts import Chart, Entry, Panel
from .evidence import Evidence
from .gain_drawing import draw_curve
from .gain_points import HELD_OUT, Curve, Point, curve_of_record, curves_of, frontier, is_chosen
from .methods import number, series_looks
from .scale import Ends

# Also the names of gain_points that callers need to make a chart.
__all__ = [
    "Curve",
    "Point",
    "chart_of",
    "curve_of_record",
    "curves_of",
    "frontier",
    "gain_chart",
    "is_chosen",
    "peft_records",
]

PANEL_HEIGHT = 3.6  # inches

# Of the table. The kind of interval is the head of the columns that follow the numbers with one.
_COLUMNS = (
    "method",
    "where on its path",
    "rows",
    "gained",
    "{interval}",
    "probe",
    "forgotten",
    "{interval}",
    "bytes",
    "seeds",
)
_TEXT = (
    "Up is gained, left is kept: the best corner is the upper left. The black line joins the points that no other "
    "beats on both axes, beginning at the model before training. {points} with {interval} 95 % intervals (of two seeds "
    "none). A point off scale is an arrow with its number, or counted."
)
_POINTS_OF_PATHS = (
    "All others are pale, and thin lines are the path of one run or of one checkpoint's scales, on held-out rows. "
    "Chosen points are on test rows,"
)
_POINTS_OF_A_COMPARISON = "Others without an interval are pale. All points are on test rows,"
_TEXT_OF_BUDGETS = (
    " A dotted line is a budget: the KL to the base, in nats per token, that training was allowed on its own "
    "rows; points lie near it as far as the probe is like these."
)


def gain_chart(evidence: Evidence) -> Chart:
    """One panel for each set of earlier abilities.

    Raises:
        NotComputed: If the study measures no earlier abilities.
    """
    curves = curves_of(evidence)
    return chart_of(curves)


def chart_of(curves: Sequence[Curve]) -> Chart:
    """One panel per curve."""
    # One look per method, the same in all panels. A dictionary, because a set would not keep the order of the methods.
    methods = {}
    for curve in curves:
        for point in curve.points:
            methods[point.method] = None
    looks = series_looks(methods)

    # A panel for each probe. Table and records have the points of all of them.
    panels = []
    rows = []
    records = []
    for curve in curves:
        panel = Panel(
            title=f"{curve.task} and {curve.probe}, against {curve.against}",
            draw=partial(draw_curve, curve=curve, looks=looks),
            is_wide=True,
            height=PANEL_HEIGHT,
        )
        panels.append(panel)
        records += peft_records(curve)
        for point in curve.points:
            rows.append(_cells(curve, point))

    # One for all: the curves are of one comparison.
    kinds = {curve.kind_of_interval for curve in curves}
    interval = "unadjusted" if "unadjusted" in kinds else "simultaneous"
    has_paths = any(point.rows == HELD_OUT for curve in curves for point in curve.points)
    points = _POINTS_OF_PATHS if has_paths else _POINTS_OF_A_COMPARISON
    text = _TEXT.format(points=points, interval=interval)
    columns = tuple(column.format(interval=interval) for column in _COLUMNS)

    entries = [Entry("not beaten on both axes", "ink", "-")]
    entries += looks.values()
    # Few studies train with a budget for the KL divergence.
    if any(curve.budgets for curve in curves):
        text += _TEXT_OF_BUDGETS
        entries.append(Entry("budget", "muted", ":"))

    table = Table(columns, rows)
    return Chart(text, panels, table, entries, records)


def _cells(curve: Curve, point: Point) -> tuple[str, ...]:
    """A row of the table, in the order of `_COLUMNS`."""
    gained_unit, forgotten_unit = curve.units
    return (
        point.method,
        _where(point),
        point.rows,
        f"{number(point.gained)} {gained_unit}",
        _ends_text(point.gained_ends),
        curve.probe,
        f"{number(point.forgotten)} {forgotten_unit}",
        _ends_text(point.forgotten_ends),
        number(point.num_bytes),
        str(point.num_seeds),
    )


def _where(point: Point) -> str:
    """The place of a point on its method's path."""
    parts = []
    # The table has a column with the method, so a path of the same name is not repeated.
    if point.path != point.method:
        parts.append(point.path)
    parts.append(point.label)
    if point.budget is not None:
        parts.append(f"budget {number(point.budget)}")
    return ", ".join(part for part in parts if part)


def _ends_text(ends: Ends | None) -> str:
    if not ends:
        return ""
    low, high = ends
    return f"[{number(low)}, {number(high)}]"


def peft_records(curve: Curve) -> list[dict[str, Any]]:
    """Every point as a result of PEFT's method comparison, which gives accuracies as fractions."""
    # The keys are those that PEFT's scripts read. A number that a point does not have is null.
    records = []
    for point in curve.points:
        metrics = {
            f"{point.rows} accuracy": point.score,
            "points gained": point.gained,
            "forgetting": point.forgotten,
        }
        record = {
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
        records.append(record)
    return records
