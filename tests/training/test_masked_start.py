"""Mask, then weights: removed weights stay at exactly zero, or only start there."""

import copy
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from maskft import MaskConfig, UserError
from maskft.masks.mask_set import MaskSet
from maskft.training.masked_start import RemovedStayZero, set_removed_to_zero
from maskft.training.method_arguments import MethodArguments
from maskft.training.record import read_record
from maskft.training.verdict import read_heldout
from maskft_common.layout import LAST
from tiny_tokenizer import tiny_tokenizer

LORA = '{"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}'


@pytest.fixture
def adapter(call, tmp_path):
    assert call("adapter", method="random_mask", mask_sparsity=0.3)[0] == 0
    return tmp_path / "adapter"


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def num_nonzero_removed(folder, masks):
    weights = weights_of(folder)
    return sum(int(torch.count_nonzero(weights[f"{name}.weight"][~mask])) for name, mask in masks.items())


def test_removed_weights_stay_at_zero_and_the_others_train(adapter, base, call, tmp_path):
    settings = {"method": "full", "learning_rate": 1e-2, "weight_decay": 0.1, "keep_last": True, "max_steps": 4}
    assert call(keep_mask=adapter, **settings)[0] == 0
    masks, before, after = MaskSet.from_adapter(adapter), weights_of(base), weights_of(tmp_path / "out")
    folders = [tmp_path / "out", *(tmp_path / "out").glob("checkpoint-*"), tmp_path / "out" / LAST]
    assert len(folders) >= 3 and all(num_nonzero_removed(folder, masks) == 0 for folder in folders)
    for name, mask in masks.items():
        moved = after[f"{name}.weight"][mask] != before[f"{name}.weight"][mask]
        assert moved.float().mean() > 0.9
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert read_record(tmp_path / "out").recipe["keep_mask"] == "adapter"


def test_removed_weights_only_start_at_zero(adapter, base, call, tmp_path):
    masks = MaskSet.from_adapter(adapter)
    still = {"method": "full", "start_mask": adapter, "learning_rate": 0.0}
    assert call("still", **still)[0] == 0
    assert num_nonzero_removed(tmp_path / "still", masks) == 0
    assert call(**{**still, "learning_rate": 1e-2}, max_steps=4, eval_strategy="no")[0] == 0
    assert num_nonzero_removed(tmp_path / "out", masks) > 0.9 * masks.num_removed
    masked = AutoModelForCausalLM.from_pretrained(base)
    masks.apply_(masked)
    start = weights_of(tmp_path / "still")
    assert all(torch.equal(start[name], value) for name, value in masked.state_dict().items())


def test_a_resumed_run_keeps_them_at_zero(adapter, call, tmp_path):
    """Bit for bit the uninterrupted one."""
    settings = {"method": "full", "keep_mask": adapter, "max_steps": 4, "learning_rate": 1e-2}
    for name in ("whole", "cut"):
        assert call(name, **settings)[0] == 0
    for file in (tmp_path / "cut").glob("model*"):
        file.unlink()
    for file in (tmp_path / "cut" / "checkpoint-4").iterdir():
        file.unlink()
    (tmp_path / "cut" / "checkpoint-4").rmdir()
    assert call("cut", resume_from_checkpoint="true", **settings)[0] == 0
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_an_adapter_after_random_pruning_is_merged(adapter, base, call, tmp_path):
    """What is saved is the pruned base plus the adapter of the best checkpoint, and loads as a model."""
    lora = {"method": "peft", "peft_config": LORA, "start_mask": adapter, "learning_rate": 1e-2}
    status, err = call(**lora, max_steps=4, save_steps=2, eval_steps=2)
    assert status == 0 and "--model_name_or_path" in err, err
    out, record = tmp_path / "out", read_record(tmp_path / "out")
    assert not (out / "adapter_config.json").exists() and record.recipe["start_mask"] == "adapter"
    pruned = AutoModelForCausalLM.from_pretrained(base)
    MaskSet.from_adapter(adapter).apply_(pruned)
    best = PeftModel.from_pretrained(pruned, out / f"checkpoint-{record.summary.best_step}").merge_and_unload()
    saved = weights_of(out)
    assert record.summary.best_step > 0
    for name, value in best.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-6)
    assert max(read_heldout(out).nll) != max(read_heldout(out).parent_nll)


def test_gradients_of_removed_weights_do_not_count_in_the_norm():
    model, mask = tiny.tiny_llama(), torch.ones(32, 32, dtype=torch.bool)
    name = "model.layers.1.self_attn.q_proj"
    mask[3] = False
    callback, weight = RemovedStayZero(MaskSet({name: mask})), model.get_submodule(name).weight
    callback.on_train_begin(None, None, None, model=model)
    callback.clear_gradients()  # without a gradient, as in a frozen layer
    weight.grad = torch.ones_like(weight)
    callback.clear_gradients()
    assert torch.equal(weight.grad, mask.float())
    callback.on_optimizer_step(None, None, None)
    assert torch.equal(weight == 0, ~mask)


@pytest.mark.parametrize("option", ["keep_mask", "start_mask"])
def test_a_mask_of_another_model_is_refused(option, base, call, tmp_path):
    assert call("adapter", method="random_mask")[0] == 0
    for number, overrides in enumerate(({"seed": 1}, {"num_layers": 2}, {"intermediate_size": 64})):
        other, tokenizer = tmp_path / f"other{number}", tiny_tokenizer()
        settings = {"vocab_size": len(tokenizer), "num_layers": 3, **overrides}
        tiny.tiny_llama(**settings).save_pretrained(other)
        tokenizer.save_pretrained(other)
        status, err = call(method="full", model_name_or_path=other, **{option: tmp_path / "adapter"})
        assert status == 2 and re.search(rf"error: {option} .* is a mask of another model: ", err)
        assert err.count("maskft: error") == 1 and "Traceback" not in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_compared_with_its_base_as_it_is_stored(dtype, tmp_path):
    model, other = (tiny.tiny_llama(seed=seed) for seed in (0, 1))
    get_peft_model(copy.deepcopy(model), MaskConfig(sparsity=0.3, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    method = MethodArguments(method="full", start_mask=str(tmp_path))
    model = model.to(dtype)
    set_removed_to_zero(model, method)
    masks = MaskSet.from_adapter(tmp_path)
    assert all((model.get_submodule(name).weight[~mask] == 0).all() for name, mask in masks.items())
    with pytest.raises(UserError, match=r"start_mask .* is a mask of another model: .*fingerprint"):
        set_removed_to_zero(other.to(dtype), method)


def test_a_mask_that_removes_nothing_is_refused(tmp_path):
    """As a training saves that gained nothing."""
    get_peft_model(tiny.tiny_llama(), MaskConfig(sparsity=0.0, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"keep_mask .* removes nothing; name a mask that does"):
        set_removed_to_zero(tiny.tiny_llama(), MethodArguments(method="full", keep_mask=str(tmp_path)))


def test_a_mask_with_other_weights_beside_it_is_refused(tmp_path):
    model = tiny.tiny_llama()
    config = MaskConfig(sparsity=0.3, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"start_mask .* also replaces weights of the base \(.*lm_head.*\)"):
        set_removed_to_zero(model, MethodArguments(method="full", start_mask=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "mask", "keep_mask": "x"}, "keep_mask goes with --method full, not with mask"),
        ({"method": "peft", "peft_config": LORA, "keep_mask": "x"}, "keep_mask goes with --method full, not with peft"),
        (
            {"method": "peft", "peft_config": LORA, "start_mask": "x", "keep_last": True},
            "an adapter after start_mask is merged at the end: drop keep_last",
        ),
        ({"method": "full", "keep_mask": "x", "start_mask": "x"}, "keep_mask and start_mask are both given"),
        ({"method": "full", "keep_mask": "no-such"}, "adapter folder 'no-such' does not exist"),
    ],
)
def test_mistakes_are_one_line(changes, message, call, tmp_path):
    status, err = call(**changes)
    assert status == 2 and message in err and err.count("maskft: error") == 1
    assert not (tmp_path / "out").exists()
