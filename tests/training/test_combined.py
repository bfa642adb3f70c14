"""Models combined without training."""

import torch

from maskft.training.combined import dare, interpolated


def test_interpolation_is_exact_at_its_ends_and_linear_between():
    before, after = torch.randn(2, 5, 7)
    assert torch.equal(interpolated(before, after, 0.0), before) and torch.equal(
        interpolated(before, after, 1.0), after
    )
    torch.testing.assert_close(interpolated(before, after, 0.3), 0.7 * before + 0.3 * after)


def test_dare_drops_differences_at_its_rate_and_rescales_the_others():
    before = torch.zeros(200, 100)
    mixed = dare(before, before + 3.0, 0.25, torch.Generator().manual_seed(0))
    assert set(mixed.unique().tolist()) == {0.0, 4.0}
    assert abs((mixed == 0).float().mean().item() - 0.25) < 0.01
    assert torch.equal(dare(before, before + 3.0, 0.0, torch.Generator()), before + 3.0)
