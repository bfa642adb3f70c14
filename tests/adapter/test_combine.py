"""What several masks remove together."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model

import tiny
from maskft import MaskConfig, UserError, current_masks
from maskft.adapter.combine import OPERATIONS, combine, combine_adapters
from maskft.adapter.mask_set import MaskSet, read_config
from maskft.adapter.verify import verify
from maskft.tuner import adapter_layers
from maskft.tuner.fingerprints import base_fingerprint
from maskft_base.files import ADAPTER_CONFIG
from maskft_lab.cli.main import main

LAYERS = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj")


def removed(*places):
    """A mask of one row of eight that removes these places."""
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, list(places)] = False
    return mask


@pytest.mark.parametrize(
    "operation,at_least,expected",
    [
        ("union", None, {0, 1, 2, 3, 4, 5}),
        ("intersect", None, {0}),
        ("vote", None, {0, 1, 2}),
        ("vote", 1, {0, 1, 2, 3, 4, 5}),
        ("vote", 3, {0}),
        ("minus", None, {3}),
    ],
)
def test_by_hand(operation, at_least, expected):
    masks = [removed(0, 1, 2, 3), removed(0, 1, 4), removed(0, 2, 5)]
    before = [mask.clone() for mask in masks]
    result = combine(operation, masks, at_least)
    assert result.dtype == torch.bool and set((~result[0]).nonzero().view(-1).tolist()) == expected
    assert all(map(torch.equal, masks, before))


def test_votes_outside_their_range_and_too_few_masks():
    masks = [removed(0), removed(1)]
    for votes in (0, 3):
        with pytest.raises(UserError, match=f"at_least is {votes} and there are 2 masks"):
            combine("vote", masks, votes)
    with pytest.raises(UserError, match="union needs two masks or more, and there is 1"):
        combine("union", masks[:1])
    with pytest.raises(UserError, match="no operation 'xor'; there are union"):
        combine("xor", masks)


# Folders


def folder_of(tmp_path, name, seed, model=None, **config):
    """An adapter folder over the tiny model, with random masks of a tenth."""
    model = model or tiny.tiny_llama()
    generator = torch.Generator().manual_seed(seed)
    masks = {layer: torch.rand(model.get_submodule(layer).weight.shape, generator=generator) >= 0.1 for layer in LAYERS}
    wrapped = get_peft_model(model, MaskConfig(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]))
    fingerprint = base_fingerprint(adapter_layers(wrapped).values())
    settings = {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
        "base_fingerprint": fingerprint,
        "selection": "threshold",
        "rank_by": "signed",
        "inference_mode": True,
    }
    tiny.save_masks(masks, tmp_path / name, **settings | config)
    return tmp_path / name, masks


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_written_loads_like_any_adapter(tmp_path, operation, capsys):
    folders, masks = zip(*(folder_of(tmp_path, f"mask{seed}", seed) for seed in range(3)), strict=True)
    out = tmp_path / "out"
    assert main(["masks", operation, *map(str, folders), "--output_dir", str(out)]) == 0
    expected = {name: combine(operation, [each[name] for each in masks]) for name in LAYERS}
    total = MaskSet(expected)
    assert f"removes {total.num_removed:,} of {total.numel:,} weights" in capsys.readouterr().out
    assert verify(out)
    loaded = current_masks(PeftModel.from_pretrained(tiny.tiny_llama(), out))
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in LAYERS)
    config = read_config(out)
    assert (
        config.recipe["operation"] == operation and config.base_fingerprint == read_config(folders[0]).base_fingerprint
    )
    assert config.recipe["of"] == [read_config(folder).mask_sha256 for folder in folders]


def as_held():
    """The tiny model with the weights that 4 bits of it might stand for."""
    model = tiny.tiny_llama()
    for name in LAYERS:
        weight = model.get_submodule(name).weight
        weight.data = (weight.data * 100).round() / 100
    return model


def test_masks_of_a_quantised_base_combine(tmp_path):
    """Their fingerprint is that of dequantised weights, which the float base does not have."""
    made = [folder_of(tmp_path, f"mask{seed}", seed, as_held(), base_quantisation="nf4") for seed in range(2)]
    combine_adapters("union", [folder for folder, _ in made], tmp_path / "out")
    assert read_config(tmp_path / "out").base_quantisation == "nf4"
    with pytest.warns(UserWarning, match="learned on weights held as nf4, the model's are held as float"):
        loaded = current_masks(PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "out"))
    assert all(torch.equal(loaded[name], made[0][1][name] & made[1][1][name]) for name in LAYERS)
    with pytest.raises(UserError, match="was trained on other base weights"):
        PeftModel.from_pretrained(tiny.tiny_llama(seed=1), tmp_path / "out")


def test_a_combined_mask_has_no_scores_to_train(tmp_path):
    folders = [folder_of(tmp_path, f"mask{seed}", seed)[0] for seed in range(2)]
    combine_adapters("union", folders, tmp_path / "out")
    with pytest.raises(UserError, match="without the scores it was made from"):
        PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "out", is_trainable=True)


def other_base(tmp_path):
    return folder_of(tmp_path, "b", 1, tiny.tiny_llama(seed=1))[0], "are over other base weights"


def other_shapes(tmp_path):
    return folder_of(tmp_path, "b", 1, tiny.tiny_llama(intermediate_size=64))[0], "are over other bases: .* is "


def other_modules(tmp_path):
    folder = tmp_path / "b"
    tiny.save_masks({LAYERS[0]: torch.rand(32, 32) >= 0.1}, folder)
    return folder, "mask other modules: .*up_proj"


def other_value(tmp_path):
    value = {"removed_value": "base", "removed_value_model": "before"}
    return folder_of(tmp_path, "b", 1, **value)[0], "put other values where they remove: zero and base"


def with_weights(tmp_path):
    folder = folder_of(tmp_path, "b", 1)[0]
    config = json.loads((folder / ADAPTER_CONFIG).read_text()) | {"weights_sha256": {"lm_head.weight": "0" * 64}}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return folder, "also replaces weights of the base"


def held_otherwise(tmp_path):
    folder = folder_of(tmp_path, "b", 1, as_held(), base_quantisation="nf4")[0]
    return folder, "were learned on base weights held as float and nf4"


def lora(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    return tmp_path / "b", "peft_type"


def newer(tmp_path):
    return folder_of(tmp_path, "b", 1, format_version=9)[0], "format_version is 9"


@pytest.mark.parametrize(
    "make", [other_base, other_shapes, other_modules, other_value, held_otherwise, with_weights, lora, newer]
)
def test_what_does_not_go_together_is_one_line(tmp_path, make, capsys):
    first = folder_of(tmp_path, "a", 0)[0]
    second, message = make(tmp_path)
    assert main(["masks", "union", str(first), str(second), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=message):
        combine_adapters("union", [first, second], tmp_path / "out")


def test_a_mask_that_removes_all_is_not_written(tmp_path):
    halves = torch.rand(32, 32) >= 0.5
    for name, mask in (("a", halves), ("b", ~halves)):
        tiny.save_masks({LAYERS[0]: mask}, tmp_path / name)
    with pytest.raises(UserError, match="the union removes all 1,024 weights"):
        combine_adapters("union", [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compare_tells_masks_that_share_something_from_random_ones(tmp_path, capsys):
    folders = [folder_of(tmp_path / str(seed), "mask", seed)[0] for seed in range(2)]
    shared = {name: mask.clone() for name, mask in MaskSet.from_adapter(folders[0]).items()}
    for mask in shared.values():
        mask[:8] = torch.rand(mask[:8].shape) >= 0.1
    tiny.save_masks(shared, tmp_path / "like", base_fingerprint=read_config(folders[0]).base_fingerprint)
    words = ["masks", "compare", *map(str, folders), str(tmp_path / "like")]
    assert main([*words, "--format", "json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["pairs"]
    assert [pair["verdict"] for pair in pairs] == ["what chance gives", "more than chance", "what chance gives"]
    assert [pair["first"] for pair in pairs] == ["0/mask", "0/mask", "1/mask"]
    assert main(words) == 0
    assert "more than chance" in capsys.readouterr().out
    for bad in ([*words, "--confidence", "1"], words[:3]):
        assert main(bad) == 2
        assert capsys.readouterr().err.count("\n") == 1
