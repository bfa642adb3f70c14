"""Numbers and sentences: how a score, a difference and its interval are written wherever they appear.

Tables, pages, verdicts and the report all take their words from here, so one difference reads the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .comparison import NOT_DISTINGUISHABLE, Difference, Score

MAX_DIGITS = 8  # decimals that a bound close to zero may take, or digits of a p-value close to its level

# Numbers below this are printed as zero: items that cancel each other may leave some 1e-18.
PRINTED_AS_ZERO = 10**-MAX_DIGITS
# A p-value below this is said to be: an exact test of a thousand items that differ is 0 as a float.
SMALLEST_P = 1e-6

Ends = tuple[float, float]


def sentence(row: Difference) -> str:
    """Return a difference in words, claiming no more than the interval and the adjusted p support.

    Of several comparisons the interval beside the verdict is simultaneous; the unadjusted one is labelled, since it may
    leave zero out where nothing is claimed.
    """
    # The metric, and how many seeds and clusters its values are from.
    where = f"{row.metric} on {task_text(row)}"
    if row.num_seeds > 1:
        # Fixed seeds: a claim about these models, and not about other seeds.
        these = "these " if row.by_seed else ""
        where += f", {these}{row.num_seeds} seeds"
    if row.num_clusters:
        where += f", {row.num_clusters:,} clusters"

    # Holm decides the verdict, so the simultaneous interval comes first.
    unit = points_or_unit(row.unit)
    difference = difference_text(row, unit) + _unadjusted_text(row)

    # The verdict follows from the adjusted p; the plain one is what a single comparison would have had.
    level = 1 - row.confidence
    p_value = f"{row.test} p {p_text(row.p_value, level)}"
    if row.num_comparisons > 1:
        adjusted = p_text(row.p_adjusted, level)
        p_value += f" ({adjusted} after Holm over {row.num_comparisons} comparisons)"

    # Two seeds can hardly show anything, and where nothing is shown a reader may take it for equality.
    said = row.verdict
    has_two_seeds = row.num_seeds == 2 and not row.by_seed
    if has_two_seeds and row.verdict == NOT_DISTINGUISHABLE:
        said += "; two seeds: no claim over seeds"
    if row.by_seed:
        said += f"; by seed {numbers_text(row.by_seed, row.unit)}"
    return f"{row.method} vs {row.baseline}, {where}: {difference}, {p_value}: {said}."


def difference_text(row: Difference, unit: str = "") -> str:
    """Return ``+1.2 [0.3, 2.1]`` with the interval that agrees with the verdict: the simultaneous one.

    A round bracket is the bound at zero of a difference of which only the sign is claimed. ``+0.0, all 200 alike``:
    the two agree on every item at every seed. ``(no interval)``: it would be the whole range, -100 to 100 points.
    Published comparisons from before intervals were simultaneous have only unadjusted ones, and their text says so.
    """
    bounds = (row.ci_low, row.ci_high)
    text = _with_interval(row, bounds, unit)
    # Of one comparison both intervals are the same, and nothing has to be said.
    is_unadjusted = row.num_comparisons > 1 and row.unadjusted_low is None
    if is_unadjusted:
        text += " unadjusted"
    return text


def is_alike(row: Difference) -> bool:
    """Tell whether two models agree on every item at every seed, as far as that is known."""
    if row.difference != 0:
        return False
    # At every seed: seeds that cancel each other leave a difference of 0 between models that are not alike.
    if row.num_identical is not None:
        return row.num_identical == row.num_items
    # Published comparisons count ties of the means over seeds alone: of one result these are the items.
    return row.num_seeds == 1 and row.tied == row.num_items


def _unadjusted_text(row: Difference) -> str:
    """Return ``, unadjusted [0.6, 1.8]`` if that interval differs from the one beside the verdict."""
    if row.num_comparisons == 1:
        return ""  # both are the same
    if row.unadjusted_low is None or row.unadjusted_high is None:
        return ""
    bounds = (row.unadjusted_low, row.unadjusted_high)
    if is_alike(row) or _is_everything(row, bounds):
        return ""
    # The text after the difference, which is written already.
    text = _with_interval(row, bounds)
    _, interval = text.split(" ", 1)
    return f", unadjusted {interval}"


def _with_interval(
    row: Difference,
    bounds: Ends,
    unit: str = "",
) -> str:
    """Return a difference and bounds, with enough decimals that only a zero is written as zero."""
    # One number of decimals for all three numbers.
    numbers, digits = rounded((row.difference, *bounds), *scale_and_digits(row.unit))
    value, low, high = numbers
    text = f"{value:+.{digits}f}"
    if unit:
        text += f" {unit}"
    if is_alike(row):
        return f"{text}, all {row.num_items:,} alike"
    if _is_everything(row, bounds):
        return f"{text} (no interval)"

    # A claimed difference is not zero, so a bound at zero is open: the sign is claimed and no size.
    # Compared after rounding: a bound that is printed as zero gets the bracket of zero.
    is_claimed = row.verdict != NOT_DISTINGUISHABLE
    left = "(" if is_claimed and low == 0 else "["
    right = ")" if is_claimed and high == 0 else "]"
    return f"{text} {left}{low:.{digits}f}, {high:.{digits}f}{right}"


def _is_everything(row: Difference, bounds: Ends) -> bool:
    """Whether an interval is the whole range of a difference of shares: two seeds that disagree."""
    low, high = bounds
    return row.unit == "fraction" and low <= -1 and high >= 1


def score_text(score: Score) -> str:
    """Return ``46.8 ± 1.4``, in percent for fractions; at an edge ``0.0 [0.0, 1.3]``, never ``± 0.0``.

    An error or a bound takes more decimals where it would be written as zero, or as the value, and is not.
    """
    if score.value is None:
        return "no value"

    # Both bounds are None or neither is; mypy needs both checks.
    # An interval instead of an error where the error says nothing.
    has_interval = shows_interval(score)
    if has_interval and score.low is not None and score.high is not None:
        # Of thousands of items that are all right, the bounds are close to 100 %.
        distances = [score.value - score.low, score.high - score.value]
        _, digits = rounded(distances, *scale_and_digits(score.unit))
        value, low, high = (_fixed(number, score.unit, digits) for number in (score.value, score.low, score.high))
        return f"{value} [{low}, {high}]"

    if score.stderr is None:
        return number_text(score.value, score.unit)
    # The value has the decimals of its error, and no more: behind them it says nothing.
    _, digits = rounded([score.stderr], *scale_and_digits(score.unit))
    value = _fixed(score.value, score.unit, digits)
    stderr = _fixed(score.stderr, score.unit, digits)
    return f"{value} ± {stderr}"


def shows_interval(score: Score) -> bool:
    """Tell whether a score is written with its interval: its standard error would say nothing."""
    # Only shares have an interval, and they are written in percent with one decimal.
    is_shown_as_zero = score.stderr is not None and round(100 * score.stderr, 1) == 0
    return score.low is not None and (score.is_at_edge or is_shown_as_zero)


def number_text(number: float, unit: str) -> str:
    """Return a value as tables have it; only a zero is written as zero, without a minus."""
    _, digits = rounded([number], *scale_and_digits(unit))
    return _fixed(number, unit, digits)


def _fixed(number: float, unit: str, digits: int) -> str:
    """Return a value with this many decimals, without a minus before zero."""
    scale, _ = scale_and_digits(unit)
    # -0.0 + 0.0 is 0.0.
    shown = round(scale * number, digits) + 0.0
    return f"{shown:.{digits}f}"


def task_text(row: Difference | Score) -> str:
    """Return the name of a task in tables: for the user's own rows, the file of the test set."""
    return row.test_set or row.task


def numbers_text(numbers: Sequence[float], unit: str) -> str:
    """Return differences with their signs, such as those of several seeds; only a zero is written as zero."""
    shown, digits = rounded(numbers, *scale_and_digits(unit))
    texts = [f"{number:+.{digits}f}" for number in shown]
    return ", ".join(texts)


def rounded(
    numbers: Sequence[float],
    scale: float,
    digits: int,
) -> tuple[list[float], int]:
    """Return numbers times a scale as they are printed, and how many decimals all of them need, at least ``digits``."""
    shown = [number if abs(number) >= PRINTED_AS_ZERO else 0.0 for number in numbers]
    scaled = [scale * number for number in shown]

    # More decimals while the smallest number that is not zero would be rounded to zero.
    sizes = [abs(number) for number in scaled if number]
    smallest = min(sizes, default=1.0)
    while smallest < 0.5 * 10**-digits and digits < MAX_DIGITS:
        digits += 1

    # -0.0 + 0.0 is 0.0: no minus before zero.
    return [round(number, digits) + 0.0 for number in scaled], digits


def scale_and_digits(unit: str) -> tuple[float, int]:
    """Return the factor by which values of a unit are multiplied in tables, and the least number of decimals."""
    if unit == "fraction":
        return 100.0, 1
    return 1.0, 4


def unit_text(unit: str) -> str:
    """Return the unit of a score: fractions are shown in percent."""
    return "%" if unit == "fraction" else unit


def points_or_unit(unit: str) -> str:
    """Return the unit of a difference: points for percentages."""
    return "points" if unit == "fraction" else unit


def p_text(p_value: float, level: float) -> str:
    """Return a p-value with two digits, or as many as show on which side of the level it is.

    With two digits 0.0496 and 0.0504 would both be 0.05, and only one of them allows a claim at that level.

    Args:
        p_value: In [0, 1].
        level: A claim needs a p-value of at most this, in (0, 1).
    """
    # Nobody needs more below 0.001, as long as the level is not there, too.
    if p_value < 0.001 <= level:
        return "< 0.001"
    if p_value < SMALLEST_P:
        return "< 0.000001"

    side = _side(p_value, level)
    for digits in range(2, MAX_DIGITS):
        text = f"{p_value:.{digits}g}"
        if _side(float(text), level) == side:
            return text
    return f"{p_value:.{MAX_DIGITS}g}"


def _side(p_value: float, level: float) -> int:
    """Return 1 above the level, -1 below, 0 at it."""
    # Not ==: as floats, 1 - 0.95 is not 0.05.
    if math.isclose(p_value, level):
        return 0
    return 1 if p_value > level else -1
