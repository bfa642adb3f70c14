"""Grids of recipes/smollm2/grids.py: against the format's own reader, and each value against all levels, in a loop."""

import copy

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import gguf
from maskft_common.errors import UserError
from recipe_scripts import script_of

from .tiny_gguf import write_gguf


@pytest.fixture(params=["Q4_0", "Q5_0", "Q8_0", pytest.param("NF4", marks=pytest.mark.quantised)])
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
    step, offset = scale
    codes = torch.arange(grid.codes.lowest, grid.codes.highest + 1)
    return codes * step - offset


@pytest.fixture(params=["Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q6_K"])
def type_name(request):
    return request.param


def random_blocks(type_name):
    """Packed rows of random codes and small scales, as a file could hold them; scales of 16 bits stay small."""
    kind = gguf.GGMLQuantizationType[type_name]
    _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, size=(12, num_bytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    if type_name == "Q6_K":
        blocks[:, -2:] = scale
    else:
        blocks[:, :2] = scale
    if type_name == "Q4_K":
        blocks[:, 2:4] = scale
    if type_name == "Q8_0":
        # The code -128 is not one that llama.cpp writes.
        blocks[:, 2:] = blocks[:, 2:] % 128
    return blocks.reshape(3, -1)


def test_scales_of_a_file(type_name, monkeypatch):
    """What a file's reader makes of random bytes is on the grid of the scales that are found in them."""
    packed = random_blocks(type_name)
    values = gguf.dequantize(packed, gguf.GGMLQuantizationType[type_name])
    weight = torch.from_numpy(np.array(values))
    grid = script_of("grids", monkeypatch=monkeypatch).grid_of(type_name)
    scales = grid.scales_in(packed)
    assert torch.equal(grid.nearest(weight, scales), weight)

    # Half a level away is another value.
    step = scales[:, :1].expand(-1, grid.block_size).reshape(weight.shape)
    moved = grid.nearest(weight + 0.6 * step, scales)
    highest = grid.nearest(torch.full_like(weight, 1e6) * step.sign(), scales)
    can_move = (weight != highest) & (step != 0)
    assert bool((moved != weight)[can_move].all())
    assert torch.equal(moved[~can_move], weight[~can_move])


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


@pytest.fixture
def recipe(monkeypatch):
    script_of("grids", monkeypatch=monkeypatch)
    return script_of("exact_in_four_bits", monkeypatch=monkeypatch)


@pytest.fixture
def stored(tmp_path, recipe):
    """A tiny Qwen2 in a file of two types, and the model that the file holds."""
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    kinds = {f"blk.{index}.ffn_down.weight": gguf.GGMLQuantizationType.Q8_0 for index in range(2)}
    file = write_gguf(
        tmp_path / "tiny.gguf",
        model,
        kind=gguf.GGMLQuantizationType.Q5_0,
        kinds=kinds,
        architecture="qwen2",
    )
    for name, weight in recipe.linear_weights(model).items():
        weight.copy_(recipe.grid_of("Q8_0" if "down_proj" in name else "Q5_0").fresh(weight))
    return model, file


def test_a_file_is_on_its_own_grids(recipe, stored):
    model, file = stored
    grids = recipe.grids_of_file(model, file)
    assert len(grids) == 14
    before = {name: weight.clone() for name, weight in recipe.linear_weights(model).items()}
    assert recipe.store(model, "base's grid", grids) == 0

    # Zeros stay, small changes are lost, fresh scales round all of a block.
    weights = recipe.linear_weights(model)
    gate = weights["model.layers.0.mlp.gate_proj.weight"]
    gate[:, :8] = 0.0
    assert recipe.store(model, "base's grid", grids) == 0
    for weight in weights.values():
        weight *= 1.001
    assert recipe.store(model, "base's grid", grids) > 0
    before["model.layers.0.mlp.gate_proj.weight"][:, :8] = 0.0
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def test_a_file_of_another_model(recipe, stored):
    model, file = stored
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1.0
    with pytest.raises(UserError, match=r"ffn_up\.weight are not those of"):
        recipe.grids_of_file(model, file)


def test_a_part_of_a_change(recipe, stored):
    base, _ = stored
    model = copy.deepcopy(base)
    head = model.lm_head.weight.data
    head += 1.0
    recipe.take_back(model, base, 0.25)
    torch.testing.assert_close(head, base.lm_head.weight + 0.25)
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, base.model.get_parameter(name)), name
