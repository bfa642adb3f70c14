"""llama.cpp serves a patched file, and answers as transformers does over the same weights."""

import sys

import pytest
import torch
import xllamacpp
from benchmarks import served_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.masks.gguf import merge_into_gguf

from ..tiny import save_masks, tiny_llama
from ..tiny_gguf import write_gguf
from ..tiny_tokenizer import tiny_tokenizer

PROMPTS = ["the answer is", "in the end", "4 + 2 =", "what then"]
ENDINGS = [" 42 and nothing else", " it was the engine", " 6, as I think", " the cat in the hat"]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model():
    """A tiny model that knows four sentences by heart, so that greedy answers have a margin over rounding."""
    model = tiny_llama(2, 288, hidden_size=64, intermediate_size=96, head_dim=16, num_key_value_heads=2)
    tokenizer = tiny_tokenizer()
    batch = tokenizer([a + b for a, b in zip(PROMPTS, ENDINGS, strict=True)], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("served")
    base = write_gguf(folder / "base.gguf", model)
    generator = torch.Generator().manual_seed(0)
    masks = {
        f"model.layers.{index}.mlp.gate_proj": torch.rand(96, 64, generator=generator) > 0.02 for index in range(2)
    }
    masks |= {f"model.layers.{index}.self_attn.q_proj": torch.ones(64, 64) > 0 for index in range(2)}
    masks["model.layers.1.self_attn.q_proj"][5, ::7] = False
    save_masks(masks, folder / "mask")
    merge_into_gguf(folder / "mask", base, folder / "task.gguf")
    return folder


def answers_of_llama_cpp(file):
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = 128
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    request = {"max_tokens": NUM_TOKENS, "temperature": 0}
    return [server.handle_completions({"prompt": prompt, **request})["choices"][0]["text"] for prompt in PROMPTS]


def answers_of_transformers(folder, name):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        ids.pop("token_type_ids", None)
        out = model.generate(**ids, max_new_tokens=NUM_TOKENS, do_sample=False)
        found.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("name", ["base.gguf", "task.gguf"])
def test_llama_cpp_answers_as_transformers_does(files, name):
    expected = answers_of_transformers(files, name)
    found = answers_of_llama_cpp(files / name)
    # The space before the first word is lost where transformers 5.10 decodes.
    assert [answer.lstrip() for answer in found] == [answer.lstrip() for answer in expected]
    if name == "base.gguf":
        assert all(ending.startswith(answer[:5]) for ending, answer in zip(ENDINGS, found, strict=True))


def test_transformers_reads_the_patched_file_as_base_times_mask(files):
    """Also queries, whose rows the file has in another order."""
    base = AutoModelForCausalLM.from_pretrained(files, gguf_file="base.gguf", dtype=torch.float32)
    task = AutoModelForCausalLM.from_pretrained(files, gguf_file="task.gguf", dtype=torch.float32)
    weights = dict(base.named_parameters())
    differing = {name for name, weight in task.named_parameters() if not torch.equal(weight, weights[name])}
    assert differing == {
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    }
    removed = task.get_submodule("model.layers.1.self_attn.q_proj").weight[5, ::7]
    assert torch.equal(removed, torch.zeros_like(removed))


def test_the_benchmark_serves_base_mask_and_lora(files, monkeypatch, capsys):
    words = ["served", str(files / "base.gguf"), str(files / "mask"), "--rounds", "1", "--num_tokens", "4"]
    monkeypatch.setattr(sys, "argv", words)
    served_gguf.main()
    *speeds, sizes = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split(":")[0] for line in speeds] == ["base", "mask merged", "LoRA r 16 beside"]
    # Two layers: queries and outputs 64 x 64, keys and values 64 x 32, three matrices of 64 x 96; two bytes a value.
    num_values = 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    num_bytes = int(sizes.rsplit(" ", 1)[1].replace(",", ""))
    assert 2 * num_values < num_bytes < 2 * num_values + 8_000
