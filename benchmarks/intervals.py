"""Coverage of the intervals and false claims of the tests of ``maskft compare``, over simulated models.

Published in results/benchmarks/intervals.json, so the order of random draws is kept.
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
from scipy import stats

from maskft_lab.results import families
from maskft_lab.results.comparison import NOT_DISTINGUISHABLE, Settings
from maskft_lab.results.differences import Measured, Sample, difference_of, judge
from maskft_lab.results.proportions import proportion_interval, tango_interval
from maskft_lab.results.statistics import Bootstrap, as_block

RESAMPLES = 600
Z = stats.norm.ppf(0.975)


def run(report) -> None:
    """Simulate; with ``--quick`` a few draws each."""
    draws = 20 if report.quick else 600
    parts = (
        scores,
        dependent_scores,
        differences,
        clusters,
        samples,
        few_seeds,
        one_for_many_seeds,
        all_at_once,
    )
    for part in parts:
        # A new generator for each, so that a part can be repeated alone.
        part(report, draws, np.random.default_rng(0))


# Of items


def scores(report, draws: int, rng) -> None:
    """One proportion: exact, summed over the number of right answers."""
    for num_items, rate in ((30, 0.05), (100, 0.02), (300, 0.003), (300, 0.01), (300, 0.3)):
        counts = np.arange(num_items + 1)
        chances = stats.binom.pmf(counts, num_items, rate)

        # Ours: a Wilson interval for each number of right answers.
        intervals = np.array([proportion_interval(np.arange(num_items) < right) for right in counts])
        is_covered = (intervals[:, 0] <= rate) & (rate <= intervals[:, 1])
        ours = chances @ is_covered

        # By the standard error, as most papers have it.
        share = counts / num_items
        half = Z * np.sqrt(share * (1 - share) / num_items)
        is_covered = (share - half <= rate) & (rate <= share + half)
        by_standard_error = chances @ is_covered

        what = f"score: {num_items} items, {100 * rate:g} % right"
        report.add("scores", what, 100 * ours, "% covered", by_standard_error=100 * by_standard_error)


def dependent_scores(report, draws: int, rng) -> None:
    """One proportion over passages of 5 items, half of whose variance they share, and over k samples of 100 items."""
    for count, rate in ((60, 0.01), (60, 0.05), (60, 0.3), (20, 0.3)):
        passages = np.repeat(np.arange(count), 5)
        hits = 0
        hits_by_items = 0
        for _ in range(draws):
            # The generator's draws are kept in this order, on which the published numbers depend.
            uniform = rng.random(5 * count)
            rates = np.repeat(rng.beta(rate, 1 - rate, count), 5)
            is_right = uniform < rates
            hits += _contains(proportion_interval(is_right, passages), rate)
            hits_by_items += _contains(proportion_interval(is_right), rate)
        # Intervals that take items for independent are too narrow here.
        what = f"score: {count} passages of 5, {100 * rate:g} % right"
        report.add(
            "scores",
            what,
            100 * hits / draws,
            "% covered",
            by_items=100 * hits_by_items / draws,
        )

    # The mean of k sampled answers to each item.
    for k, rate in ((4, 0.01), (4, 0.5), (16, 0.01), (16, 0.5)):
        spread = 5 if rate < 0.1 else 1
        hits = 0
        for _ in range(draws):
            ease = rng.beta(spread * rate, spread * (1 - rate), 100)
            shares = rng.binomial(k, ease) / k
            hits += _contains(proportion_interval(shares), rate)
        what = f"score: avg@{k} of 100 items, {100 * rate:g} % right"
        report.add("scores", what, 100 * (hits / draws), "% covered")


# Few counts are drawn, many times each.
@cache
def _resampled(won: int, lost: int) -> tuple[float, float]:
    diffs = np.repeat([1.0, -1.0, 0.0], [won, lost, 300 - won - lost])
    return Bootstrap(as_block([diffs]), 2000).interval()


@cache
def _tango(won: int, lost: int) -> tuple[float, float]:
    return tango_interval(won, lost, 300)


def differences(report, draws: int, rng) -> None:
    """Two accuracies on the same 300 items, four of five items that differ won by one model."""
    for expected in (1, 3, 6, 10, 25):
        share_won = 0.8 * expected / 300
        share_lost = 0.2 * expected / 300
        truth = share_won - share_lost
        # How many of the 300 items each model wins, many times.
        drawn = rng.multinomial(300, [share_won, share_lost, 1 - share_won - share_lost], 3 * draws)

        ours = []
        by_bootstrap = []
        for won, lost, _ in drawn.tolist():
            # As maskft compare chooses: with few items that differ, a bootstrap has too few values.
            resampled = _resampled(won, lost)
            interval = _tango(won, lost) if won + lost < 10 else resampled
            ours.append(_contains(interval, truth, tolerance=1e-12))
            by_bootstrap.append(_contains(resampled, truth, tolerance=1e-12))
        what = f"difference: {expected} of 300 items expected to differ"
        report.add(
            "pairs",
            what,
            100 * np.mean(ours),
            "% covered",
            by_bootstrap=100 * np.mean(by_bootstrap),
        )


def _contains(
    interval: tuple[float, float],
    truth: float,
    tolerance: float = 0.0,
) -> bool:
    low, high = interval
    return low - tolerance <= truth <= high + tolerance


def _covered(draw, truth: float, draws: int) -> float:
    """How many of the bootstrap's intervals contain the truth, in %; ``draw`` draws differences."""
    hits = 0
    for seed in range(draws):
        interval = Bootstrap(draw(), RESAMPLES, seed).interval()
        hits += _contains(interval, truth)
    return 100 * hits / draws


def clusters(report, draws: int, rng) -> None:
    """Differences of 5 items per passage that share a part of their variance."""

    def equal(count: int, shared: float, is_known: bool):
        passages = np.repeat(rng.normal(size=count), 5)
        diffs = np.sqrt(shared) * passages + np.sqrt(1 - shared) * rng.normal(size=5 * count)
        labels = [str(index // 5) for index in range(5 * count)]
        return as_block([diffs], None, labels if is_known else None)

    for count, shared in ((10, 0.3), (20, 0.3), (40, 0.0), (40, 0.3), (40, 0.7), (100, 0.3)):
        what = f"clusters: {count} of 5 items, {100 * shared:g} % of the variance shared"
        # Intervals that know nothing of the passages, and ours.
        by_items = _covered(partial(equal, count, shared, False), 0.0, draws)
        ours = _covered(partial(equal, count, shared, True), 0.0, draws)
        report.add("clusters", what, ours, "% covered", by_items=by_items)

    # Passages of different lengths, most of them short.
    def unequal():
        sizes = np.clip(rng.geometric(0.2, 40), 1, 40)
        labels = np.repeat(np.arange(40), sizes)
        diffs = np.repeat(rng.normal(size=40), sizes) + rng.normal(size=labels.size)
        return as_block([diffs], None, [str(label) for label in labels])

    ours = _covered(unequal, 0.0, draws)
    report.add("clusters", "clusters: 40 of 1 to 40 items, half shared", ours, "% covered")


def samples(report, draws: int, rng) -> None:
    """avg@k of two models on 100 items whose difficulty they share."""

    def draw(k: int):
        ease = np.clip(rng.beta(0.5, 0.5, 100), 0, 1)
        first = rng.binomial(k, ease) / k
        second = rng.binomial(k, ease) / k
        return as_block([first - second])

    for k in (1, 4, 16):
        ours = _covered(partial(draw, k), 0.0, draws)
        report.add("samples", f"avg@{k}: difference over 100 items", ours, "% covered")


# Of seeds


def _sample(values, baseline) -> Sample:
    values_SN = np.atleast_2d(values) * 1.0
    baseline_SN = np.atleast_2d(baseline) * 1.0
    return Sample("task", values_SN, baseline_SN, None, None)


def _is_claimed(measured: Measured) -> bool:
    """Whether a difference is called one: its interval does not contain 0, and its p-value is small."""
    return not _contains(measured.interval(0.95), 0) and measured.p_value(0.95) <= 0.05


def few_seeds(report, draws: int, rng) -> None:
    """Accuracies on 300 items whose seeds vary about as much as the items let them: normal, or skewed in one arm."""

    # S seeds, N items: an item is right if its difficulty for a seed is below the seed's shift.
    def right(shifts_S):
        ease = rng.normal(size=300)
        noise = 0.5 * rng.normal(size=(len(shifts_S), 300))
        is_right_SN = ease + noise < shifts_S[:, None]
        return is_right_SN.astype(float)

    for num_seeds in (2, 3):
        for name, is_skewed in (("normal seeds", False), ("seeds skewed in one arm", True)):
            hits = 0
            claims = 0
            for seed in range(draws):
                if is_skewed:
                    shifts = 0.1 * (rng.exponential(size=num_seeds) - 1)
                else:
                    shifts = 0.1 * rng.normal(size=num_seeds)
                first = right(shifts)
                second = right(0.1 * rng.normal(size=num_seeds))
                measured = Measured(_sample(first, second), "fraction", 600, seed)
                hits += _contains(measured.interval(0.95), 0)
                claims += _is_claimed(measured)
            what = f"{num_seeds} seeds of 300 items, {name}"
            report.add(
                "seeds",
                what,
                100 * hits / draws,
                "% covered",
                false_claims=100 * claims / draws,
            )


def one_for_many_seeds(report, draws: int, rng) -> None:
    """One result beside several seeds, of equal methods: why maskft compares it only for a model without seeds."""
    for num_seeds in (3, 6):
        claims = 0
        claims_about_parent = 0
        for seed in range(draws):
            ease = rng.normal(size=300)
            shifts = 0.15 * rng.normal(size=(num_seeds + 1, 1))
            values = ease + shifts + 0.5 * rng.normal(size=(num_seeds + 1, 300))
            parent = ease + 0.5 * rng.normal(size=(1, 300))  # not trained, so it has no shift

            # Another seed of the same method, and the model that all seeds began with.
            seeds = values[:-1]
            single = values[-1:]
            claims += _is_claimed(Measured(_sample(seeds, single), "score", RESAMPLES, seed))
            claims_about_parent += _is_claimed(Measured(_sample(seeds, parent), "score", RESAMPLES, seed))
        what = f"one result beside {num_seeds} seeds of equal methods"
        report.add(
            "seeds",
            what,
            100 * claims / draws,
            "% false",
            of_an_untrained_model=100 * claims_about_parent / draws,
        )


# Of many differences


def _judged(measured: list[Measured]):
    rows = [(difference_of(("method", "baseline"), each, "metric", True, True), each) for each in measured]
    return judge(rows, Settings())


def all_at_once(report, draws: int, rng) -> None:
    """Methods that share a baseline, some of them truly different, on 100 items."""
    # Fewer draws of the level of simultaneous intervals: this is repeated hundreds of times.
    usual = families.NUM_DRAWS
    families.NUM_DRAWS = 10_000
    for name, truths in (
        ("4 equal methods", [0.0] * 4),
        ("10 equal methods", [0.0] * 10),
        ("2 far, 2 near, 2 equal", [1.0, 1.0, 0.35, 0.35, 0.0, 0.0]),
    ):
        num_families = draws // 2
        num_held = 0
        num_each_held = 0
        num_false_signs = 0
        num_cut = 0
        for _ in range(num_families):
            baseline = rng.normal(size=100)
            methods = [_sample(truth + rng.normal(size=100), baseline) for truth in truths]
            rows = _judged([Measured(each, "score", RESAMPLES, 0) for each in methods])

            # Simultaneous intervals promise that all hold together; others promise it of each.
            all_hold = True
            all_hold_each = True
            has_false_sign = False
            for row, truth in zip(rows, truths, strict=True):
                # An interval that is cut at 0 claims a sign and not a range.
                if not row.is_cut_at_zero:
                    all_hold &= _contains((row.ci_low, row.ci_high), truth)
                all_hold_each &= _contains((row.unadjusted_low, row.unadjusted_high), truth)
                is_claimed = row.verdict != NOT_DISTINGUISHABLE
                has_false_sign |= is_claimed and row.difference * truth <= 0
                num_cut += row.is_cut_at_zero
            num_held += all_hold
            num_each_held += all_hold_each
            num_false_signs += has_false_sign
        report.add(
            "families",
            f"all at once: {name}",
            100 * (num_held / num_families),
            "% covered",
            each_alone=100 * (num_each_held / num_families),
            false_signs=100 * (num_false_signs / num_families),
            cut=num_cut / num_families,
        )
    families.NUM_DRAWS = usual
