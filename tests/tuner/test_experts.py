"""Masks of experts that are fused into 3-D parameters: one mask for each expert's matrix."""

import copy
import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from maskft import MaskConfig, UserError, adapter_layers, current_masks
from maskft.adapter.export import removed_places
from maskft.adapter.mask_set import MaskSet
from maskft.adapter.verify import verify
from maskft.masking import num_removed
from maskft.tuner.experts import place_of
from tiny import decoder, token_ids

MODELS = {
    "qwen3_moe": lambda: decoder(
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        num_hidden_layers=2,
    ),
    "mixtral": lambda: decoder(
        transformers.MixtralConfig, transformers.MixtralForCausalLM, num_local_experts=4, num_hidden_layers=2
    ),
    "gpt_oss": lambda: decoder(
        transformers.GptOssConfig,
        transformers.GptOssForCausalLM,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        layer_types=["full_attention", "full_attention"],
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def masked(model, **changes):
    settings = {"sparsity": 0.3, "target_modules": ["experts"], "task_type": "CAUSAL_LM", "save_scores": True}
    return get_peft_model(model, MaskConfig(**{**settings, **changes}))


def set_to_masks(model, masks):
    """The experts of a plain model with their removed weights at zero, by hand."""
    for name, mask in masks.items():
        path, parameter, index = name.rsplit(".", 2)
        getattr(model.get_submodule(path), parameter).data[int(index)].masked_fill_(~mask, 0.0)
    return model


def test_each_expert_has_a_mask_of_exact_size(model):
    plain, peft = copy.deepcopy(model), masked(model)
    masks = current_masks(peft)
    assert len(masks) == 2 * 2 * 4  # layers, parameters, experts
    assert all(int((~m).sum()) == num_removed(m.numel(), 0.3) for m in masks.values())
    assert len({mask.numpy().tobytes() for mask in masks.values()}) == len(masks)
    assert {n for n, p in peft.named_parameters() if p.requires_grad and "mask_scores" not in n} == set()
    with torch.no_grad():
        found = peft.eval()(token_ids()).logits
        with peft.disable_adapter():
            assert torch.equal(peft(token_ids()).logits, plain(token_ids()).logits)
        assert torch.equal(found, set_to_masks(plain, masks)(token_ids()).logits)


def test_experts_in_another_form_are_left_out_with_a_warning():
    """Those of DBRX lie in matrices, one expert below the other."""
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 96, "pad_token_id": 0}
    parts = {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    }
    dbrx = transformers.DbrxForCausalLM(transformers.DbrxConfig(**sizes, **parts))
    glus = [module for module in dbrx.modules() if type(module).__name__ == "DbrxExpertGLU"]
    numel = sum(parameter.numel() for glu in glus for parameter in glu.parameters())
    assert len(glus) == 2 and numel
    with pytest.warns(UserWarning, match=rf"maskft cannot mask are left out: DbrxExpertGLU \({numel:,} weights\)"):
        names = current_masks(get_peft_model(dbrx, MaskConfig()))
    assert names and not any("experts" in name for name in names)


def test_experts_that_are_masked_or_not_asked_for_are_no_warning(model):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="experts in a form")
        get_peft_model(copy.deepcopy(model), MaskConfig()).add_adapter("second", MaskConfig())
        get_peft_model(model, MaskConfig(target_modules=["q_proj"]))


def test_one_pool_for_all_experts(model):
    masks = current_masks(masked(model, scope="global"))
    numel = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == num_removed(numel, 0.3)
    assert len({float(mask.float().mean()) for mask in masks.values()}) > 1


def test_the_gradient_is_that_of_the_weights_times_the_weights(model):
    plain, peft = copy.deepcopy(model), masked(model)
    set_to_masks(plain, current_masks(peft)).requires_grad_(True)
    ids = token_ids()
    peft(input_ids=ids, labels=ids).loss.backward()
    plain(input_ids=ids, labels=ids).loss.backward()
    for layer in adapter_layers(peft).values():
        path, parameter, index = layer.module_name.rsplit(".", 2)
        grad_weight = getattr(plain.get_submodule(path), parameter).grad[int(index)]
        scores = layer.mask_scores["default"]
        torch.testing.assert_close(scores.grad, grad_weight * layer.weight * scores.sign(), rtol=1e-5, atol=1e-8)


def test_trained_saved_loaded_merged(model, tmp_path):
    plain, ids = copy.deepcopy(model), token_ids()
    peft = masked(model, layers_to_transform=[1])
    start = current_masks(peft)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = peft(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = current_masks(peft)
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    peft.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = peft(ids).logits
        peft.merge_adapter()
        torch.testing.assert_close(peft(ids).logits, expected, rtol=0, atol=0)
        peft.unmerge_adapter()
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
        assert torch.equal(loaded(ids).logits, expected)
        merged = loaded.merge_and_unload()
        assert type(merged.model.layers[1].mlp) is type(plain.model.layers[1].mlp)
        assert torch.equal(merged(ids).logits, expected)
        patched = copy.deepcopy(plain)
        for name, places in removed_places(tmp_path)[0].items():
            patched.get_parameter(name).view(-1)[places.long()] = 0
        assert torch.equal(patched(ids).logits, expected)
        by_hand = copy.deepcopy(plain)
        MaskSet.from_adapter(tmp_path).apply_(by_hand)
        assert torch.equal(by_hand(ids).logits, expected)
    for (name, left), right in zip(peft.unload().named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(left, right), name
    assert any("of" in line and "weights" in line for line in verify(tmp_path))


def test_two_adapters(model):
    peft = masked(model)
    peft.add_adapter("other", MaskConfig(sparsity=0.1, target_modules=["experts"], mask_seed=1))
    ids = token_ids()
    with torch.no_grad():
        first = peft.eval()(ids).logits
        peft.set_adapter("other")
        assert not torch.equal(peft(ids).logits, first)
        peft.set_adapter("default")
        assert torch.equal(peft(ids).logits, first)


def test_by_default_experts_are_among_the_layers(model):
    peft = get_peft_model(model, MaskConfig())
    targets = peft.peft_config["default"].target_modules
    assert "experts" in targets and "q_proj" in targets and not any(name.isdecimal() for name in targets)


def test_names_of_experts_and_of_layers():
    assert place_of("model.layers.0.mlp.experts.gate_up_proj.3") == ("model.layers.0.mlp.experts.gate_up_proj", 3)
    assert place_of("model.layers.0.moe.input_linear.weight.12") == ("model.layers.0.moe.input_linear.weight", 12)
    for name in ("model.layers.0.mlp.experts.3.w1", "model.layers.0.mlp.up_proj", "layers.0.mlp.0"):
        assert place_of(name) is None


def test_what_experts_do_not_have(tmp_path):
    model = MODELS["mixtral"]()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'base' is not for fused experts"):
        masked(model, removed_value="base", removed_value_model=str(tmp_path))
