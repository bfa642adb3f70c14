"""The algorithm: by hand, against a naive reference, and its properties."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
from maskft import masking
from maskft.errors import UserError
from maskft.masking import (
    StraightThroughMask,
    fixed_masks,
    initial_scores,
    magnitude_mask,
    num_removed,
    random_mask,
    scores_for_mask,
    threshold_mask,
    topk_mask,
    topk_masks,
)

SPARSITIES = (0.0, 0.1, 0.9)


def test_by_hand():
    """Inner product of 0..9 with itself, smallest |score| removed; every number can be checked on paper."""
    weight, x = torch.arange(10.0), torch.ones(10)
    scores = torch.tensor([9.0, -8, 7, -6, 5, -4, 3, -2, 1, -0.5]).requires_grad_()
    mask = topk_mask(scores, 0.2)
    assert mask.tolist() == [True] * 8 + [False] * 2
    effective = StraightThroughMask.apply(weight, scores, mask, "abs")
    y = (effective * x).sum()
    assert y.item() == 0 + 1 + 2 + 3 + 4 + 5 + 6 + 7 == 28
    y.backward()
    # dL/ds = x * w * sign(s), also at the two removed entries.
    assert scores.grad.tolist() == [0, -1, 2, -3, 4, -5, 6, -7, 8, -9]
    stepped = scores.detach() - 1.0 * scores.grad
    assert stepped.tolist() == [9, -7, 5, -3, 1, 1, -3, 5, -7, 8.5]
    # |stepped| is smallest at positions 4 and 5 now: the mask moved, and both removed weights came back.
    assert topk_mask(stepped, 0.2).tolist() == [True] * 4 + [False] * 2 + [True] * 4


@pytest.mark.parametrize("numel", [1, 9, 10, 100, 1000, 4096 * 3])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_count_is_exact(numel, sparsity):
    mask = topk_mask(torch.randn(numel), sparsity)
    assert int((~mask).sum()) == num_removed(numel, sparsity) == round(sparsity * numel)


@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_matches_naive_reference_under_ties(rank_by, sparsity):
    scores = torch.randint(-3, 4, (17, 13)).float() / 4
    assert torch.equal(topk_mask(scores, sparsity, rank_by), reference.topk_mask(scores, sparsity, rank_by))


def test_all_equal_scores_are_removed_in_index_order():
    assert topk_mask(torch.full((4, 5), 0.25), 0.1).view(-1).tolist() == [False] * 2 + [True] * 18


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=60),
    st.floats(0, 0.99),
    st.sampled_from(["abs", "signed"]),
)
@settings(max_examples=200, deadline=None)
def test_property_against_reference(values, sparsity, rank_by):
    scores = torch.tensor(values)
    mask = topk_mask(scores, sparsity, rank_by)
    assert torch.equal(mask, reference.topk_mask(scores, sparsity, rank_by))
    keys = scores.abs() if rank_by == "abs" else scores
    if mask.any() and (~mask).any():
        assert keys[mask].min() >= keys[~mask].max()


SAMPLED_NUMEL = 500_000


@pytest.fixture
def small_samples(monkeypatch):
    """Send small pools through the sample, the band and several chunks."""
    monkeypatch.setattr(masking, "_SAMPLED_MIN_NUMEL", 1)
    monkeypatch.setattr(masking, "_CHUNK_NUMEL", 16)


@given(
    st.lists(
        st.sampled_from([-math.inf, -2.0, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0, 2.0, 3.0, math.inf]), max_size=90
    ),
    st.integers(0, 90),
    st.sampled_from(["abs", "signed"]),
    st.integers(1, 3),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_property_sampled_bands_against_sorting(small_samples, values, num, rank_by, num_matrices):
    pool = torch.tensor(values, dtype=torch.float32)
    num = min(num, len(pool))
    keys = pool.abs() if rank_by == "abs" else pool
    expected = torch.arange(1.0, len(pool) + 1)
    expected[keys.sort(stable=True).indices[:num]] = 0
    scores = pool.tensor_split(num_matrices)
    weights = torch.arange(1.0, len(pool) + 1).tensor_split(num_matrices)
    outs = [torch.full_like(weight, math.nan) for weight in weights]
    masking.keep_highest_(outs, weights, scores, num, rank_by)
    assert torch.equal(torch.cat(outs), expected)


def test_a_sample_that_misleads_costs_time_and_nothing_else(monkeypatch):
    """Every sampled score is high, so the cut is not where the sample says."""
    n = SAMPLED_NUMEL + 5
    scores = torch.rand(n)
    scores[:: int(n ** (1 / 3)) | 1] += 10
    calls = []
    kth_smallest = masking._kth_smallest
    monkeypatch.setattr(masking, "_kth_smallest", lambda *args: calls.append(1) or kth_smallest(*args))
    mask = topk_mask(scores, 0.1)
    expected = torch.ones(n, dtype=torch.bool)
    expected[scores.sort(stable=True).indices[: round(0.1 * n)]] = False
    assert torch.equal(mask, expected) and calls == [1]


@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize("kind", ["distinct", "ties", "tiny", "infinite"])
def test_large_pools_are_sampled_and_agree_with_sorting(rank_by, kind):
    n = SAMPLED_NUMEL + 3
    scores = torch.randn(n)
    if kind == "ties":
        scores = (scores * 4).round() / 4
    elif kind == "tiny":
        scores *= 1e-39
    elif kind == "infinite":
        scores[::7], scores[1::7] = math.inf, -math.inf
    keys = scores.abs() if rank_by == "abs" else scores
    for sparsity in (0.1, 0.9):
        expected = torch.ones(n, dtype=torch.bool)
        expected[keys.sort(stable=True).indices[: round(sparsity * n)]] = False
        assert torch.equal(topk_mask(scores, sparsity, rank_by), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_removed_entries_are_plus_zero_whatever_the_weight_is(dtype):
    weight = torch.tensor([-1.0, math.nan, math.inf, -0.0, 5.0, -6.0], dtype=dtype)
    out = torch.empty_like(weight)
    masking.keep_highest_([out], [weight], [torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])], 4, "abs")
    assert out.tolist() == [0, 0, 0, 0, 5, -6] and not torch.signbit(out[:4]).any()


def test_weights_are_converted_to_the_dtype_asked_for():
    weight, scores = torch.randn(50, 30), torch.randn(50, 30)
    out = torch.empty(50, 30, dtype=torch.bfloat16)
    masking.keep_highest_([out], [weight], [scores], 150, "abs")
    assert torch.equal(out, weight.bfloat16().masked_fill(~topk_mask(scores, 0.1), 0))


def test_memory_layout_does_not_matter():
    scores = torch.randint(-3, 4, (6, 50)).float()
    transposed = scores.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert torch.equal(topk_mask(transposed, 0.1), topk_mask(scores, 0.1))
    strided = torch.zeros(6, 100)[:, ::2].copy_(scores)
    assert torch.equal(topk_mask(strided, 0.9), topk_mask(scores, 0.9))


def test_signed_zeros_tie():
    assert topk_mask(torch.tensor([0.0, -0.0, 1.0]), 1 / 3, "signed").tolist() == [False, True, True]
    assert topk_mask(torch.tensor([-0.0, 0.0, 1.0]), 1 / 3, "signed").tolist() == [False, True, True]


def test_ranking_is_in_float32():
    """Scores a bfloat16 cannot tell apart are still ranked."""
    scores = 1.0 + torch.arange(1000) * 1e-6
    assert scores.bfloat16().unique().numel() == 1
    assert topk_mask(scores.flip(0), 0.1).tolist() == [True] * 900 + [False] * 100


def test_two_runs_are_bitwise_equal():
    scores = torch.randn(300, 1000).round(decimals=2)
    assert torch.equal(topk_mask(scores, 0.1), topk_mask(scores, 0.1))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, "0.1", True, None])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(UserError, match=r"fraction of weights removed and must be in \[0, 1\)"):
        topk_mask(torch.randn(4), sparsity)


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize("n", [50, masking._SAMPLED_MIN_NUMEL + 1])
def test_nan_scores_are_refused(nan, rank_by, n):
    scores = torch.randn(n)
    scores[3] = nan
    for sparsity in SPARSITIES:
        with pytest.raises(UserError, match="NaN"):
            topk_mask(scores, sparsity, rank_by)
    with pytest.raises(UserError, match="NaN"):
        threshold_mask(scores, 0.0, rank_by)


def test_global_scope_is_one_pool():
    a, b = torch.randn(20, 30), 10 * torch.randn(7, 11)
    masks = topk_masks([a, b], 0.1)
    together = topk_mask(torch.cat([a.view(-1), b.view(-1)]), 0.1)
    assert torch.equal(torch.cat([m.view(-1) for m in masks]), together)
    assert int((~masks[0]).sum()) > int((~masks[1]).sum())


def test_global_ties_follow_the_order_of_the_pool():
    first, second = topk_masks([torch.ones(2, 5), torch.ones(2, 5)], 0.6)
    assert int((~first).sum()) == 10 and (~second).view(-1).tolist() == [True, True] + [False] * 8


def test_threshold():
    scores = torch.tensor([-0.04, -0.035, -0.03, 0.0, 1.0])
    assert threshold_mask(scores, -0.035).tolist() == [False, True, True, True, True]
    assert threshold_mask(scores, 0.03, "abs").tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_fixed_masks_have_the_learned_masks_count(sparsity):
    weight = torch.randn(31, 17)
    count = int((~topk_mask(torch.randn(31, 17), sparsity)).sum())
    assert int((~random_mask(weight.shape, sparsity, seed=3)).sum()) == count
    assert int((~magnitude_mask(weight, sparsity)).sum()) == count


def test_magnitude_mask_removes_the_smallest():
    weight = torch.tensor([[3.0, -0.1, 2.0], [0.2, -5.0, 0.05]])
    assert magnitude_mask(weight, 1 / 3).tolist() == [[True, False, True], [True, True, False]]


def test_random_mask_is_uniform_and_seeded():
    assert torch.equal(random_mask((50, 40), 0.1, 7), random_mask((50, 40), 0.1, 7))
    assert not torch.equal(random_mask((50, 40), 0.1, 7), random_mask((50, 40), 0.1, 8))
    rate = torch.stack([~random_mask((20, 10), 0.1, seed) for seed in range(400)]).float().mean(0)
    # Each entry is removed in Binomial(400, 0.1) draws: five standard deviations are 0.075.
    assert (rate - 0.1).abs().max() < 0.075


def test_fixed_masks_of_given_counts_and_global_pool():
    weights = [torch.randn(10, 10), 5 * torch.randn(4, 25)]
    for kind in ("random_mask", "l1_mask"):
        assert [int((~m).sum()) for m in fixed_masks(kind, weights, 0.1, counts=[3, 17])] == [3, 17]
        assert sum(int((~m).sum()) for m in fixed_masks(kind, weights, 0.1, scope="global")) == 20
    assert torch.equal(fixed_masks("l1_mask", weights, 0.1, "global")[0], topk_masks(weights, 0.1)[0])


@pytest.mark.parametrize("kind", ["normal", "kaiming_uniform", "constant", "magnitude"])
def test_initial_scores(kind):
    weight = torch.randn(60, 50)
    scores = initial_scores(weight, kind, torch.Generator().manual_seed(1), std=0.02, value=0.5)
    assert scores.shape == weight.shape and scores.dtype == torch.float32
    again = initial_scores(weight, kind, torch.Generator().manual_seed(1), std=0.02, value=0.5)
    assert torch.equal(scores, again)
    if kind in ("normal", "magnitude"):
        assert scores.std().item() == pytest.approx(0.02, rel=0.05)
    if kind == "kaiming_uniform":
        assert scores.abs().max() <= 1 / math.sqrt(50) and scores.abs().max() > 0.9 / math.sqrt(50)
    if kind == "magnitude":
        for sparsity in (0.1, 0.9):
            assert torch.equal(topk_mask(scores, sparsity), magnitude_mask(weight, sparsity))


@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_scores_for_mask_give_the_mask_and_keep_the_values(rank_by, sparsity):
    scores, mask = torch.randn(40, 30), topk_mask(torch.randn(40, 30), sparsity)
    permuted = scores_for_mask(scores, mask, rank_by)
    assert torch.equal(topk_mask(permuted, sparsity, rank_by), mask)
    assert torch.equal(permuted.view(-1).sort().values, scores.view(-1).sort().values)


@pytest.mark.parametrize("rank_by", ["abs", "signed"])
def test_straight_through_gradients(rank_by):
    weight, scores = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    mask, upstream = topk_mask(scores, 0.4, rank_by), torch.randn(5, 4)
    StraightThroughMask.apply(weight, scores, mask, rank_by).backward(upstream)
    sign = torch.sign(scores) if rank_by == "abs" else 1.0
    assert torch.equal(weight.grad, upstream * mask)
    assert torch.equal(scores.grad, (upstream * weight * sign).detach())


def test_removed_entries_are_plus_zero_even_for_nan_weights():
    weight = torch.tensor([-1.0, math.nan, 2.0])
    out = StraightThroughMask.apply(weight, torch.zeros(3), torch.tensor([False, False, True]), "abs")
    assert out.tolist() == [0, 0, 2] and not torch.signbit(out).any()


def test_score_gradient_matches_finite_differences_of_the_relaxed_layer():
    """Eq. (5): the gradient equals that of the layer with m replaced by a real-valued mask, at the binary point."""
    x_TI, weight_OI, target = torch.randn(7, 4).double(), torch.randn(3, 4).double(), torch.randn(7, 3).double()
    mask_OI = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]]).double()

    def loss(mask):
        return ((x_TI @ (weight_OI * mask).T - target) ** 2).sum()

    scores = torch.randn(3, 4).double().abs().requires_grad_()
    effective = StraightThroughMask.apply(weight_OI, scores, mask_OI.bool(), "signed")
    ((x_TI @ effective.T - target) ** 2).sum().backward()
    for i in range(3):
        for j in range(4):
            up, down = mask_OI.clone(), mask_OI.clone()
            up[i, j] += 1e-6
            down[i, j] -= 1e-6
            slope = ((loss(up) - loss(down)) / 2e-6).item()
            assert scores.grad[i, j].item() == pytest.approx(slope, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_wanda_mask_is_the_naive_one(sparsity):
    generator = torch.Generator().manual_seed(3)
    weight, norms = torch.randn(7, 12, generator=generator), torch.rand(12, generator=generator)
    (mask,) = fixed_masks("wanda_mask", [weight], sparsity, input_norms=[norms[None]])
    assert torch.equal(mask, reference.wanda_mask(weight, norms, round(sparsity * 84)))
    assert int((~mask).sum()) == num_removed(84, sparsity)
    (transposed,) = fixed_masks("wanda_mask", [weight.t()], sparsity, input_norms=[norms[:, None]])
    assert torch.equal(transposed.t(), mask)


def test_wanda_mask_takes_counts_and_one_pool():
    weights, norms = [torch.arange(1.0, 7).view(2, 3), 10 * torch.ones(2, 3)], [torch.ones(1, 3)] * 2
    masks = fixed_masks("wanda_mask", weights, 0.5, counts=[1, 3], input_norms=norms)
    # The first output gives one more where the count does not divide.
    assert masks[0].tolist() == [[False, True, True], [True, True, True]]
    assert masks[1].tolist() == [[False, False, True], [False, True, True]]
    pooled = fixed_masks("wanda_mask", weights, 0.5, "global", input_norms=norms)
    assert not pooled[0].any() and pooled[1].all()
