"""Learners of masks: gates and gradients against their formulas, the layer in all states, budgets, starts, files."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

import tiny
from maskft import MaskConfig, MaskProgress, adapter_layers, current_masks, num_removed, set_mask_progress, start_scores
from maskft.baselines.fixed import fixed_masks, ranks_per_output
from maskft.learners import gates
from maskft.learners import removed_value as removed_value_module
from maskft.masks.mask_set import MaskSet
from maskft.masks.merge import merge
from maskft.masks.verify import verify
from maskft.tuner import selection
from maskft.tuner.layer import MaskedLinear
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_CONFIG
from tiny_tokenizer import tiny_tokenizer


def make_layer(conv1d=False, in_features=12, out_features=8, **config):
    base = Conv1D(out_features, in_features) if conv1d else nn.Linear(in_features, out_features)
    if conv1d:
        nn.init.normal_(base.bias)
    layer = MaskedLinear(base.requires_grad_(False), "default", MaskConfig(**config), "lin")
    layer.set_adapter("default")
    return layer


def scores_like(*shape, seed=0, std=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# The definitions, entry by entry


def test_every_slope_is_the_derivative_of_its_gate():
    """Central differences in float64, away from where hard concrete clips."""
    scores, noise, h = scores_like(40).double(), scores_like(40, seed=1).double(), 1e-6
    gates_of = {
        "gumbel": lambda s: gates.gumbel_gate(s, noise, 3.0, 0.7),
        "hard_concrete": lambda s: gates.hard_concrete_gate(s, noise),
        "sigmoid": lambda s: (torch.sigmoid(2.5 * s), selection.sigmoid_slope(s, 2.5)),
        "hard_concrete_kept": lambda s: (
            torch.sigmoid(s - 2 / 3 * math.log(0.1 / 1.1)),
            gates.hard_concrete_kept_slope(s),
        ),
    }
    for name, gate in gates_of.items():
        numeric = (gate(scores + h)[0] - gate(scores - h)[0]) / (2 * h)
        torch.testing.assert_close(gate(scores)[1], numeric, rtol=1e-5, atol=1e-8, msg=name)


def test_logistic_noise_and_its_hard_concrete_zeros():
    noise = selection.logistic_noise(torch.Size([200_000]), torch.Generator().manual_seed(0))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.01)
    # The probability that a gate is 0 is the one whose derivative the price takes (1 - Eq. 12).
    gate, _ = gates.hard_concrete_gate(torch.full_like(noise, 0.4), noise)
    expected = 1 - sigmoid(0.4 - 2 / 3 * math.log(0.1 / 1.1))
    assert (gate == 0).float().mean().item() == pytest.approx(expected, abs=0.003)


# The layer

BASE = scores_like(8, 12, seed=9)
LEARNERS = [
    {"selection": "logit", "init_value": 0.02},
    {"selection": "logit", "init_value": 0.02, "gradient": "sigmoid", "sharpness": 5.0, "sharpness_end": 50.0},
    {"selection": "logit", "init_value": 0.02, "price": 3.0, "sharpness": 4.0},
    {"selection": "gumbel", "init_value": 0.5, "sharpness": 2.0},
    {"selection": "gumbel", "init_value": 0.5, "price": 3.0},
    {"selection": "hard_concrete", "init_value": 0.5, "init_std": 1.0},
    {"selection": "hard_concrete", "init_value": 0.5, "price": 3.0},
    {"selection": "topk", "sparsity": 0.3, "sparsity_ramp": 0.8},
]
CUT = [
    {"selection": "threshold", "threshold": 0.01},
    {"selection": "threshold", "threshold": -0.01, "rank_by": "signed"},
]


def naive_gate(config, scores, noise, progress):
    """What a learner does, from its formulas and autograd: (gate, relaxed share removed)."""
    k = config.sharpness if config.sharpness_end is None else config.sharpness * (1 - progress) + 50.0 * progress
    if config.selection == "logit":
        soft = torch.sigmoid(k * scores) if config.gradient == "sigmoid" else scores
        gate = (scores > 0).float() + soft - soft.detach()
        return gate, (1 - torch.sigmoid(k * scores)).mean()
    if config.selection == "gumbel":
        tau = 4.0 * (1 - progress) + 0.05 * progress
        return torch.sigmoid((k * scores + noise) / tau), (1 - torch.sigmoid(k * scores)).mean()
    if config.selection == "hard_concrete":
        gate = (torch.sigmoid((scores + noise) / (2 / 3)) * 1.2 - 0.1).clamp(0, 1)
        return gate, (1 - torch.sigmoid(scores - 2 / 3 * math.log(0.1 / 1.1))).mean()
    if config.selection == "threshold":
        keys = scores.abs() if config.rank_by == "abs" else scores
        return (keys >= config.threshold).float() + keys - keys.detach(), torch.zeros(())
    removed = round(0.3 * (1 - (1 - progress / 0.8) ** 3) * scores.numel())
    mask = torch.ones(scores.numel())
    mask[scores.abs().flatten().argsort(stable=True)[:removed]] = 0
    return mask.view_as(scores) + scores.abs() - scores.abs().detach(), torch.zeros(())


@pytest.mark.parametrize("removed_value", ["zero", "base"])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("settings", LEARNERS + CUT, ids=str)
def test_layer_output_and_gradients_are_those_of_autograd_through_the_formula(settings, conv1d, removed_value):
    layer, progress = make_layer(conv1d=conv1d, **settings).train(), 0.25
    config, scores, weight = layer.mask_configs["default"], layer.mask_scores["default"], layer.weight
    value = torch.zeros_like(weight)
    if removed_value == "base":
        config.removed_value, value = "base", (BASE.t() if conv1d else BASE).clone()
        layer.removed_values["default"] = value
    set_mask_progress(layer, progress)
    x, upstream = torch.randn(5, 12, requires_grad=True), torch.randn(5, 8)
    y = layer(x)
    y.backward(upstream)
    noise = selection.draw_noise(config, "lin", scores.shape, scores.device)
    s, x_ = scores.detach().clone().requires_grad_(True), x.detach().clone().requires_grad_(True)
    gate, share = naive_gate(config, s, noise, progress)
    effective = value + (weight - value) * gate
    expected = F.linear(x_, effective if not conv1d else effective.t(), layer.base_layer.bias)
    ((expected * upstream).sum() + config.price * share).backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, x_.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.grad, s.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", LEARNERS, ids=str)
def test_in_evaluation_the_gate_is_the_mask_that_is_saved(settings):
    layer = make_layer(**settings)
    set_mask_progress(layer, 0.5)
    layer.eval()
    expected = layer.weight * layer.get_mask("default")
    assert torch.equal(layer.get_masked_weight(), expected)
    if settings["selection"] != "topk":
        assert torch.equal(layer.get_mask("default"), layer.mask_scores["default"] > 0)
    layer.train()
    is_soft = selection.LEARNERS[settings["selection"]].soft_gate is not None
    assert torch.equal(layer.get_masked_weight(), expected) != is_soft


def test_the_price_is_paid_once_per_step_and_not_per_micro_batch():
    layers = [make_layer(selection="logit", init_value=0.02, price=price) for price in (0.0, 7.0)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizer = torch.optim.SGD(layers[1].mask_scores.parameters(), lr=0.0)
    for _ in range(2):
        for layer in layers:
            layer.zero_grad()
        for seed in range(3):
            for layer in layers:
                layer(scores_like(4, 12, seed=seed)).square().sum().backward()
        plain, priced = (layer.mask_scores["default"] for layer in layers)
        p = torch.sigmoid(priced.detach())
        torch.testing.assert_close(priced.grad - plain.grad, -7.0 * p * (1 - p) / 96, rtol=1e-3, atol=1e-6)
        optimizer.step()


@pytest.mark.parametrize("name", ["gumbel", "hard_concrete"])
def test_noise_is_drawn_once_per_step_of_a_seed_and_a_layer(name):
    layer = make_layer(selection=name, init_value=0.5)
    set_mask_progress(layer, 0.25)
    first = layer.get_masked_weight().clone()
    layer.eval().get_masked_weight()
    assert torch.equal(layer.train().get_masked_weight(), first)
    set_mask_progress(layer, 0.5)
    assert not torch.equal(layer.get_masked_weight(), first)
    set_mask_progress(layer, 0.25)
    assert torch.equal(layer.get_masked_weight(), first)
    config = layer.mask_configs["default"]
    noise = [selection.draw_noise(config, name, torch.Size([8]), torch.device("cpu")) for name in ("a", "b")]
    config.mask_seed = 1
    noise.append(selection.draw_noise(config, "a", torch.Size([8]), torch.device("cpu")))
    assert len({tuple(n.tolist()) for n in noise}) == 3


def test_the_count_along_a_ramp_is_exact_and_saved(tmp_path):
    config = MaskConfig(sparsity=0.4, sparsity_ramp=0.5, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(tiny.tiny_llama(), config)
    for progress in (0.0, 0.1, 0.3, 0.5, 1.0):
        set_mask_progress(model, progress)
        share = 0.4 * (1 - (1 - min(progress / 0.5, 1)) ** 3)
        masks = current_masks(model)
        assert all(int((~mask).sum()) == num_removed(mask.numel(), share) for mask in masks.values())
        zeros = sum(int((layer.get_masked_weight() == 0).sum()) for layer in adapter_layers(model).values())
        assert zeros == sum(int((~m).sum()) for m in masks.values())
    set_mask_progress(model, 0.1)
    model.save_pretrained(tmp_path)
    assert verify(tmp_path)[-1].startswith("removes ")
    loaded = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path)
    expected = current_masks(model)
    assert all(torch.equal(mask, expected[name]) for name, mask in current_masks(loaded).items())


def test_a_trainer_ends_with_the_mask_of_its_best_checkpoint(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.token_ids(8)]
    model = get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(sparsity=0.6, sparsity_ramp=1.0))
    args = TrainingArguments(
        str(tmp_path), learning_rate=0.1, max_steps=6, eval_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[MaskProgress()])
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("-6"), "the best step must not be the last"
    expected = current_masks(PeftModel.from_pretrained(tiny.tiny_llama(num_layers=1), best))
    assert all(torch.equal(mask, expected[name]) for name, mask in current_masks(model).items())
    # A run that is resumed after its last step takes one more in transformers' Trainer.
    MaskProgress().on_step_end(args, TrainerState(global_step=7, max_steps=6), None, model)
    assert model.peft_config["default"].progress == 1.0


def test_a_trainer_that_takes_no_step_has_no_progress(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.token_ids(8)]
    model = get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(sparsity_ramp=1.0))
    args = TrainingArguments(str(tmp_path), num_train_epochs=0, use_cpu=True, report_to="none", disable_tqdm=True)
    Trainer(model, args, train_dataset=rows, callbacks=[MaskProgress()]).train()
    assert model.peft_config["default"].progress is None


@pytest.mark.parametrize("price", [1.0, 0.0])
def test_a_price_is_refused_where_a_trainer_scales_gradients(price):
    """It is added to gradients that are 65,536 times as large, and divided with them."""
    model = get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(selection="logit", price=price))
    start = (TrainerState(max_steps=6), None, model)
    MaskProgress().on_train_begin(SimpleNamespace(fp16=False), *start)
    if not price:
        MaskProgress().on_train_begin(SimpleNamespace(fp16=True), *start)
        return
    with pytest.raises(UserError, match="fp16 has scaled, so it would not count: use bf16"):
        MaskProgress().on_train_begin(SimpleNamespace(fp16=True), *start)


@pytest.mark.parametrize(
    "settings",
    [
        {"selection": "logit", "gradient": "sigmoid", "sharpness_end": 9.0},
        {"selection": "gumbel"},
        {"sparsity_ramp": 0.5},
    ],
    ids=str,
)
def test_training_without_progress_is_refused(settings):
    layer = make_layer(**settings).train()
    with pytest.raises(UserError, match=r"call maskft.set_mask_progress\(model, step / max_steps\) before every step"):
        layer(torch.randn(3, 12))
    with pytest.raises(UserError, match=r"progress is 1.5; it is a share of training"):
        set_mask_progress(layer, 1.5)


@pytest.mark.parametrize("settings", [{"selection": "gumbel"}, {"sparsity": 0.5, "sparsity_ramp": 1.0}], ids=str)
def test_a_further_training_sets_its_own_progress(settings, tmp_path):
    """That of the file is where the first training ended: every step would draw one and the same noise."""
    config = MaskConfig(save_scores=True, **settings)
    model = get_peft_model(tiny.tiny_llama(num_layers=1), config)
    set_mask_progress(model, 0.4)
    model.save_pretrained(tmp_path)
    ids = tiny.token_ids(2)
    expected = model.eval()(ids).logits

    # The same configuration again is also that of a file.
    config = MaskConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    for _ in range(2):
        base = tiny.tiny_llama(num_layers=1)
        loaded = PeftModel.from_pretrained(base, tmp_path, config=config, is_trainable=True)
        with pytest.raises(UserError, match=r"call maskft\.set_mask_progress"):
            loaded.train()(ids)
        assert torch.equal(loaded.eval()(ids).logits, expected)
        set_mask_progress(loaded, 0.4)
        assert loaded.train()(ids).logits.requires_grad

    # Used and not trained, it needs none, whatever the mode.
    for mode in (True, False):
        used = PeftModel.from_pretrained(tiny.tiny_llama(num_layers=1), tmp_path)
        assert torch.equal(used.train(mode)(ids).logits, expected)
    further = PeftModel.from_pretrained(tiny.tiny_llama(num_layers=1), tmp_path, is_trainable=True)
    assert torch.equal(further.merge_and_unload()(ids).logits, expected)


def test_masks_that_cannot_be_active_together():
    layer = make_layer(sparsity=0.3)
    layer.update_layer("soft", MaskConfig(selection="gumbel", init_value=0.5))
    layer.set_adapter(["default", "soft"])
    set_mask_progress(layer, 0.0)
    with pytest.raises(UserError, match="masks that are active together must be hard and remove to zero"):
        layer(torch.randn(3, 12))


# Starts


@pytest.mark.parametrize("start", ["normal", "magnitude", "constant"])
@pytest.mark.parametrize(
    ("settings", "centre"),
    [
        ({"selection": "logit"}, 0.04),
        ({"selection": "logit", "init_std": 0.5}, 1.0),
        ({"selection": "gumbel"}, 3.0),
        ({"selection": "gumbel", "sharpness": 100.0, "init_std": 0.005}, 0.03),
        ({"selection": "gumbel", "sharpness": 100.0}, 0.04),
        ({"selection": "hard_concrete"}, 3.0),
    ],
)
def test_scores_cut_at_zero_start_where_nearly_all_weights_are_kept(settings, centre, start):
    layer = make_layer(in_features=64, out_features=64, init_scores=start, **settings)
    scores, config = layer.mask_scores["default"].detach(), layer.mask_configs["default"]
    assert scores.mean().item() == pytest.approx(centre, rel=0.05)
    kept = layer.get_mask("default").float().mean().item()
    assert kept > 0.965 if centre == 2 * config.init_std and start == "normal" else kept == 1.0
    # The noise of gates in training: how often a gate is open where the paper's formula says so.
    if settings["selection"] != "logit" and start == "constant":
        noise = selection.logistic_noise(torch.Size((100, 100)), torch.Generator().manual_seed(0))
        config.progress = 0.0
        gate, _ = selection.soft_gate(config, torch.full((100, 100), centre), noise)
        shut = {"gumbel": sigmoid(-centre * config.sharpness), "hard_concrete": 0.010}[settings["selection"]]
        is_shut = gate < 0.5 if settings["selection"] == "gumbel" else gate == 0
        assert is_shut.float().mean().item() == pytest.approx(shut, abs=0.008)


def test_a_start_in_wandas_order_gives_wandas_mask():
    for seed, sparsity in enumerate((0.1, 0.37)):
        weight, norms = scores_like(8, 12, seed=seed), scores_like(1, 12, seed=5).abs()
        model = torch.nn.ModuleDict({"lin": torch.nn.Linear(12, 8, bias=False)})
        model["lin"].weight.data.copy_(weight)
        config = MaskConfig(target_modules=["lin"], init_scores="wanda", sparsity=sparsity)
        masked = get_peft_model(model, config)
        with pytest.raises(UserError, match=r"NaN: .* init_scores='wanda' got no data: maskft.start_scores"):
            current_masks(masked)
        start_scores(masked, {"lin": ranks_per_output(weight.abs() * norms, 0)})
        (expected,) = fixed_masks("wanda_mask", [weight], sparsity, input_norms=[norms])
        assert torch.equal(current_masks(masked)["lin"], expected)
        with pytest.raises(UserError, match=r"the keys of lin must have shape \(8, 12\); found none"):
            start_scores(masked, {})
        with pytest.raises(UserError, match="the keys of lin are not finite"):
            start_scores(masked, {"lin": weight * float("nan")})


def test_keys_of_ones_own_start_around_the_centre():
    """Whatever the start was before, which here is the default's."""
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(30, 20)), MaskConfig(target_modules=["0"], selection="logit")
    )
    start_scores(model, {"0": torch.rand(20, 30)})
    assert model.base_model.model[0].mask_scores["default"].mean().item() == pytest.approx(0.04, abs=1e-4)


def test_keys_that_are_refused_leave_all_scores_as_they_were():
    layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model = get_peft_model(layers, MaskConfig(target_modules=["0", "1"]))
    before = current_masks(model)
    for last in ({}, {"1": torch.full((2, 3), float("nan"))}):
        with pytest.raises(UserError, match=r"^the keys of 1 "):
            start_scores(model, {"0": torch.arange(12.0).view(3, 4), **last})
        assert all(torch.equal(mask, before[name]) for name, mask in current_masks(model).items())


# Files: a removed weight takes its value before fine-tuning


@pytest.fixture
def base(tmp_path):
    tiny.tiny_llama(seed=3).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny.tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tuned")
    tiny.tiny_llama(seed=3, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "before")
    tokenizer.save_pretrained(tmp_path / "tuned")
    return str(tmp_path / "tuned")


def of_base(base, **settings):
    return MaskConfig(removed_value="base", removed_value_model=base, sparsity=0.3, **settings)


def test_removed_weights_are_the_bases_in_forward_merge_and_file(tuned, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tuned)
    before = {name: p.clone() for name, p in model.named_parameters()}
    old = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "before").named_parameters())
    masked = get_peft_model(model, of_base(str(tmp_path / "before")))
    masks, ids = current_masks(masked), tiny.token_ids()
    masked.peft_config["default"].base_model_name_or_path = tuned
    masked.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = masked(input_ids=ids).logits
        masked.merge_adapter()
        weights = {name: layer.weight.clone() for name, layer in adapter_layers(masked).items()}
        for name, mask in masks.items():
            exact = torch.where(mask, before[f"{name}.weight"], old[f"{name}.weight"])
            assert torch.equal(weights[f"base_model.model.{name}"], exact)
        assert torch.equal(masked(input_ids=ids).logits, expected)
        masked.unmerge_adapter()
    for name, layer in adapter_layers(masked).items():
        assert torch.equal(layer.weight, before[name.removeprefix("base_model.model.") + ".weight"])
    lines = verify(tmp_path / "adapter", tuned)
    assert lines[-1].startswith("removed weights are those of ") and "before" in lines[-1]
    assert "set to their value in before" in merge(tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits, expected)
    assert "set to 0.7 of the way to their value in" in merge(tmp_path / "adapter", tmp_path / "part", scale=0.7)
    part, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("part", "merged"))
    for name in (f"{name}.weight" for name in masks):
        assert torch.equal(part[name], before[name].lerp(whole[name], 0.7))
    assert len(MaskSet.from_adapter(tmp_path / "adapter")) == len(masks)


def test_bases_that_cannot_be(base, tmp_path):
    with pytest.raises(UserError, match=r"removed_value_model: .*nowhere"):
        get_peft_model(tiny.tiny_llama(), of_base(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"has another architecture: .* is .* in the model, there"):
        get_peft_model(tiny.tiny_llama(intermediate_size=64), of_base(base))
    with pytest.raises(UserError, match=r"has another architecture: .* there no such layer"):
        get_peft_model(tiny.tiny_gpt2(), of_base(base))
    tiny.tiny_llama().save_pretrained(tmp_path / "itself")
    with pytest.raises(UserError, match=r"itself' has the weights of the model itself, .*; name the model before"):
        get_peft_model(tiny.tiny_llama(), of_base(str(tmp_path / "itself")))
    get_peft_model(tiny.tiny_llama(), of_base(base)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="does not load with low_cpu_mem_usage; leave it out"):
        PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "adapter", low_cpu_mem_usage=True)
    tiny.tiny_llama(seed=4).save_pretrained(base)
    with pytest.raises(UserError, match=r"removed_value_model .* has other weights than the mask was trained with"):
        PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert settings["removed_value_model"] == base and settings["removed_value_fingerprint"]


def test_codes_are_not_taken_for_the_values_of_removed_weights(monkeypatch):
    """bitsandbytes keeps one byte a weight, in the shape of the weight."""
    other = tiny.tiny_llama(seed=3)
    layer = other.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().sign().to(torch.int8), requires_grad=False)
    monkeypatch.setattr(removed_value_module, "load_model", lambda *args: other)
    with pytest.raises(UserError, match=r"'before' is quantised \(model.layers.1.mlp.up_proj is\), .* before it was"):
        get_peft_model(tiny.tiny_llama(), of_base("before"))


@pytest.mark.parametrize("selection", ["logit", "gumbel", "hard_concrete"])
def test_a_learned_mask_is_saved_and_loaded_as_any(selection, tmp_path):
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(selection=selection, init_value=0.03)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(3):
        set_mask_progress(model, step / 3)
        ids = tiny.token_ids(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    verify(tmp_path)
    loaded, ids = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path).eval(), tiny.token_ids()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    masks = MaskSet.from_adapter(tmp_path)
    assert 0 < masks.num_removed < masks.numel


def test_a_mask_that_removes_everything_is_not_saved(tmp_path):
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(selection="logit", init_value=0.1))
    for layer in adapter_layers(model).values():
        layer.mask_scores["default"].data.fill_(-1.0)
    with pytest.raises(UserError, match=r"removes all [0-9,]+ weights: every score is 0 or less"):
        model.save_pretrained(tmp_path)


# A learner of one's own


def test_a_learner_is_one_entry(monkeypatch, tmp_path):
    """As docs/learners.md tells: keep what scores above 0, with a slope of one's own."""
    toy = selection.Learner(
        options=("sharpness", "price"),
        cut=lambda config: 0.0,
        start=lambda config: 0.1,
        hard_slope=lambda config, scores: 1 / (1 + (config.sharpness * scores) ** 2),
        kept_slope=lambda config, scores, slope: torch.ones_like(scores),
    )
    monkeypatch.setitem(selection.LEARNERS, "toy", toy)
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(selection="toy", sharpness=3.0, price=1e-3, init_std=0.05))
    layer = next(iter(adapter_layers(model).values()))
    scores = layer.mask_scores["default"]
    optimizer, before = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05), current_masks(model)
    for _ in range(2):
        model(input_ids=tiny.token_ids(), labels=tiny.token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layer.get_mask("default"), scores > 0)
    assert any(not torch.equal(before[name], mask) for name, mask in current_masks(model).items())
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path).eval()
    with torch.no_grad():
        expected = model(input_ids=tiny.token_ids()).logits
        assert torch.equal(loaded(input_ids=tiny.token_ids()).logits, expected)
        assert torch.equal(loaded.merge_and_unload()(input_ids=tiny.token_ids()).logits, expected)
    with pytest.raises(UserError, match=r"temperature=1\.0 has no effect with selection='toy'; it goes with gumbel"):
        MaskConfig(selection="toy", temperature=1.0)
    with pytest.raises(UserError, match=r"selection is 'toi' \(did you mean 'toy'"):
        MaskConfig(selection="toi")


def test_a_learner_that_is_not_whole_says_so_and_leaves_the_others_alone(monkeypatch):
    monkeypatch.setitem(selection.LEARNERS, "toy", selection.Learner(options=("sharpnes",)))
    with pytest.raises(
        UserError, match=r"^the learner 'toy' has the option 'sharpnes', which is no field of MaskConfig:"
    ):
        MaskConfig(selection="toy")
    MaskConfig(selection="topk")
    for incomplete in ({"options": ("price",)}, {"options": (), "kept_slope": selection.logit_kept_slope}):
        with pytest.raises(ValueError, match="has kept_slope if and only if 'price' is among its options"):
            selection.Learner(**incomplete)
