"""``maskft merge`` into a checkpoint: the base is checked in any dtype, and what is written is said."""

import gc
import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from maskft import MaskConfig
from maskft.masks import merge as merge_module
from maskft.masks.merge import merge
from maskft.masks.verify import verify
from maskft.models import load_model
from maskft.tuner.layer import MaskedLinear
from maskft_common.errors import UserError
from tiny_tokenizer import tiny_tokenizer


def save_adapter(base, folder, **settings):
    config = MaskConfig(task_type="CAUSAL_LM", **settings)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def test_another_base_does_not_pass_in_float16(base, tmp_path):
    """Rounded to float16 no weights have the fingerprint of the training."""
    adapter = save_adapter(base, tmp_path / "adapter")
    other = tmp_path / "other"
    tiny.tiny_llama(vocab_size=len(tiny_tokenizer()), seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(UserError, match="was trained on other base weights"):
        merge(adapter, tmp_path / "merged", str(other), "float16")
    assert not (tmp_path / "merged").exists()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "base weights are in float16")
        merge(adapter, tmp_path / "merged", dtype="float16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.float16


def test_a_base_stored_in_float16_is_compared_as_it_is_stored(base, tmp_path):
    """A model of the hub in float16, over which a mask was trained in float32, and another one."""
    half = {}
    for seed in (0, 1):
        half[seed] = tmp_path / f"half{seed}"
        tiny.tiny_llama(vocab_size=len(tiny_tokenizer()), seed=seed).half().save_pretrained(half[seed])
        tiny_tokenizer().save_pretrained(half[seed])
    config = MaskConfig(task_type="CAUSAL_LM")
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(half[0], dtype=torch.float32), config)
    trained.save_pretrained(tmp_path / "adapter")

    with pytest.raises(UserError, match=r"trained on other base weights .* than these, stored in float16"):
        merge(tmp_path / "adapter", tmp_path / "merged", str(half[1]))
    assert not (tmp_path / "merged").exists()
    merge(tmp_path / "adapter", tmp_path / "merged", str(half[0]))

    # Over codes it was trained with other values than those of the model that they were made from.
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_quantisation": "bitsandbytes nf4"}))
    with pytest.warns(UserWarning, match="stored as bitsandbytes nf4, and these are stored as float16"):
        merge(tmp_path / "adapter", tmp_path / "of_codes", str(half[1]))


def test_a_base_without_a_tokenizer_is_found_before_the_model_is_loaded(base, tmp_path, monkeypatch):
    adapter = save_adapter(base, tmp_path / "adapter")
    other = tmp_path / "weights-alone"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(other)
    monkeypatch.setattr(merge_module, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(UserError, match="weights-alone' is not a folder with a tokenizer; save one into it"):
        merge(adapter, tmp_path / "merged", str(other))


def test_the_head_of_a_classifier_is_not_dropped(base, tmp_path):
    """PEFT would load the rest of the adapter into a causal language model, which has no such head."""
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    masked = get_peft_model(classifier, MaskConfig(task_type="SEQ_CLS"))
    masked.save_pretrained(tmp_path / "adapter")
    for use in (lambda: verify(tmp_path / "adapter", str(base)), lambda: merge(tmp_path / "adapter", tmp_path / "out")):
        with pytest.raises(UserError, match=r"replaces score.weight, which LlamaForCausalLM does not have; load"):
            use()
    assert not (tmp_path / "out").exists()
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), tmp_path / "adapter"
    )
    assert torch.equal(again.score.weight, masked.score.weight)


def test_a_base_that_is_not_here_is_said_to_be_the_adapters(base, tmp_path):
    """As after a folder has moved: the name is not one that the user gave."""
    moved = tmp_path / "moved"
    shutil.copytree(base, tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter")
    (tmp_path / "base").rename(moved)
    message = r"adapter '.*adapter' names the base model '.*base', which is not here; name its folder with --base"
    with pytest.raises(UserError, match=message):
        merge(adapter, tmp_path / "merged")
    merge(adapter, tmp_path / "merged", str(moved))


def test_an_empty_name_is_not_the_adapters_own_base(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    for use in (lambda: verify(adapter, ""), lambda: merge(adapter, tmp_path / "merged", "")):
        with pytest.raises(UserError, match=r"'' is not a model folder: it has no config\.json"):
            use()
    assert not (tmp_path / "merged").exists()


def test_what_would_undo_the_merge_is_not_kept(base, tmp_path, monkeypatch):
    """A byte a weight and more, beside two models in memory."""
    adapter = save_adapter(base, tmp_path / "adapter")
    counts = []

    def load(name, *args, **kwargs):
        counts.append(sum(type(thing) is MaskedLinear for thing in gc.get_objects()))
        return load_model(name, *args, **kwargs)

    gc.collect()
    monkeypatch.setattr(merge_module, "load_model", load)
    merge(adapter, tmp_path / "merged")
    # When the base is loaded, and when the written checkpoint is; other tests may have left some.
    assert counts == [counts[0]] * 2


def test_a_model_that_computes_nan_is_not_said_to_be_written_wrongly(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    broken = shutil.copytree(base, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"computes NaN in float32; check the weights of its base '.*broken', or name"):
        merge(adapter, tmp_path / "merged", str(broken))
    assert not (tmp_path / "merged").exists()


def test_weights_beside_the_mask_are_said_and_are_not_scaled(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    assert "set to zero; replaced in full: lm_head.weight; reloaded" in merge(adapter, tmp_path / "merged")
    with pytest.raises(UserError, match=r"also replaces weights \(lm_head.weight\), .*: leave out --scale"):
        merge(adapter, tmp_path / "part", scale=0.5)
