"""The plain tuner by itself: PEFT's shape, plain files, and what other code may do to a masked model."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call, grad
from transformers import AutoModelForCausalLM

import maskft.fast
from maskft import MaskConfig, UserError, adapter_layers, current_masks, set_mask_progress
from maskft.tuner.adapter_files import AdapterFiles, set_adapter_files
from maskft.tuner.config import REMOVED_VALUES
from maskft.tuner.model import NO_TOKEN_INDICES, unwrapped_name
from maskft_common.layout import ADAPTER_WEIGHTS
from tiny import IS_OLD_TORCH, tiny_llama, token_ids


@pytest.fixture
def plain_files():
    before = set_adapter_files(AdapterFiles())
    yield
    set_adapter_files(before)


@pytest.fixture(params=["plain", "fast"])
def masker(request):
    if request.param == "fast":
        yield
    else:
        with maskft.fast.disabled():
            yield


def two_linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def two_layers(**options):
    return get_peft_model(two_linears(), MaskConfig(**{"target_modules": ["0", "2"], "sparsity": 0.3} | options))


def test_without_the_add_on_a_file_holds_scores_as_plain_tensors(plain_files, tmp_path):
    model = get_peft_model(tiny_llama(num_layers=1), MaskConfig(sparsity=0.2, mask_seed=3)).eval()
    for layer in adapter_layers(model).values():
        layer.mask_scores["default"].data = layer.mask_scores["default"].data.flip(0)  # as no start draws them
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    assert tensors and all(name.endswith(".mask_scores") for name in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    for is_trainable in (False, True):
        loaded = PeftModel.from_pretrained(tiny_llama(num_layers=1), tmp_path, is_trainable=is_trainable).eval()
        assert torch.equal(loaded(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)
        assert any(parameter.requires_grad for parameter in loaded.parameters()) == is_trainable


@pytest.mark.parametrize("is_trainable", [False, True])
def test_one_of_two_masks_is_saved_and_loaded_under_another_name(is_trainable, tmp_path):
    model = two_layers(save_scores=True)
    model.add_adapter("second", MaskConfig(target_modules=["0"], mask_seed=3, save_scores=True))
    expected = adapter_layers(model, "second")["base_model.model.0"]
    expected.mask_scores["second"].data.neg_()  # as no start draws them
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        two_linears(), tmp_path / "second", adapter_name="third", is_trainable=is_trainable
    )
    (layer,) = adapter_layers(loaded, "third").values()
    assert torch.equal(layer.get_mask("third"), expected.get_mask("second"))
    assert list(layer.mask_scores) == (["third"] if is_trainable else [])
    if is_trainable:
        assert torch.equal(layer.mask_scores["third"], expected.mask_scores["second"])


def test_the_delta_weight_leads_to_the_masked_weight(masker):
    layer = two_layers().base_model.model[0]
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(layer.get_base_weight() + delta, layer.get_masked_weight())
    assert int((delta != 0).sum()) == int((~layer.get_mask("default")).sum())
    layer.merge()
    assert torch.equal(layer.get_delta_weight("default"), delta)
    assert not layer.supports_lora_conversion()


def test_switching_the_fast_step_off_and_on_is_noticed_by_existing_models():
    model = two_layers()
    x = torch.randn(3, 6)
    layer = model.base_model.model[0]
    fast = model(x)
    assert isinstance(layer.masker, maskft.fast.FastMasker) and layer.masker.value is not None
    with maskft.fast.disabled():
        assert not maskft.fast.is_enabled() and type(layer.masker) is maskft.tuner.Masker
        assert torch.equal(model(x), fast)
    assert maskft.fast.is_enabled() and torch.equal(model(x), fast)


@pytest.mark.parametrize("options", [{}, {"selection": "logit", "sparsity": 0.1, "price": 1.0}], ids=str)
def test_functional_call_and_its_gradient(options, masker):
    """Of other scores than the model's, without touching those."""
    model = two_layers(**options)
    x = torch.randn(3, 6)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    scores = {name: -value for name, value in parameters.items() if "mask_scores" in name}
    scores = {name: value + 0.01 * torch.randn_like(value) for name, value in scores.items()}
    before = model(x)

    def loss(scores):
        return functional_call(model, {**parameters, **scores}, (x,)).square().sum()

    gradients = grad(loss)(scores)
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if name in scores:
            parameter.data.copy_(scores[name])
    assert torch.equal(functional_call(model, scores, (x,)), other(x))
    other(x).square().sum().backward()
    assert all(torch.equal(gradients[name], dict(other.named_parameters())[name].grad) for name in scores)
    assert torch.equal(model(x), before)


def test_lora_over_a_mask_works_and_is_not_merged_below_it():
    model = two_layers().eval()
    lora = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    x = torch.randn(3, 6)
    expected = lora(x)
    layer = model.base_model.model[0]
    update = layer.get_delta_weight("default")
    assert not torch.equal(expected, model.base_model.model[2](torch.relu(nn.functional.linear(x, update))))
    for merge in (lora.merge_adapter, model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UserError, match=r"0 has an adapter of another kind over its mask \(peft.tuners.lora"):
            merge()
        torch.testing.assert_close(lora(x), expected)


def test_layers_with_lora_are_refused_or_left_out_with_a_warning():
    """Also LoRA's own matrices, whose last name would be ``default``."""
    lora = get_peft_model(tiny_llama(num_layers=1), LoraConfig(target_modules=["v_proj"]))
    base = lora.base_model.model
    with pytest.raises(
        UserError, match=r"v_proj cannot be masked: it has an adapter of another kind \(peft.tuners.lora"
    ):
        get_peft_model(base, MaskConfig(target_modules=["v_proj"]), adapter_name="mask")
    with pytest.warns(UserWarning, match=r"another kind are left out: model\.layers\.0\.self_attn\.v_proj; to mask"):
        model = get_peft_model(base, MaskConfig(), adapter_name="mask")
    assert len(current_masks(model, "mask")) == 6
    names = {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(model.peft_config["mask"].target_modules) == names


def test_a_mask_over_a_whole_model_of_peft_has_the_names_of_the_plain_model(tmp_path):
    lora = get_peft_model(tiny_llama(num_layers=1), LoraConfig(target_modules=["q_proj"]))
    model = get_peft_model(lora, MaskConfig(target_modules=["up_proj"]), adapter_name="sums")
    names = [layer.module_name for layer in adapter_layers(model, "sums").values()]
    assert names == ["model.layers.0.mlp.up_proj"]
    model.save_pretrained(tmp_path, selected_adapters=["sums"])
    loaded = PeftModel.from_pretrained(tiny_llama(num_layers=1), tmp_path / "sums")
    assert torch.equal(current_masks(loaded)[names[0]], current_masks(model, "sums")[names[0]])


def test_lora_on_some_layers_leaves_out_these_alone():
    config = LoraConfig(target_modules=["v_proj"], layers_to_transform=[0])
    base = get_peft_model(tiny_llama(num_layers=2), config).base_model.model
    with pytest.warns(UserWarning, match=r"another kind are left out: model\.layers\.0\.self_attn\.v_proj; to mask"):
        model = get_peft_model(base, MaskConfig(), adapter_name="mask")
    masked = current_masks(model, "mask")
    assert len(masked) == 13 and "model.layers.1.self_attn.v_proj" in masked


def test_a_copy_is_not_merged_below_lora_either():
    lora = get_peft_model(two_layers().eval(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    copied = copy.deepcopy(lora).base_model.model  # the model with the mask
    with pytest.raises(UserError, match="0 has an adapter of another kind over its mask"):
        copied.merge_adapter()


@pytest.mark.parametrize("name", ["default", "sums"])
def test_a_mask_below_lora_is_not_unloaded_whatever_its_name(name):
    base = nn.Sequential(nn.Linear(6, 5))
    model = get_peft_model(base, MaskConfig(target_modules=["0"], sparsity=0.3), adapter_name=name)
    get_peft_model(model, LoraConfig(target_modules=["0"]))
    message = (
        "0 has an adapter of another kind over its mask (peft.tuners.lora.layer), and merging would write that adapter "
        "below the mask: merge the mask first, with merge_and_unload of a model without the other adapter, and apply "
        "that adapter to the merged model"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        model.unload()


def test_layers_of_a_copy_know_their_places():
    """In modules in modules, where a name has several parts."""
    model = get_peft_model(tiny_llama(num_layers=1), MaskConfig())
    for each in (model, copy.deepcopy(model)):
        for layer in adapter_layers(each).values():
            parent, name = layer.place
            assert getattr(parent(), name) is layer


def test_a_configuration_is_the_models_own_until_another_adapter_comes_with_it():
    config = MaskConfig(target_modules=["0"], sparsity=0.3)
    base = nn.Sequential(nn.Linear(6, 5))
    model = get_peft_model(base, config)
    assert model.peft_config["default"] is config and config.is_new is True

    # As training and saving fill them in.
    filled = {"mask_sha256": "m", "base_fingerprint": "b", "weights_sha256": {"w": "s"}, "progress": 0.5, "recipe": {}}
    for name, value in filled.items():
        setattr(config, name, value)
    model.add_adapter("second", config)
    other = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    for copied in (model.peft_config["second"], other.peft_config["default"]):
        assert copied is not config and copied.is_new is True and copied.copy_of == ""
        assert [getattr(copied, name) for name in filled] == [None] * 5
    assert {name: getattr(config, name) for name in filled} == filled

    # TRL's name of the reference, which is a copy.
    model.add_adapter("ref", config)
    assert model.peft_config["ref"] is not config and model.peft_config["ref"].copy_of == "default"
    assert {name: getattr(model.peft_config["ref"], name) for name in filled} == filled


def test_new_tokens_are_refused_before_anything_is_replaced():
    base = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(UserError, match=f"^{re.escape(NO_TOKEN_INDICES)}$"):
        get_peft_model(base, MaskConfig(target_modules=["0"], trainable_token_indices=[1]))
    assert type(base[0]) is nn.Linear


@pytest.mark.parametrize(
    ("unload", "is_merged"),
    [
        (lambda model: model.unload(), False),
        (lambda model: model.base_model._unload_and_optionally_merge(False), False),
        (lambda model: model.merge_and_unload(), True),
    ],
)
def test_add_ons_of_a_whole_model_are_attached_once_and_undone(unload, is_merged, monkeypatch):
    base = nn.Sequential(nn.Linear(6, 5))
    weight = base[0].weight.detach().clone()
    calls = []

    def attach(model):
        calls.append(model)
        return lambda: calls.append("undone")

    monkeypatch.setattr("maskft.tuner.model.MODEL_HOOKS", [attach])
    model = get_peft_model(base, MaskConfig(target_modules=["0"], sparsity=0.3))
    model.add_adapter("second", MaskConfig(target_modules=["0"], sparsity=0.2))
    assert calls == [base]
    unloaded = unload(model)
    assert calls == [base, "undone"]
    assert type(unloaded[0]) is nn.Linear and torch.equal(unloaded[0].weight, weight) != is_merged


@pytest.mark.parametrize("inference_mode", [False, True])
def test_only_a_model_that_trains_is_kept_differentiable(inference_mode):
    base = nn.Sequential(nn.Linear(6, 5))
    base[0].support_avx512bf16_for_cpu = True  # as a four-bit layer of bitsandbytes has it
    model = get_peft_model(base, MaskConfig(target_modules=["0"], inference_mode=inference_mode))
    assert model.base_model.model[0].base_layer.support_avx512bf16_for_cpu is inference_mode


def test_layers_alone_hold_the_values_of_removed_weights(monkeypatch):
    def twos(config, model):
        return {name: torch.full_like(model.get_submodule(name).weight, 2.0) for name in config.target_modules}

    monkeypatch.setitem(REMOVED_VALUES, "twos", twos)
    model = two_layers(removed_value="twos", target_modules=["0"])
    model.add_adapter("second", MaskConfig(removed_value="twos", target_modules=["0", "2"]))
    model.add_adapter("third", MaskConfig(target_modules=["0", "2"]))
    layers = adapter_layers(model, None)
    assert {name: list(layer.removed_values) for name, layer in layers.items()} == {
        "base_model.model.0": ["default", "second"],
        "base_model.model.2": ["second"],
    }
    assert [layer.module_name for layer in layers.values()] == ["0", "2"]
    assert all(bool((value == 2).all()) for layer in layers.values() for value in layer.removed_values.values())
    assert model.base_model._removed_values == {}


def test_a_head_without_a_weight_is_trained_beside_a_mask_and_unloaded():
    base = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 2)))
    model = get_peft_model(base, MaskConfig(target_modules=["0"], modules_to_save=["1"]))
    assert any("modules_to_save" in name for name, each in model.named_parameters() if each.requires_grad)
    unloaded = model.unload()
    assert type(unloaded[0]) is nn.Linear and type(unloaded[1]) is nn.Sequential


def test_an_adapter_that_is_not_active_is_deleted_and_the_last_one_too():
    model = two_layers()
    model.add_adapter("b", MaskConfig(target_modules=["0", "2"], sparsity=0.4))
    model.set_adapter("b")
    model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    model.delete_adapter("b")
    assert not adapter_layers(model, "b") and len(adapter_layers(model, None)) == 2


def test_an_adapter_is_deleted_whatever_the_names_of_its_layers():
    """PEFT passes over modules with the tuner's prefix in their names."""
    base = nn.ModuleDict({"mask_decoder": two_linears(), "mask_head": nn.Linear(2, 2)})
    options = {"target_modules": ["mask_decoder.0", "mask_head"], "modules_to_save": ["mask_decoder.2"]}
    model = get_peft_model(base, MaskConfig(**options))
    model.add_adapter("b", MaskConfig(**options, mask_seed=1))
    model.delete_adapter("b")
    assert not adapter_layers(model, "b")
    assert model.active_adapters == ["default"]
    assert model.base_model.model["mask_decoder"][2].active_adapters == ["default"]
    model.delete_adapter("default")
    assert not any(layer.active_masks for layer in adapter_layers(model, None).values())


def test_names_are_those_of_state_dicts():
    wrapper = nn.Module()
    wrapper._fsdp_wrapped_module = two_layers().base_model.model  # as FSDP1 puts it between
    assert list(adapter_layers(wrapper)) == ["0", "2"]
    for name in ("a.b", "base_model.model.a.b", "module.base_model.model.base_model.model.a.b"):
        assert unwrapped_name(name) == "a.b"


@pytest.mark.usefixtures("masker")
def test_scores_that_are_passed_in_one_after_another_are_seen():
    """Each is freed before the next is made, so that it often has the same address, and the same version."""
    model = two_layers()
    x = torch.randn(3, 6)
    names = [name for name, _ in model.named_parameters() if "mask_scores" in name]
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        given = {}
        for name in names:
            shape = model.get_parameter(name).shape
            given[name] = torch.randn(shape, generator=generator).requires_grad_()
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name in names:
                other.get_parameter(name).copy_(given[name])
        for _ in range(3):  # from the second backward pass on a factor of the gradient is kept
            found = functional_call(model, given, (x,))
            expected = other(x)
            assert torch.equal(found, expected)
            found.sum().backward()
            expected.sum().backward()
        assert all(torch.equal(given[name].grad, other.get_parameter(name).grad) for name in names)
        del given, found, expected


def test_when_the_active_adapter_is_deleted_all_layers_take_the_same_other_one():
    """Three masks over different modules: PEFT lets each layer choose its own first one."""
    model = two_layers(target_modules=["0"])
    model.add_adapter("b", MaskConfig(target_modules=["2"], sparsity=0.4))
    model.add_adapter("a", MaskConfig(target_modules=["0", "2"], sparsity=0.2))
    model.set_adapter("a")
    model.delete_adapter("a")
    assert model.active_adapters == ["default"]
    assert {tuple(layer.active_adapters) for layer in adapter_layers(model, None).values()} == {("default",)}
    assert set(current_masks(model)) == {"0"}


def test_an_adapter_that_is_added_while_adapters_are_disabled_is_disabled_in_all_layers():
    model = two_layers(target_modules=["0"])
    x = torch.ones(3, 6)
    model.base_model.disable_adapter_layers()
    base = model(x)
    model.add_adapter("b", MaskConfig(target_modules=["0", "2"], sparsity=0.4))
    model.set_adapter("b")
    assert torch.equal(model(x), base)
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    assert not torch.equal(model(x), base)


def test_a_base_with_layers_on_disk_is_refused_before_its_file_is_written(tmp_path):
    """PEFT would write the base model's own weights anew, and then fail."""
    tiny_llama(num_layers=2).save_pretrained(tmp_path / "base")
    get_peft_model(tiny_llama(num_layers=2), MaskConfig()).save_pretrained(tmp_path / "mask")
    content = (tmp_path / "base" / "model.safetensors").read_bytes()
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    offload = {"offload_folder": str(tmp_path / "offload")}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=device_map, **offload)
    message = (
        r"^model\.layers\.1 is offloaded to disk by device_map, and masks do not work there; load the model without "
        r"device_map, or in a smaller dtype$"
    )
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(base, tmp_path / "mask", **offload)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == content


def test_a_partly_quantised_base_is_not_masked_in_part_in_silence():
    class Linear3bit(nn.Linear):
        """Of a library that nobody here knows."""

    Linear3bit.__module__ = "some_library.nn"
    base = tiny_llama(num_layers=1)
    base.model.layers[0].mlp.up_proj = Linear3bit(32, 48)
    with pytest.warns(UserWarning, match="quantised, or of an unknown kind, are left out: Linear3bit; the mask covers"):
        model = get_peft_model(base, MaskConfig())
    assert len(current_masks(model)) == 6


def test_fp8_layers_are_refused_or_left_out_with_a_warning():
    class FP8Linear(nn.Linear):
        """As transformers': codes of one byte, which torch calls floats, and a forward that scales them."""

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype) * 0.5)

    FP8Linear.__module__ = "transformers.integrations.finegrained_fp8"
    base = tiny_llama(num_layers=1)
    layer = FP8Linear(32, 48)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    base.model.layers[0].mlp.up_proj = layer
    with pytest.raises(UserError, match=r"up_proj cannot be masked: it is quantised, or .* \(FP8Linear\)"):
        get_peft_model(base, MaskConfig(target_modules=["up_proj"]))
    with pytest.warns(UserWarning, match="quantised, or of an unknown kind, are left out: FP8Linear; the mask covers"):
        model = get_peft_model(base, MaskConfig())
    assert len(current_masks(model)) == 6


def test_layers_of_packed_codes_without_a_weight_are_refused_or_left_out_with_a_warning():
    """As compressed-tensors leaves the layers of checkpoints for vLLM."""
    base = tiny_llama(num_layers=1)
    layer = base.model.layers[0].mlp.up_proj
    del layer.weight
    layer.weight_packed = nn.Parameter(torch.zeros(48, 4, dtype=torch.int32), requires_grad=False)
    with pytest.raises(UserError, match=r"up_proj cannot be masked: it is quantised, or .* \(Linear\)"):
        get_peft_model(base, MaskConfig(target_modules=["up_proj"]))
    with pytest.warns(UserWarning, match="quantised, or of an unknown kind, are left out: Linear; the mask covers"):
        model = get_peft_model(base, MaskConfig())
    assert len(current_masks(model)) == 6


@pytest.mark.skipif(IS_OLD_TORCH, reason="2.7 does not compile the plain model; 2.8 to 2.12 not tried")
def test_a_mask_with_noise_is_one_graph_and_follows_mode_and_progress():
    torch._dynamo.reset()
    model = get_peft_model(tiny_llama(num_layers=1), MaskConfig(selection="gumbel", task_type="CAUSAL_LM"))
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    ids = token_ids()
    for step in range(3):
        for each in (model, other):
            set_mask_progress(each, step / 3)
        losses = []
        for each, trained in ((model, model), (compiled, other)):
            trained.train()
            optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=1.0)
            loss = each(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trained.eval()
            with torch.no_grad():
                losses.append([loss.item(), each(input_ids=ids, labels=ids).loss.item()])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][0] != losses[0][1]
