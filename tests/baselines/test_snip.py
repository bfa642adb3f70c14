"""A method that prunes at initialisation by gradients: the example of docs/learners.md."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console

import tiny
from maskft import MaskConfig
from maskft.baselines import fixed
from maskft.baselines.gradients import weight_gradients
from maskft.data.prepared import Prepared
from maskft.training.fixed_masks import make_fixed_mask
from maskft.training.options import parse_words
from maskft.tuner.model import adapter_layers
from maskft_common.errors import UserError
from tiny_tokenizer import tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "learners.md"
ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [11, 12, 13], "labels": [-100, -100, 13]},
]


@pytest.fixture
def snip(monkeypatch):
    """What the page registers."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "snip_mask" in code]
    monkeypatch.setattr(fixed, "FIXED_MASKS", dict(fixed.FIXED_MASKS))
    monkeypatch.setattr("maskft.training.fixed_masks.FIXED_MASKS", fixed.FIXED_MASKS)
    exec(code, {})
    return fixed.FIXED_MASKS["snip_mask"]


def test_the_gradient_is_that_of_the_mean_loss_per_token():
    model = tiny.tiny_llama()
    expected_of = model.model.layers[1].mlp.up_proj.weight
    total = 0.0
    for row, count in zip(ROWS, (3, 1), strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        total = total + model(input_ids=ids, labels=labels).loss * count
    (expected,) = torch.autograd.grad(total / 4, [expected_of])
    masked = get_peft_model(model, MaskConfig(target_modules=["up_proj"])).eval()
    layers = adapter_layers(masked)
    with masked.disable_adapter():
        found = dict(zip(layers, weight_gradients(masked, list(layers.values()), ROWS), strict=True))
    (name,) = [name for name in found if ".1." in name]
    torch.testing.assert_close(found[name], expected)
    assert found[name].abs().max() > 0
    assert not any(layer.weight.requires_grad or layer.weight.grad is not None for layer in layers.values())


def test_snip_removes_the_smallest_product_of_gradient_and_weight(snip):
    """By hand; and as the run makes it, against the gradient."""
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    gradient = torch.tensor([[0.5, 0.1], [-0.01, 4.0]])  # products 0.5, 0.2, 0.03, 2
    (mask,) = fixed.fixed_masks("snip_mask", [weight], 0.5, gradients=[gradient])
    assert mask.tolist() == [[True, False], [False, True]]

    words = ["--method", "l1_mask", "--mask_sparsity", "0.2", "--mask_target_modules", "up_proj"]
    run = parse_words([*words, "--model_name_or_path", "tiny", "--dataset_name", "rows", "--bf16", "false"])[0]
    run.method.method = "snip_mask"
    rows = Dataset.from_list(ROWS)
    model = tiny.tiny_llama()
    masked, _ = make_fixed_mask(model, Prepared(rows, rows, {}), run, tiny_tokenizer(), Console(quiet=True))
    layers = list(adapter_layers(masked).values())
    with masked.disable_adapter():
        gradients = weight_gradients(masked, layers, ROWS)
    weights = [layer.weight.detach() for layer in layers]
    expected = fixed.fixed_masks("snip_mask", weights, 0.2, gradients=gradients)
    for layer, mask in zip(layers, expected, strict=True):
        assert torch.equal(layer.get_mask("default"), mask)
        assert not torch.equal(mask, fixed.fixed_masks("l1_mask", [layer.weight.detach()], 0.2)[0])


def test_a_layer_without_a_gradient_is_one_line():
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(target_modules=["up_proj"])).eval()
    layer = next(iter(adapter_layers(model).values()))
    stranger = get_peft_model(tiny.tiny_llama(), MaskConfig(target_modules=["up_proj"]))
    other = next(iter(adapter_layers(stranger).values()))
    with model.disable_adapter(), pytest.raises(UserError, match="the loss does not depend on"):
        weight_gradients(model, [layer, other], ROWS)
