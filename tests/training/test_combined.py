"""Models combined without training."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from maskft.training.combined import dare, interpolated
from maskft.training.record import read_record


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


@pytest.mark.parametrize("method, values", [("interpolate", [0.0, 0.5, 1.0]), ("dare", [0.1, 0.9])])
def test_the_held_out_rows_choose_the_value(base, call, tmp_path, method, values):
    """One step at a rate that ruins the model: the less of it is taken, the better."""
    assert call("ruined", method="full", max_steps=2, learning_rate=0.3, load_best_model_at_end=False)[0] == 0
    ruined = tmp_path / "ruined"
    status, err = call(method=method, model_name_or_path=ruined, before_model=base, combine_values=values)
    assert status == 0, err
    summary = read_record(tmp_path / "out").summary
    losses = {row["value"]: row["eval_loss"] for row in summary.history}
    assert list(losses) == values and len(set(losses.values())) == len(values)
    chosen = min(losses, key=losses.get)
    assert summary.best_loss == losses[chosen] and f"{method}: {chosen:g} is the best of" in err
    before, after, mixed = (
        AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (base, ruined, tmp_path / "out")
    )
    generator = torch.Generator().manual_seed(read_record(tmp_path / "out").recipe["seed"])
    if method == "interpolate":
        assert chosen == 0.0 and all(torch.equal(mixed[name], before[name]) for name in before)
    else:
        names = [name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_parameters()]
        for name in names:
            assert torch.equal(mixed[name], dare(before[name], after[name], chosen, generator))
