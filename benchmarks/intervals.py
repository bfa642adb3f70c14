"""Coverage of the intervals and false claims of the tests that ``maskft compare`` makes, over simulated models."""

from __future__ import annotations

from functools import cache

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
    of_items = (scores, dependent_scores, differences, clusters, samples)
    parts = (*of_items, few_seeds, one_for_many_seeds, all_at_once)
    for part in parts:
        part(report, draws, np.random.default_rng(0))


def scores(report, draws: int, rng) -> None:
    """One proportion: exact, summed over the number of right answers."""
    for num_items, rate in ((30, 0.05), (100, 0.02), (300, 0.003), (300, 0.01), (300, 0.3)):
        counts = np.arange(num_items + 1)
        chances = stats.binom.pmf(counts, num_items, rate)
        share = counts / num_items
        half = Z * np.sqrt(share * (1 - share) / num_items)
        wilson = np.array([proportion_interval(np.arange(num_items) < right) for right in counts])
        ours = chances @ ((wilson[:, 0] <= rate) & (rate <= wilson[:, 1]))
        wald = chances @ ((share - half <= rate) & (rate <= share + half))
        what = f"score: {num_items} items, {100 * rate:g} % right"
        report.add("scores", what, 100 * ours, "% covered", by_standard_error=100 * wald)


def dependent_scores(report, draws: int, rng) -> None:
    """One proportion over passages of 5 items, half of whose variance they share, and over k samples of 100 items."""
    for count, rate in ((60, 0.01), (60, 0.05), (60, 0.3), (20, 0.3)):
        labels, hits = np.repeat(np.arange(count), 5), np.zeros(2)
        for _ in range(draws):
            values = rng.random(5 * count) < np.repeat(rng.beta(rate, 1 - rate, count), 5)
            bounds = (proportion_interval(values, labels), proportion_interval(values))
            hits += [low <= rate <= high for low, high in bounds]
        what = f"score: {count} passages of 5, {100 * rate:g} % right"
        report.add("scores", what, 100 * hits[0] / draws, "% covered", by_items=100 * hits[1] / draws)
    for k, rate in ((4, 0.01), (4, 0.5), (16, 0.01), (16, 0.5)):
        spread = 5 if rate < 0.1 else 1
        bounds = [
            proportion_interval(rng.binomial(k, rng.beta(spread * rate, spread * (1 - rate), 100)) / k)
            for _ in range(draws)
        ]
        covered = np.mean([low <= rate <= high for low, high in bounds])
        report.add("scores", f"score: avg@{k} of 100 items, {100 * rate:g} % right", 100 * covered, "% covered")


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
        won, lost = 0.8 * expected / 300, 0.2 * expected / 300
        drawn = rng.multinomial(300, [won, lost, 1 - won - lost], 3 * draws).tolist()
        ours, resampled = [], []
        for a, b, _ in drawn:
            interval = _tango(a, b) if a + b < 10 else _resampled(a, b)
            for found, (low, high) in ((ours, interval), (resampled, _resampled(a, b))):
                found.append(low - 1e-12 <= won - lost <= high + 1e-12)
        what = f"difference: {expected} of 300 items expected to differ"
        report.add("pairs", what, 100 * np.mean(ours), "% covered", by_bootstrap=100 * np.mean(resampled))


def _covered(draw, truth: float, draws: int) -> float:
    hits = 0
    for seed in range(draws):
        low, high = Bootstrap(draw(), RESAMPLES, seed).interval()
        hits += low <= truth <= high
    return 100 * hits / draws


def clusters(report, draws: int, rng) -> None:
    """Differences of 5 items per passage that share a part of their variance."""
    for count, shared in ((10, 0.3), (20, 0.3), (40, 0.0), (40, 0.3), (40, 0.7), (100, 0.3)):
        labels = [str(index // 5) for index in range(5 * count)]

        def draw(known, count=count, shared=shared, labels=labels):
            passages = np.repeat(rng.normal(size=count), 5)
            diffs = np.sqrt(shared) * passages + np.sqrt(1 - shared) * rng.normal(size=5 * count)
            return as_block([diffs], None, labels if known else None)

        what = f"clusters: {count} of 5 items, {100 * shared:g} % of the variance shared"
        plain = _covered(lambda draw=draw: draw(False), 0.0, draws)
        report.add("clusters", what, _covered(lambda draw=draw: draw(True), 0.0, draws), "% covered", by_items=plain)

    def unequal():
        sizes = np.clip(rng.geometric(0.2, 40), 1, 40)
        labels = np.repeat(np.arange(40), sizes)
        diffs = np.repeat(rng.normal(size=40), sizes) + rng.normal(size=labels.size)
        return as_block([diffs], None, [str(label) for label in labels])

    report.add("clusters", "clusters: 40 of 1 to 40 items, half shared", _covered(unequal, 0.0, draws), "% covered")


def samples(report, draws: int, rng) -> None:
    """avg@k of two models on 100 items whose difficulty they share."""
    for k in (1, 4, 16):

        def draw(k=k):
            ease = rng.beta(0.5, 0.5, 100)
            a, b = (rng.binomial(k, np.clip(ease + shift, 0, 1)) / k for shift in (0.0, 0.0))
            return as_block([a - b])

        report.add("samples", f"avg@{k}: difference over 100 items", _covered(draw, 0.0, draws), "% covered")


def few_seeds(report, draws: int, rng) -> None:
    """Accuracies on 300 items whose seeds vary about as much as the items let them: normal, or skewed in one arm."""

    def right(shifts_S):
        ease = rng.normal(size=300)
        return (ease + 0.5 * rng.normal(size=(len(shifts_S), 300)) < shifts_S[:, None]).astype(float)

    for num_seeds in (2, 3):
        for name, skewed in (("normal seeds", False), ("seeds skewed in one arm", True)):
            hits = claims = 0
            for seed in range(draws):
                first = (rng.exponential(size=num_seeds) - 1 if skewed else rng.normal(size=num_seeds)) * 0.1
                measured = Measured(
                    _sample(right(first), right(0.1 * rng.normal(size=num_seeds))), "fraction", 600, seed
                )
                low, high = measured.interval(0.95)
                hits += low <= 0 <= high
                claims += not low <= 0 <= high and measured.p_value(0.95) <= 0.05
            what = f"{num_seeds} seeds of 300 items, {name}"
            report.add("seeds", what, 100 * hits / draws, "% covered", false_claims=100 * claims / draws)


def one_for_many_seeds(report, draws: int, rng) -> None:
    """One result beside several seeds, of equal methods: why it is refused, but for a model that no seed has shaped."""
    for num_seeds in (3, 6):
        claims = np.zeros(2)
        for seed in range(draws):
            ease = rng.normal(size=300)
            shifts = 0.15 * rng.normal(size=(num_seeds + 1, 1))
            values = ease + shifts + 0.5 * rng.normal(size=(num_seeds + 1, 300))
            parent = ease + 0.5 * rng.normal(size=(1, 300))
            for index, single in enumerate((values[-1:], parent)):
                measured = Measured(_sample(values[:-1], single), "score", RESAMPLES, seed)
                low, high = measured.interval(0.95)
                claims[index] += not low <= 0 <= high and measured.p_value(0.95) <= 0.05
        refused, allowed = 100 * claims / draws
        what = f"one result beside {num_seeds} seeds of equal methods"
        report.add("seeds", what, refused, "% false", of_an_untrained_model=allowed)


def _judged(measured: list[Measured]):
    rows = [(difference_of(("method", "baseline"), each, "metric", True, True), each) for each in measured]
    return judge(rows, Settings())


def _sample(values, baseline) -> Sample:
    return Sample("task", np.atleast_2d(values) * 1.0, np.atleast_2d(baseline) * 1.0, None, None)


def all_at_once(report, draws: int, rng) -> None:
    """Methods that share a baseline, some of them truly different, on 100 items."""
    families.NUM_DRAWS, usual = 10_000, families.NUM_DRAWS
    for name, truths in (
        ("4 equal methods", [0.0] * 4),
        ("10 equal methods", [0.0] * 10),
        ("2 far, 2 near, 2 equal", [1.0, 1.0, 0.35, 0.35, 0.0, 0.0]),
    ):
        held, alone, signs, cut = [], [], [], 0
        for _ in range(draws // 2):
            baseline = rng.normal(size=100)
            methods = [_sample(truth + rng.normal(size=100), baseline) for truth in truths]
            rows = _judged([Measured(each, "score", RESAMPLES, 0) for each in methods])
            both = list(zip(rows, truths, strict=True))
            held.append(all(r.ci_low <= t <= r.ci_high for r, t in both if not r.is_cut_at_zero))
            alone.append(all(r.unadjusted_low <= t <= r.unadjusted_high for r, t in both))
            signs.append(any(r.verdict != NOT_DISTINGUISHABLE and r.difference * t <= 0 for r, t in both))
            cut += sum(row.is_cut_at_zero for row in rows)
        facts = {"each_alone": 100 * np.mean(alone), "false_signs": 100 * np.mean(signs), "cut": cut / len(held)}
        report.add("families", f"all at once: {name}", 100 * np.mean(held), "% covered", **facts)
    families.NUM_DRAWS = usual
