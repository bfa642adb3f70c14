"""Training with cached weights, against a model that sorts in every forward pass and leaves the rest to autograd."""

import pytest
import torch
from peft import get_peft_model

import reference
import tiny
from maskft import MaskConfig
from maskft.tuner import adapter_layers, current_masks

STEPS, LEARNING_RATE, SPARSITY = 20, 3e-3, 0.1


def ours():
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(sparsity=SPARSITY, layers_to_transform=[1, 2]))
    return model, [layer.mask_scores["default"] for layer in adapter_layers(model).values()]


def naive(like):
    model, layers = tiny.tiny_llama().requires_grad_(False), []
    for name, layer in adapter_layers(like).items():
        parent, _, leaf = name.removeprefix("base_model.model.").rpartition(".")
        module = reference.SortingLinear(
            model.get_submodule(f"{parent}.{leaf}"), layer.mask_scores["default"].detach(), SPARSITY
        )
        setattr(model.get_submodule(parent), leaf, module)
        layers.append(module.scores)
    return model, layers


def trained(model, parameters, accumulation):
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        for index in range(accumulation):
            ids = tiny.token_ids(4, 12, seed=step * accumulation + index)
            loss = model(input_ids=ids, labels=ids).loss
            (loss / accumulation).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_float32_run_is_bit_identical_to_sorting_in_every_forward(accumulation):
    model, scores = ours()
    plain, plain_scores = naive(model)
    assert trained(model, scores, accumulation) == trained(plain, plain_scores, accumulation)
    assert all(torch.equal(a, b) for a, b in zip(scores, plain_scores, strict=True))
    for mask, other in zip(current_masks(model).values(), plain_scores, strict=True):
        assert torch.equal(mask, reference.topk_mask(other.detach(), SPARSITY))
    start, _ = ours()
    before = current_masks(start)
    assert sum(int((mask ^ before[name]).sum()) for name, mask in current_masks(model).items()) > 50


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
