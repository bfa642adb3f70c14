"""Grids of recipes/smollm2/grids.py: against the format's own reader, and each value against all levels, in a loop."""

import pytest
import torch

from recipe_scripts import script_of


@pytest.fixture(params=["Q4_0", "Q8_0", pytest.param("NF4", marks=pytest.mark.quantised)])
def grid(request, monkeypatch):
    return script_of("grids", monkeypatch=monkeypatch).grid_of(request.param)


@pytest.fixture
def weight():
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    # A block of zeros has no scale to divide by.
    weight[0, :64] = 0.0
    return weight


def levels_of(grid, scale):
    """All values of a block."""
    if hasattr(grid, "_levels"):
        return grid._levels * scale
    low, high = grid._codes
    return torch.arange(low, high + 1) * scale


def test_values_on_the_grid_stay(grid, weight):
    base = grid.fresh(weight)
    assert not torch.equal(base, weight)
    assert torch.equal(grid.nearest(base, grid.scales(base)), base)


def test_a_mask_stays(grid, weight):
    """Zero is a level, so a masked base is on the base's own grid."""
    base = grid.fresh(weight)
    masked = base * (torch.rand(base.shape, generator=torch.Generator().manual_seed(1)) > 0.1)
    assert torch.equal(grid.nearest(masked, grid.scales(base)), masked)


def test_nearest_is_that_of_a_loop(grid, weight):
    scales = grid.scales(grid.fresh(weight))
    changed = weight + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    found = grid.nearest(changed, scales).flatten()
    for place, value in enumerate(changed.flatten()):
        levels = levels_of(grid, scales[place // grid.block_size])
        assert abs(found[place] - value) == pytest.approx(float((levels - value).abs().min()), abs=1e-6)
