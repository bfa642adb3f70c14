"""Forest plots: each method's difference with its simultaneous interval, from the baseline and from the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median_low
from typing import NamedTuple

from matplotlib.axes import Axes

from ..analysis.runs import plain_name
from ..evaluation.evaluation_arguments import HELDOUT
from ..results.comparison import NOT_DISTINGUISHABLE, Comparison, Difference, Place
from ..results.schema import BEFORE
from ..results.tables import Table
from ..results.verdict import brief_metric
from ..results.words import difference_text, is_alike, points_or_unit, task_text
from .charts import COLOURS, GROUND, ROW_HEIGHT, Chart, Panel, plain, row_name
from .evidence import Evidence, NotComputed
from .methods import look, number
from .scale import few_ticks, limits, mark_ends_beyond, name_rows, near

LONG_NAME = 0.31  # height in inches of a row whose name has two lines
INTERVAL_SHARE = 1.0  # share of the span of the values that intervals may add on each side
PALE = 0.45  # opacity of differences that are not distinguishable

Kinds = Mapping[str, tuple[str, bool]]  # as `Evidence.methods`


class Line(NamedTuple):
    """One row of a forest plot, in the unit that is shown: points for shares."""

    name: str
    method: str  # decides its colour
    value: float
    # None: the interval would be the whole range, as that of two seeds, or the two models agree on every item.
    ends: tuple[float, float] | None
    is_claimed: bool  # else pale


def forest_chart(evidence: Evidence) -> Chart:
    """Differences from the baseline, in the metric of the verdict and in the others of the test; the controls below.

    Raises:
        NotComputed: If the study has no comparison.
    """
    comparison = evidence.comparison
    if comparison is None or not comparison.differences:
        raise NotComputed("there is no comparison of two models")

    panels = []
    for place in _places_of_the_test(comparison):
        rows = _rows_of(comparison, place)

        # A verdict compares a mask with its strongest control, not with the baseline, so these rows are set apart.
        below = []
        for verdict in comparison.verdicts:
            control = verdict.control
            if control is not None and control.place == place:
                name = f"{control.method} - {control.baseline}"
                below.append(_line(control, name))
        title = f"{_title(rows[0])}: difference from {comparison.baseline}"
        panel = _panel(title, _sorted_lines(rows), below, evidence, rows[0])
        panels.append(panel)

    # Which sources of chance the intervals cover.
    over = "items" if comparison.fixed_seeds else "seeds and items"
    percent = f"{100 * comparison.confidence:g} %"
    text = (
        f"Each method minus {comparison.baseline}, over {over}, with {comparison.kind_of_interval} {percent} "
        "intervals; pale: not distinguishable. Below the line: a mask minus its strongest control. Points off scale "
        "are arrows with their numbers."
    )
    return Chart(text, panels, _table(comparison.differences))


def against_mask_chart(evidence: Evidence) -> Chart:
    """All other models against the mask, in the metrics of the test and of each probe of earlier abilities.

    Raises:
        NotComputed: See `Evidence.against_mask`.
    """
    comparison = evidence.against_mask

    # A panel for each task and metric, in the order of the table.
    places = dict.fromkeys(row.place for row in comparison.differences)
    panels = []
    for place in places:
        rows = _rows_of(comparison, place)
        title = _title(rows[0])
        panel = _panel(title, _sorted_lines(rows), [], evidence, rows[0])
        panels.append(panel)

    text = (
        f"Each model minus {comparison.baseline}. Intervals hold together over all rivals and metrics of a family, so "
        "they are wider than those of the verdict, which is about controls alone and may tell more apart."
    )
    return Chart(text, panels, _table(comparison.differences))


def _rows_of(
    comparison: Comparison,
    place: Place,
) -> list[Difference]:
    return [row for row in comparison.differences if row.place == place]


def _places_of_the_test(comparison: Comparison) -> list[Place]:
    """Task and metric of the verdict first, then the other metrics of the same task."""
    # The same choice as the page in a terminal makes.
    first = brief_metric(comparison.differences)
    if comparison.verdicts:
        first = comparison.verdicts[0].parent.place
    test, _ = first  # task and metric

    # Earlier abilities are tasks of their own, and have their figure: gain and forgetting.
    places = dict.fromkeys(row.place for row in comparison.differences)
    others = [place for place in places if place[0] == test and place != first]
    return [place for place in [first, *others] if place in places]


def _sorted_lines(rows: Sequence[Difference]) -> list[Line]:
    """Lines from the best to the worst."""
    lines = [_line(row, row.method) for row in rows]
    higher_is_better = rows[0].higher_is_better  # all rows are of one metric
    lines.sort(key=lambda line: line.value, reverse=higher_is_better)
    return lines


def _line(row: Difference, name: str) -> Line:
    scale = 100.0 if row.unit == "fraction" else 1.0  # shares are shown in points

    # An interval where the text of the table has one, so that picture and table agree.
    ends: tuple[float, float] | None = None
    if not is_alike(row) and "no interval" not in difference_text(row):
        ends = (scale * row.ci_low, scale * row.ci_high)
    return Line(
        name=name,
        method=row.method,
        value=scale * row.difference,
        ends=ends,
        is_claimed=row.verdict != NOT_DISTINGUISHABLE,
    )


def _title(row: Difference) -> str:
    """The measure: probes by their names, the test by its file."""
    if row.task.startswith(BEFORE):
        probe = row.task.removeprefix(BEFORE)
        # Such as "kl", which is a probe with one metric of its name.
        if row.metric == probe:
            return row.metric
        return f"{row.metric} on {probe}"

    # The test set of a study is the task "heldout", which readers would take for the rows that chose the settings.
    task = task_text(row)
    if task == HELDOUT:
        task = "test"
    return f"{row.metric} on {task}"


def _panel(
    title: str,
    lines: Sequence[Line],
    below: Sequence[Line],
    evidence: Evidence,
    row: Difference,
) -> Panel:
    """A panel of one metric.

    Args:
        title: Its title.
        lines: Its rows.
        below: Rows below a line that separates them.
        evidence: The study.
        row: Any difference in this metric.
    """
    # Losses are better to the left, so each axis says its own direction.
    better = "right" if row.higher_is_better else "left"
    label = f"{points_or_unit(row.unit)} ({better} is better)"

    # The separating line takes the height of a row.
    num_rows = len(lines)
    if below:
        num_rows += 1 + len(below)

    # All rows have one height, so one long name makes all of them higher.
    names = [row_name(line.name) for line in [*lines, *below]]
    has_long_names = any("\n" in name for name in names)
    row_height = LONG_NAME if has_long_names else ROW_HEIGHT
    # 0.75 inches for ticks and label below the rows.
    height = 0.75 + row_height * num_rows

    # Drawn later, and maybe twice: for the page and for a file.
    draw = partial(
        _draw,
        lines=lines,
        below=below,
        label=label,
        kinds=evidence.methods,
    )
    return Panel(title, draw, is_wide=True, height=height)


def _draw(
    axes: Axes,
    lines: Sequence[Line],
    below: Sequence[Line],
    label: str,
    kinds: Kinds,
) -> None:
    # Limits around all values would be decided by the worst method, and squash the others. Values beyond the limits
    # become arrows with their numbers.
    every = [*lines, *below]
    values = near([line.value for line in every])
    ends = []
    reaches = []
    for line in every:
        # Intervals of values that are off scale would decide the limits again.
        if line.value in values and line.ends:
            ends += line.ends
            low, high = line.ends
            reaches.append(max(line.value - low, high - line.value))
    # Where values are nearer to each other than their intervals are long, half of the intervals are shown whole.
    usual_reach = median_low(reaches) if reaches else 0.0
    x_limits = limits(values, ends, INTERVAL_SHARE, usual_reach)
    axes.set_xlim(x_limits)
    # The line of no difference.
    axes.axvline(
        0,
        color=COLOURS["ink"],
        linewidth=0.8,
        zorder=1,
    )

    # Row 0 is at the top. The separator takes a row.
    places = list(range(len(lines)))
    if below:
        separator = len(lines)
        axes.axhline(separator, color=COLOURS["rule"], linewidth=0.8)
        first_below = separator + 1
        places += range(first_below, first_below + len(below))
    for place, line in zip(places, every, strict=True):
        _draw_line(axes, place, line, kinds)

    name_rows(axes, places, [row_name(line.name) for line in every])
    few_ticks(axes, "x", 6)
    axes.set_xlabel(plain(label))


def _draw_line(
    axes: Axes,
    place: int,
    line: Line,
    kinds: Kinds,
) -> None:
    """One row: the interval, the value, and the number of a value that is off scale."""
    # A model that is not the result of a run has the look of a control.
    method, is_start = kinds.get(plain_name(line.method), (None, False))
    colour, _, marker = look(method, is_start)
    left, right = axes.get_xlim()
    x = min(max(line.value, left), right)  # a value beyond the axes is drawn at their end
    opacity = 1.0 if line.is_claimed else PALE

    # The interval first, so that the marker of the value lies over it.
    if line.ends:
        axes.plot(
            line.ends,
            [place, place],
            color=COLOURS[colour],
            linewidth=1.3,
            alpha=opacity,
        )
        mark_ends_beyond(axes, line.ends, (x, place), "x", colour)
    axes.plot(
        x,
        place,
        marker,
        color=COLOURS[colour],
        markersize=5,
        alpha=opacity,
        clip_on=False,
        zorder=3,
    )

    # Off scale: the number, inside the axes beside the marker at their end.
    if x != line.value:
        is_left = line.value < left
        value = number(line.value, 3)
        text = f"← {value}" if is_left else f"{value} →"
        offset = (8, 0) if is_left else (-8, 0)
        axes.annotate(
            text,
            xy=(x, place),
            xytext=offset,
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="center",
            fontsize="small",
            color=COLOURS[colour],
            bbox=GROUND,  # because the number lies over its interval
        )


def _table(rows: Sequence[Difference]) -> Table:
    cells = []
    for row in rows:
        texts = (
            row.method,
            row.baseline,
            _title(row),
            difference_text(row),
            row.verdict,
        )
        cells.append(texts)
    return Table(("method", "minus", "measure", "difference", "verdict"), cells)
