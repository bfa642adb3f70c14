"""Intervals at the edges: exact coverage where it can be summed, simulated where not."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from maskft_lab.results.proportions import (
    is_at_edge,
    paired_interval,
    paired_score,
    proportion_interval,
    wilson_interval,
)
from maskft_lab.results.statistics import Bootstrap, as_block

Z = stats.norm.ppf(0.975)


def test_none_of_300_is_not_certainly_none():
    assert wilson_interval(0, 300) == (0, pytest.approx(Z**2 / (300 + Z**2)))  # 1.26 %
    assert wilson_interval(1, 300) == (pytest.approx(300 / (300 + Z**2)), 1)


@pytest.mark.parametrize("num_right", [0, 1, 7, 20, 40])
def test_wilson_agrees_with_scipy(num_right):
    theirs = stats.binomtest(num_right, 40).proportion_ci(method="wilson")
    assert wilson_interval(num_right / 40, 40) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    values = np.arange(40) < num_right
    assert proportion_interval(values) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_covers_near_the_edge_where_an_error_does_not():
    num_items, rates = 300, np.linspace(0.002, 0.05, 60)
    counts = np.arange(num_items + 1)
    lows, highs = np.array([wilson_interval(count / num_items, num_items) for count in counts]).T
    share, half = counts / num_items, Z * np.sqrt(counts / num_items * (1 - counts / num_items) / num_items)
    chances = np.array([stats.binom.pmf(counts, num_items, rate) for rate in rates])
    covers = [
        [(low <= rate) & (rate <= high) for rate in rates]
        for low, high in ((lows, highs), (share - half, share + half))
    ]
    wilson, wald = ((chances * np.array(each)).sum(axis=1) for each in covers)
    assert wilson.mean() == pytest.approx(0.955, abs=0.01) and wilson.min() > 0.89
    assert wald.min() < 0.5


def test_items_that_are_copies_count_once():
    values, clusters = np.repeat(np.arange(50) < 20, 4), np.repeat(np.arange(50), 4)
    low, high = proportion_interval(values, clusters)
    once = stats.binomtest(20, 50).proportion_ci(method="wilson")
    assert high - low == pytest.approx(once.high - once.low, rel=0.03)  # wider by t(49) for z
    assert proportion_interval(np.zeros(200), clusters).high == pytest.approx(
        stats.t.ppf(0.975, 49) ** 2 / (50 + stats.t.ppf(0.975, 49) ** 2)
    )
    low, high = proportion_interval(values, np.arange(200))
    assert high - low < 0.15


def test_samples_of_an_item_bring_more_than_one_item_and_none_at_an_edge():
    rng = np.random.default_rng(0)
    shares = rng.binomial(4, 0.4, 400) / 4  # each item as hard as any other: 1600 answers count
    low, high = proportion_interval(shares)
    assert high - low == pytest.approx(2 * Z * np.sqrt(0.24 / 1600), rel=0.1)
    assert proportion_interval(np.zeros(400)).high == wilson_interval(0, 400).high
    assert is_at_edge([0] * 91 + [0.25] * 9) and not is_at_edge([0] * 90 + [0.25] * 10 + [1] * 10)
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        proportion_interval([0.5, 2])


def test_tango_by_hand():
    # Without an item that differs, delta / (1 - delta) = z^2 / n.
    assert paired_interval(0, 0, 300) == pytest.approx((-(Z**2) / (300 + Z**2), Z**2 / (300 + Z**2)))
    for won, lost in [(5, 0), (3, 2), (40, 30)]:
        low, high = paired_interval(won, lost, 100)
        assert paired_score(won, lost, 100, low) == pytest.approx(Z)
        assert paired_score(won, lost, 100, high) == pytest.approx(-Z)
    assert paired_score(9, 4, 50, 0) == pytest.approx(5 / np.sqrt(13))  # McNemar's without correction
    assert paired_interval(100, 0, 100).high == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 60))
def test_tango_holds_the_difference_and_flips_with_the_models(won, lost, tied):
    num_items = max(1, won + lost + tied)
    low, high = paired_interval(won, lost, num_items)
    assert -1 <= low <= (won - lost) / num_items <= high <= 1
    assert paired_interval(lost, won, num_items) == pytest.approx((-high, -low), abs=1e-9)


@cache
def bootstrap_interval(won, lost):
    diffs = np.zeros(300)
    diffs[:won], diffs[won : won + lost] = 1, -1
    return Bootstrap(as_block([diffs]), 1000).interval()


@cache
def tango_interval(won, lost):
    return paired_interval(won, lost, 300)


@pytest.mark.parametrize(("wins", "losses"), [(0.8, 0.2), (2.4, 0.6), (5, 5)])
def test_few_items_that_differ_are_covered_as_resampling_does_not(wins, losses):
    """Expected wins and losses among 300 items; the share of 2,000 draws whose interval holds the truth."""
    drawn = np.random.default_rng(0).multinomial(300, [wins / 300, losses / 300, 1 - (wins + losses) / 300], 2000)
    truth = (wins - losses) / 300
    covered = {}
    for interval in (tango_interval, bootstrap_interval):
        bounds = [interval(won, lost) for won, lost, _ in drawn.tolist()]
        covered[interval] = np.mean([low - 1e-12 <= truth <= high + 1e-12 for low, high in bounds])
    assert covered[tango_interval] >= 0.94
    if wins + losses < 10:
        assert covered[bootstrap_interval] < 0.92


def test_samples_that_all_share_a_value_are_not_known_exactly():
    """One of two samples right, of every item: another item may be otherwise."""
    low, high = proportion_interval(np.full(100, 0.5))
    assert (low, high) == pytest.approx(wilson_interval(0.5, 100))
    assert proportion_interval(np.full(20, 0.5), np.repeat(np.arange(4), 5)).low < 0.2  # four clusters
    few = np.full(100, 0.5)
    few[:3] = 1.0
    assert proportion_interval(few).low < 0.45
