"""Adapters of PEFT's: trained, saved, loaded, evaluated and merged by their configuration alone; what cannot be."""

import json
import os

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from maskft.training.kl import Base, KLOnTask
from maskft.training.method_arguments import method_label
from maskft.training.peft_config import adapter_config
from maskft.training.record import read_record
from maskft.training.verdict import read_heldout
from maskft_lab.cli.main import main

ADAPTERS = {
    "LoRA": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"},
    "PiSSA": {"peft_type": "LORA", "r": 2, "init_lora_weights": "pissa", "target_modules": "all-linear"},
    "DoRA": {"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": ["gate_proj"]},
    "IA3": {
        "peft_type": "IA3",
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
        "inference_mode": True,  # as PEFT saves it
    },
    "OFT": {"peft_type": "OFT", "oft_block_size": 8, "target_modules": ["q_proj"]},
    "OSF": {"peft_type": "OSF", "target_modules": ["q_proj", "v_proj"], "effective_rank": 2},
    "SHiRA": {"peft_type": "SHIRA", "r": 2, "mask_type": "random", "random_seed": 0, "target_modules": ["q_proj"]},
    "LN": {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_trains_and_is_saved_loaded_evaluated_and_merged(name, call, base, data, tmp_path):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(ADAPTERS[name]))
    there = os.path.relpath(base)  # named so that it is found from here alone
    status, err = call(method="peft", peft_config=file, max_steps=3, learning_rate=0.05, model_name_or_path=there)
    assert status == 0, err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    record = read_record(tmp_path / "out")
    assert record.summary.num_trainable > 0 and record.recipe["peft_config"] == ADAPTERS[name]
    losses = [row["eval_loss"] for row in record.summary.history if "eval_loss" in row]
    assert losses[-1] < losses[0]
    words = ["--adapter", tmp_path / "out", "--dataset_name", data, "--eval_split_size", 16, "--no_generate"]
    assert main(["evaluate", *map(str, words), "--output_dir", str(tmp_path / "eval")]) == 0
    # PiSSA moves a part of the base's weights into the adapter, so that what is left without it is no parent.
    assert (read_heldout(tmp_path / "out").parent_nll is None) == (name == "PiSSA")
    measured = json.loads((tmp_path / "eval" / "result.json").read_text())["tasks"]["heldout"]["metrics"]["nll"][
        "value"
    ]
    assert measured == pytest.approx(record.summary.best_loss, rel=1e-4)
    ids = torch.arange(5, 25)[None]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(merged, AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "method peft needs --peft_config"),
        ({"peft_type": "LORO"}, "peft_type 'LORO' (did you mean 'LORA'?)"),
        ({"peft_type": "MASK"}, "masks are --method mask"),
        ({"peft_type": "PROMPT_TUNING"}, "learns tokens before the prompt"),
        ({"peft_type": "ADALORA"}, "needs a call after every training step"),
        ({"peft_type": "LORA", "rank": 3}, "has an option 'rank'"),
        ({"peft_type": "LORA", "init_lora_weights": "eva"}, "an initialisation that PEFT computes from data"),
        ({"peft_type": "LORA", "target_modules": ["nothing"]}, "PEFT does not take it for this model"),
        ("{", """is neither a JSON object such as {"peft_type": "LORA"} nor a file with one"""),
        ("LIST", "list.json' is neither a JSON object such as"),
        ({"peft_type": "LORA", "target_modules": ["nothing"] * 30}, "PEFT does not take it for this model"),
    ],
)
def test_a_configuration_that_cannot_be_trained_is_one_line(config, message, call, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    config = str(tmp_path / "list.json") if config == "LIST" else config
    given = {} if config is None else {"peft_config": config if isinstance(config, str) else json.dumps(config)}
    status, err = call(method="peft", **given)
    assert status == 2 and message in err and err.count("error:") == 1


def test_options_of_another_method_are_refused(call):
    status, err = call(method="full", peft_config='{"peft_type": "LORA"}')
    assert status == 2 and "peft_config goes with --method peft, not with full" in err
    status, err = call(method="mask", lora_r=4)
    assert status == 2 and "lora_r is TRL's option of LoRA; write --method peft" in err


def test_results_name_the_adapter():
    assert method_label("peft", {"peft_config": {"peft_type": "IA3"}}) == "ia3"
    assert method_label("mask", {}) == "mask"


MODELS = {
    "llama": tiny.tiny_llama,
    "granite": lambda: tiny.decoder(transformers.GraniteConfig, transformers.GraniteForCausalLM, logits_scaling=0.3),
    "gemma2": lambda: tiny.decoder(
        transformers.Gemma2Config, transformers.Gemma2ForCausalLM, final_logit_softcapping=0.5
    ),
    "cohere": lambda: tiny.decoder(transformers.CohereConfig, transformers.CohereForCausalLM, logit_scale=4.0),
}


@pytest.mark.parametrize(
    ("method", "name"),
    [("full", "llama"), ("peft", "llama"), ("peft", "granite"), ("full", "gemma2"), ("peft", "cohere")],
)
def test_kl_to_base_is_the_sum_over_tokens(method, name):
    """Against a loop, after the model has been moved; a model that was not moved has no term."""
    model = MODELS[name]().train()
    if method == "peft":
        model = get_peft_model(model, adapter_config({**ADAPTERS["LoRA"], "lora_dropout": 0.0}))
    term = KLOnTask(model, Base(model))

    def kl_sum():
        term.before_forward(model, inputs, 0)
        model(input_ids=ids)
        return term.after_forward(model)

    ids = torch.arange(5, 25).reshape(2, 10)
    labels = torch.where(torch.arange(10) < 7, -100, ids)
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    before = model(input_ids=ids).logits.log_softmax(-1).detach()
    assert kl_sum().total.item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    after = model(input_ids=ids).logits.log_softmax(-1)
    expected = 0.0
    for row in range(2):
        for place in (6, 7, 8):  # of the tokens that predict a label
            p, q = before[row, place], after[row, place]
            expected += float((p.exp() * (p - q)).sum())
    value = kl_sum()
    assert value.total.item() == pytest.approx(expected, rel=1e-3) and expected > 0.01
    assert value.num_tokens == 6
    value.total.backward()
    assert all(
        p.grad is not None
        for name, p in model.named_parameters()
        if "lora_B" in name or ("lm_head" in name and p.requires_grad)
    )


def test_the_copy_of_a_model_goes_where_its_rows_are():
    """The Trainer moves the model, not the copy; there is no other device here than meta."""
    model = tiny.tiny_llama().to(torch.bfloat16)
    held = Base(model)
    with held.of(model.to("meta")) as base:
        assert {(p.device.type, p.dtype) for p in base.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "full", "learning_rate": 0.003},
        {"method": "mask", "learning_rate": 1.0},
        {"method": "peft", "peft_config": json.dumps(ADAPTERS["LoRA"]), "learning_rate": 0.03},
    ],
    ids=lambda options: options["method"],
)
def test_training_with_kl_to_base_stays_nearer_to_it(options, call, tmp_path):
    """Of the hidden states that the loss is computed from: what a second forward pass gives has no gradient."""
    ends = []
    for weight in (0, 100):
        status, err = call(name=f"kl{weight}", kl_to_base=weight, max_steps=6, load_best_model_at_end=False, **options)
        assert status == 0, err
        ends.append(read_record(tmp_path / f"kl{weight}").summary.end_loss)
    assert ends[0] < ends[1]  # what holds it near its base keeps it from the task


def test_kl_to_base_needs_a_loss(call):
    assert "kl_to_base is -1.0" in call(kl_to_base=-1)[1]
    assert "method random_mask is not trained" in call(method="random_mask", kl_to_base=1)[1]
