"""The fast selection: bit for bit the plain definition in masking.py."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from maskft import masking
from maskft.fast import selection
from maskft_common.errors import UserError
from reference import FEW_VALUES

SAMPLED_NUMEL = 500_000


@pytest.fixture
def small_samples(monkeypatch):
    """Send small pools through the sample, the band and several chunks: the sizes are private, the result never."""
    monkeypatch.setattr(selection, "_SAMPLED_MIN_NUMEL", 1)
    monkeypatch.setattr(selection, "CHUNK_NUMEL", 16)
    monkeypatch.setattr(selection, "_NARROWED_MIN_NUMEL", 1)
    monkeypatch.setattr(selection, "_ROWS", 4)


@given(*FEW_VALUES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_masks_are_those_of_the_plain_definition(small_samples, values, num, rank_by):
    """Bit for bit, ties and infinities included, whatever the sample says; removed weights are +0."""
    scores = torch.tensor(values, dtype=torch.float32)
    num = min(num, len(scores))
    plain = masking.remove_lowest(masking.ranking_keys(scores, rank_by), num)
    assert torch.equal(selection.mask_without_lowest(scores, num, rank_by), plain)
    weight = torch.arange(1.0, len(scores) + 1)
    out = torch.full_like(weight, math.nan)
    selection.keep_highest_(out, weight, scores, num, rank_by)
    assert torch.equal(out, weight.masked_fill(~plain, 0))


def test_a_sample_that_misleads_costs_time_and_nothing_else(monkeypatch):
    """Every sampled score is high, so the cut is not where the sample says."""
    n = SAMPLED_NUMEL + 5
    scores = torch.rand(n)
    scores[:: int(n ** (1 / 3)) | 1] += 10
    calls = []
    kth_smallest = selection._kth_smallest
    monkeypatch.setattr(selection, "_kth_smallest", lambda *args: calls.append(1) or kth_smallest(*args))
    mask = selection.mask_without_lowest(scores, masking.num_removed(n, 0.1))
    expected = torch.ones(n, dtype=torch.bool)
    expected[scores.sort(stable=True).indices[: round(0.1 * n)]] = False
    assert torch.equal(mask, expected) and calls == [1]


@pytest.mark.parametrize("change", [1e-4, 1e-2, 3.0])
def test_the_cut_of_the_call_before_saves_time_and_changes_nothing(change):
    """Whether scores move little, too far for a narrow band, or out of it at once."""
    scores, near, narrow = torch.randn(SAMPLED_NUMEL), None, 0
    for step in range(6):
        out = torch.empty_like(scores)
        near = selection.keep_highest_(out, torch.ones_like(scores), scores, 50_000, "signed", near)
        assert torch.equal(out == 1, masking.topk_mask(scores, 0.1, "signed"))
        narrow += near.band is not None
        scores = scores + change * (torch.rand_like(scores) + step)
    assert narrow == (6 if change < 1e-3 else 1)


@pytest.mark.parametrize("cut", [0.0, -0.0, 1e-45, -0.25, 0.25])
def test_what_is_judged_by_itself_is_kept_above_the_cut(cut):
    scores = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 0.25, -0.25, 1.0, -1.0, math.inf, -math.inf])
    for dtype in (torch.float32, torch.bfloat16):
        weight, out = torch.full(scores.shape, -2.0), torch.empty(scores.shape, dtype=dtype)
        selection.keep_above_(out, weight, scores, cut, "signed")
        assert torch.equal(out, weight.masked_fill(scores <= cut, 0.0).to(dtype))
        assert not torch.signbit(out[out == 0]).any()
    with pytest.raises(UserError, match="NaN"):
        selection.keep_above_(out, weight, scores * math.nan, cut, "signed")


@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize("kind", ["distinct", "ties", "tiny", "infinite"])
def test_large_matrices_are_sampled_and_agree_with_the_plain_definition(rank_by, kind):
    n = SAMPLED_NUMEL + 3
    scores = torch.randn(n)
    if kind == "ties":
        scores = (scores * 4).round() / 4
    elif kind == "tiny":
        scores *= 1e-39
    elif kind == "infinite":
        scores[::7], scores[1::7] = math.inf, -math.inf
    for sparsity in (0.1, 0.9):
        mask = selection.mask_without_lowest(scores, masking.num_removed(n, sparsity), rank_by)
        assert torch.equal(mask, masking.topk_mask(scores, sparsity, rank_by))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_removed_entries_are_plus_zero_whatever_the_weight_is(dtype):
    weight = torch.tensor([-1.0, math.nan, math.inf, -0.0, 5.0, -6.0], dtype=dtype)
    out = torch.empty_like(weight)
    selection.keep_highest_(out, weight, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), 4, "abs")
    assert out.tolist() == [0, 0, 0, 0, 5, -6] and not torch.signbit(out[:4]).any()


def test_weights_are_converted_to_the_dtype_asked_for():
    weight, scores = torch.randn(50, 30), torch.randn(50, 30)
    out = torch.empty(50, 30, dtype=torch.bfloat16)
    selection.keep_highest_(out, weight, scores, 150, "abs")
    assert torch.equal(out, weight.bfloat16().masked_fill(~masking.topk_mask(scores, 0.1), 0))


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize("n", [50, SAMPLED_NUMEL])
def test_nan_scores_are_refused(nan, rank_by, n):
    scores = torch.randn(n)
    scores[3] = nan
    for sparsity in (0.0, 0.1, 0.9):
        with pytest.raises(UserError, match="NaN"):
            selection.mask_without_lowest(scores, masking.num_removed(n, sparsity), rank_by)
