"""Numbers of the paired statistics that can be checked on paper, or against scipy."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from maskft_lab.results.statistics import (
    Bootstrap,
    as_block,
    holm,
    mcnemar_exact,
    mean_over_seeds,
    weighted_mean,
)


def test_items_of_a_cluster_count_as_one():
    # Clusters: mean 2 of weight 2, and 5 of weight 1. Ratio (4 + 5) / 3 = 3, residuals -+4/3, error 4/3.
    mean, stderr = weighted_mean([1, 3, 5], clusters=["a", "a", "b"])
    assert (mean, stderr) == (pytest.approx(3), pytest.approx(4 / 3))
    # Weights 1, 3, 2: 2.5 of weight 4, and 5 of weight 2. Ratio 20 / 6, residuals 4 * (2.5 - 10/3) / 3 = -10/9.
    mean, stderr = weighted_mean([1, 3, 5], [1, 3, 2], clusters=["a", "a", "b"])
    assert (mean, stderr) == (pytest.approx(10 / 3), pytest.approx(10 / 9))
    assert weighted_mean([1, 3], clusters=["a", "b"]) == weighted_mean([1, 3])


def test_one_cluster_has_a_mean_and_no_error():
    mean, stderr = weighted_mean([1, 3], [1, 3], clusters=["a", "a"])
    assert mean == 2.5 and math.isnan(stderr)
    mean, stderr = weighted_mean([7])
    assert mean == 7 and math.isnan(stderr)
    assert weighted_mean([1, 3]) == (2, 1), "two items have an error"


def test_values_near_the_largest_float_have_an_infinite_error_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weighted_mean([1e200, -1e200]) == (0, math.inf)


def test_seeds_that_cancel_each_other_have_a_mean_of_zero():
    values_SN = np.array([[0.1 + 0.2, 1.0, 1e-13, 0.0], [-0.3, 0.5, -0.5e-13, 0.0]])
    assert mean_over_seeds(values_SN).tolist() == [0.0, 0.75, pytest.approx(2.5e-14), 0.0]
    # The largest value of the column decides, not the largest of all, and by its size.
    assert mean_over_seeds(np.array([[1e-9, 1e9], [1e-9, 1e9]])).tolist() == [1e-9, 1e9]
    assert mean_over_seeds(np.array([[-1.0], [-2.0]])).tolist() == [-1.5]
    assert as_block([[0.3, 0.3], [-0.1 - 0.2, -0.3]]).mean == 0.0


def test_a_block_by_hand():
    block = as_block([[1, 3, 5], [2, 2, 2]], [1, 3, 2], ["b", "b", "a"])
    assert block.diffs_SN.tolist() == [[5, 2.5], [2, 2]] and block.weights_N.tolist() == [2, 4]
    assert block.means_S.tolist() == pytest.approx([20 / 6, 2])
    assert block.mean == pytest.approx(8 / 3)
    plain = as_block([[1, 3]])
    assert plain.diffs_SN.tolist() == [[1, 3]] and plain.weights_N.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("diffs", "weights", "clusters", "message"),
    [
        ([1.0, 2.0], None, None, "differences of shape (2,): a bootstrap needs seeds x items, at least 2 items"),
        ([[1.0]], None, None, "differences of shape (1, 1): a bootstrap needs seeds x items, at least 2 items"),
        (np.ones((0, 5)), None, None, "differences of shape (0, 5): a bootstrap needs seeds x items, at least 2 items"),
        ([[1.0, 2.0]], [1.0], None, "weights of shape (1,) for 2 items: give one weight > 0 per item"),
        ([[1.0, 2.0]], [1.0, -1.0], None, "weights of shape (2,) for 2 items: give one weight > 0 per item"),
        ([[1.0, math.inf]], None, None, "a difference is NaN or infinite: leave no item without a value"),
        ([[1.0, 2.0]], None, ["a", "a"], "2 items of 1 clusters: errors need at least 2 clusters"),
        ([[1.0, 2.0]], None, ["a", "b", "c"], "3 items of 3 clusters: errors need at least 2 clusters"),
    ],
)
def test_differences_that_allow_no_bootstrap(diffs, weights, clusters, message):
    with pytest.raises(ValueError) as error:
        as_block(diffs, weights, clusters)
    assert str(error.value) == message


def test_defaults_of_the_bootstrap():
    block = as_block([np.random.default_rng(0).normal(0.3, 1, 40)])
    found = Bootstrap(block)
    assert found.num_resamples == len(found.resamples(0.95)) == 10_000
    assert found.interval() == Bootstrap(block, 10_000, 0).interval(0.95)
    assert found.p_value() == found.p_value(0.95)
    assert found.interval() != Bootstrap(block, 10_000, 1).interval()
    low, high = np.quantile(found.resamples(0.5), [0.25, 0.75])
    assert found.interval(0.5) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("sign", [1, -1])
def test_p_values_by_hand(sign):
    def p_value(diffs_SN, num_resamples=299):
        return Bootstrap(as_block(sign * np.array(diffs_SN)), num_resamples).p_value()

    # No resample is at or beyond zero: 2 * (0 + 1) / (299 + 1).
    assert p_value([[0.5] * 20]) == pytest.approx(2 / 300)
    # Two items differ, and two coins agree once in two times.
    assert p_value([[0.0] * 10 + [1.0] * 2]) >= 0.5
    assert p_value([[0.0] * 2 + [1.0] * 4], 10_000) == pytest.approx(2**-3)
    assert p_value([[0.0] * 20]) == 1.0
    assert p_value([[1.0, -1.0]]) == 1.0
    # Seeds that agree in everything add nothing.
    assert p_value([[0.5] * 20] * 2) == pytest.approx(2 / 300)
    assert p_value([[0.0] * 20] * 2) == 1.0
    # What two seeds cancel on an item is no difference of that item.
    assert p_value([[0.3] * 18 + [1.0] * 2, [-0.1 - 0.2] * 18 + [1.0] * 2]) >= 0.5


def test_several_seeds_are_not_surer_than_a_t_test_on_them():
    means = np.array([0.1, 0.3, 0.5, 0.4])
    found = Bootstrap(as_block(np.repeat(means[:, None], 50, axis=1)), 2000)
    expected = stats.ttest_1samp(means, 0).pvalue
    assert found.between == pytest.approx(means.var(ddof=1)) and found.interaction == pytest.approx(0, abs=1e-20)
    assert found.seed_excess == pytest.approx(found.between)
    assert 2 * found._t_tail(abs(found.difference)) == pytest.approx(expected)
    assert found.p_value() >= expected
    # Rows without spread over items: the resamples are those of the seeds, stretched to a t interval.
    stretch = math.sqrt(4 / 3) * stats.t.ppf(0.975, 3) / stats.norm.ppf(0.975)
    resampled = Bootstrap(as_block(np.repeat(means[:, None], 50, axis=1)), 20_000).resamples(0.95)
    assert resampled.mean() == pytest.approx(means.mean(), abs=0.01)
    assert resampled.std() == pytest.approx(stretch * means.std() / 2, rel=0.03)


def test_one_seed_has_no_variance_between_seeds():
    found = Bootstrap(as_block([[1.0, 2.0, 4.0]]), 100)
    assert (found.num_seeds, found.between, found.interaction, found.seed_excess) == (1, 0, 0, 0)


def test_the_variance_that_items_explain_is_not_counted_twice():
    """Two seeds, two items, won crosswise: means are equal, and all variance is interaction."""
    found = Bootstrap(as_block([[1.0, 0.0], [0.0, 1.0]]), 100)
    # Residuals +-0.5 in four cells; 4 * 0.25 / (1 * 1 * 2).
    assert (found.between, found.interaction, found.seed_excess) == (0.0, 0.5, 0.0)
    found = Bootstrap(as_block([[3.0, 2.0], [0.0, 1.0]]), 100)
    # Means 2.5 and 0.5: variance 2.
    assert (found.between, found.interaction, found.seed_excess) == (2.0, 0.5, 1.5)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([1, 0]).tolist() == [1.0, 0.0]
    assert holm([]).tolist() == []


def test_mcnemar_by_hand():
    won, lost = np.array([True] * 5 + [False]), np.array([False] * 5 + [False])
    assert mcnemar_exact(won, lost) == pytest.approx(2 * 0.5**5)
    assert mcnemar_exact(lost, won) == pytest.approx(2 * 0.5**5)
    assert mcnemar_exact([1, 0, 1], [1, 0, 1]) == 1.0
    # One won of four that differ: 2 * (1 + 4) / 16.
    assert mcnemar_exact([1, 0, 0, 0, 1], [0, 1, 1, 1, 1]) == pytest.approx(2 * 5 / 16)
    assert mcnemar_exact([1], [0]) == 1.0


def skew(values):
    """How much farther the upper end lies from the mean than the lower one."""
    low, high = np.quantile(values, [0.025, 0.975])
    return (high - values.mean()) - (values.mean() - low)


def test_resamples_lean_as_the_values_do():
    items = np.array([0.0] * 18 + [10.0] * 2)
    assert skew(Bootstrap(as_block([items]), 5000).resamples(0.95)) > 0.5
    assert skew(Bootstrap(as_block([-items]), 5000).resamples(0.95)) < -0.5
    seeds = np.repeat(np.array([[0.0], [0.0], [0.0], [0.0], [10.0]]), 20, axis=1)
    assert skew(Bootstrap(as_block(seeds), 5000).resamples(0.95)) > 0.5
    assert skew(Bootstrap(as_block(-seeds), 5000).resamples(0.95)) < -0.5


def test_two_seeds_widen_the_interval_and_seeds_that_differ_by_chance_do_not():
    low, high = Bootstrap(as_block([[0.4] * 20, [0.6] * 20]), 2000).interval()
    # Both resamples of one seed: 0.1 from the mean, stretched by sqrt(2) * t / z.
    reach = 0.1 * math.sqrt(2) * stats.t.ppf(0.975, 1) / stats.norm.ppf(0.975)
    assert (low, high) == (pytest.approx(0.5 - reach), pytest.approx(0.5 + reach))
    crosswise = Bootstrap(as_block([[1.0, 0.0], [0.0, 1.0]]), 200).resamples(0.95)
    assert crosswise.tolist() == pytest.approx([0.5] * 200)


def test_seeds_without_any_variance():
    found = Bootstrap(as_block([[0.5] * 20] * 2), 100)
    assert (found._t_tail(0.0), found._t_tail(0.5), found._t_tail(1.0)) == (0.5, 0.0, 0.0)


def test_the_unit_of_the_weights_does_not_matter():
    diffs = [[3.0, 2.0, 1.0], [0.0, 1.0, 5.0]]
    one = Bootstrap(as_block(diffs, [1, 2, 3]), 50)
    ten = Bootstrap(as_block(diffs, [10, 20, 30]), 50)
    assert ten.between == pytest.approx(one.between) and ten.interaction == pytest.approx(one.interaction)
