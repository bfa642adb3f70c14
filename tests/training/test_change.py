"""The part of a change that is kept: interpolation of parameters, and the largest part within a budget."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from maskft.training.change import _MAX_TRIES, Change, largest_part


def trained(model):
    """Move all trainable parameters, and return how they were and how they are."""
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return before, copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("has_copy", [False, True])
def test_a_part_is_between_the_start_and_the_trained_parameters(has_copy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    frozen = copy.deepcopy(model).requires_grad_(False) if has_copy else None
    change = Change(model, frozen)
    before, after = trained(model)
    with change.taken_back() as set_part:
        for part in (0.25, 0.0, 0.6):
            set_part(part)
            for name, value in model.state_dict().items():
                torch.testing.assert_close(value, before[name] + part * (after[name] - before[name]))
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())

    change.keep(0.5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, (before[name] + after[name]) / 2)


def test_of_lora_a_part_of_the_weights_change_is_kept():
    """Whose B starts at zero; else A is interpolated too, because at the part 0 the model is that of the start."""
    torch.manual_seed(0)
    for is_zero in (True, False):
        base = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Embedding(7, 5))
        config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=is_zero)
        model = get_peft_model(base, config)
        change = Change(model)
        layers = [model.base_model.model[place] for place in (0, 1)]
        start = [layer.get_delta_weight("default").clone() for layer in layers]
        trained(model)
        whole = [layer.get_delta_weight("default").clone() for layer in layers]
        with change.taken_back() as set_part:
            set_part(0.0)
            for layer, weight in zip(layers, start, strict=True):
                torch.testing.assert_close(layer.get_delta_weight("default"), weight)
            set_part(0.3)
            for layer, weight in zip(layers, whole, strict=True):
                is_linear = torch.allclose(layer.get_delta_weight("default"), 0.3 * weight, atol=1e-6)
                assert is_linear == is_zero


def test_the_trained_parameters_come_back_bit_for_bit_after_an_error():
    model = nn.Linear(3, 4).to(torch.bfloat16)
    with torch.no_grad():
        model.weight[0, 0] = -0.0
    change = Change(model)
    _, after = trained(model)
    with pytest.raises(ZeroDivisionError), change.taken_back() as set_part:
        set_part(0.3)
        raise ZeroDivisionError
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int16), after[name].view(torch.int16))


@pytest.mark.parametrize("power", [0.7, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("whole", [0.1001, 0.15, 5.0, math.inf])
def test_the_largest_part_within_a_budget(power, whole):
    tried = []

    def kl_of(part):
        tried.append(part)
        scale = min(whole, 50.0)
        return scale * part**power

    part, kl = largest_part(kl_of, whole, 0.1)
    assert part == tried[-1] and kl == kl_of(part)
    assert 0.09 <= kl <= 0.1 and 0 < part < 1
    # The law through both ends is that of the function, once there are two.
    if math.isfinite(whole) and 1 <= power <= 2:
        assert len(tried) <= 5


def test_a_step_of_a_mask_is_found_from_below():
    """No part has a KL near the budget: entries flip together."""

    def kl_of(part):
        return 0.0 if part < 0.37 else 3.0

    part, kl = largest_part(kl_of, 3.0, 0.1)
    assert kl == 0.0 and 0.36 < part < 0.37


@pytest.mark.parametrize("steepness", [3, 30, 300])
def test_a_curve_that_levels_off_is_searched_as_well(steepness):
    """As of a tiny model whose normalised activations hardly change any more."""

    def kl_of(part):
        return 0.0138 * (1 - math.exp(-((steepness * part) ** 2)))

    part, kl = largest_part(kl_of, kl_of(1.0), 0.01)
    assert 0.009 <= kl <= 0.01 and kl == kl_of(part)


def test_no_part_is_found_where_all_exceed_the_budget():
    tried = []

    def kl_of(part):
        tried.append(part)
        return math.nan

    assert largest_part(kl_of, 0.3, 0.1) is None
    assert len(tried) == _MAX_TRIES and tried == sorted(tried, reverse=True)
