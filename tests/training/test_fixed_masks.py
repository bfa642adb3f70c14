"""Norms of the inputs of linear layers, against plain sums over what the layers were given."""

import pytest
import torch
from peft import get_peft_model

import tiny
from maskft import MaskConfig
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
