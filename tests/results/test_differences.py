"""Clusters and families: what is claimed, checked by simulation."""

import tracemalloc

import numpy as np
import pytest

from maskft_lab.results import families
from maskft_lab.results.comparison import NOT_DISTINGUISHABLE, Settings
from maskft_lab.results.differences import Measured, Sample, difference_of, judge
from maskft_lab.results.families import Noise, simultaneous_level
from maskft_lab.results.statistics import as_block, weighted_mean

RESAMPLES = 400


def make_sample(values, baseline):
    return Sample("sums", np.atleast_2d(values).astype(float), np.atleast_2d(baseline).astype(float), None, None)


def measure(sample, unit="score"):
    return Measured(sample, unit, RESAMPLES, 0)


def judged(measured):
    """Judge differences of one family, with the least of results around them."""
    rows = [(difference_of(("mask", "full"), each, "accuracy", True, True), each) for each in measured]
    return judge(rows, Settings())


# Clusters


def clustered(rng, num_clusters=40, size=5):
    """Differences with mean 0.1, half of whose variance the items of a cluster share."""
    shared = np.repeat(rng.normal(size=num_clusters), size)
    labels = [f"p{index}" for index in np.repeat(np.arange(num_clusters), size)]
    return 0.1 + shared + rng.normal(size=num_clusters * size), labels


def test_a_cluster_is_one_unit():
    block = as_block([[1.0, 2.0, 6.0, 4.0]], [1, 3, 1, 1], ["a", "a", "b", "b"])
    np.testing.assert_allclose(block.diffs_SN, [[7 / 4, 5]])
    np.testing.assert_allclose(block.weights_N, [4, 2])
    assert block.means_S == pytest.approx([17 / 6])  # as of the items
    with pytest.raises(ValueError, match="at least 2 clusters"):
        as_block([[1.0, 2.0]], None, ["a", "a"])


def test_clusters_of_one_item_change_nothing():
    values, weights = np.random.default_rng(0).normal(size=30), np.arange(1, 31)
    labels = [str(index) for index in range(30)]
    assert weighted_mean(values, weights, labels) == pytest.approx(weighted_mean(values, weights))
    assert np.isnan(weighted_mean(values, None, ["a"] * 30)[1])


def test_the_clustered_error_is_the_spread_over_fresh_samples():
    rng = np.random.default_rng(0)
    drawn = [clustered(rng) for _ in range(800)]
    means, stderrs = np.array([weighted_mean(values, None, labels) for values, labels in drawn]).T
    assert np.median(stderrs) == pytest.approx(means.std(), rel=0.05)
    assert weighted_mean(drawn[0][0])[1] < 0.65 * means.std()  # of items as if independent: 1 / sqrt(3)


# Families


def noise(*columns):
    return Noise("sums", np.array(columns, dtype=float), 0.0)


def test_the_level_pays_for_what_the_comparisons_do_not_share():
    rng = np.random.default_rng(0)
    apart = [noise(*rng.normal(size=2000)) for _ in range(5)]
    assert simultaneous_level(apart, 0.05) == pytest.approx(1 - 0.95 ** (1 / 5), rel=0.05)  # Šidák
    assert simultaneous_level([apart[0]] * 5, 0.05) == pytest.approx(0.05, rel=0.05)
    assert simultaneous_level(apart[:1], 0.05) == 0.05
    baseline = rng.normal(size=2000)
    sharing = [noise(*(rng.normal(size=2000) - baseline)) for _ in range(5)]
    assert 0.0103 < simultaneous_level(sharing, 0.05) < 0.02
    assert simultaneous_level([noise(0, 0)] * 4, 0.05) == pytest.approx(1 - 0.95**0.25, rel=0.05)
    elsewhere = [apart[0]._replace(task=task) for task in ("sums", "odd")]
    assert simultaneous_level(elsewhere, 0.05) == pytest.approx(1 - 0.95**0.5, rel=0.05)
    seeds = [each._replace(own_variance=1e6) for each in [apart[0]] * 5]
    assert simultaneous_level(seeds, 0.05) == pytest.approx(1 - 0.95 ** (1 / 5), rel=0.05)


def test_the_level_is_drawn_in_chunks_of_the_same_numbers(monkeypatch):
    rng = np.random.default_rng(0)
    many = [noise(*rng.normal(size=50)) for _ in range(40)]
    monkeypatch.setattr(families, "NUM_DRAWS", 5000)
    at_once = simultaneous_level(many, 0.05)
    monkeypatch.setattr(families, "MAX_CHUNK_DRAWS", 10_000)
    tracemalloc.start()
    in_chunks = simultaneous_level(many, 0.05)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert in_chunks == at_once
    assert peak_bytes < 5000 * 40 * 8 / 2


def family(rng, truths, num_items=80):
    """Methods that share a baseline, with their true differences."""
    baseline = rng.normal(size=num_items)
    return [measure(make_sample(truth + rng.normal(size=num_items), baseline)) for truth in truths]


def test_simultaneous_intervals_hold_all_at_once(monkeypatch):
    monkeypatch.setattr(families, "NUM_DRAWS", 4000)
    rng, truths = np.random.default_rng(0), [0.0, 0.1, -0.2, 0.05]
    unadjusted = at_once = 0
    for _ in range(150):
        rows = judged(family(rng, truths))
        unadjusted += all(
            row.unadjusted_low <= truth <= row.unadjusted_high for row, truth in zip(rows, truths, strict=True)
        )
        at_once += all(row.ci_low <= truth <= row.ci_high for row, truth in zip(rows, truths, strict=True))
    assert 0.91 <= at_once / 150 <= 0.99
    assert unadjusted / 150 < 0.91


def test_interval_and_verdict_never_disagree(monkeypatch):
    monkeypatch.setattr(families, "NUM_DRAWS", 4000)
    rng = np.random.default_rng(1)
    cut = 0
    for _ in range(40):
        for row in judged(family(rng, [2.0, 2.0, 0.32, 0.36, 0.0])):
            holds_zero = row.ci_low <= 0 <= row.ci_high and not row.is_cut_at_zero
            assert holds_zero == (row.verdict == NOT_DISTINGUISHABLE)
            assert (row.ci_low <= row.unadjusted_low and row.unadjusted_high <= row.ci_high) or row.is_cut_at_zero
            cut += row.is_cut_at_zero
    assert cut  # Holm's last steps claim what one level for all cannot


def test_an_exact_test_that_disagrees_widens_the_interval():
    # 5 won, 0 lost of 100: the unadjusted interval is above zero, McNemar's p 0.0625.
    (row,) = judged([measure(make_sample(np.arange(100) < 55, np.arange(100) < 50), unit="fraction")])
    assert row.unadjusted_low > 0 == row.ci_low
    assert row.verdict == NOT_DISTINGUISHABLE


def test_shares_of_samples_at_an_edge_are_not_certain():
    # Average of 4 answers: one answer of one item differs.
    shares = np.zeros(100)
    measured = measure(make_sample(shares + 0.25 * (np.arange(100) == 3), shares), unit="fraction")
    low, high = measured.interval(0.95)
    assert low < -0.02 and high > 0.03
