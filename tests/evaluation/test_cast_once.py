"""Weights that are cast once give the bits of autocast, and stay as they are."""

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from maskft import MaskConfig
from maskft_lab.cli.main import main
from maskft_lab.evaluation import cast_once
from maskft_lab.evaluation.cast_once import weights_cast_once

LINEAR = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def logits(model, is_cast_once):
    """Logits of two forward passes, and how many weights were cast once."""
    ids = tiny.token_ids()
    with torch.inference_mode(), autocast():
        with weights_cast_once(model) if is_cast_once else contextlib.nullcontext() as mode:
            out = [model(input_ids=ids, use_cache=False).logits for _ in range(2)]
    return torch.cat(out), len(mode.copies) if mode else 0


@pytest.mark.parametrize("name", tiny.MODELS)
def test_same_bits(name):
    model = tiny.MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected, _ = logits(model, is_cast_once=False)
    found, num_cast = logits(model, is_cast_once=True)
    assert torch.equal(found, expected) and num_cast > 0
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])


def test_embedding_tied_to_the_head_stays_in_float32():
    model = tiny.tiny_llama(tie_word_embeddings=True)
    expected, _ = logits(model, is_cast_once=False)
    found, num_cast = logits(model, is_cast_once=True)
    assert torch.equal(found, expected)
    assert num_cast == 3 * 7 + 1  # seven matrices a layer, and the head


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=LINEAR),
        # Takes norms of the base's weights, in their own dtype.
        LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
        IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
        MaskConfig(target_modules=LINEAR, sparsity=0.3),
    ],
    ids=["lora", "dora", "ia3", "mask"],
)
def test_same_bits_under_an_adapter(config):
    model = get_peft_model(tiny.tiny_llama(), config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    expected, _ = logits(model, is_cast_once=False)
    found, num_cast = logits(model, is_cast_once=True)
    assert torch.equal(found, expected) and num_cast > 0


def test_parts_without_autocast_stay_in_float32():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)
            self.device = torch.device("cpu")

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.linear(x) + F.linear(x.double(), self.linear.weight.double()).float()

    model = Router()
    x = torch.randn(3, 8)
    with autocast():
        expected = model(x)
        with weights_cast_once(model) as mode:
            assert torch.equal(model(x), expected) and expected.dtype == torch.float32
            # autocast leaves float64 alone.
            with pytest.raises(RuntimeError, match="dtype"):
                F.linear(x.double(), model.linear.weight)
    assert not mode.copies


def test_off_where_it_cannot_help(monkeypatch):
    model = tiny.tiny_llama()
    with weights_cast_once(model) as mode:
        assert mode is None  # no autocast
    _, num_cast = logits(model, is_cast_once=True)
    assert num_cast
    # All weights of linear layers fit, or not.
    num_bytes = 2 * sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr(cast_once, "free_memory_bytes", lambda device: 2 * num_bytes)
    assert logits(model, is_cast_once=True)[1] == num_cast
    monkeypatch.setattr(cast_once, "free_memory_bytes", lambda device: 2 * num_bytes - 1)
    assert logits(model, is_cast_once=True)[1] == 0


@pytest.mark.parametrize("kl", [False, True], ids=["losses", "kl"])
def test_evaluations_measure_the_same(kl, base, data, tmp_path, monkeypatch):
    """Losses and answers of a model and of a change to it, whose KL exchanges the weights during an evaluation."""
    changed = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in changed.parameters():
            weight += 0.05 * torch.randn_like(weight)
    changed.save_pretrained(tmp_path / "changed")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "changed")

    def tasks_of(folder, free_bytes):
        monkeypatch.setattr(cast_once, "free_memory_bytes", lambda device: free_bytes)
        words = [f"--model_name_or_path={base}", "--change", "none", str(tmp_path / "changed"), "--scale", "1", "0.5"]
        words += ["--name", "base", "half", f"--dataset_name={data}", "--bf16", "--max_new_tokens=4"]
        assert main(["evaluate", *words, *(["--kl"] if kl else []), f"--output_dir={folder}"]) == 0
        results = [json.loads((folder / name / "result.json").read_text())["tasks"] for name in ("base", "half")]
        for result in results:
            for task in result.values():
                task.pop("time_s", None)
        return results

    plain = tasks_of(tmp_path / "plain", free_bytes=0)
    once = tasks_of(tmp_path / "once", free_bytes=2**40)
    assert once == plain and once[0] != once[1]
