"""Fingerprints of bases: which weights count as the same."""

import json

import pytest
import torch

from maskft.masks.fingerprints import is_the_base, weights_fingerprint
from maskft.masks.mask_set import read_config
from maskft_lab.ready import ready_masks


def of(*values, dtype=torch.float32):
    return weights_fingerprint([("layer", torch.tensor([values], dtype=dtype))])


def test_negative_zeros_are_zeros():
    """As every dequantised GGUF file holds them, and torch.lerp(w, w, 0) makes +0.0 of them."""
    assert of(-0.0, 1.0) == of(0.0, 1.0)
    weight = torch.tensor([[-0.0, -1.0]])
    copied = torch.lerp(weight, weight, 0)  # noqa: TID251
    assert not torch.signbit(copied[0, 0])
    assert weights_fingerprint([("layer", weight)]) == weights_fingerprint([("layer", copied)])
    assert torch.signbit(weight[0, 0])  # and the weight itself is left as it was


def test_the_dtype_does_not_matter_but_any_value_does():
    assert of(0.1, 2.0) == weights_fingerprint([("layer", torch.tensor([[0.1, 2.0]]).to(torch.bfloat16))])
    assert len({of(0.1, 2.0), of(0.1, -2.0), of(2.0, 0.1), of(0.1)}) == 4
    assert of(0.1) != weights_fingerprint([("other", torch.tensor([[0.1]]))])
    assert of(float("nan")) == of(float("nan")) != of(0.0)


def test_known_values():
    """Of weights without negative zeros; masks that were saved before are bound to it."""
    assert of(0.0, 1.0, -2.5) == "1e35fc20cb66ac6eac8f23b302611e90d28004b34beba2562844e63008a0803c"


def test_ready_masks_are_read_by_their_fingerprint():
    for folder in ready_masks().values():
        config = read_config(folder)
        assert config.base_fingerprint == json.loads((folder / "adapter_config.json").read_text())["base_fingerprint"]
        assert is_the_base(config.base_fingerprint, {torch.float32}, config)


def test_float16_passes_with_a_warning():
    config = read_config(next(iter(ready_masks().values())))
    with pytest.warns(UserWarning, match="are in float16"):
        assert is_the_base("0" * 64, {torch.float16}, config)
    assert not is_the_base("0" * 64, {torch.bfloat16}, config)
