from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from maskft_lab.results import statistics
from maskft_lab.results.statistics import Bootstrap, as_block, holm, mcnemar_exact, weighted_mean

NUM_DRAWS = 2000
NUM_ITEMS = 100


class Interval(NamedTuple):
    difference: float
    ci_low: float
    ci_high: float
    p_value: float


def hierarchical_bootstrap(diffs_SN, weights=None, num_resamples=10_000, seed=0, confidence=0.95):
    """Bootstrap of the differences of one task, over its seeds and items."""
    drawn = Bootstrap(as_block(diffs_SN, weights), num_resamples, seed)
    return Interval(drawn.difference, *drawn.interval(confidence), drawn.p_value(confidence))


def one_row(diffs, *args, **options):
    """Bootstrap of a single pair of models: differences of one seed."""
    return hierarchical_bootstrap([diffs], *args, **options)


def unstretched(interval, num_items):
    """Return the plain percentile bounds: for items alone the stretch is a known factor about the difference."""
    factor = np.sqrt(num_items / (num_items - 1)) * stats.t.ppf(0.975, num_items - 1) / stats.norm.ppf(0.975)
    return interval.difference + (np.array([interval.ci_low, interval.ci_high]) - interval.difference) / factor


def test_weighted_mean_by_hand():
    # ratio (2*1 + 6*3) / 8 = 2.5; residuals 2*(1-2.5)/4 = -0.75 and 6*(3-2.5)/4 = 0.75; their variance 1.125; / 2 items
    mean, stderr = weighted_mean([1.0, 3.0], [2, 6])
    assert mean == 2.5
    assert stderr == pytest.approx(np.sqrt(1.125 / 2))


def test_weighted_mean_with_equal_weights_is_the_usual_standard_error():
    values = np.random.default_rng(0).normal(size=50)
    for weights in (None, np.full(50, 7)):
        mean, stderr = weighted_mean(values, weights)
        assert mean == pytest.approx(values.mean())
        assert stderr == pytest.approx(stats.sem(values))


def test_ratio_standard_error_is_the_spread_over_fresh_samples():
    rng = np.random.default_rng(0)
    num_tokens = rng.integers(1, 40, size=(4000, 80))
    values = 1 + 0.05 * num_tokens + rng.normal(size=num_tokens.shape)  # long items are worse: weights matter
    means, stderrs = np.array([weighted_mean(v, w) for v, w in zip(values, num_tokens, strict=True)]).T
    assert np.median(stderrs) == pytest.approx(means.std(), rel=0.05)


def test_single_item_has_no_standard_error():
    assert np.isnan(weighted_mean([1.0])[1])


@pytest.mark.parametrize("weights", [None, np.random.default_rng(2).integers(1, 30, 60)])
def test_the_bootstrap_of_one_row_agrees_with_scipy(weights):
    diffs = np.random.default_rng(1).normal(0.3, 1, 60)
    mine = one_row(diffs, weights, num_resamples=20_000)
    given = np.ones(60) if weights is None else weights

    def ratio(d, w, axis):
        return (d * w).sum(axis) / w.sum(axis)

    settings = {"paired": True, "n_resamples": 20_000, "method": "percentile", "rng": 2}
    theirs = stats.bootstrap((diffs, given), ratio, **settings).confidence_interval
    assert mine.difference == pytest.approx(np.average(diffs, weights=given))
    np.testing.assert_allclose(unstretched(mine, 60), [theirs.low, theirs.high], atol=0.02)


def test_a_constant_difference_has_no_spread_whatever_the_tokens():
    interval = one_row(np.full(20, 0.5), np.arange(1, 21), num_resamples=300)
    assert (interval.ci_low, interval.ci_high) == pytest.approx((0.5, 0.5))


def test_bootstrap_p_agrees_with_the_t_test():
    diffs = np.random.default_rng(3).normal(0.2, 1, 120)
    assert one_row(diffs).p_value == pytest.approx(stats.ttest_1samp(diffs, 0).pvalue, rel=0.25)


def test_many_resamples_take_bounded_memory_and_give_the_same_numbers(monkeypatch):
    diffs = np.random.default_rng(3).normal(0.2, 1, 50)
    whole = one_row(diffs, num_resamples=2000)
    monkeypatch.setattr(statistics, "MAX_CHUNK_COUNTS", 333)  # 6 rows at a time, the last chunk smaller
    assert one_row(diffs, num_resamples=2000) == pytest.approx(whole)


def test_few_items_that_agree_prove_nothing():
    # Three items, all improved: every resample is positive, but three coins agree once in four times.
    assert one_row([1.0, 2.0, 3.0]).p_value >= 0.25
    assert one_row([1.0, 2.0, 3.0]).ci_low < 0


@pytest.mark.parametrize(
    ("diffs", "weights", "message"),
    [
        ([1.0], None, "at least 2 items"),
        ([1.0, np.nan], None, "NaN or infinite"),
        ([1.0, 2.0], [1.0], "one weight > 0 per item"),
        ([1.0, 2.0], [1.0, 0.0], "one weight > 0 per item"),
    ],
)
def test_bootstrap_refuses(diffs, weights, message):
    with pytest.raises(ValueError, match=message):
        one_row(diffs, weights)


def covered(draw, truth, bootstrap):
    """Return the share of intervals that hold the truth, over data drawn anew each time."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(NUM_DRAWS):
        interval = bootstrap(*draw(rng), num_resamples=1000, seed=seed)
        hits += interval.ci_low <= truth <= interval.ci_high
    return hits / NUM_DRAWS


def draw_normal(rng):
    return (rng.normal(0.1, 1, NUM_ITEMS),)


def draw_zero_one(rng):
    """Two models, right on 50 % and 60 % of the items, mostly the same ones."""
    ease = rng.random(NUM_ITEMS)
    flips = rng.random((2, NUM_ITEMS)) < 0.1
    a, b = (ease < 0.625) ^ flips[0], (ease < 0.5) ^ flips[1]
    return (a.astype(float) - b,)  # 0.9 * 0.625 + 0.1 * 0.375 - 0.5 = 0.1


def draw_per_token(rng):
    """Differences that grow with the length of the item: E[w d] / E[w] = E[w^2] / (20 E[w]), w uniform on 1..19."""
    num_tokens = rng.integers(1, 20, NUM_ITEMS)
    return num_tokens / 20 + rng.normal(size=NUM_ITEMS), num_tokens


def draw_seeds(rng):
    """Three seeds; the spread between them is partly their own, partly chance on the items."""
    shape = (3, NUM_ITEMS)
    return (0.1 + 0.1 * rng.normal(size=(3, 1)) + rng.normal(size=(1, NUM_ITEMS)) + rng.normal(size=shape),)


@pytest.mark.parametrize(
    ("draw", "truth", "bootstrap"),
    [
        # Each takes some 5 s of an idle core. Several seeds use all that one row does, and more.
        pytest.param(draw_normal, 0.1, one_row, marks=pytest.mark.slow),
        pytest.param(draw_zero_one, 0.1, one_row, marks=pytest.mark.slow),
        pytest.param(draw_per_token, 130 / 200, one_row, marks=pytest.mark.slow),  # E[w^2] = 130, E[w] = 10
        (draw_seeds, 0.1, hierarchical_bootstrap),
    ],
)
def test_the_95_percent_interval_covers_in_93_to_97_percent(draw, truth, bootstrap):
    assert 0.93 <= covered(draw, truth, bootstrap) <= 0.97


def test_seeds_that_disagree_widen_the_interval():
    items = np.random.default_rng(0).normal(1, 0.1, 200)
    agreeing = hierarchical_bootstrap(np.stack([items, items, items]))
    disagreeing = hierarchical_bootstrap(np.stack([items - 2, items, items + 2]))
    assert agreeing == pytest.approx(one_row(items))
    assert agreeing.ci_low > 0.9
    assert disagreeing.difference == pytest.approx(agreeing.difference)
    # The t interval of the three seed means -1, 1, 3 is 1 ± 4.97; the items add next to nothing.
    assert disagreeing.ci_low == pytest.approx(1 - 4.97, abs=0.8)
    assert disagreeing.ci_high == pytest.approx(1 + 4.97, abs=0.8)


def test_seed_spread_that_the_items_explain_is_not_counted_twice():
    # No seed variance at all: the interval over 3 seeds must be narrower than that of one seed, not wider.
    widths = []
    for seed in range(50):
        diffs = np.random.default_rng(seed).normal(size=(3, 100))
        three, one = hierarchical_bootstrap(diffs, num_resamples=500), one_row(diffs[0], num_resamples=500)
        widths.append((three.ci_high - three.ci_low) / (one.ci_high - one.ci_low))
    assert np.median(widths) < 0.9


DIFFS = hnp.arrays(float, st.tuples(st.integers(1, 3), st.integers(2, 12)), elements=st.floats(-5, 5, width=32))


@settings(max_examples=50, deadline=None)
@given(DIFFS, st.integers(0, 5))
def test_swapping_the_models_flips_the_signs(diffs, seed):
    forward = hierarchical_bootstrap(diffs, num_resamples=200, seed=seed)
    backward = hierarchical_bootstrap(-diffs, num_resamples=200, seed=seed)
    flipped = (-backward.difference, -backward.ci_high, -backward.ci_low, backward.p_value)
    assert tuple(forward) == pytest.approx(flipped, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(2, 30))
def test_identical_models_have_no_difference(num_seeds, num_items):
    assert hierarchical_bootstrap(np.zeros((num_seeds, num_items)), num_resamples=200) == (0, 0, 0, 1)


def test_two_seeds_that_agree_to_the_last_digit_are_not_sure():
    wins = np.arange(200) < 30
    drawn = Bootstrap(as_block([wins, wins[::-1]]), 10_000)
    assert drawn.between == 0 and drawn.p_value() > 0.02


def test_two_seeds_are_no_surer_than_a_t_test_on_them():
    # Seed differences 0.10 and 0.09 with next to no item noise: t = 0.095 / 0.005 with one degree of freedom.
    items = np.random.default_rng(0).normal(0, 1e-4, 200)
    p_value = hierarchical_bootstrap(np.stack([0.10 + items, 0.09 + items])).p_value
    assert p_value == pytest.approx(stats.ttest_1samp([0.10, 0.09], 0).pvalue, rel=0.05)


@pytest.mark.parametrize("num_seeds", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_holm_holds_over_methods_whose_seeds_differ_by_chance(num_seeds):
    """Six methods without a true difference, seeds that vary more than items: claims in about 5 % of the families."""
    rng = np.random.default_rng(1)
    num_families, claims = 150, 0
    for _ in range(num_families):
        diffs = rng.normal(size=(6, num_seeds, 1)) + 0.5 * rng.normal(size=(6, num_seeds, 60))
        intervals = [hierarchical_bootstrap(each, num_resamples=400) for each in diffs]
        adjusted = holm([interval.p_value for interval in intervals])
        excludes = [interval.ci_low > 0 or interval.ci_high < 0 for interval in intervals]
        claims += any(p <= 0.05 and out for p, out in zip(adjusted, excludes, strict=True))
    assert claims / num_families <= 0.09  # 0.05 and two standard errors


def test_mcnemar_by_hand():
    a = [1, 1, 1, 1, 1, 0, 1, 0]
    b = [0, 0, 0, 0, 0, 1, 1, 0]  # 5 won, 1 lost: 2 * (1 + 6) / 2^6
    assert mcnemar_exact(a, b) == pytest.approx(14 / 64)
    assert mcnemar_exact(b, a) == mcnemar_exact(a, b)
    assert mcnemar_exact(a, a) == 1.0


def test_holm_by_hand():
    # Sorted 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.5 x 1, made monotone, back in the order given.
    np.testing.assert_allclose(holm([0.02, 0.5, 0.01, 0.03]), [0.06, 0.5, 0.04, 0.06])
    np.testing.assert_allclose(holm([0.8, 0.9]), [1.0, 1.0])
    assert holm([0.3]) == [0.3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_adjustment_and_bonferroni(p_values):
    adjusted = holm(p_values)
    assert (adjusted >= p_values).all()
    assert (adjusted <= np.minimum(1, np.array(p_values) * len(p_values)) + 1e-12).all()


def test_variance_components_by_hand():
    # Seeds 1 ± 0.5, items ± 1 alike in both seeds, items ± 0.5 of opposite sign in the seeds.
    shared, crossed = np.array([1, 1, -1, -1.0]), np.array([0.5, -0.5, 0.5, -0.5])
    diffs = np.stack([1.5 + shared + crossed, 0.5 + shared - crossed])
    between, interaction = statistics._variance_components(diffs, np.ones(4))
    assert between == 0.5  # of 1.5 and 0.5
    assert interaction == pytest.approx(2 * 1 / (1 * 3 * 4))  # two rows with sum of squares 1


def test_far_out_a_few_units_are_not_surer_than_a_t_test():
    """Holm's correction looks there, and the resamples of ten units said 0.0014 where a t-test says 0.005."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        diffs = rng.normal(0.9, 1, 10)
        bootstrap = Bootstrap(as_block(diffs[None]), num_resamples=2000)
        p_of_t_test = stats.ttest_1samp(diffs, 0).pvalue
        p = bootstrap.p_value()
        if p_of_t_test < 0.05:
            assert p >= p_of_t_test * (1 - 1e-9)
        low, high = bootstrap.interval()
        assert (p < 0.05) == (not low <= 0 <= high) or abs(p - 0.05) < 0.01
        found.append(p_of_t_test)
    assert sum(p < 0.005 for p in found) > 5


@pytest.mark.parametrize("num_seeds", [2, 5])
def test_far_out_several_seeds_are_not_surer_than_a_t_test_of_their_few_units(num_seeds):
    """Seeds that agree tell nothing about other units, of which there are as few as with one seed."""
    rng = np.random.default_rng(0)
    num_far_out = 0
    for _ in range(40):
        # Seeds differ by next to nothing, as in the average over them.
        diffs = rng.normal(0.9, 1, 10) + rng.normal(0, 0.01, (num_seeds, 10))
        p_of_t_test = stats.ttest_1samp(diffs.mean(axis=0), 0).pvalue
        p = Bootstrap(as_block(diffs), num_resamples=2000).p_value()
        if p_of_t_test < 0.05:
            assert p >= p_of_t_test * (1 - 1e-9)
        num_far_out += p_of_t_test < 0.005
    assert num_far_out > 5
