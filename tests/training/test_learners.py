"""Learners of masks through ``maskft train``: resuming, the best step, starts on data, optimizers, mistakes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from maskft import adapter_layers
from maskft.baselines.fixed import fixed_masks
from maskft.masks.mask_set import MaskSet
from maskft.masks.merge import load_masked
from maskft.masks.verify import verify
from maskft_common.layout import ADAPTER_CONFIG, TRAINING
from maskft_lab.cli.main import main

STEPS = {"max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 0.02}


@pytest.fixture
def train(call):
    """Keeps the mask that was learned, which is looked at, also where it is worse."""
    return lambda **changes: call(**{**STEPS, "keep_worse": True, **changes})


def settings_of(folder):
    return json.loads((folder / ADAPTER_CONFIG).read_text())


def test_the_saved_mask_is_that_of_the_best_step_on_a_ramp(train, tmp_path):
    status, err = train(mask_sparsity=0.45, mask_sparsity_ramp=1.0, learning_rate=0.0)
    assert status == 0 and "reached after 100% of training" in " ".join(err.split())
    step = json.loads((tmp_path / "out" / TRAINING).read_text())["summary"]["best_step"]
    assert settings_of(tmp_path / "out")["progress"] == step / 4
    verify(tmp_path / "out")
    removed = MaskSet.from_adapter(tmp_path / "out").sparsity
    assert removed == pytest.approx(0.45 * (1 - (1 - step / 4) ** 3), abs=1e-3)


def test_scores_start_in_an_order_taken_from_training_rows(train, base, tmp_path):
    options = {"mask_sparsity": 0.3, "num_calibration_samples": 5}
    status, err = train(mask_init_scores="wanda", learning_rate=0.0, **options)
    assert status == 0, err
    masks = MaskSet.from_adapter(tmp_path / "out")
    assert masks.sparsity == pytest.approx(0.3, abs=1e-3)
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    by_magnitude = {n: fixed_masks("l1_mask", [weights[f"{n}.weight"]], 0.3)[0] for n in masks}
    assert any(not torch.equal(masks[n], by_magnitude[n]) for n in masks)


def test_the_preset_of_deletion_tuning_trains_and_options_beside_it_win(train, tmp_path):
    status, err = train(mask_preset="deletion_tuning", mask_sharpness_end=50.0)
    assert status == 0 and "logit: removes weights with a score of 0 or less" in err, err
    assert "preset deletion_tuning, but {'sharpness_end': 50.0}" in err
    masks = MaskSet.from_adapter(tmp_path / "out")
    assert all(name.endswith("gate_proj") for name in masks) and len(masks) == 3


def test_removed_weights_take_the_value_before_fine_tuning(train, base, tmp_path, capsys):
    before = AutoModelForCausalLM.from_pretrained(base)
    for parameter in before.parameters():
        parameter.data.mul_(0.9)
    before.save_pretrained(tmp_path / "before")
    options = {"mask_removed_value": "base", "mask_removed_value_model": tmp_path / "before", "mask_sparsity": 0.3}
    status, err = train(**options)
    assert status == 0 and "a removed weight takes its" in err, err
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["base_model"], facts["removed_value_model"]) == (str(base), str(tmp_path / "before"))
    assert facts["removed_value_fingerprint"] != facts["base_fingerprint"]
    model, _, _ = load_masked(tmp_path / "out")
    masks = MaskSet.from_adapter(tmp_path / "out")
    for name, layer in adapter_layers(model).items():
        mask = masks[name.removeprefix("base_model.model.")]
        expected = torch.where(mask, layer.weight, layer.weight * 0.9)
        torch.testing.assert_close(layer.get_masked_weight(), expected)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"mask_price": 1.0}, "price=1.0 has no effect with selection='topk'"),
        ({"mask_sparsity_ramp": -0.1}, "sparsity_ramp is -0.1; it is a share of training"),
        ({"mask_sparsity": "auto"}, "invalid float value: 'auto'"),
        ({"mask_sparsity": 1.0}, "sparsity is 1.0; it is the fraction of weights removed"),
        (
            {"mask_selection": "logit", "mask_init_scores": "constant", "mask_init_value": 0},
            "that is every weight; set init_value above 0",
        ),
        ({"mask_removed_value": "base"}, "removed_value='base' needs the model before fine-tuning"),
        ({"mask_removed_value": "base", "mask_removed_value_model": "/nowhere/at/all"}, "removed_value_model: "),
        ({"mask_preset": "deletion_tuning", "fp16": True}, "would not count: use bf16"),
    ],
)
def test_mistakes_end_in_one_line(options, message, train):
    status, err = train(**options)
    assert status == 2 and message in err and err.count("maskft: error") == 1, err


def test_scores_that_remove_everything_on_the_way_end_in_one_line(train, tmp_path):
    # Decay of more than a whole score in one step of SGD turns all of them below 0.
    options = {"mask_selection": "logit", "mask_init_scores": "constant", "mask_init_value": 0.04}
    decay = {"optim": "sgd", "weight_decay": 100.0, "eval_steps": 1, "save_steps": 1}
    status, err = train(**options, **decay)
    assert status == 2 and err.count("maskft: error") == 1 and "Traceback" not in err, err
    assert "the mask removes all" in err and "every score is 0 or less" in err
    assert not (tmp_path / "out" / ADAPTER_CONFIG).exists(), "nothing half-written"


def test_the_values_of_another_architecture_end_in_one_line(train, tmp_path):
    tiny.tiny_llama(intermediate_size=64).save_pretrained(tmp_path / "other")
    status, err = train(mask_removed_value="base", mask_removed_value_model=tmp_path / "other")
    assert status == 2 and "removed_value_model" in err and "has another architecture: " in err
    assert err.count("maskft: error") == 1 and "Traceback" not in err
