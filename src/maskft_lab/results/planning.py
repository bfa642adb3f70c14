"""What a comparison could see, before it is run: the smallest difference of two accuracies on so many items."""

from __future__ import annotations

import math

from scipy import stats

from maskft_base.errors import UserError

from .statistics import POWER


def smallest_difference(num_items: int, discordance: float, alpha: float = 0.05, power: float = POWER) -> float:
    """Return the minimum detectable difference of two accuracies on the same items, by the normal approximation.

    Eq. 9 of https://arxiv.org/abs/2411.00640: ``(z(1 - alpha/2) + z(power)) * sqrt(discordance / N)``.

    Args:
        num_items: N.
        discordance: Share of the items that exactly one of the two models has right, in (0, 1].
        alpha: Two-sided level; of m comparisons ``alpha / m``, what Holm asks of the first.
        power: Probability that a true difference of this size is claimed, in (0, 1).
    """
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return float(z * math.sqrt(discordance / num_items))


def plan_text(num_items: list[int], discordance: float, num_comparisons: int, confidence: float) -> str:
    """Return for a terminal what could be seen, one line per number of items.

    Raises:
        UserError: If a number is out of range.
    """
    if not 0 < discordance <= 1:
        raise UserError(f"discordance {discordance} is outside (0, 1]: give a fraction, 0.1 for 10 % of the items")
    if min(num_items) < 2 or num_comparisons < 1 or not 0 < confidence < 1:
        raise UserError(
            f"items {min(num_items)}, comparisons {num_comparisons}, confidence {confidence}: give at least 2 and 1, "
            "and a confidence in (0, 1)"
        )
    lines = [f"Smallest true difference that is claimed with probability {100 * POWER:g} %,"]
    lines.append(f"where {100 * discordance:g} % of the items are right in exactly one of the two models:")
    for count in num_items:
        effect = smallest_difference(count, discordance, (1 - confidence) / num_comparisons)
        seen = f"{100 * effect:.1f} points" if effect <= discordance else "none: too few items differ"
        lines.append(f"{count:>8,} items, {num_comparisons} comparisons: {seen}")
    return "\n".join(lines) + "\n"
