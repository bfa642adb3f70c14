"""The PEFT method on five architectures: what users of PEFT do with an adapter, and every way a file can be wrong."""

import copy
import importlib
import io
import json
import struct
import tracemalloc
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
from trl import ModelConfig

import maskft
import tiny
from maskft import MaskConfig, current_masks, set_mask_progress
from maskft.masks import adapter
from maskft.masks.codec import encode_mask, weights_sha256
from maskft.masks.mask_set import MaskSet
from maskft.masks.verify import verify
from maskft.training.build import with_adapter
from maskft.training.checkpoints import save_weights
from maskft.tuner import MaskedLinear, MaskPeftType, adapter_layers
from maskft.tuner.targets import check_targets, maskable_names
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

IS_TRANSFORMERS_4 = transformers.__version__.startswith("4.")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def train_a_little(model, steps=3, lr=0.05):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        ids = tiny.token_ids(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model, seed=5):
    with torch.no_grad():
        return model(input_ids=tiny.token_ids(seed=seed)).logits


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(params=tiny.MODELS)
def make(request):
    return tiny.MODELS[request.param]


def trained(make, **config):
    return train_a_little(get_peft_model(make(), MaskConfig(**config)))


@pytest.fixture
def saved(tmp_path):
    model = trained(tiny.tiny_llama, layers_to_transform=[1, 2])
    model.save_pretrained(tmp_path)
    return tmp_path, logits(model), current_masks(model)


# What a user of PEFT does


def test_registration_is_what_peft_reads():
    """Fails when PEFT stops reading the three tables maskft fills."""
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["MASK"] is MaskConfig
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[MaskPeftType.MASK] is MaskConfig
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING["MASK"].__name__ == "MaskModel"
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["MASK"] == "mask_"


def test_only_scores_train_and_the_base_stays_bitwise(make):
    model = get_peft_model(make(), MaskConfig())
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(n.endswith(".mask_scores.default") for n in names)
    others = {n for n, p in model.named_parameters() if p.requires_grad} - set(names)
    assert others == set()
    before = copy.deepcopy(current_masks(model))
    train_a_little(model)
    assert any(not torch.equal(before[n], m) for n, m in current_masks(model).items())
    assert same_weights(model.unload(), make())


def test_default_targets_are_the_linear_layers_of_the_decoder(make):
    names = current_masks(get_peft_model(make(), MaskConfig()))
    assert all(".layers." in n or ".h." in n for n in names)
    assert len(names) == 3 * (4 if make is tiny.MODELS["gpt2"] else 7)


def test_disabled_adapter_is_the_base(make):
    model = trained(make)
    assert not torch.equal(logits(model), logits(make()))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make()))


def test_save_and_load(make, tmp_path):
    model = trained(make)
    model.save_pretrained(tmp_path)
    for config in (None, model.peft_config["default"]):  # PEFT's own tests pass the one that was saved
        loaded = PeftModel.from_pretrained(make(), tmp_path, config=config).eval()
        assert torch.equal(logits(loaded), logits(model))
        assert not any(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", ADAPTER_CONFIG, ADAPTER_WEIGHTS]


@pytest.mark.filterwarnings("error")
def test_saving_asks_nobody_about_the_base(tmp_path, monkeypatch):
    """PEFT would look the base up at every save, to see whether its vocabulary was resized."""
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", None)
    source = ModelConfig(model_name_or_path="nobody/named-this")
    save_weights(with_adapter(tiny.tiny_llama(), MaskConfig(), source), tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "nobody/named-this"


def test_merge_equals_masked_forward(make):
    model = trained(make)
    expected, masks = logits(model), MaskSet(current_masks(model))
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    plain = make()
    masks.apply_(plain)
    assert same_weights(merged, plain)


def test_merging_and_unmerging_is_bit_exact(make):
    model = trained(make)
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)
    start = {
        name: layer.fresh_scores(MaskConfig(init_scores="magnitude")) for name, layer in adapter_layers(model).items()
    }
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    for name, layer in adapter_layers(model).items():
        assert torch.equal(layer.fresh_scores(MaskConfig(init_scores="magnitude")), start[name])
    assert same_weights(model.unload(), make())


def test_an_adapter_that_is_named_twice_is_merged_once(make):
    """The second merge kept the zeros of the first in place of the base's values."""
    model = trained(make)
    expected = logits(model)
    model.merge_adapter(["default", "default"])
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "default"])
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert same_weights(model.unload(), make())


def test_a_merged_adapter_is_saved_after_the_model_is_cast(tmp_path):
    model = trained(tiny.tiny_llama)
    model.merge_adapter()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert MaskSet.from_adapter(tmp_path)


def test_unmerge_restores_nan_and_minus_zero():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), MaskConfig(target_modules=["0"], sparsity=0.4))
    weight = model.base_model.model[0].base_layer.weight.data
    weight.view(-1)[::3] = -0.0
    weight.view(-1)[1::3] = float("nan")
    before = weight.clone()
    model.merge_adapter()
    removed = ~current_masks(model)["0"]
    assert (weight[removed] == 0).all() and not torch.signbit(weight[removed]).any()
    model.unmerge_adapter()
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))


def test_safe_merge_refuses_what_is_not_finite():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), MaskConfig(target_modules=["0"]))
    model.base_model.model[0].base_layer.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_layer_that_cannot_be_merged_leaves_all_layers_as_they_were(merge):
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(target_modules=["up_proj"])).eval()
    last = list(adapter_layers(model).values())[-1]
    with torch.no_grad():
        last.base_layer.weight.view(-1)[:1000] = float("inf")
    with pytest.raises(ValueError, match=r"^model\.layers\.2\.mlp\.up_proj has weights that are not finite"):
        getattr(model, merge)(safe_merge=True)
    assert not any(layer.merged for layer in adapter_layers(model).values())
    with torch.no_grad():
        last.mask_scores["default"].view(-1)[0] = float("nan")
    with pytest.raises(UserError, match="scores contain NaN"):
        getattr(model, merge)()
    assert [layer.merged for layer in adapter_layers(model).values()] == [False] * 3


def test_a_mask_that_was_loaded_is_decoded_once_to_be_merged(saved, monkeypatch):
    model = PeftModel.from_pretrained(tiny.tiny_llama(), saved[0])
    layers = list(adapter_layers(model).values())
    decoded = []
    decode = adapter.decode_mask
    monkeypatch.setattr(adapter, "decode_mask", lambda *args: decoded.append(args) or decode(*args))
    model.merge_adapter()
    assert len(decoded) == len(layers)


def test_two_adapters_switch_delete_and_intersect(make, tmp_path):
    model = trained(make)
    first = logits(model)
    model.add_adapter("other", MaskConfig(mask_seed=9))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(first, second)
    assert all(n.endswith(".other") for n, p in model.named_parameters() if p.requires_grad)
    a, b = current_masks(model, "default"), current_masks(model, "other")
    model.base_model.set_adapter(["default", "other"])
    plain = make()
    MaskSet({n: a[n] & b[n] for n in a}).apply_(plain)
    assert torch.equal(logits(model), logits(plain))
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    with pytest.raises(UserError, match="no mask adapter named 'other'"):
        current_masks(model, "other")


def test_loading_another_adapter_into_a_model(saved):
    folder, expected, _ = saved
    model = trained(tiny.tiny_llama)
    model.load_adapter(folder, "loaded")
    model.set_adapter("loaded", inference_mode=True)
    assert torch.equal(logits(model), expected)


def test_low_cpu_mem_usage(saved):
    folder, expected, _ = saved
    loaded = PeftModel.from_pretrained(tiny.tiny_llama(), folder, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded), expected)


def test_training_continues_from_saved_scores(tmp_path):
    model = trained(tiny.tiny_llama, save_scores=True)
    model.peft_config["default"].recipe = {"verdict": "of this mask"}
    model.save_pretrained(tmp_path / "scores")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="missing adapter keys")
        loaded = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "scores", is_trainable=True).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    assert not torch.equal(logits(train_a_little(loaded)), logits(model))
    assert loaded.peft_config["default"].recipe is None
    model.peft_config["default"].save_scores = False
    model.save_pretrained(tmp_path / "mask")
    with pytest.raises(UserError, match=r"not its scores, .* save it with MaskConfig\(save_scores=True\)"):
        PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "mask", is_trainable=True)
    assert PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "mask")


def test_layers_of_a_list_at_the_top_of_a_model_are_named_with_it():
    """As in AutoModel: PEFT finds no index there, and in a list of experts it takes the expert for the layer."""
    base = tiny.tiny_llama().model
    message = r"PEFT finds no layer index in layers\.0\..*_proj, .* add layers_pattern=\['layers'\]$"
    for options in ({}, {"target_modules": ["q_proj"]}):
        with pytest.raises(UserError, match=message):
            get_peft_model(base, MaskConfig(layers_to_transform=[1], **options))
    for layer in base.layers:
        layer.mlp = nn.ModuleDict({"experts": nn.ModuleList([layer.mlp])})
    # It would be expert 0 of every layer.
    with pytest.raises(UserError, match=message):
        get_peft_model(base, MaskConfig(layers_to_transform=[0], target_modules=["up_proj"]))
    with pytest.raises(UserError, match=r"layers_pattern 'h' names no list of layers; .* lists are: experts, layers$"):
        get_peft_model(base, MaskConfig(layers_to_transform=[1], layers_pattern="h"))

    # The remedy, and a name in full, which needs none.
    full = MaskConfig(layers_to_transform=[1], target_modules=["layers.1.self_attn.q_proj"])
    assert list(current_masks(get_peft_model(base, full))) == ["layers.1.self_attn.q_proj"]
    config = MaskConfig(layers_to_transform=[0], layers_pattern="layers", target_modules=["up_proj"])
    assert list(current_masks(get_peft_model(tiny.tiny_llama().model, config))) == ["layers.0.mlp.up_proj"]


def test_replacing_an_adapters_mask_is_noticed(saved, tmp_path):
    folder, expected, _ = saved
    model = trained(tiny.tiny_llama, layers_to_transform=[1, 2], mask_seed=4)
    model.save_pretrained(tmp_path / "second")
    loaded = load(tmp_path / "second").eval()
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(folder, "default")
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("modules", [None, ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_resized_vocabulary_is_saved_and_loaded(modules, tmp_path):
    """PEFT writes the embeddings whole then, as it does for any adapter."""
    tiny.tiny_llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(104)
    model = train_a_little(get_peft_model(base, MaskConfig(layers_to_transform=[1], modules_to_save=modules)))
    model.save_pretrained(tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain.resize_token_embeddings(104)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), logits(model))
    assert verify(tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_cpu_mem_usage_leaves_scores_float32(dtype, tmp_path):
    model = trained(tiny.tiny_llama, layers_to_transform=[1], save_scores=True)
    model.save_pretrained(tmp_path)
    scores = {n: p.detach().clone() for n, p in model.named_parameters() if "mask_scores" in n}
    base = tiny.tiny_llama().to(dtype)
    how = {"is_trainable": True, "low_cpu_mem_usage": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(base, tmp_path, **how)
    found = {n: p for n, p in loaded.named_parameters() if "mask_scores" in n}
    assert found.keys() == scores.keys() and all(torch.equal(found[n], scores[n]) for n in scores)


def test_status_names_a_mask_loaded_for_inference(saved):
    loaded = PeftModel.from_pretrained(tiny.tiny_llama(), saved[0])
    assert all(layer.available_adapters == ["default"] for layer in loaded.get_layer_status())


def test_unloading_a_merged_mask_gives_the_base_back():
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(layers_to_transform=[1]))
    model.add_adapter("b", MaskConfig(layers_to_transform=[1, 2], mask_seed=1))
    model.merge_adapter(["default", "b"])
    assert same_weights(model.unload(), tiny.tiny_llama())


@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_an_adapter_that_was_unloaded_is_not_saved(unload, tmp_path):
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(layers_to_transform=[1]))
    getattr(model, unload)()
    with pytest.raises(UserError, match=r"^adapter 'default' masks no layer of the model.* before merge_and_unload or"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / ADAPTER_CONFIG).exists()


def test_unloading_leaves_nothing_behind():
    plain = tiny.tiny_llama()
    before = copy.deepcopy(plain._no_split_modules), len(plain._forward_pre_hooks)
    for unload in ("unload", "merge_and_unload"):
        model = getattr(get_peft_model(plain, MaskConfig(layers_to_transform=[1])), unload)()
        assert (model._no_split_modules, len(model._forward_pre_hooks)) == before


def test_offloaded_weights_are_refused():
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(layers_to_transform=[1]))
    model.base_model.model.model.layers[1].mlp.up_proj.base_layer.to("meta")
    with pytest.raises(UserError, match="up_proj is on the meta device: offloaded layers cannot be masked"):
        logits(model)


def test_another_adapter_of_the_same_configuration_starts_fresh():
    """Only a trainer's reference is a copy; a second mask is its own, whatever the first has learned."""
    config = MaskConfig(sparsity=0.3, layers_to_transform=[1])
    model = get_peft_model(tiny.tiny_llama(), config)
    start = current_masks(model)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.mask_scores["default"].copy_(layer.mask_scores["default"].flip(0))
    model.add_adapter("second", config)
    first, second = current_masks(model), current_masks(model, "second")
    assert all(torch.equal(second[name], start[name]) for name in start)
    assert not any(torch.equal(second[name], first[name]) for name in start)
    assert model.peft_config["second"] is not model.peft_config["default"]
    model.peft_config["default"].progress = 0.5
    model.peft_config["default"].mask_sha256 = "of the first"
    again = get_peft_model(tiny.tiny_llama(seed=1), config)
    assert again.peft_config["default"].progress is None and again.peft_config["default"].mask_sha256 is None
    assert model.peft_config["default"].progress == 0.5 and model.peft_config["default"].mask_sha256 == "of the first"


def test_the_configuration_of_a_reference_gives_another_model_a_mask_that_trains():
    config = MaskConfig(sparsity=0.3, layers_to_transform=[1])
    model = get_peft_model(tiny.tiny_llama(), config)
    model.add_adapter("ref", config)
    reference = model.peft_config["ref"]
    again = get_peft_model(tiny.tiny_llama(seed=1), reference)
    assert reference.copy_of == "default" and again.peft_config["default"].copy_of == ""


def test_progress_of_a_mask_that_was_loaded_is_its_own(tmp_path):
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(sparsity=0.5, sparsity_ramp=1.0))
    set_mask_progress(model, 0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path)
    loaded.add_adapter("new", MaskConfig(sparsity_ramp=1.0))
    loaded.set_adapter("new")
    set_mask_progress(loaded, 1.0)
    model.add_adapter("new", MaskConfig(sparsity_ramp=1.0))
    model.set_adapter("new")
    set_mask_progress(model, 1.0)
    for each in (loaded, model):  # neither of a mask without scores nor of one that is not active
        assert each.peft_config["default"].progress == 0.5 and each.peft_config["new"].progress == 1.0


def test_an_adapter_over_a_base_that_was_masked_before_masks_its_own_layers_alone(tmp_path):
    """Of PEFT's warning about a second time, the first adapter is what is left."""
    base = tiny.tiny_llama()
    get_peft_model(base, MaskConfig())
    with pytest.raises(UserError, match="names layer 9"):
        get_peft_model(base, MaskConfig(layers_to_transform=[9]))
    assert len(adapter_layers(base)) == 21  # a request that is refused deletes nothing

    model = get_peft_model(base, MaskConfig(layers_to_transform=[1])).eval()
    assert len(current_masks(model)) == 7
    assert sum(p.requires_grad for p in model.parameters()) == 7
    model.save_pretrained(tmp_path / "mask")
    assert torch.equal(logits(load(tmp_path / "mask").eval()), logits(model))

    get_peft_model(tiny.tiny_llama(seed=1), MaskConfig()).save_pretrained(tmp_path / "of another base")
    base = tiny.tiny_llama()
    with pytest.raises(UserError, match="was trained on other base weights"):
        load(tmp_path / "of another base", base)
    assert torch.equal(logits(load(tmp_path / "mask", base).eval()), logits(model))


def test_a_configuration_may_be_saved_before_the_tensors(tmp_path):
    """The order of transformers' own save_pretrained, of a model with an adapter that was injected into it."""
    for value in (1.0, 2.0):  # over the files of an earlier save, too
        plain = tiny.tiny_llama()
        model = inject_adapter_in_model(MaskConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), plain)
        with torch.no_grad():
            model.lm_head.modules_to_save["default"].weight.fill_(value)
        tensors = get_peft_model_state_dict(model)
        model.peft_config["default"].save_pretrained(tmp_path)
        renamed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file(renamed, tmp_path / ADAPTER_WEIGHTS)
        assert torch.equal(logits(load(tmp_path).eval()), logits(model.eval()))


def test_modules_that_are_renamed_are_refused(saved):
    message = r"do not match mask_sha256 .* or key_mapping renames modules, which masks do not support$"
    wrapped = nn.ModuleDict({"inner": tiny.tiny_llama()})
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(wrapped, saved[0], key_mapping={"^model": "inner.model"})


def test_a_misspelt_adapter_is_not_left_out_in_silence():
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(layers_to_transform=[1]))
    model.add_adapter("sums", MaskConfig(layers_to_transform=[1]))
    with pytest.raises(UserError, match=r"^the model has no adapter named 'sum' \(did you mean 'sums'\?\); it has: d"):
        model.base_model.set_adapter(["default", "sum"])
    assert model.active_adapters == ["default"]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UserError, match=r"^the model has no adapter named 'sum' \(did you mean 'sums'\?\); it has"):
            merge(adapter_names=["default", "sum"])
        with pytest.raises(TypeError, match="should be a list of strings, got 'sums'"):
            merge(adapter_names="sums")
    assert [layer.merged for layer in adapter_layers(model).values()] == [False] * 7


@pytest.mark.parametrize("name", ["v1.2", "", "values", "train", "training"])
def test_a_name_that_torch_cannot_have_is_refused_and_the_model_works_on(name):
    message = f"^adapter name {name!r} cannot be the name of a parameter in torch .*: choose another$"
    with pytest.raises(UserError, match=message):
        get_peft_model(tiny.tiny_llama(), MaskConfig(), adapter_name=name)
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(layers_to_transform=[1])).eval()
    before = logits(model)
    with pytest.raises(UserError, match=message):
        model.add_adapter(name, MaskConfig(layers_to_transform=[1]))
    assert torch.equal(logits(model), before)


def test_a_mask_for_inference_may_have_any_name(saved, tmp_path):
    model = PeftModel.from_pretrained(tiny.tiny_llama(), saved[0], adapter_name="v1.2")
    assert torch.equal(logits(model), saved[1])
    whole = get_peft_model(tiny.tiny_llama(), MaskConfig(modules_to_save=["lm_head"]))
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=r"^adapter name 'v1\.3' cannot be the name of a parameter in torch"):
        model.load_adapter(tmp_path / "whole", "v1.3")
    model.load_adapter(saved[0], "v1.3")
    model.delete_adapter("v1.2")
    assert torch.equal(logits(model), saved[1])


def test_the_folder_of_an_initial_adapter_is_left_alone(tmp_path):
    """PEFT writes the configuration of the trained adapter into it before it says that it cannot convert."""
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(layers_to_transform=[1]))
    model.save_pretrained(tmp_path / "initial")
    content = (tmp_path / "initial" / ADAPTER_CONFIG).read_bytes()
    train_a_little(model)
    with pytest.raises(UserError, match=r"^path_initial_model_for_weight_conversion is for LoRA"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert (tmp_path / "initial" / ADAPTER_CONFIG).read_bytes() == content
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out").eval()), logits(model))


def test_a_masked_head_is_saved_as_a_mask_alone(tmp_path):
    """PEFT would write the head itself beside it, which loading refuses."""
    model = trained(tiny.tiny_llama, target_modules=["lm_head", "q_proj"])
    model.save_pretrained(tmp_path)
    assert all("mask_coded" in name for name in safetensors.torch.load_file(tmp_path / ADAPTER_WEIGHTS))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("place", ["model", "blocks before", "blocks after"])
def test_a_file_of_a_compiled_model_is_one_of_the_plain_model(place, tmp_path):
    """torch.compile(module) puts ``_orig_mod`` into the names of modules. Compiled, but not run: only names matter."""
    base = tiny.tiny_llama()
    blocks = nn.ModuleList(torch.compile(block, backend="eager") for block in base.model.layers)
    if place == "blocks before":
        base.model.layers = blocks
    config = MaskConfig(save_scores=True, layers_to_transform=[0, 1])
    model = get_peft_model(torch.compile(base, backend="eager") if place == "model" else base, config)
    if place == "blocks after":
        base.model.layers = blocks
    model.save_pretrained(tmp_path)
    masks = current_masks(model)
    assert set(MaskSet.from_adapter(tmp_path)) == set(masks) and "model.layers.0.mlp.up_proj" in masks
    plain = get_peft_model(tiny.tiny_llama(), MaskConfig(layers_to_transform=[0, 1]))
    loaded = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path, is_trainable=True)
    for other in (plain, loaded):
        assert all(torch.equal(mask, masks[name]) for name, mask in current_masks(other).items())
    # And the other way round, onto the compiled model.
    plain.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")
    assert all(torch.equal(mask, masks[name]) for name, mask in current_masks(model, "other").items())


def test_a_threshold_that_is_changed_is_used():
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(selection="threshold", rank_by="signed")).eval()
    before = logits(model)
    model.peft_config["default"].threshold = 0.0
    assert not torch.equal(logits(model), before)


def test_an_adapter_that_does_not_load_leaves_nothing_behind(saved, tmp_path):
    get_peft_model(tiny.tiny_llama(seed=9), MaskConfig()).save_pretrained(tmp_path / "of another base")
    model = PeftModel.from_pretrained(tiny.tiny_llama(), saved[0])
    with pytest.raises(UserError, match="was trained on other base weights"):
        model.load_adapter(tmp_path / "of another base", "b")
    assert list(model.peft_config) == ["default"] and not adapter_layers(model, "b")
    model.load_adapter(saved[0], "b")


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_base_whose_adapter_does_not_load_is_as_it_was(is_trainable, tmp_path):
    """It would be masked by scores that nobody has trained, or could not be called at all."""
    config = MaskConfig(target_modules=["gate_proj"], modules_to_save=["lm_head"])
    get_peft_model(tiny.tiny_llama(seed=9), config).save_pretrained(tmp_path / "of another base")
    base = tiny.tiny_llama()
    hooks = len(base._forward_pre_hooks)
    with pytest.raises(UserError, match="but not its scores" if is_trainable else "was trained on other base weights"):
        PeftModel.from_pretrained(base, tmp_path / "of another base", is_trainable=is_trainable)
    assert same_weights(base, tiny.tiny_llama()) and torch.equal(logits(base), logits(tiny.tiny_llama()))
    assert len(base._forward_pre_hooks) == hooks and not hasattr(base, "peft_config")

    lora = get_peft_model(tiny.tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    get_peft_model(copy.deepcopy(lora), MaskConfig(target_modules=["gate_proj"])).save_pretrained(
        tmp_path / "over lora"
    )
    with torch.no_grad():
        lora.base_model.model.model.layers[0].mlp.gate_proj.weight.add_(1)
    before = logits(lora)
    with pytest.raises(UserError, match="but not its scores" if is_trainable else "was trained on other base weights"):
        PeftModel.from_pretrained(lora, tmp_path / "over lora", is_trainable=is_trainable)
    assert len(lora.get_layer_status()) > 0 and torch.equal(logits(lora), before)


def test_an_injected_adapter_that_does_not_load_leaves_nothing_behind(saved):
    model = nn.ModuleDict({"llama": tiny.tiny_llama()})
    inject_adapter_in_model(MaskConfig(), model, "first")
    config = MaskConfig.from_pretrained(saved[0], inference_mode=True)
    inject_adapter_in_model(config, model, "b")
    tensors = safetensors.torch.load_file(saved[0] / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match=r"the adapter file has no mask for llama\.model"):
        set_peft_model_state_dict(model, tensors, "b")
    assert list(model.peft_config) == ["first"] and not adapter_layers(model, "b")


def test_what_another_adapter_saves_whole_is_not_masked():
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(target_modules=["q_proj"], modules_to_save=["mlp.down_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("second", MaskConfig())
    assert not any("down_proj" in name for name in current_masks(model, "second"))
    one = MaskConfig(target_modules=["q_proj"], modules_to_save=["layers.1.mlp.down_proj"])
    model = get_peft_model(tiny.tiny_llama(), one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("second", MaskConfig())
    assert sum("down_proj" in name for name in current_masks(model, "second")) == 2


@pytest.mark.parametrize("saved_whole", ["lm_head", "mlp"])
def test_what_another_adapter_masks_is_not_saved_whole(saved_whole, tmp_path):
    """PEFT would copy the masks with it, and then could save neither adapter."""
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(target_modules=["gate_proj", "lm_head"])).eval()
    before = logits(model)
    with pytest.raises(UserError, match=f"^modules_to_save names '{saved_whole}', in which another adapter masks "):
        model.add_adapter("second", MaskConfig(target_modules=["q_proj"], modules_to_save=[saved_whole]))
    assert not adapter_layers(model, "second") and torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path)), before)


@pytest.mark.parametrize("options", [{"selection": "gumbel"}, {"selection": "logit", "price": 1.0}])
def test_masks_that_were_loaded_are_hard_however_they_were_learned(options, tmp_path):
    trained_masks = get_peft_model(tiny.tiny_llama(), MaskConfig(**options, init_value=0.04))
    set_mask_progress(trained_masks, 1.0)
    trained_masks.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path).eval()
    whole = model if tiny.IS_OLD_TORCH else torch.compile(model, backend="eager", fullgraph=True)  # see test_compile
    with torch.no_grad():
        assert torch.equal(whole(input_ids=tiny.token_ids(seed=5)).logits, logits(model))
    model.load_adapter(tmp_path, "b")
    model.base_model.set_adapter(["default", "b"], inference_mode=True)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path).eval()))


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2])
def test_a_regular_expression_does_not_match_what_a_masked_layer_is_made_of(make):
    pattern = r".*\.1\.(self_attn|attn)\.(q_proj|c_attn).*"
    model = get_peft_model(make(), MaskConfig(target_modules=pattern, sparsity=0.1))
    model.add_adapter("second", MaskConfig(target_modules=pattern, sparsity=0.2))
    names = set(current_masks(model))
    assert names == set(current_masks(model, "second")) and not any("mask_scores" in name for name in names)
    merged = model.merge_and_unload(adapter_names=["second"])
    assert not any(isinstance(module, MaskedLinear) for module in merged.modules())


def test_a_model_without_token_embeddings(tmp_path):
    sizes = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(**sizes, conv_dim=(8, 8), conv_kernel=(4, 4), conv_stride=(4, 4))
    plain = transformers.Wav2Vec2ForCTC(config).eval()
    state = copy.deepcopy(plain)
    get_peft_model(plain, MaskConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(state, tmp_path)
    assert len(current_masks(loaded)) == 2


def test_a_model_that_is_pickled_whole_is_the_same():
    model = trained(tiny.tiny_llama, layers_to_transform=[1])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    assert same_weights(loaded.unload(), tiny.tiny_llama())


def test_unloading_a_copy_leaves_the_model_as_it_was():
    plain = tiny.tiny_llama()
    before = copy.deepcopy(plain._no_split_modules), len(plain._forward_pre_hooks)
    model = get_peft_model(plain, MaskConfig(layers_to_transform=[1]))
    prepared = copy.deepcopy(plain._no_split_modules), len(plain._forward_pre_hooks)
    assert prepared != before
    unloaded = copy.deepcopy(model).unload()
    assert (unloaded._no_split_modules, len(unloaded._forward_pre_hooks)) == before
    assert (plain._no_split_modules, len(plain._forward_pre_hooks)) == prepared


def test_a_model_that_is_copied_trains_by_itself():
    model = trained(tiny.tiny_llama)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), logits(model))
    train_a_little(clone)
    assert not torch.equal(logits(clone), logits(model))


def test_threshold_starts_at_the_published_share_and_moves():
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(selection="threshold", rank_by="signed"))
    # P(N(0, 0.02) < -0.035) = 4.0 %
    assert MaskSet(current_masks(model)).sparsity == pytest.approx(0.040, abs=0.01)
    before = MaskSet(current_masks(model)).num_removed
    train_a_little(model)
    assert MaskSet(current_masks(model)).num_removed != before


# Targets


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"layers_to_transform": [1, 9]}, "names layer 9; the model has layers 0 to 2"),
        (
            {"target_modules": ["q_prj"]},
            r"did you mean 'q_proj'\?\); the model's linear layers are: down_proj, gate_proj",
        ),
        (
            {"target_modules": ["embed_tokens", "q_proj"]},
            "embed_tokens cannot be masked: it is an embedding; matched and",
        ),
        ({"target_modules": ["q_proj", "k_prj"]}, r"entry 'k_prj' matches no layer \(did you mean 'k_proj'\?\)"),
        ({"exclude_modules": ["k_prj"]}, r"exclude_modules entry 'k_prj' matches no layer \(did you mean 'k_proj'\?\)"),
        ({"target_modules": ["input_layernorm"]}, "it is a LlamaRMSNorm, not a linear layer"),
    ],
)
def test_targets_that_cannot_be(settings, message):
    model = tiny.tiny_llama()
    with pytest.raises(UserError, match=message):
        get_peft_model(model, MaskConfig(**settings))
    assert same_weights(model, tiny.tiny_llama())


@pytest.mark.parametrize(
    "targets, saved, task_type, named",
    [
        (["q_proj", "lm_head"], ["lm_head"], None, "'lm_head' .*: lm_head;"),
        (["gate_proj"], ["mlp"], None, "'gate_proj' .*: mlp;"),
        (r".*\.gate_proj", ["mlp"], None, r"'\.\*\\\\\.gate_proj' .*: mlp;"),
        (["q_proj", "score"], None, "SEQ_CLS", "'score' .*: classifier, score;"),
        (None, ["layers"], None, "'down_proj' .*: layers;"),
    ],
)
def test_a_target_that_is_trained_in_full_is_not_left_unmasked_in_silence(targets, saved, task_type, named):
    if task_type is None:
        model = tiny.tiny_llama()
    else:
        settings = {"num_labels": 3, "vocab_size": 96, "pad_token_id": 0}
        model = tiny.decoder(transformers.LlamaConfig, transformers.LlamaForSequenceClassification, **settings)
    config = MaskConfig(target_modules=targets, modules_to_save=saved, task_type=task_type)
    with pytest.raises(UserError, match=f"^target_modules {named} leave it out of one of the two$"):
        get_peft_model(model, config)


def test_by_default_what_is_trained_in_full_is_no_target(tmp_path):
    config = MaskConfig(modules_to_save=["q_proj", "layers.1.mlp"])
    model = get_peft_model(tiny.tiny_llama(), config).eval()
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "up_proj", "v_proj"]
    assert model.peft_config["default"].target_modules == names
    assert len(adapter_layers(model)) == 3 * 6 - 3
    # A file that names them all, as files did before, is loaded.
    model.peft_config["default"].target_modules = [*names, "q_proj"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path)), logits(model))


def test_a_tied_head_is_refused():
    model = tiny.tiny_llama(tie_word_embeddings=True)
    with pytest.raises(UserError, match="lm_head cannot be masked: its weight is tied to the input embeddings"):
        get_peft_model(model, MaskConfig(target_modules=["lm_head", "q_proj"]))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_not_trained_in_one_of_its_places(name):
    config = MaskConfig(target_modules=["q_proj"], modules_to_save=[name])
    with pytest.raises(UserError, match=f"{name}', whose weight is shared by model.embed_tokens, lm_head"):
        get_peft_model(tiny.tiny_llama(tie_word_embeddings=True), config)


def test_a_weight_shared_by_two_layers_is_refused():
    """Also where one of them alone is masked: merging would write into both."""

    def sharing(attribute):
        model = tiny.tiny_llama()
        for kind in ("q_proj", "o_proj"):
            one, other = (layer.self_attn for layer in model.model.layers[:2])
            if attribute == "weight":
                getattr(other, kind).weight = getattr(one, kind).weight
            else:
                setattr(other, kind, getattr(one, kind))
        return model

    both = r"model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj share one weight, .*: q_proj, o_proj$"
    for attribute in ("weight", "module"):
        with pytest.raises(UserError, match=both):
            get_peft_model(sharing(attribute), MaskConfig())
    for layer in (0, 1):
        with pytest.raises(UserError, match=both):
            get_peft_model(sharing("weight"), MaskConfig(layers_to_transform=[layer]))
    model = get_peft_model(sharing("weight"), MaskConfig(exclude_modules=["q_proj", "o_proj"]))
    assert len(current_masks(model)) == 3 * 5
    with pytest.raises(UserError, match=both):  # a second adapter, over layers that are wrapped
        model.add_adapter("second", MaskConfig())


def test_a_block_that_is_used_again_has_one_mask():
    plain = tiny.tiny_llama()
    plain.model.layers[1].mlp = plain.model.layers[0].mlp
    before = logits(plain)
    model = get_peft_model(plain, MaskConfig(sparsity=0.3, target_modules=["up_proj"], layers_to_transform=[0]))
    model.add_adapter("second", MaskConfig(target_modules=["up_proj"], layers_to_transform=[0]))
    assert set(current_masks(model)) == {"model.layers.0.mlp.up_proj"}
    masked = logits(model.eval())
    merged = model.merge_and_unload()
    assert merged.model.layers[1].mlp is merged.model.layers[0].mlp
    assert torch.equal(logits(merged), masked) and not torch.equal(masked, before)


class Halved(nn.Linear):
    """As transformers has them: a linear layer by its class, another map by its forward."""

    __module__ = "transformers.integrations.bitnet"

    def forward(self, x):
        return super().forward(x) / 2


def test_linear_layers_that_compute_something_else_are_refused():
    model = tiny.tiny_llama()
    for layer in model.model.layers:
        layer.mlp.router = Halved(32, 4)
    assert "router" not in maskable_names(model)
    with pytest.raises(UserError, match="it is a Halved, which computes something else than a linear map"):
        get_peft_model(model, MaskConfig(target_modules=["router", "q_proj"]))


def classes_of_transformers(name):
    """Classes of this name in the modules of models that have it."""
    folder = Path(transformers.__file__).parent / "models"
    for file in folder.glob("*/modeling_*.py"):
        if f"class {name}(" in file.read_text():
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            yield getattr(module, name)
            return


def test_layers_that_are_named_in_full_and_chosen_by_number():
    """PEFT masks a layer that is named in full, whatever the numbers say."""
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    with pytest.raises(UserError, match=r"no effect on model\.layers\.1\.mlp\.up_proj, which target_modules names"):
        get_peft_model(tiny.tiny_llama(), MaskConfig(target_modules=names, layers_to_transform=[0]))
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(target_modules=names, layers_to_transform=[0, 1]))
    assert len(adapter_layers(model)) == 2


def test_a_mask_that_is_trained_from_the_configuration_of_another(tmp_path):
    """It was saved with the recipe of the other one, and its card with that one's verdict."""
    model = get_peft_model(tiny.tiny_llama(), MaskConfig())
    model.peft_config["default"].recipe = {"verdict": "better"}
    model.save_pretrained(tmp_path / "old")
    config = MaskConfig.from_pretrained(tmp_path / "old")
    assert config.recipe == {"verdict": "better"}
    config.inference_mode = False
    get_peft_model(tiny.tiny_llama(), config).save_pretrained(tmp_path / "new")
    assert MaskConfig.from_pretrained(tmp_path / "new").recipe is None
    # A recipe that a user gives is of no other mask.
    own = get_peft_model(tiny.tiny_llama(), MaskConfig(recipe={"by": "me"}))
    own.save_pretrained(tmp_path / "own")
    assert MaskConfig.from_pretrained(tmp_path / "own").recipe == {"by": "me"}
    # One that is loaded to be used keeps it, also when it is saved again.
    PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "old").save_pretrained(tmp_path / "copy")
    assert MaskConfig.from_pretrained(tmp_path / "copy").recipe == {"verdict": "better"}


def test_unloading_gives_four_bit_layers_their_kernel_back():
    base = tiny.tiny_llama()
    for layer in base.model.layers:
        layer.mlp.up_proj.support_avx512bf16_for_cpu = True
    with pytest.raises(UserError):
        get_peft_model(base, MaskConfig(removed_value="base", removed_value_model="no/such-folder-"))
    assert all(layer.mlp.up_proj.support_avx512bf16_for_cpu for layer in base.model.layers)
    model = get_peft_model(base, MaskConfig(target_modules=["q_proj"]))
    assert not any(layer.mlp.up_proj.support_avx512bf16_for_cpu for layer in base.model.layers)
    model.unload()
    assert all(layer.mlp.up_proj.support_avx512bf16_for_cpu for layer in base.model.layers)


def test_weights_that_a_parent_reads_itself_are_refused():
    """The mask would be saved and merged, and never trained."""
    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    mamba = transformers.MambaForCausalLM(config)
    assert maskable_names(mamba) == {"in_proj"}
    with pytest.raises(UserError, match="dt_proj cannot be masked: its MambaMixer reads the weight"):
        get_peft_model(mamba, MaskConfig(target_modules=["dt_proj"]))
    one_of_each = {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
    one_of_each["use_mamba_kernels"] = False
    jamba = tiny.decoder(transformers.JambaConfig, transformers.JambaForCausalLM, **one_of_each)
    names = maskable_names(jamba)
    assert {"in_proj", "x_proj", "out_proj", "o_proj"} <= names and "dt_proj" not in names
    wavlm = nn.Sequential(type("WavLMAttention", (nn.Module,), {})())
    wavlm[0].q_proj, wavlm[0].gru_rel_pos_linear = nn.Linear(8, 8), nn.Linear(8, 8)
    assert maskable_names(wavlm) == {"gru_rel_pos_linear"}
    stack = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert maskable_names(stack) == {"1"}
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.TransformerDecoderLayer(8, 2, 16))
    assert maskable_names(encoder) == {"linear1", "linear2"}  # of the decoder layer, which calls them
    with pytest.raises(UserError, match=r"0\.linear1 cannot be masked: its TransformerEncoderLayer reads the weight"):
        check_targets(MaskConfig(target_modules=["linear1"]), encoder)
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(UserError, match="its MultiheadAttention reads the weight and does not call the layer"):
        check_targets(MaskConfig(target_modules=["out_proj"]), attention)
    # Of models that are large or need more than text: the parent's class decides.
    for kind, read, called in (
        ("Gemma3nTextAltUp", "correction_coefs", "prediction_coefs"),
        ("LongcatFlashTopkRouter", "classifier", "other"),
        ("TDNNLayer", "kernel", "other"),
        ("LSHSelfAttention", "query_key", "other"),
        ("MobileBertLMPredictionHead", "decoder", "transform"),
        ("DetrMHAttentionMap", "k_proj", "q_proj"),
    ):
        assert kind in (type_of.__name__ for type_of in classes_of_transformers(kind)), "renamed"
        parent = type(kind, (nn.Module,), {})()
        setattr(parent, read, nn.Linear(8, 8))
        setattr(parent, called, nn.Linear(8, 8))
        assert maskable_names(nn.Sequential(parent)) == {called}
    bloom = {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    exact = transformers.BloomForCausalLM(transformers.BloomConfig(**bloom, slow_but_exact=True, pretraining_tp=2))
    assert maskable_names(exact) == {"query_key_value", "dense_h_to_4h"}
    plain = transformers.BloomForCausalLM(transformers.BloomConfig(**bloom, slow_but_exact=True))
    assert {"dense", "dense_4h_to_h"} < maskable_names(plain)
    masked = get_peft_model(mamba, MaskConfig())
    masked(input_ids=tiny.token_ids(), labels=tiny.token_ids()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in masked.parameters() if p.requires_grad)


def test_a_weight_that_is_computed_is_refused():
    """Merging would write into a tensor that is gone after it."""
    model = tiny.tiny_llama()
    for layer in model.model.layers:
        nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    assert "up_proj" not in maskable_names(model)
    with pytest.raises(
        UserError, match=r"up_proj cannot be masked: its weight is computed from others \(torch's param"
    ):
        get_peft_model(model, MaskConfig(target_modules=["up_proj"]))


def test_quantised_linears_are_refused():
    class Linear8bit(nn.Linear):
        pass

    Linear8bit.__module__ = "bitsandbytes.nn.modules"
    model = nn.Sequential(Linear8bit(4, 4), nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"0 cannot be masked: it is quantised.*\(Linear8bit\).* maskable: 1"):
        get_peft_model(model, MaskConfig(target_modules=["0", "1"]))


def test_mixed_models_and_transformers_own_loader(saved):
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(tiny.tiny_llama(), MaskConfig(), mixed=True)
    model = tiny.tiny_llama()
    model.load_adapter(saved[0])
    if IS_TRANSFORMERS_4:  # its loader calls PEFT's, and with it the hooks
        assert torch.equal(logits(model), saved[1])
        return
    with pytest.raises(UserError, match=r"transformers' own model\.load_adapter and add_adapter cannot read masks"):
        logits(model)


# Files that are wrong


def edit(folder, change):
    file = folder / ADAPTER_WEIGHTS
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def key_of(tensors, part):
    return next(key for key in tensors if part in key)


def load(folder, model=None):
    return PeftModel.from_pretrained(model or tiny.tiny_llama(), folder)


def flip(tensors):
    tensors[key_of(tensors, "layers.2.mlp.down_proj")][-3] ^= 16


UP = "layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(key_of(t, UP)), r"has no mask for model.layers.1.mlp.up_proj; it is incomplete"),
        (
            lambda t: t.update({key_of(t, "layers.1.").replace("layers.1.", "layers.0."): torch.zeros(9)}),
            r"has masks for model.layers.0\..* which the model or",
        ),
        (
            lambda t: t.update({key_of(t, UP): torch.zeros(9, dtype=torch.bfloat16)}),
            "up_proj is corrupted: it is not a 1-D tensor of bytes",
        ),
        (flip, r"model.layers.2.mlp.down_proj is corrupted: its bytes do not match its sha256"),
    ],
)
def test_entries_that_are_wrong(change, message, saved):
    edit(saved[0], change)
    with pytest.raises(UserError, match=message):
        load(saved[0])


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_an_entry_that_would_overwrite_base_weights(saved, key):
    weight = tiny.tiny_llama().state_dict()[key]
    edit(saved[0], lambda t: t.update({f"base_model.model.{key}": torch.full_like(weight, 3.0)}))
    with pytest.raises(UserError, match="neither masks nor modules_to_save"):
        load(saved[0])
    with pytest.raises(UserError, match=f"{key}; they would replace the base's"):
        MaskSet.from_adapter(saved[0])


def test_a_saved_module_is_the_one_that_its_configuration_declares(tmp_path):
    trained(tiny.tiny_llama, layers_to_transform=[0], modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    assert list(MaskConfig.from_pretrained(tmp_path).weights_sha256) == ["lm_head.weight"]
    edit(tmp_path, lambda t: t["base_model.model.lm_head.weight"].mul_(2))
    for read in (load, MaskSet.from_adapter):
        with pytest.raises(UserError, match=r"weights_sha256 .* lm_head.weight; they would replace the base's"):
            read(tmp_path)


def test_a_masked_weight_is_never_replaced_whatever_is_declared(saved):
    name = "model.layers.1.mlp.up_proj.base_layer.weight"
    weights = {f"base_model.model.{name}": torch.full_like(tiny.tiny_llama().model.layers[1].mlp.up_proj.weight, 3.0)}
    edit(saved[0], lambda t: t.update(weights))
    content = json.loads((saved[0] / ADAPTER_CONFIG).read_text())
    (saved[0] / ADAPTER_CONFIG).write_text(json.dumps(content | {"weights_sha256": weights_sha256(weights)}))
    with pytest.raises(UserError, match=f"neither masks nor .*{name}; it is not loaded"):
        load(saved[0])


def test_an_adapter_without_its_checksum_is_not_loaded(tmp_path):
    """Nothing else would tell that the head beside the masks is not the one that was saved."""
    trained(tiny.tiny_llama, layers_to_transform=[0]).save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(64, 32)}))
    content = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    content |= {"mask_sha256": None, "weights_sha256": {"lm_head.weight": "0" * 64}}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(content))
    with pytest.raises(UserError, match="has no mask_sha256, so nothing in the adapter's file can be checked"):
        load(tmp_path)
    with pytest.raises(UserError, match="neither masks nor modules_to_save"):
        PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path, is_trainable=True)


def test_an_adapter_without_its_checksum_leaves_nothing_behind(saved, tmp_path):
    """Its configuration would stay for the next file of that name, which then nothing would check."""
    model = PeftModel.from_pretrained(tiny.tiny_llama(), saved[0])
    with maskft.masks.disabled():
        get_peft_model(tiny.tiny_llama(), MaskConfig()).save_pretrained(tmp_path / "scores")
    get_peft_model(tiny.tiny_llama(seed=9), MaskConfig()).save_pretrained(tmp_path / "of another base")
    with pytest.raises(UserError, match="has no mask_sha256"):
        model.load_adapter(tmp_path / "scores", "b")
    assert list(model.peft_config) == ["default"] and not adapter_layers(model, "b")
    with pytest.raises(UserError, match="was trained on other base weights"):
        model.load_adapter(tmp_path / "of another base", "b")


def test_masks_of_another_adapter(saved, tmp_path):
    """Every mask is whole and fits; only the configuration tells that they are others."""
    trained(tiny.tiny_llama, layers_to_transform=[1, 2], mask_seed=9).save_pretrained(tmp_path / "other")
    (saved[0] / ADAPTER_WEIGHTS).write_bytes((tmp_path / "other" / ADAPTER_WEIGHTS).read_bytes())
    with pytest.raises(UserError, match=r"do not match mask_sha256 in adapter_config\.json"):
        load(saved[0])
    with pytest.raises(UserError, match=r"do not match mask_sha256 in adapter_config\.json"):
        MaskSet.from_adapter(saved[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bases_of_these_dtypes_are_checked(saved, dtype):
    assert load(saved[0], tiny.tiny_llama().to(dtype))
    with pytest.raises(UserError, match="was trained on other base weights"):
        load(saved[0], tiny.tiny_llama(seed=1).to(dtype))
    with pytest.raises(UserError, match=r"has shape \(48, 32\), the model's weight \(64, 32\); wrong base"):
        load(saved[0], tiny.tiny_llama(intermediate_size=64).to(dtype))
    config = PeftConfig.from_pretrained(saved[0])
    config.verify_base = False
    assert PeftModel.from_pretrained(tiny.tiny_llama(seed=1), saved[0], config=config)


def test_a_base_in_float16_is_not_checked_and_that_is_said(saved):
    with pytest.warns(UserWarning, match="base weights are in float16, so that they are not checked"):
        load(saved[0], tiny.tiny_llama().half())


def test_a_shape_is_compared_before_memory_is_taken_for_it(saved):
    """100 bytes that claim a gigabyte."""
    bomb = encode_mask(torch.ones(1, 8, dtype=torch.bool))
    bomb[8:16] = torch.frombuffer(bytearray(struct.pack("<II", 2**15, 2**15)), dtype=torch.uint8)
    edit(saved[0], lambda t: t.update({key_of(t, "layers.1.mlp.up_proj"): bomb}))
    config = PeftConfig.from_pretrained(saved[0])
    config.mask_sha256 = None
    tracemalloc.start()
    with pytest.raises(UserError, match=r"has shape \(32768, 32768\), the model's weight \(48, 32\)"):
        PeftModel.from_pretrained(tiny.tiny_llama(), saved[0], config=config, is_trainable=True)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_newer_format(saved):
    file = saved[0] / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 3}))
    with pytest.raises(UserError, match="format version 3, this maskft reads up to 2; use a newer one"):
        load(saved[0])


def test_scores_that_are_nan_are_not_saved(tmp_path):
    model = trained(tiny.tiny_llama)
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / ADAPTER_WEIGHTS).exists()


def test_the_base_is_named_by_a_path_that_holds_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_llama().save_pretrained("base")
    tiny.tiny_llama(seed=1).save_pretrained("before")
    config = MaskConfig(removed_value="base", removed_value_model="before")
    model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained("base"), config)
    model.save_pretrained("mask")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mask")
    saved = json.loads((tmp_path / "mask" / ADAPTER_CONFIG).read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    assert saved["removed_value_model"] == str(tmp_path / "before")


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2])
def test_a_masked_layer_has_the_sizes_of_its_base(make):
    layer = next(m for m in get_peft_model(make(), MaskConfig()).modules() if isinstance(m, MaskedLinear))
    names = [name for name in ("in_features", "out_features", "nf", "nx") if hasattr(layer.base_layer, name)]
    assert names and all(getattr(layer, name) == getattr(layer.base_layer, name) for name in names)


def test_an_adapter_saved_while_it_is_merged_knows_its_base(tmp_path):
    models = [get_peft_model(tiny.tiny_llama(), MaskConfig(sparsity=0.2)).eval() for _ in range(2)]
    models[0].merge_adapter()
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    merged, plain = (json.loads((tmp_path / name / ADAPTER_CONFIG).read_text()) for name in "01")
    assert merged["base_fingerprint"] == plain["base_fingerprint"] is not None
    with pytest.raises(UserError, match="was trained on other base weights"):
        PeftModel.from_pretrained(tiny.tiny_llama(seed=1), tmp_path / "0")
