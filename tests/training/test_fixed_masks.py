"""Norms of the inputs of linear layers, against plain sums; a fixed mask of one's own."""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from maskft import MaskConfig, current_masks, topk_mask
from maskft.adapter.mask_set import MaskSet
from maskft.tuner import adapter_layers
from maskft.tuner.wanda import input_norms


@pytest.mark.parametrize("build, transposed", [(tiny.tiny_llama, False), (tiny.tiny_gpt2, True)])
def test_norms_of_the_inputs_of_a_layer(build, transposed):
    model = get_peft_model(build(), MaskConfig(inference_mode=True, task_type="CAUSAL_LM")).eval()
    layers = list(adapter_layers(model, "default").values())
    rows = [tiny.token_ids(1, length, seed=length)[0].tolist() for length in (5, 9, 3)]
    inputs = [[] for _ in layers]
    hooks = [
        layer.get_base_layer().register_forward_hook(lambda m, args, out, n=n: inputs[n].append(args[0]))
        for n, layer in enumerate(layers)
    ]
    with model.disable_adapter():
        norms = input_norms(model, layers, rows[:2])
    for hook in hooks:
        hook.remove()
    for layer, norm, seen in zip(layers, norms, inputs, strict=True):
        x_TI = torch.cat([x[0] for x in seen])
        assert len(x_TI) == 14 and layer.is_transposed == transposed
        expected = torch.tensor([sum(float(v) ** 2 for v in column) ** 0.5 for column in x_TI.t()])
        assert torch.allclose(norm.reshape(-1), expected, rtol=1e-5)
        assert norm.shape == ((len(expected), 1) if transposed else (1, len(expected)))
    assert not any(layer.get_base_layer()._forward_pre_hooks for layer in layers)


TOY = """
import sys
from maskft.tuner.fixed import FIXED_MASKS, FixedMask
FIXED_MASKS["largest_mask"] = FixedMask(lambda weight, norms, generator: -weight.abs())
from maskft_lab.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_fixed_mask_is_one_entry(base, data, tmp_path):
    """As docs/architecture.md tells: one that removes the largest weights, made, saved and loaded."""
    words = ["train", "--method", "largest_mask", "--model_name_or_path", base, "--dataset_name", data]
    words += ["--mask_sparsity", "0.2", "--eval_split_size", "16", "--output_dir", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", TOY, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = {name: model.get_submodule(name).weight.detach() for name in MaskSet.from_adapter(tmp_path / "out")}
    for name, mask in current_masks(PeftModel.from_pretrained(model, tmp_path / "out")).items():
        assert torch.equal(mask, topk_mask(-weights[name].abs(), 0.2, "signed"))
