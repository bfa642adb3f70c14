"""Intervals at the edges, by hand and against scipy; how often they cover: ``python -m benchmarks intervals``."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from maskft_lab.results.proportions import is_at_edge, proportion_interval, tango_interval, tango_score

Z = stats.norm.ppf(0.975)


def test_none_of_300_is_not_certainly_none():
    assert proportion_interval(np.zeros(300)) == (0, pytest.approx(Z**2 / (300 + Z**2)))  # 1.26 %
    assert proportion_interval(np.ones(300)) == (pytest.approx(300 / (300 + Z**2)), 1)


@pytest.mark.parametrize("num_right", [0, 1, 7, 20, 40])
def test_wilson_agrees_with_scipy(num_right):
    theirs = stats.binomtest(num_right, 40).proportion_ci(method="wilson")
    values = np.arange(40) < num_right
    assert proportion_interval(values) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


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
    assert proportion_interval(np.zeros(400)).high == pytest.approx(Z**2 / (400 + Z**2))
    assert is_at_edge([0] * 91 + [0.25] * 9) and not is_at_edge([0] * 90 + [0.25] * 10 + [1] * 10)
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        proportion_interval([0.5, 2])


def test_tango_by_hand():
    # Without an item that differs, delta / (1 - delta) = z^2 / n.
    assert tango_interval(0, 0, 300) == pytest.approx((-(Z**2) / (300 + Z**2), Z**2 / (300 + Z**2)))
    for won, lost in [(5, 0), (3, 2), (40, 30)]:
        low, high = tango_interval(won, lost, 100)
        assert tango_score(won, lost, 100, low) == pytest.approx(Z)
        assert tango_score(won, lost, 100, high) == pytest.approx(-Z)
    assert tango_score(9, 4, 50, 0) == pytest.approx(5 / np.sqrt(13))  # McNemar's without correction
    assert tango_interval(100, 0, 100).high == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 60))
def test_tango_holds_the_difference_and_flips_with_the_models(won, lost, tied):
    num_items = max(1, won + lost + tied)
    low, high = tango_interval(won, lost, num_items)
    assert -1 <= low <= (won - lost) / num_items <= high <= 1
    assert tango_interval(lost, won, num_items) == pytest.approx((-high, -low), abs=1e-9)


def test_samples_that_all_share_a_value_are_not_known_exactly():
    """One of two samples right, of every item: another item may be otherwise."""
    low, high = proportion_interval(np.full(100, 0.5))
    assert (low, high) == pytest.approx(proportion_interval(np.arange(100) < 50))
    assert proportion_interval(np.full(20, 0.5), np.repeat(np.arange(4), 5)).low < 0.2  # four clusters
    few = np.full(100, 0.5)
    few[:3] = 1.0
    assert proportion_interval(few).low < 0.45
