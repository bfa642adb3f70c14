"""The fast selection: bit for bit the plain definition in masking.py."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from maskft import masking
from maskft.tuner import selection
from maskft_base.errors import UserError
from reference import POOLS

SAMPLED_NUMEL = 500_000


@pytest.fixture
def small_samples(monkeypatch):
    """Send small pools through the sample, the band and several chunks: the sizes are private, the result never."""
    monkeypatch.setattr(selection, "_SAMPLED_MIN_NUMEL", 1)
    monkeypatch.setattr(selection, "CHUNK_NUMEL", 16)
    monkeypatch.setattr(selection, "_NARROWED_MIN_NUMEL", 1)
    monkeypatch.setattr(selection, "_ROWS", 4)


@given(*POOLS)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_masks_are_those_of_the_plain_definition(small_samples, values, num, rank_by, num_matrices):
    """Bit for bit, ties and infinities included, whatever the sample says; removed weights are +0."""
    pool = torch.tensor(values, dtype=torch.float32)
    num = min(num, len(pool))
    plain = masking.remove_lowest(masking.ranking_keys(pool, rank_by), num)
    scores = pool.tensor_split(num_matrices)
    assert torch.equal(torch.cat(selection.remove_lowest_of_pool(scores, num, rank_by)), plain)
    weights = torch.arange(1.0, len(pool) + 1).tensor_split(num_matrices)
    outs = [torch.full_like(weight, math.nan) for weight in weights]
    selection.keep_highest_(outs, weights, scores, num, rank_by)
    assert torch.equal(torch.cat(outs), torch.cat(weights).masked_fill(~plain, 0))


def test_a_sample_that_misleads_costs_time_and_nothing_else(monkeypatch):
    """Every sampled score is high, so the cut is not where the sample says."""
    n = SAMPLED_NUMEL + 5
    scores = torch.rand(n)
    scores[:: int(n ** (1 / 3)) | 1] += 10
    calls = []
    kth_smallest = selection._kth_smallest
    monkeypatch.setattr(selection, "_kth_smallest", lambda *args: calls.append(1) or kth_smallest(*args))
    mask = selection.topk_masks([scores], 0.1)[0]
    expected = torch.ones(n, dtype=torch.bool)
    expected[scores.sort(stable=True).indices[: round(0.1 * n)]] = False
    assert torch.equal(mask, expected) and calls == [1]


@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize("kind", ["distinct", "ties", "tiny", "infinite"])
def test_large_pools_are_sampled_and_agree_with_the_plain_definition(rank_by, kind):
    n = SAMPLED_NUMEL + 3
    scores = torch.randn(n)
    if kind == "ties":
        scores = (scores * 4).round() / 4
    elif kind == "tiny":
        scores *= 1e-39
    elif kind == "infinite":
        scores[::7], scores[1::7] = math.inf, -math.inf
    for sparsity in (0.1, 0.9):
        mask = selection.topk_masks([scores], sparsity, rank_by)[0]
        assert torch.equal(mask, masking.topk_mask(scores, sparsity, rank_by))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_removed_entries_are_plus_zero_whatever_the_weight_is(dtype):
    weight = torch.tensor([-1.0, math.nan, math.inf, -0.0, 5.0, -6.0], dtype=dtype)
    out = torch.empty_like(weight)
    selection.keep_highest_([out], [weight], [torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])], 4, "abs")
    assert out.tolist() == [0, 0, 0, 0, 5, -6] and not torch.signbit(out[:4]).any()


def test_weights_are_converted_to_the_dtype_asked_for():
    weight, scores = torch.randn(50, 30), torch.randn(50, 30)
    out = torch.empty(50, 30, dtype=torch.bfloat16)
    selection.keep_highest_([out], [weight], [scores], 150, "abs")
    assert torch.equal(out, weight.bfloat16().masked_fill(~masking.topk_mask(scores, 0.1), 0))


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize("n", [50, SAMPLED_NUMEL])
def test_nan_scores_are_refused(nan, rank_by, n):
    scores = torch.randn(n)
    scores[3] = nan
    for sparsity in (0.0, 0.1, 0.9):
        with pytest.raises(UserError, match="NaN"):
            selection.topk_masks([scores], sparsity, rank_by)
