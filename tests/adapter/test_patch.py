"""A mask as a patch of plain weights, and another mask in a running model."""

import json

import pytest
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model

import tiny
from maskft import MaskConfig, UserError
from maskft.adapter.mask_set import MaskSet
from maskft.adapter.patch import Patch, apply_patch, patch_of_adapter, read_patch, undo_patch, write_patch
from maskft.adapter.swap import swap_mask
from maskft.tuner import layer
from maskft.tuner.codec import decode_mask
from maskft_lab.cli.main import main


def adapter(folder, seed, model=None, **settings):
    """A mask of random scores over the tiny model."""
    model = get_peft_model(model or tiny.tiny_llama(), MaskConfig(mask_seed=seed, sparsity=0.2, **settings))
    model.save_pretrained(folder)
    return folder


def weights(model):
    return dict(model.named_parameters())


def bits(model):
    return {name: weight.detach().view(torch.int32).clone() for name, weight in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2])
def test_applying_is_merging_and_undoing_gives_every_bit_back(tmp_path, make):
    adapter(tmp_path / "mask", 3, make())
    assert main(["masks", "export", str(tmp_path / "mask"), "--output", str(tmp_path / "mask.safetensors")]) == 0
    model = make()
    with torch.no_grad():  # what a product with the mask would lose
        for weight in model.parameters():
            weight.view(-1)[::7] = -0.0
            weight.view(-1)[::11] = torch.nan
    before = bits(model)
    patch = read_patch(tmp_path / "mask.safetensors")
    undo = apply_patch(weights(model), patch)
    expected = make()
    for name, weight in expected.named_parameters():
        weight.data.view(torch.int32).copy_(before[name])
    MaskSet.from_adapter(tmp_path / "mask").apply_(expected)
    assert same(bits(model), bits(expected)) and not same(bits(model), before)
    undo_patch(weights(model), undo)
    assert same(bits(model), before)


def test_patches_over_one_another_are_undone_from_the_last(tmp_path):
    patches = [patch_of_adapter(adapter(tmp_path / str(seed), seed)) for seed in range(2)]
    model = tiny.tiny_llama()
    before = bits(model)
    undos = [apply_patch(weights(model), patch) for patch in patches]
    for undo in reversed(undos):
        undo_patch(weights(model), undo)
    assert same(bits(model), before)


def test_weights_of_any_layout_and_dtype():
    patch = patch_like(torch.tensor([0, 5, 11], dtype=torch.int32), (3, 4))
    for weight in (torch.rand(4, 3).t(), torch.rand(3, 4).bfloat16(), torch.rand(3, 4).half()):
        before = weight.clone()
        undo = apply_patch({"w": weight}, patch)
        expected = before.reshape(-1).clone()
        expected[[0, 5, 11]] = 0
        assert torch.equal(weight.reshape(-1), expected)
        undo_patch({"w": weight}, undo)
        assert torch.equal(weight, before)


def patch_like(places, shape):
    return Patch({"w": places}, {"w": shape})


def test_what_does_not_fit_changes_nothing(tmp_path):
    patch = patch_of_adapter(adapter(tmp_path / "mask", 0))
    model = tiny.tiny_llama(num_layers=2)
    before = bits(model)
    with pytest.raises(UserError, match=r"the model has no weight .*layers\.2"):
        apply_patch(weights(model), patch)
    other = tiny.tiny_llama(intermediate_size=64)
    with pytest.raises(UserError, match=r"has shape \(32, 64\), in the patch \(32, 48\)"):
        apply_patch(weights(other), patch)
    quantised = {name: weight.detach().to(torch.int8) for name, weight in tiny.tiny_llama().named_parameters()}
    with pytest.raises(UserError, match=r"is torch\.int8: a quantised weight cannot be patched"):
        apply_patch(quantised, patch)
    assert same(bits(model), before)


@pytest.mark.parametrize(
    "places,message",
    [
        (torch.tensor([0, 12]), "do not rise from 0 to below 12"),
        (torch.tensor([3, 3]), "do not rise"),
        (torch.tensor([-1, 3]), "do not rise"),
        (torch.tensor([0.0]), "places are torch.float32 of 1"),
        (torch.tensor([[0]]), "places are torch.int64 of 2"),
    ],
)
def test_damaged_places(tmp_path, places, message):
    write_patch(patch_like(places, (3, 4)), tmp_path / "p.safetensors")
    with pytest.raises(UserError, match=message):
        read_patch(tmp_path / "p.safetensors")


def test_files_that_are_no_patches(tmp_path, capsys):
    file = tmp_path / "p.safetensors"
    for metadata, message in (
        (None, "is no patch: its format is None"),
        ({"format": "maskft.patch.1"}, "is no patch file: 'shapes'"),
        ({"format": "maskft.patch.1", "shapes": "{"}, "is damaged"),
        ({"format": "maskft.patch.1", "shapes": json.dumps({"v": [1]})}, "have places or a shape alone"),
    ):
        safetensors.torch.save_file({"w.indices": torch.tensor([0])}, file, metadata)
        with pytest.raises(UserError, match=message):
            read_patch(file)
    file.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="is no patch file"):
        read_patch(file)
    adapter(tmp_path / "mask", 0)
    assert main(["masks", "export", str(tmp_path / "mask"), "--output", str(file)]) == 2
    assert "is there already; name another file" in capsys.readouterr().err
    assert file.read_bytes() == b"no safetensors"


# Another mask in a running model


def logits(model):
    with torch.inference_mode():
        return model(input_ids=tiny.token_ids()).logits


def test_a_swapped_mask_is_the_loaded_one(tmp_path):
    folders = [adapter(tmp_path / str(seed), seed) for seed in range(2)]
    expected = [logits(PeftModel.from_pretrained(tiny.tiny_llama(), folder)) for folder in folders]
    model = PeftModel.from_pretrained(tiny.tiny_llama(), folders[0])
    assert torch.equal(logits(model), expected[0]) and not torch.equal(*expected)
    for index in (1, 0, 1):
        swap_mask(model, folders[index])
        assert torch.equal(logits(model), expected[index])
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        folders[1] / "adapter_model.safetensors"
    ).read_bytes()


def test_a_swapped_mask_is_decoded_once(tmp_path, monkeypatch):
    """Checking a mask decodes it, and so does the first forward pass after loading; after a swap it is known."""
    folders = [adapter(tmp_path / str(seed), seed) for seed in range(3)]
    expected = [logits(PeftModel.from_pretrained(tiny.tiny_llama(), folder)) for folder in folders]
    model, decoded = PeftModel.from_pretrained(tiny.tiny_llama(), folders[0]), []
    monkeypatch.setattr(layer, "decode_mask", lambda coded, name: decoded.append(name) or decode_mask(coded, name))
    swap_mask(model, folders[1])
    swap_mask(model, folders[2])  # what was known of the mask before it is of no use
    assert torch.equal(logits(model), expected[2]) and not decoded
    masked = next(module for module in model.modules() if isinstance(module, layer.MaskedLinear))
    assert not masked.mask_decoded
    # A mask that is loaded in the place of a swapped one.
    swap_mask(model, folders[1])
    model.load_adapter(folders[0], "default")
    assert torch.equal(logits(model), expected[0]) and decoded


def test_masks_side_by_side_change_by_name(tmp_path):
    folders = [adapter(tmp_path / str(seed), seed) for seed in range(2)]
    expected = [logits(PeftModel.from_pretrained(tiny.tiny_llama(), folder)) for folder in folders]
    model = PeftModel.from_pretrained(tiny.tiny_llama(), folders[0], adapter_name="a")
    model.load_adapter(folders[1], "b")
    for name, index in (("b", 1), ("a", 0), ("b", 1)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[index])


def test_a_refused_swap_leaves_the_mask(tmp_path):
    model = PeftModel.from_pretrained(tiny.tiny_llama(), adapter(tmp_path / "a", 0))
    before = logits(model)
    adapter(tmp_path / "other_base", 1, tiny.tiny_llama(seed=5))
    adapter(tmp_path / "other_layers", 1, layers_to_transform=[0])
    adapter(tmp_path / "other_shape", 1, tiny.tiny_llama(intermediate_size=64))
    for folder, message in (
        ("other_base", "was trained on other base weights"),
        ("other_layers", "masks other layers than adapter 'default'"),
        ("other_shape", r"has shape \(64, 32\), the model.s weight \(48, 32\)"),
    ):
        with pytest.raises(UserError, match=message):
            swap_mask(model, tmp_path / folder)
        assert torch.equal(logits(model), before)
    with pytest.raises(UserError, match="no mask adapter named 'x'"):
        swap_mask(model, tmp_path / "a", "x")
    trained = get_peft_model(tiny.tiny_llama(), MaskConfig())
    with pytest.raises(UserError, match="is being trained or is merged"):
        swap_mask(trained, tmp_path / "a")
