"""A mask as places in a checkpoint's weights."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open

import tiny
from maskft import MaskConfig
from maskft.adapter.mask_set import MaskSet
from maskft_lab.cli.main import main


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2])
def test_zeros_at_the_exported_places_are_the_merged_model(tmp_path, make, capsys):
    get_peft_model(make(), MaskConfig(mask_seed=3, sparsity=0.2)).save_pretrained(tmp_path / "mask")
    command = ["masks", "export", str(tmp_path / "mask"), "--output", str(tmp_path / "places.safetensors")]
    assert main(command) == 0
    patched, expected = make(), make()
    weights = dict(patched.named_parameters())
    with safe_open(tmp_path / "places.safetensors", "pt") as file, torch.no_grad():
        shapes = json.loads(file.metadata()["shapes"])
        assert file.metadata()["mask_sha256"]
        for key in file.keys():
            name, places = key.removesuffix(".indices"), file.get_tensor(key)
            assert tuple(shapes[name]) == weights[name].shape and bool((places[1:] > places[:-1]).all())
            weights[name].view(-1)[places.long()] = 0
    MaskSet.from_adapter(tmp_path / "mask").apply_(expected)
    assert all(torch.equal(weight, weights[name]) for name, weight in expected.named_parameters())
    assert main(command) == 2
    assert "is there already; name another file" in capsys.readouterr().err
