"""A comparison in words and tables, claiming no more than its numbers support."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from .compare import SCHEMA_VERSION, Comparison, Difference, Score
from .text_tables import Table, latex_table, markdown_table, terminal_table


def render(comparison: Comparison, output_format: str) -> str:
    """Return a comparison as text in one of `FORMATS`."""
    return FORMATS[output_format](comparison)


def render_scores(scores: Sequence[Score], output_format: str) -> str:
    """Return scores alone as text in one of `FORMATS`: one model has nothing to be compared with."""
    if output_format == "json":
        record = {"schema_version": SCHEMA_VERSION, "kind": "scores", "scores": [asdict(score) for score in scores]}
        return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    draw = {"terminal": terminal_table, "markdown": markdown_table, "latex": latex_table}[output_format]
    return draw(cross_domain_table(scores)).rstrip("\n") + "\n"


def sentence(row: Difference) -> str:
    """Return a difference in words, claiming no more than the interval and the adjusted p support."""
    seeds = f", {row.num_seeds} seeds" if row.num_seeds > 1 else ""
    unit = " points" if row.unit == "fraction" else f" {row.unit}"
    text = (
        f"{row.method} vs {row.baseline}, {row.metric} on {row.task}{seeds}: "
        f"{_signed_text(row)}{unit} {_bounds_text(row)}, "
        f"{row.test} p {_p_text(row.p_value)}"
    )
    if row.num_comparisons > 1:
        text += f" ({_p_text(row.p_adjusted)} after Holm over {row.num_comparisons} comparisons)"
    text += f": {row.verdict}"
    if row.seeds_needed:
        text += f"; a difference of this size would need about {_round_up(row.seeds_needed):,} seeds"
    elif row.items_needed:
        about = "about" if row.num_seeds == 1 else "at least"  # the seeds' own noise comes on top
        text += f"; a difference of this size would need {about} {_round_up(row.items_needed):,} items"
    return text + "."


def difference_table(comparison: Comparison) -> Table:
    """Return the differences as a table, fractions in percent."""
    difference = f"difference, {100 * comparison.confidence:g} % interval"
    columns = ("method", "task", "metric", "n", difference, "p (Holm)", "won / lost / tied", "verdict")
    rows = []
    for row in comparison.differences:
        rows.append(
            (
                row.method,
                row.task,
                f"{row.metric} ({_unit_text(row.unit)})",
                f"{row.num_items:,}" + (f" x {row.num_seeds} seeds" if row.num_seeds > 1 else ""),
                f"{_signed_text(row)} {_bounds_text(row)}",
                _p_text(row.p_adjusted),
                f"{row.won} / {row.lost} / {row.tied}",
                row.verdict,
            )
        )
    return Table(columns, rows)


def cross_domain_table(scores: Sequence[Score]) -> Table:
    """Return a row per model, a column per metric of a task, cells ``value ± standard error``; fractions in percent.

    A model that has a metric of one task at some of its seeds only counts as without.
    """
    tasks = list(dict.fromkeys(score.task for score in scores))
    units = {(score.task, score.metric): score.unit for score in scores}
    units = dict(sorted(units.items(), key=lambda entry: tasks.index(entry[0][0])))  # a task's metrics side by side
    columns = ("model", *(f"{task} {metric} ({_unit_text(unit)})" for (task, metric), unit in units.items()))
    rows: dict[str, dict] = {}
    for score in scores:
        label = score.model + (f" ({score.num_seeds} seeds)" if score.num_seeds > 1 else "")
        rows.setdefault(label, {})[score.task, score.metric] = _score_text(score)
    return Table(columns, [(label, *(cells.get(column, "–") for column in units)) for label, cells in rows.items()])


def _to_terminal(comparison: Comparison) -> str:
    tables = map(terminal_table, _tables(comparison))
    return "\n".join([*tables, *_sentences(comparison)]) + "\n"


def _to_markdown(comparison: Comparison) -> str:
    reached, differences = map(markdown_table, _tables(comparison))
    return "\n".join([reached, "", differences, "", *(f"- {line}" for line in _sentences(comparison))]) + "\n"


def _to_latex(comparison: Comparison) -> str:
    reached, differences = map(latex_table, _tables(comparison))
    return "\n".join([*(f"% {line}" for line in _sentences(comparison)), reached, "", differences]) + "\n"


def _tables(comparison: Comparison) -> tuple[Table, Table]:
    return cross_domain_table(comparison.scores), difference_table(comparison)


def _to_json(comparison: Comparison) -> str:
    return json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS = {"terminal": _to_terminal, "markdown": _to_markdown, "latex": _to_latex, "json": _to_json}


def _sentences(comparison: Comparison) -> list[str]:
    lines = [sentence(row) for row in comparison.differences]
    lines += [f"Note: {note}." for note in comparison.notes]
    lines.append(
        f"Differences are method - {comparison.baseline}, with {100 * comparison.confidence:g} % intervals of "
        f"{comparison.num_resamples:,} bootstrap samples; ± is one standard error, over items or several seeds."
    )
    return lines


def _score_text(score: Score) -> str:
    """Return a score's cell in a table."""
    if score.value is None:
        return "no value"
    scale, digits = _scale(score.unit), _min_digits(score.unit)
    error = "" if score.stderr is None else f" ± {scale * score.stderr:.{digits}f}"
    return f"{scale * score.value:.{digits}f}{error}"


def _scale(unit: str) -> float:
    return 100.0 if unit == "fraction" else 1.0


def _unit_text(unit: str) -> str:
    return "%" if unit == "fraction" else unit


def _min_digits(unit: str) -> int:
    return 1 if unit == "fraction" else 4


def _digits(row: Difference) -> int:
    """Return how many decimals show the difference and its bounds without rounding one of them to zero."""
    digits = _min_digits(row.unit)
    smallest = min((abs(x) * _scale(row.unit) for x in (row.difference, row.ci_low, row.ci_high) if x), default=1.0)
    while smallest < 0.5 * 10**-digits and digits < 8:
        digits += 1
    return digits


def _signed_text(row: Difference) -> str:
    return f"{_rounded(row.difference, row):+.{_digits(row)}f}"


def _bounds_text(row: Difference) -> str:
    return f"[{_rounded(row.ci_low, row):.{_digits(row)}f}, {_rounded(row.ci_high, row):.{_digits(row)}f}]"


def _rounded(value: float, row: Difference) -> float:
    return round(_scale(row.unit) * value, _digits(row)) + 0.0  # + 0.0: no minus before zero


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}"


def _round_up(number: int) -> int:
    """Round up to two significant digits: 2871 items are "about 2,900"."""
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step
