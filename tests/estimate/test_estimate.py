"""Estimates against what really happens: parameters, files, saved activations, peak memory; what fits a card."""

import json
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

import tiny
from maskft import set_mask_progress
from maskft.models import EMBEDDED_MODEL
from maskft.training.method_arguments import mask_config
from maskft.tuner import MaskedLinear
from maskft_common.errors import UserError
from maskft_lab.cli.train import parse
from maskft_lab.estimate.estimate import RunMemory, estimate
from tiny import IS_OLD_TORCH

LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
LLAMA3_8B = {**LLAMA2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
SMALL = {
    **LLAMA2_7B,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
EXPERTS = {
    **SMALL,
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}


@pytest.fixture
def run(tmp_path):
    def build(config=SMALL, **options):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(config))
        settings = {
            "model_name_or_path": file,
            "max_length": 64,
            "per_device_train_batch_size": 2,
            "gradient_checkpointing": False,
            "max_steps": 10,
            "eval_strategy": "no",
            "bf16": True,  # the default of most machines
            **options,
        }
        words = []
        for key, value in settings.items():
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        return parse(words)

    return build


# Counting


def test_parameters_and_units(run):
    layers = {"mask_layers_to_transform": [1, 2]}
    result = estimate(run(method="mask", **layers), device="cpu")
    per_layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 256
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL))
    assert result.num_parameters == sum(p.numel() for p in model.parameters())
    assert result.num_trainable == result.num_masked == 2 * per_layer
    assert result.memory["scores"] == 4 * 2 * per_layer and result.memory["optimizer"] == 8 * 2 * per_layer
    assert result.memory["weights"] == 4 * result.num_parameters + 2 * 4 * 8, "weights and two rotary buffers of 8"
    assert result.memory["effective weights"] == 2 * 2 * per_layer, "bfloat16 autocast"
    partial = estimate(run(method="full", partial_layers=[1, 2]), device="cpu")
    assert partial.num_trainable == 2 * per_layer and partial.num_masked == 0
    assert estimate(run(method="full"), device="cpu").num_trainable == result.num_parameters
    lora = estimate(
        run(method="peft", peft_config='{"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}'), device="cpu"
    )
    assert lora.num_trainable == 4 * 2 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 256))
    fixed = estimate(run(method="l1_mask", **layers), device="cpu")
    assert fixed.num_masked == 2 * per_layer
    assert set(fixed.memory) == {"process", "weights", "masks"}


# Memory


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("config", [SMALL, EXPERTS], ids=["dense", "experts"])
def test_activations_of_a_mask_are_those_of_the_real_layers(config, bf16, run):
    """The stand-in for masked layers saves what they save."""
    planned = RunMemory(run(config, mask_layers_to_transform=[1, 2], bf16=bf16), "cpu")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(model, mask_config(planned.run.mask)).train()
    ids = torch.zeros(2, 64, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return -model(**inputs, fused_lm_head=True).log_probs.sum()

    forward().backward()  # makes the effective weights
    effective = [m.masker.value for m in model.modules() if isinstance(m, MaskedLinear)]
    known = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers(), *effective)}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    measured = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in known)
    # Autocast of torch 2.7 keeps a third more.
    assert planned.memory(2)["activations"] == pytest.approx(measured, rel=0.3 if IS_OLD_TORCH else 0.1)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("learner", ["topk", "logit", "gumbel"])
def test_factors_that_a_masker_keeps(learner, num_micro_batches, run):
    options = {"mask_layers_to_transform": [1, 2], "gradient_accumulation_steps": num_micro_batches, "bf16": False}
    if learner != "topk":
        options["mask_selection"] = learner
    if learner == "logit":
        options["mask_gradient"] = "sigmoid"
    settings = run(**options)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL))
    model = get_peft_model(model, mask_config(settings.mask)).train()
    set_mask_progress(model, 0.5)
    ids = torch.zeros(1, 4, dtype=torch.long)
    for _ in range(num_micro_batches):
        model(input_ids=ids, labels=ids).loss.backward()

    measured = 0
    for masker in (m.masker for m in model.modules() if isinstance(m, MaskedLinear)):
        kept = [factor for _, factor in masker._kept.values() if factor is not None]
        measured += sum(tensor.nbytes for tensor in (*kept, *masker.slopes.values()))
    term = "factors of gradients"
    assert RunMemory(settings, "cpu").kept[term] == measured
    # Slopes are kept on a GPU in any case, and a product with the signs never is.
    expected = 0 if learner == "topk" else RunMemory(settings, "cpu").kept["scores"]
    assert RunMemory(settings, "cuda").kept[term] == expected


@pytest.mark.parametrize(("bf16", "bytes_of_a_logit"), [(True, 8 * (2 + 4)), (False, 8 * 4 + 12)])
def test_logits_of_held_out_rows_are_converted_under_autocast(bf16, bytes_of_a_logit, run):
    needs = RunMemory(run(bf16=bf16, per_device_eval_batch_size=8), "cuda")
    assert needs._heldout_logit_bytes() == 64 * 512 * bytes_of_a_logit


def test_the_device_of_a_run_on_the_cpu_is_the_cpu(run, monkeypatch):
    settings = run(use_cpu=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert estimate(settings).device == "cpu"


def test_what_checkpointing_and_eight_bits_save(run):
    sizes = {"max_length": 256, "per_device_train_batch_size": 32}
    layers = {"mask_layers_to_transform": [2, 3], **sizes}
    plain = estimate(run(**layers), device="cuda")
    checkpointed = estimate(run(**sizes, gradient_checkpointing=True, method="full"), device="cuda")
    full = estimate(run(**sizes, method="full"), device="cuda")
    assert checkpointed.memory["activations"] < full.memory["activations"]
    eight = estimate(run(**layers, optim="adamw_bnb_8bit"), device="cuda")
    assert eight.memory["optimizer"] == pytest.approx(plain.memory["optimizer"] * (1 + 4 / 256) / 4, rel=1e-3)
    assert plain.memory["process"] == 0 and estimate(run(**layers), device="cpu").memory["process"] > 100e6


def test_the_largest_micro_batch_is_the_largest(run):
    planned = RunMemory(run(mask_layers_to_transform=[2, 3]), "cpu")
    limit_gb = sum(planned.memory(1000).values()) / 2**30
    planned_again = estimate(run(mask_layers_to_transform=[2, 3]), device="cpu", device_memory_gb=limit_gb)
    assert planned_again.largest_micro_batch == pytest.approx(1000, rel=0.1), "the process itself may have grown"


@pytest.mark.parametrize(
    ("config", "layers", "num_parameters"),
    [(LLAMA2_7B, [20, 21, 22, 23], 6_738_415_616), (LLAMA3_8B, [20, 21], 8_030_261_248)],
)
def test_7b_on_a_card_of_24_gb(config, layers, num_parameters, run):
    """13.5 GB of weights, 1.6 effective, 3.2 scores, 3.2 gradients and 1.6 of 8-bit moments leave room; 6.5 do not."""
    options = {"dtype": "bfloat16", "max_length": 512, "per_device_train_batch_size": 1}
    options |= {"mask_layers_to_transform": layers, "optim": "adamw_torch_8bit"}
    result = estimate(run(config, **options), device="cuda", device_memory_gb=24)
    assert result.num_parameters == num_parameters and result.largest_micro_batch >= 1
    with pytest.raises(UserError, match=r"too small for micro-batch 1: about .* GB are needed.*; try, in this"):
        estimate(run(config, **options | {"dtype": "float32"}), device="cuda", device_memory_gb=24)


def test_a_card_smaller_than_the_reserve_has_no_memory(run):
    with pytest.raises(UserError, match=r"GB are needed, 0 GB are there"):
        estimate(run(mask_layers_to_transform=[2, 3]), device="cuda", device_memory_gb=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "mask", "peft", "mask KL", "full KL", "peft KL of text"])
def test_peak_memory_of_real_runs(method, dtype, tmp_path):
    """Within 15 % of the peak resident memory of ``maskft train`` on the embedded model, in a fresh process."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"{i} " + "the quick brown fox jumps " * 60}) for i in range(24)))
    words = f"--model_name_or_path {EMBEDDED_MODEL} --dataset_name {rows} --output_dir {tmp_path / 'out'} --max_steps 2"
    method, _, kl = method.partition(" ")
    words += f" --eval_strategy no --save_strategy no --eval_split_size 8 --max_length 256 --method {method}"
    words += f" --per_device_train_batch_size 2 --gradient_checkpointing false --dtype {dtype} --report_to none"
    if method == "peft":
        words += ' --peft_config {"peft_type":"LORA","r":16,"target_modules":"all-linear"}'
    if method == "mask":
        words += " --mask_layers_to_transform 20 21 22 23"
    if kl:
        words += " --kl_to_base 0.1 --per_device_eval_batch_size 2"
    if kl == "KL of text":
        words += f" --kl_dataset_name {rows} --kl_batch_size 4"
    # In processes of their own: the memory of this one is that of all tests before.
    maskft = [sys.executable, "-m", "maskft_lab.cli.main"]
    subprocess.run([*maskft, "train", *words.split()], check=True)
    measured = json.loads((tmp_path / "out" / "training.json").read_text())["summary"]["peak_memory_bytes"]
    estimated = subprocess.run(
        [*maskft, "estimate", *words.split(), "--format", "json"], check=True, capture_output=True, text=True
    )
    assert json.loads(estimated.stdout)["peak_bytes"] == pytest.approx(measured, rel=0.15)


def test_a_kl_term(run):
    """Of README's advice there was no estimate. Its logits are of all tokens, and in full fine-tuning it has a copy."""
    sizes = {"per_device_train_batch_size": 8, "max_length": 256}
    plain = estimate(run(**sizes, method="mask"), device="cuda").memory
    near = estimate(run(**sizes, method="mask", kl_to_base=0.1), device="cuda").memory
    # Five float32 tensors, and the logits in bfloat16.
    assert near["logits"] == 8 * 256 * 512 * (5 * 4 + 2) > plain["logits"]
    assert near["activations"] == plain["activations"] and not near["base of the KL"]
    text = {"kl_dataset_name": "text.jsonl", "kl_batch_size": 16}
    on_text = estimate(run(**sizes, method="mask", kl_budget=0.1, **text), device="cuda").memory
    assert on_text["logits"] == 2 * near["logits"] and on_text["activations"] > 2.5 * near["activations"]
    full = estimate(run(**sizes, method="full", kl_to_base=0.1), device="cuda").memory
    assert full["base of the KL"] == full["weights"]
    on_cpu = estimate(run(**sizes, method="mask", kl_budget=0.1), device="cpu").memory
    assert on_cpu["start of the change"] == on_cpu["scores"]
    # Its parts are measured with many rows; the frozen copy is the start.
    many = {"per_device_eval_batch_size": 64, "max_length": 1024, "per_device_train_batch_size": 1}
    full = estimate(run(**many, method="full", kl_budget=0.1), device="cpu").memory
    assert full["buffers"] == pytest.approx(full["weights"], rel=1e-3) and not full["start of the change"]


def test_weights_that_stay_zero_change_no_size(run, tmp_path):
    """It ended in a traceback: a model without data has no weights to compare a mask's base with."""
    tiny.save_masks({"model.layers.0.mlp.up_proj": torch.ones(96, 64, dtype=torch.bool)}, tmp_path / "mask")
    plain = estimate(run(method="full"))
    assert estimate(run(method="full", keep_mask=tmp_path / "mask")).memory.keys() == plain.memory.keys()
    assert estimate(run(method="full", start_mask=tmp_path / "mask")).num_trainable == plain.num_trainable


# Bad input


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (SMALL, {"mask_layers_to_transform": [3, 9]}, "names layer 9; the model has layers 0 to 3"),
        (SMALL, {"model_name_or_path": "nowhere.json"}, "model configuration 'nowhere.json' does not exist"),
        (SMALL, {"optim": "lion_32bit"}, "optim is 'lion_32bit'"),
        (SMALL, {"kl_to_base": -0.1}, "kl_to_base is -0.1; it must be a finite number"),
        (SMALL, {"method": "full", "mask_sparsity": 0.5}, "mask_sparsity is an option of masks and has no effect"),
        (SMALL, {"partial_layers": [1]}, "partial_layers goes with --method full"),
        ({**SMALL, "num_hidden_layers": 0}, {}, "no decoder layers"),
        ({"model_type": "lama"}, {}, "cannot read the configuration"),
        ({"model_type": "t5"}, {}, "makes no causal language model"),
        # Shapes that do not fit each other, in the constructor and in a forward pass.
        ({**SMALL, "hidden_size": 2**62}, {}, "makes no causal language model: Storage size calculation overflowed"),
        ({**SMALL, "head_dim": 3}, {}, r"cannot be computed \(.*\); is it complete"),
        ({**SMALL, "num_key_value_heads": 3}, {}, r"cannot be computed \(.*\); is it complete"),
        ({**SMALL, "quantization_config": {"quant_method": "fp8"}}, {}, "is stored quantised"),
        (SMALL, {"max_length": 10**9}, "max_length is 1,000,000,000; there are estimates up to 1,048,576 tokens"),
    ],
)
def test_bad_input(config, options, message, run):
    with pytest.raises(UserError, match=message):
        estimate(run(config, **options))
