"""What a comparison holds: differences from one baseline, their verdicts, and the scores of all models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1

BETTER, WORSE, NOT_DISTINGUISHABLE = "better", "worse", "not distinguishable"
EQUIVALENT, NO_WORSE = "equivalent", "no worse"  # within a margin


@dataclass(frozen=True)
class Equivalence:
    """What a margin given beforehand allows to say (two one-sided tests).

    ``p_no_worse`` is the p of "worse by the margin or more", ``p_equivalent`` the larger of it and that of "better by
    the margin or more", each after Holm's correction over the family; the verdict stands where they are at most
    1 - confidence, and is None where nothing can be said.
    """

    margin: float
    p_no_worse: float
    p_equivalent: float
    verdict: str | None = None


@dataclass(frozen=True)
class Difference:
    """One method against the baseline, on one metric of one task (of an average: of several).

    ``p_value`` is McNemar's exact p (``test`` "McNemar") where both sides are one result with 0/1 scores of independent
    items, and the bootstrap's otherwise; ``p_adjusted`` is Holm's over ``num_comparisons``: those of all methods on the
    main metrics of all tasks (``is_main``), on all other metrics together, or of the averages.

    ``ci_low`` to ``ci_high`` is the interval of this difference alone, ``simultaneous_low`` to ``simultaneous_high``
    that which holds together with those of the family; it holds zero exactly where the verdict claims nothing
    (``is_cut_at_zero``: its bound at zero is open).

    ``by_seed`` are the differences of seeds that are fixed: interval, p and verdict are then about these models and
    other items, and None says that they are about other seeds too. Items are won, lost and tied by their mean over the
    seeds. ``num_clusters`` is null for independent items.
    ``items_needed`` and ``seeds_needed`` are None where they would not help or the verdict stands without.
    """

    method: str
    baseline: str
    task: str
    metric: str
    unit: str
    higher_is_better: bool
    is_main: bool
    num_items: int
    num_seeds: int
    value: float
    baseline_value: float
    difference: float
    ci_low: float
    ci_high: float
    confidence: float
    test: str
    p_value: float
    p_adjusted: float
    num_comparisons: int
    won: int
    lost: int
    tied: int
    verdict: str
    items_needed: int | None = None
    seeds_needed: int | None = None
    simultaneous_low: float | None = None
    simultaneous_high: float | None = None
    is_cut_at_zero: bool = False
    num_clusters: int | None = None
    equivalence: Equivalence | None = None
    by_seed: list[float] | None = None


@dataclass(frozen=True)
class Score:
    """The value of one model in one metric of a task.

    ``stderr`` is over the items (clusters) for one result and for fixed seeds, over the seeds for several others; None
    where there is none.
    ``value`` is None where a result has none. ``low`` to ``high`` is a 95 % interval over the items: of a proportion
    (`proportions.proportion_interval`), otherwise None. At the edges (``is_at_edge``) it says what ``stderr`` cannot.
    """

    model: str
    task: str
    metric: str
    unit: str
    value: float | None
    stderr: float | None
    num_seeds: int
    low: float | None = None
    high: float | None = None
    is_at_edge: bool = False


@dataclass(frozen=True)
class Comparison:
    """All differences from one baseline, with what they were computed from.

    ``averages`` are differences of the unweighted mean over the tasks' main metrics, a family of their own.
    ``fixed_seeds`` says that seeds are not a sample: errors and intervals are over items alone.
    """

    baseline: str
    methods: list[str]
    differences: list[Difference]
    scores: list[Score]
    notes: list[str]
    confidence: float
    num_resamples: int
    seed: int
    averages: list[Difference] = field(default_factory=list)
    fixed_seeds: bool = False
    schema_version: int = SCHEMA_VERSION
    kind: str = "comparison"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values, in the metrics' units (fractions in [0, 1], no percent)."""
        return asdict(self)
