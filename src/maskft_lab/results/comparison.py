"""A comparison: differences from one baseline, their verdicts, and the scores of all models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from maskft_common.errors import UserError, printable

SCHEMA_VERSION = 2  # 1: ci_low and ci_high were the unadjusted interval
MIN_RESAMPLES = 100
NUM_RESAMPLES = 10_000
MAX_RESAMPLES = 2_000_000  # each takes 16 bytes per seed; more than this changes no digit that is printed
MAX_CONFIDENCE = 0.9999  # 100 of MAX_RESAMPLES lie beyond each of its bounds
MAX_LOOKS = 100

Place = tuple[str, str]  # task and metric

BETTER = "better"
WORSE = "worse"
NOT_DISTINGUISHABLE = "not distinguishable"


@dataclass(frozen=True)
class Settings:
    """How differences are judged.

    Attributes:
        num_resamples: Bootstrap samples per difference, 100 to 2,000,000; the default grows with many comparisons.
        seed: Seed of the resampling.
        confidence: Coverage of the intervals, above 0 and at most 0.9999.
        fixed_seeds: Claim something about these trained models, averaged over their seeds: intervals are over items
            only and say nothing about other training seeds. By default seeds are drawn as items are.
        looks: How often verdicts are looked at in all while seeds or items are added. Whoever adds seeds until a
            verdict appears finds one too often; each look is judged at ``(1 - confidence) / looks`` (Bonferroni, which
            holds however the looks depend on each other).
    """

    num_resamples: int = NUM_RESAMPLES
    seed: int = 0
    confidence: float = 0.95
    fixed_seeds: bool = False
    looks: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.confidence <= MAX_CONFIDENCE:
            raise UserError(f"confidence {self.confidence} is outside (0, {MAX_CONFIDENCE}]: 0.95 is usual")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is negative: give 0 or more")
        if self.num_resamples > MAX_RESAMPLES:
            raise UserError(f"num_resamples {self.num_resamples:,} is too many: give at most {MAX_RESAMPLES:,}")
        if not 1 <= self.looks <= MAX_LOOKS:
            raise UserError(f"looks {self.looks} is outside [1, {MAX_LOOKS}]: give the number of planned looks")

    def of_one_look(self) -> Settings:
        """Return them with the confidence at which each of the looks is judged.

        Raises:
            UserError: If that is too close to 1.
        """
        # Bonferroni: the looks share the probability of a false claim.
        # Not a sequential design such as O'Brien and Fleming's, which needs the looks at planned shares of the data.
        alpha = (1 - self.confidence) / self.looks
        confidence = 1 - alpha
        # Before `replace`, whose check would name a confidence that the user did not give.
        if confidence > MAX_CONFIDENCE:
            raise UserError(
                f"confidence {self.confidence} with {self.looks} looks judges each at {confidence:.6g}, above "
                f"{MAX_CONFIDENCE}: plan fewer looks, or give a lower --confidence"
            )
        return replace(self, confidence=confidence, looks=1)

    def with_resamples(self, num_comparisons: int) -> Settings:
        """Return them with as many resamples as Holm needs: a bootstrap p is a multiple of ``2 / (resamples + 1)``.

        Args:
            num_comparisons: Of the largest family.

        Raises:
            UserError: If fewer resamples were asked for, or more than `MAX_RESAMPLES` are needed.
        """
        # Holm's first step compares the smallest p with alpha / m. With R = 4 m / alpha resamples that limit is about
        # twice the smallest p that the bootstrap can give, 2 / (R + 1).
        alpha = 1 - self.confidence
        needed = math.ceil(4 * num_comparisons / alpha)
        needed = max(MIN_RESAMPLES, needed)
        if needed > MAX_RESAMPLES:
            raise UserError(
                f"{num_comparisons} comparisons at confidence {self.confidence:g} need {needed:,} bootstrap samples, "
                f"more than {MAX_RESAMPLES:,}: compare fewer --metrics, or at a lower --confidence"
            )
        # The default grows by itself; a number that the user chose is not changed in silence.
        number = self.num_resamples
        if number == NUM_RESAMPLES:
            number = max(number, needed)
        if number < needed:
            raise UserError(
                f"num_resamples {number} is too few for {num_comparisons} comparisons at confidence "
                f"{self.confidence}: give at least {needed}"
            )
        return replace(self, num_resamples=number)


@dataclass(frozen=True)
class Difference:
    """One method against the baseline, on one metric of one task.

    ``p_value`` is McNemar's exact p (``test`` "McNemar") where both sides are one result with 0/1 scores of independent
    items, and the bootstrap's otherwise; ``p_adjusted`` is Holm's over ``num_comparisons``: those of all methods on the
    main metrics of all tasks (``is_main``), or on all other metrics together.

    ``ci_low`` to ``ci_high`` is the simultaneous interval, the one that is shown: it holds together with those of the
    family, and holds zero exactly where the verdict claims nothing (``is_cut_at_zero``: its bound at zero is open).
    ``unadjusted_low`` to ``unadjusted_high`` is that of this difference without the others; null in published
    comparisons that have no other one than it, as ``ci_low`` to ``ci_high``.

    ``by_seed`` are the differences of seeds that are fixed: interval, p and verdict are then about these models and
    other items, and None says that they are about other seeds too. Items are won, lost and tied by their mean over the
    seeds; ``num_identical`` are those on which the two agree at every seed (null: not counted, in published files).
    ``num_clusters`` is null for independent items.
    ``test_set`` is the file that the items are from, where it is known: tables call the task by it.
    """

    # Which models, and the metric in which they are compared.
    method: str
    baseline: str
    task: str
    metric: str
    unit: str
    higher_is_better: bool
    is_main: bool

    # Means over the items and seeds, in the unit of the metric.
    num_items: int
    num_seeds: int
    value: float
    baseline_value: float
    difference: float

    test: str
    won: int
    lost: int
    tied: int

    # Given by `differences.judge`.
    ci_low: float = math.nan
    ci_high: float = math.nan
    confidence: float = math.nan
    p_value: float = math.nan
    p_adjusted: float = math.nan
    num_comparisons: int = 0
    verdict: str = NOT_DISTINGUISHABLE
    unadjusted_low: float | None = None
    unadjusted_high: float | None = None
    is_cut_at_zero: bool = False
    num_clusters: int | None = None
    by_seed: list[float] | None = None
    test_set: str | None = None
    num_identical: int | None = None

    @property
    def place(self) -> Place:
        """Its task and metric."""
        return self.task, self.metric

    def mirrored(self) -> Difference:
        """Return it with the two models exchanged, judged as before."""
        exchanged_verdicts = {BETTER: WORSE, WORSE: BETTER}
        by_seed = None
        if self.by_seed is not None:
            by_seed = [-value for value in self.by_seed]
        unadjusted_low = None
        unadjusted_high = None
        if self.unadjusted_low is not None and self.unadjusted_high is not None:
            unadjusted_low = -self.unadjusted_high
            unadjusted_high = -self.unadjusted_low
        return replace(
            self,
            method=self.baseline,
            baseline=self.method,
            value=self.baseline_value,
            baseline_value=self.value,
            difference=-self.difference,
            won=self.lost,
            lost=self.won,
            ci_low=-self.ci_high,
            ci_high=-self.ci_low,
            unadjusted_low=unadjusted_low,
            unadjusted_high=unadjusted_high,
            verdict=exchanged_verdicts.get(self.verdict, self.verdict),
            by_seed=by_seed,
        )


@dataclass(frozen=True)
class Score:
    """The value of one model in one metric of a task.

    ``stderr`` is over the items (clusters) for one result and for fixed seeds, over the seeds for several others; None
    where it cannot be computed.
    ``value`` is None where a result has none. ``low`` to ``high`` is a 95 % interval over the items: of a proportion
    (`proportions.proportion_interval`), otherwise None. At the edges (``is_at_edge``) it replaces ``stderr``, which
    would be near 0 there.
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
    test_set: str | None = None

    @property
    def place(self) -> Place:
        """Its task and metric."""
        return self.task, self.metric


@dataclass(frozen=True)
class MaskVerdict:
    """A learned mask against the model that it starts from, and against the strongest control.

    Controls are models trained from the same start on as many tokens without a learned mask. ``control`` is None
    without one; ``text`` has both differences and the conclusion, after the seeds that contradict it.
    """

    parent: Difference
    control: Difference | None
    text: str


@dataclass(frozen=True)
class Comparison:
    """All differences from one baseline, with what they were computed from.

    ``verdicts`` are of the learned masks, in the order of the results.
    ``fixed_seeds`` says that seeds are not a sample: errors and intervals are over items only.
    """

    baseline: str
    methods: list[str]
    differences: list[Difference]
    scores: list[Score]
    notes: list[str]
    confidence: float
    num_resamples: int
    seed: int
    fixed_seeds: bool = False
    verdicts: list[MaskVerdict] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION
    kind: str = "comparison"

    @property
    def kind_of_interval(self) -> str:
        """``simultaneous``, or ``unadjusted`` for the first published comparisons, which have no other one."""
        is_unadjusted = any(row.unadjusted_low is None for row in self.differences)
        return "unadjusted" if is_unadjusted else "simultaneous"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values, in the metrics' units (fractions in [0, 1], no percent)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Comparison:
        """Return the comparison of which this is the `to_dict`.

        The record may be a stranger's: its texts come back without control characters and the like, so that none
        reaches a terminal or a page.

        Raises:
            UserError: If it is of another schema version.
            ValueError: If it is not a comparison.
        """
        # Before all other checks: an earlier version has the same keys, with another meaning.
        # Without a version it is None, which is another version too.
        version = record.get("schema_version")
        if version != SCHEMA_VERSION:
            found = f"a comparison has schema version {version}, this maskft reads {SCHEMA_VERSION}"
            raise UserError(f"{found}: run maskft study again, which writes it anew and trains nothing")
        return TypeAdapter(cls).validate_python(_visible(record))


def _visible(value: Any) -> Any:
    """Return a record with all of its texts printable."""
    # Keys are names of our fields, which pydantic checks.
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {key: _visible(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(each) for each in value]
    return value
