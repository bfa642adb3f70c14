"""``maskft train`` over a base in four or eight bits."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import ModelConfig

from maskft import MaskConfig, adapter_layers
from maskft.quant.layers import storage_of
from maskft.training.build import build_model
from maskft.training.method_arguments import MaskArguments, MethodArguments
from maskft_lab.cli.main import main

from ..tiny import tiny_llama, token_ids
from ..tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    # bitsandbytes needs rows of whole blocks of 64 on some CPUs.
    tiny_llama(2, 288, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a} + {a} =", "completion": f" {2 * a}"} for a in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def train(folder, *words):
    return main(
        [
            *("train", "--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "sums.jsonl")),
            *("--eval_split_size", "8", "--as_chat", "false", "--max_steps", "2", "--report_to", "none"),
            *("--bf16", "false", "--keep_worse", "true", "--output_dir", str(folder / "out"), *words),
        ]
    )


@pytest.mark.quantised
@pytest.mark.parametrize("bits", [4, 8])
def test_a_mask_trains_over_it_and_merges_exactly(folder, bits):
    words = ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "nf4"] if bits == 4 else ["--load_in_8bit", "true"]
    assert train(folder, "--mask_sparsity", "0.3", *words) == 0
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert config["base_quantisation"] == ("bitsandbytes nf4" if bits == 4 else "bitsandbytes int8")

    how = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=how, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "out").train()
    layers = adapter_layers(model)
    expected = {
        name: storage_of(layer.base_layer).dequantise() * layer.get_mask("default") for name, layer in layers.items()
    }
    ids = token_ids(vocab_size=288)
    with torch.no_grad():
        masked_logits = model(ids).logits
    model.merge_adapter()
    for name, layer in layers.items():
        assert torch.equal(storage_of(layer.base_layer).dequantise(), expected[name])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, masked_logits, atol=1e-4, rtol=1e-3)


@pytest.mark.quantised
@pytest.mark.parametrize("kind", ["mask", "lora"])
def test_an_evaluation_between_steps_leaves_gradients_as_they_are(folder, kind):
    """On CPUs with AVX-512 and bfloat16, bitsandbytes' kernel of eval mode has no backward pass."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=how, dtype=torch.float32)
    if kind == "mask":
        model = get_peft_model(base, MaskConfig(target_modules=["gate_proj"], task_type="CAUSAL_LM"))
    else:
        peft_config = {"peft_type": "LORA", "target_modules": ["gate_proj"], "init_lora_weights": False}
        method = MethodArguments(method="peft", peft_config=peft_config)
        source = ModelConfig(model_name_or_path=str(folder / "model"))
        model = build_model(base, method, source, MaskArguments(), seed=0)
    ids = token_ids(vocab_size=288)

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    with torch.no_grad():
        model.eval()(ids)
    after = gradients()
    assert before.keys() == after.keys() and all(gradient.any() for gradient in before.values())
    assert all(torch.equal(after[name], before[name]) for name in before)


def save_codes_and_mask(folder, bits):
    """A checkpoint that is stored in four or eight bits, and a mask over it."""
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=how)
    base.save_pretrained(folder / "codes")
    tiny_tokenizer().save_pretrained(folder / "codes")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "codes")
    get_peft_model(loaded, MaskConfig(task_type="CAUSAL_LM")).save_pretrained(folder / "mask")


@pytest.mark.quantised
@pytest.mark.parametrize("bits", [4, 8])
def test_base_and_mask_are_evaluated_over_a_checkpoint_of_codes(folder, bits):
    """On CPUs with AVX-512 and bfloat16, bitsandbytes rounds four-bit scales when the base alone answers."""
    save_codes_and_mask(folder, bits)
    words = ["--model_name_or_path", str(folder / "codes"), "--adapter", "none", str(folder / "mask")]
    data = ["--dataset_name", str(folder / "sums.jsonl"), "--eval_split_size", "8", "--as_chat", "false"]
    assert main(["evaluate", *words, *data, "--name", "base", "mask", "--output_dir", str(folder / "results")]) == 0
    assert {path.name for path in (folder / "results").iterdir()} >= {"base", "mask"}


@pytest.mark.quantised
@pytest.mark.parametrize("bits", [4, 8])
def test_merging_into_a_checkpoint_of_codes_is_refused(folder, bits, capsys):
    save_codes_and_mask(folder, bits)
    capsys.readouterr()
    assert main(["merge", str(folder / "mask"), "--output_dir", str(folder / "merged")]) == 2
    kind = "nf4" if bits == 4 else "int8"
    assert f"/codes' is stored as bitsandbytes {kind}, and merge writes floats" in capsys.readouterr().err
    assert not (folder / "merged").exists()


def test_methods_that_write_floats_are_refused(folder, capsys):
    assert train(folder, "--method", "full", "--load_in_4bit", "true") == 2
    assert "method full needs weights that are floats" in capsys.readouterr().err
