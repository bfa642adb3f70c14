"""Masks that are not learned have the counts of learned ones."""

import weakref

import pytest
import torch

import reference
from maskft import num_removed, topk_mask
from maskft.baselines.fixed import FIXED_MASKS, FixedMask, fixed_masks
from maskft_common.errors import UserError


def random_mask(shape, sparsity, seed):
    return fixed_masks("random_mask", [torch.zeros(shape)], sparsity, seed)[0]


def magnitude_mask(weight, sparsity):
    return fixed_masks("l1_mask", [weight], sparsity)[0]


@pytest.mark.parametrize("sparsity", (0.0, 0.1, 0.9))
def test_fixed_masks_have_the_learned_masks_count(sparsity):
    weight = torch.randn(31, 17)
    count = int((~topk_mask(torch.randn(31, 17), sparsity)).sum())
    assert int((~random_mask(weight.shape, sparsity, seed=3)).sum()) == count
    assert int((~magnitude_mask(weight, sparsity)).sum()) == count


def test_magnitude_mask_removes_the_smallest():
    weight = torch.tensor([[3.0, -0.1, 2.0], [0.2, -5.0, 0.05]])
    assert magnitude_mask(weight, 1 / 3).tolist() == [[True, False, True], [True, True, False]]


@pytest.mark.parametrize("kind", ["random_mask", "l1_mask", "wanda_mask"])
def test_a_base_with_nan_is_refused(kind):
    broken = torch.ones(4, 3)
    broken[2, 1] = torch.nan
    norms = [torch.ones(1, 3)] * 2
    with pytest.raises(UserError, match=f"weights hold NaN or inf .in matrix 2 of 2., so {kind} cannot be made"):
        fixed_masks(kind, [torch.ones(4, 3), broken], 0.5, input_norms=norms)


def test_ranking_values_of_all_matrices_are_not_in_memory_together(monkeypatch):
    """They take four bytes a weight, of a 7B model 28 GB."""
    made = []

    def keys(weight, statistic, generator):
        # Those of the matrix before are replaced when these are returned.
        assert sum(reference() is not None for reference in made) <= 1
        found = weight.abs()
        made.append(weakref.ref(found))
        return found

    monkeypatch.setitem(FIXED_MASKS, "own_mask", FixedMask(keys))
    assert len(fixed_masks("own_mask", [torch.randn(3, 4) for _ in range(4)], 0.5)) == len(made) == 4


def test_random_mask_is_uniform_and_seeded():
    assert torch.equal(random_mask((50, 40), 0.1, 7), random_mask((50, 40), 0.1, 7))
    assert not torch.equal(random_mask((50, 40), 0.1, 7), random_mask((50, 40), 0.1, 8))
    rate = torch.stack([~random_mask((20, 10), 0.1, seed) for seed in range(400)]).float().mean(0)
    # Each entry is removed in Binomial(400, 0.1) draws: five standard deviations are 0.075.
    assert (rate - 0.1).abs().max() < 0.075


def test_fixed_masks_of_given_counts():
    weights = [torch.randn(10, 10), 5 * torch.randn(4, 25)]
    for kind in ("random_mask", "l1_mask"):
        assert [int((~m).sum()) for m in fixed_masks(kind, weights, 0.1, counts=[3, 17])] == [3, 17]


@pytest.mark.parametrize("sparsity", (0.0, 0.1, 0.9))
def test_wanda_mask_is_the_naive_one(sparsity):
    generator = torch.Generator().manual_seed(3)
    weight, norms = torch.randn(7, 12, generator=generator), torch.rand(12, generator=generator)
    (mask,) = fixed_masks("wanda_mask", [weight], sparsity, input_norms=[norms[None]])
    assert torch.equal(mask, reference.wanda_mask(weight, norms, round(sparsity * 84)))
    assert int((~mask).sum()) == num_removed(84, sparsity)
    (transposed,) = fixed_masks("wanda_mask", [weight.t()], sparsity, input_norms=[norms[:, None]])
    assert torch.equal(transposed.t(), mask)


def test_wanda_mask_takes_counts():
    weights, norms = [torch.arange(1.0, 7).view(2, 3), 10 * torch.ones(2, 3)], [torch.ones(1, 3)] * 2
    masks = fixed_masks("wanda_mask", weights, 0.5, counts=[1, 3], input_norms=norms)
    # The first output gives one more where the count does not divide.
    assert masks[0].tolist() == [[False, True, True], [True, True, True]]
    assert masks[1].tolist() == [[False, False, True], [False, True, True]]
