"""The algorithm: by hand, against a naive reference, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from maskft.masking import initial_scores, num_removed, ranking_keys, score_gradient, spread_by_rank, topk_mask
from maskft_common.errors import NotFiniteError, UserError

SPARSITIES = (0.0, 0.1, 0.9)


def test_by_hand():
    """Inner product of 0..9 with itself, smallest |score| removed; every number can be checked on paper."""
    weight, x = torch.arange(10.0), torch.ones(10)
    scores = torch.tensor([9.0, -8, 7, -6, 5, -4, 3, -2, 1, -0.5])
    mask = topk_mask(scores, 0.2)
    assert mask.tolist() == [True] * 8 + [False] * 2
    assert (weight * mask * x).sum().item() == 0 + 1 + 2 + 3 + 4 + 5 + 6 + 7 == 28
    # dL/ds = x * w * sign(s), also at the two removed entries.
    gradient = score_gradient(x, weight, scores)
    assert gradient.tolist() == [0, -1, 2, -3, 4, -5, 6, -7, 8, -9]
    stepped = scores - 1.0 * gradient
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


def test_another_word_for_the_ranking_is_refused():
    with pytest.raises(UserError, match="rank_by is 'magnitude'; it must be abs or signed"):
        topk_mask(torch.ones(3), 0.5, "magnitude")


def test_ranking_keys_by_hand():
    scores = torch.tensor([[-0.0, 0.0], [2**-24, -1.0]])
    assert ranking_keys(scores, "signed").tolist() == [0.0, 0.0, 2**-24, -1.0], "flat, and not moved"
    assert ranking_keys(scores).tolist() == [0.0, 0.0, 2**-24, 1.0], "by magnitude unless told otherwise"
    for rank_by in ("abs", "signed"):
        keys = ranking_keys(scores, rank_by)
        assert keys[:3].signbit().tolist() == [False] * 3, "equal keys have equal bits"
        assert ranking_keys(scores.bfloat16(), rank_by).dtype == torch.float32


def test_ranking_is_in_float32():
    """Scores a bfloat16 cannot tell apart are still ranked."""
    scores = 1.0 + torch.arange(1000) * 1e-6
    assert scores.bfloat16().unique().numel() == 1
    assert topk_mask(scores.flip(0), 0.1).tolist() == [True] * 900 + [False] * 100


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, "0.1", True, None])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(UserError, match=r"fraction of weights removed and must be in \[0, 1\)"):
        topk_mask(torch.randn(4), sparsity)


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("rank_by", ["abs", "signed"])
def test_nan_scores_are_refused(nan, rank_by):
    scores = torch.randn(50)
    scores[3] = nan
    for sparsity in SPARSITIES:
        with pytest.raises(NotFiniteError, match=r"^scores contain NaN, so they cannot be ranked$"):
            topk_mask(scores, sparsity, rank_by)


@pytest.mark.parametrize("kind", ["normal", "constant", "magnitude"])
def test_initial_scores(kind):
    weight = torch.randn(60, 50)
    scores = initial_scores(weight, kind, torch.Generator().manual_seed(1), std=0.02, value=0.5)
    assert scores.shape == weight.shape and scores.dtype == torch.float32
    again = initial_scores(weight, kind, torch.Generator().manual_seed(1), std=0.02, value=0.5)
    assert torch.equal(scores, again)
    if kind in ("normal", "magnitude"):
        assert scores.std().item() == pytest.approx(0.02, rel=0.05)
    if kind == "magnitude":
        for sparsity in (0.1, 0.9):
            assert torch.equal(topk_mask(scores, sparsity), topk_mask(weight, sparsity))


def test_initial_scores_by_hand():
    weight = torch.tensor([[3.0, -1.0], [-1.0, 2.0]])
    generator = torch.Generator().manual_seed(1)
    expected = 0.02 * torch.empty(2, 2).normal_(generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(initial_scores(weight, "normal", generator), expected)  # N(0, 0.02), as published
    assert initial_scores(weight, "constant", generator).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert initial_scores(weight, "constant", generator, value=0.5).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    # The order of abs(weight), ties in index order, evenly up to 0.02 * sqrt(12).
    step = 0.02 * math.sqrt(12) / 4
    assert initial_scores(weight, "magnitude", generator).tolist() == [
        pytest.approx([4 * step, 1 * step]),
        pytest.approx([2 * step, 3 * step]),
    ]
    for start in ("normal", "constant"):
        assert initial_scores(weight.to("meta"), start, generator).device.type == "meta"


def test_scores_by_rank_are_rounded_once():
    """Each is the float32 nearest to its exact value; negative keys come before positive ones."""
    keys = torch.arange(-500.0, 500.0).flip(0)
    step = 0.3 * math.sqrt(12) / 1000
    expected = torch.tensor([n * step for n in range(1000, 0, -1)], dtype=torch.float64).float()
    assert torch.equal(spread_by_rank(keys, 0.3), expected)


def test_a_score_of_zero_has_no_gradient_by_magnitude():
    gradient = score_gradient(torch.ones(3), torch.full((3,), 2.0), torch.tensor([0.0, -0.5, 0.5]))
    assert gradient.tolist() == [0.0, -2.0, 2.0]


@pytest.mark.parametrize("rank_by", ["abs", "signed"])
def test_straight_through_gradients(rank_by):
    weight, scores, upstream = torch.randn(5, 4), torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    reference.straight_through(weight, scores, topk_mask(scores, 0.4, rank_by), rank_by).backward(upstream)
    assert torch.equal(score_gradient(upstream, weight, scores.detach(), rank_by), scores.grad)
