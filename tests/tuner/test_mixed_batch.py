"""Mixed batches: each row as under its own mask alone, in one forward pass and in generation."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import tiny
from maskft import MaskConfig
from maskft.tuner import adapter_layers, mixed_batch
from maskft_common.errors import UserError

ADAPTERS = {
    "sums": {"sparsity": 0.1},
    "intents": {"sparsity": 0.4, "target_modules": r".*(gate_proj|q_proj|c_fc)"},
    "dates": {"sparsity": 0.01, "layers_to_transform": [1]},
}
NAMES = ["sums", "__base__", "intents", "sums", "dates"]


def with_adapters(base, adapters=ADAPTERS):
    """A model with several masks that are trained further, in evaluation mode."""
    first, *others = adapters
    model = get_peft_model(base, MaskConfig(**adapters[first]), adapter_name=first)
    for seed, name in enumerate(others, 1):
        model.add_adapter(name, MaskConfig(mask_seed=seed, **adapters[name]))
    return model.eval()


def loaded(folder, make=tiny.tiny_llama, dtype=torch.float32, adapters=ADAPTERS):
    """A model with the same masks saved and loaded again, for inference."""
    with_adapters(make(), adapters).save_pretrained(folder)
    first, *others = adapters
    model = PeftModel.from_pretrained(make().to(dtype), folder / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder / name, name)
    return model.eval()


def alone(model, call, names, ids, **kwargs):
    """``call`` of each row by itself, under the row's own adapter."""
    rows = []
    for row, name in enumerate(names):
        inputs = {"input_ids": ids[row : row + 1], **kwargs}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(call(model)(**inputs))
        else:
            model.set_adapter(name)
            rows.append(call(model)(**inputs))
    return rows


@torch.no_grad()
def both_logits(model, names=NAMES, ids=None):
    ids = tiny.token_ids(batch=len(names)) if ids is None else ids
    rows = alone(model, lambda m: m, names, ids)
    mixed = model(input_ids=ids, adapter_names=names).logits
    return mixed, torch.cat([row.logits for row in rows])


@pytest.mark.parametrize("name", tiny.MODELS)
def test_each_row_is_as_under_its_own_mask_alone(name, tmp_path):
    mixed, expected = both_logits(loaded(tmp_path, tiny.MODELS[name]))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def tiny_opt():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64)
    return transformers.OPTForCausalLM(config).eval()


@torch.no_grad()
def test_blocks_that_give_their_layers_all_tokens_in_one_dimension():
    """OPT's fc1 and fc2 get (B * T, I): "5 names and the batch 45 rows; give one name per row"."""
    adapters = {"sums": {"sparsity": 0.2}, "intents": {"sparsity": 0.4}, "dates": {"target_modules": ["fc1"]}}
    model = with_adapters(tiny_opt(), adapters)
    mixed, expected = both_logits(model)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected[0], expected[2], atol=1e-3)
    # As many tokens as rows.
    mixed, expected = both_logits(model, ids=tiny.token_ids(batch=5, length=5))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
    # Every step of a generation has other shapes, and beams repeat the rows.
    ids = tiny.token_ids(batch=len(NAMES))
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 1}
    tokens = model.generate(input_ids=ids, adapter_names=NAMES, **options)
    rows = alone(model, lambda m: m.generate, NAMES, ids, **options)
    for found, row in zip(tokens, rows, strict=True):
        assert torch.equal(found[: row.shape[1]], row[0])


def test_experts_get_tokens_of_any_row():
    base = tiny.tiny_llama()
    for layer in base.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    model = with_adapters(base, {"sums": {}, "intents": {}})
    fails(model, r"experts\.0 is an expert, whose rows are tokens of any row")


def test_layers_that_get_tokens_before_rows():
    """With as many tokens as rows, each mask would silently be of a token's place."""
    config = transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48)
    adapters = {name: {"target_modules": ["layer_1"]} for name in ("sums", "intents")}
    model = with_adapters(transformers.XLNetLMHeadModel(config), adapters)
    with pytest.raises(UserError, match="layers of xlnet get the tokens of all rows before the rows"):
        model(input_ids=tiny.token_ids(2, 2), adapter_names=["sums", "intents"])


def test_rows_of_one_token():
    """Decoding without a cache of keys: the product with one vector a row."""
    mixed, expected = both_logits(with_adapters(tiny.tiny_llama()), ids=tiny.token_ids(batch=len(NAMES), length=1))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


def test_without_the_product_that_torch_has_through_mkl_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    test_rows_of_one_token()


@pytest.mark.parametrize("names", [["sums"] * 3, ["__base__"] * 3, ["dates", "dates", "__base__"]])
def test_batches_of_one_adapter_or_none(names):
    mixed, expected = both_logits(with_adapters(tiny.tiny_llama()), names)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_bases_of_another_dtype(dtype, atol, tmp_path):
    model = with_adapters(tiny.tiny_llama().to(dtype))
    mixed, expected = both_logits(model)
    assert mixed.dtype == expected.dtype
    torch.testing.assert_close(mixed, expected, rtol=0, atol=atol)


def test_autocast():
    model = with_adapters(tiny.tiny_llama())
    with torch.autocast("cpu", torch.bfloat16):
        mixed, expected = both_logits(model)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=0.05)


def test_a_single_layer_by_hand():
    base = nn.Linear(3, 2, bias=False)
    base.weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    model = get_peft_model(
        nn.Sequential(base), MaskConfig(target_modules=["0"], sparsity=0.5), adapter_name="sums"
    ).eval()
    layer = adapter_layers(model, "sums")["base_model.model.0"]
    layer.mask_scores["sums"].data = torch.tensor([[0.1, 9.0, 9.0], [9.0, 0.1, 0.1]])  # removes 1, 5 and 6
    with torch.no_grad():
        y = model(torch.tensor([[1.0, 1.0, 1.0], [1.0, 10.0, 100.0]]), adapter_names=["sums", "__base__"])
    assert y.tolist() == [[5.0, 4.0], [321.0, 654.0]]


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_is_token_for_token_that_of_each_alone(model_name, num_beams, tmp_path):
    model = loaded(tmp_path, tiny.MODELS[model_name])
    ids = tiny.token_ids(batch=len(NAMES), length=5)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": num_beams}
    rows = alone(model, lambda m: m.generate, NAMES, ids, **settings)
    mixed = model.generate(input_ids=ids, adapter_names=NAMES, **settings)
    assert torch.equal(mixed, torch.cat(rows))
    assert len({tuple(row.tolist()) for row in mixed[:, 5:]}) > 1


def test_several_answers_a_row():
    model = with_adapters(tiny.tiny_llama())
    ids = tiny.token_ids(batch=2, length=4)
    config = transformers.GenerationConfig(num_return_sequences=2, do_sample=True, max_new_tokens=3, pad_token_id=0)
    assert model.generate(input_ids=ids, adapter_names=["sums", "intents"], generation_config=config).shape[0] == 4


def test_beams_of_a_generation_configuration():
    """That of the model, as many translators and summarisers have one, or one that is passed by its position."""
    model = with_adapters(tiny.tiny_llama())
    ids = tiny.token_ids(batch=3, length=4)
    names = ["sums", "__base__", "intents"]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, adapter_names=names, num_beams=2, **settings)
    config = transformers.GenerationConfig(num_beams=2, **settings)
    assert torch.equal(model.generate(ids, config, adapter_names=names), expected)

    model.base_model.model.generation_config.num_beams = 2
    assert torch.equal(model.generate(input_ids=ids, adapter_names=names, **settings), expected)
    assert model.generate(input_ids=ids, adapter_names=names, num_beams=1, **settings).shape == expected.shape
    mixed, alone_logits = both_logits(model, names, ids)
    torch.testing.assert_close(mixed, alone_logits, rtol=0, atol=1e-5)

    # As many names as beams, or beams where nothing is generated, are no names of the rows.
    with pytest.raises(UserError, match=r"^adapter_names has 6 names and the batch 3 rows; give one name per row$"):
        model.generate(input_ids=ids, adapter_names=names * 2, **settings)
    adapters = {name: {"sparsity": 0.1, "task_type": "CAUSAL_LM"} for name in ("sums", "intents")}
    of_a_task = with_adapters(tiny.tiny_llama(), adapters)
    of_a_task.base_model.model.generation_config.num_beams = 2
    with pytest.raises(UserError, match=r"^adapter_names has 2 names and the batch 4 rows; give one name per row$"):
        of_a_task(input_ids=tiny.token_ids(batch=4), adapter_names=["sums", "intents"])


def test_encoder_and_decoder_get_the_names_of_their_own_rows():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    base = transformers.T5ForConditionalGeneration(config).eval()
    model = with_adapters(base, {"sums": {"sparsity": 0.3}, "intents": {"sparsity": 0.3}})
    ids = tiny.token_ids(batch=2, length=5)
    settings = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    rows = alone(model, lambda m: m.generate, ["sums", "intents"], ids, **settings)
    mixed = model.generate(input_ids=ids, adapter_names=["sums", "intents"], **settings)
    for row, expected in zip(mixed, rows, strict=True):
        assert row[: expected.shape[1]].tolist() == expected[0].tolist()


def test_modules_to_save_are_those_of_each_row(tmp_path):
    adapters = {"sums": {"sparsity": 0.1}, "intents": {"sparsity": 0.1}}
    adapters = {name: {**config, "modules_to_save": ["lm_head"]} for name, config in adapters.items()}
    model = with_adapters(tiny.tiny_llama(tie_word_embeddings=False), adapters)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["intents"].weight.mul_(2)
    mixed, expected = both_logits(model, ["sums", "intents"])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


def test_masks_that_change_between_batches_are_seen():
    model = with_adapters(tiny.tiny_llama())
    both_logits(model)
    for layer in adapter_layers(model, "sums").values():
        with torch.no_grad():
            layer.mask_scores["sums"].mul_(-1).add_(0.01)
            layer.base_layer.weight.mul_(1.5)
    mixed, expected = both_logits(model)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


def test_an_adapter_deleted_and_loaded_again_under_its_name_is_the_new_one(tmp_path):
    model = loaded(tmp_path)
    both_logits(model)
    model.delete_adapter("sums")
    model.load_adapter(tmp_path / "intents", "sums")
    mixed, expected = both_logits(model)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


def test_the_active_adapter_and_the_weights_are_left_as_they_were():
    model = with_adapters(tiny.tiny_llama())
    model.set_adapter("intents")
    ids = tiny.token_ids()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model(input_ids=ids, adapter_names=["sums", "dates"])
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if name.endswith("_proj"))


def test_disabled_adapters_win_over_names():
    model = with_adapters(tiny.tiny_llama())
    ids = tiny.token_ids()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids, adapter_names=["sums", "intents"]).logits, model(input_ids=ids).logits)


def test_places_take_two_bytes_and_go_with_their_adapter():
    model = with_adapters(tiny.tiny_llama())
    both_logits(model)
    layer = next(iter(adapter_layers(model, "intents").values()))
    places = layer.mixed_batch.places["intents"][2]
    assert places.columns.dtype == torch.int16
    assert len(places.columns) == int((~layer.get_mask("intents")).sum())
    assert layer.mixed_batch.num_bytes > 0
    model.delete_adapter("intents")
    assert "intents" not in layer.mixed_batch.places


# Bad input


def fails(model, match, adapter_names=("sums", "intents"), **kwargs):
    ids = tiny.token_ids()
    with pytest.raises(UserError, match=match) as raised:
        model(input_ids=ids, adapter_names=adapter_names, **kwargs)
    assert "\n" not in str(raised.value)
    assert not any("adapter_names" in str(module._forward_pre_hooks) for module in model.modules())


def test_bad_names():
    model = with_adapters(tiny.tiny_llama())
    fails(model, r"'sum', which is not loaded.*loaded: dates, intents, sums \(and __base__", ["sum", "intents"])
    fails(model, "3 names and the batch 2 rows", ["sums", "intents", "dates"])
    fails(model, "give a list with one adapter name per row", "sums")
    fails(model, "give a list with one adapter name per row", ["sums", None])


def test_training_mode():
    fails(with_adapters(tiny.tiny_llama()).train(), "for inference.*model.eval()")


def test_merged():
    model = with_adapters(tiny.tiny_llama())
    model.merge_adapter(["sums"])
    fails(model, r"sums is merged: call model.unmerge_adapter\(\)")


def test_offloaded_weights():
    model = with_adapters(tiny.tiny_llama())
    layer = next(iter(adapter_layers(model, "sums").values()))
    layer.base_layer.to("meta")
    fails(model, "q_proj are offloaded: load it whole")


def test_removed_value_base(tmp_path):
    tiny.tiny_llama(seed=1).save_pretrained(tmp_path)
    other = {"removed_value": "base", "removed_value_model": str(tmp_path)}
    fails(with_adapters(tiny.tiny_llama(), {"sums": {}, "intents": other}), "'intents' has removed_value='base'")


def test_soft_gates(tmp_path):
    adapters = {"sums": {}, "intents": {"selection": "gumbel"}}
    fails(with_adapters(tiny.tiny_llama(), adapters), "'intents' is trained with soft gates")
    mixed, expected = both_logits(loaded(tmp_path, adapters=adapters), ["sums", "intents"])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


def test_another_kind_of_adapter_beside_masks():
    base = get_peft_model(tiny.tiny_llama(), LoraConfig(target_modules=["v_proj"])).base_model.model
    config = {"target_modules": ["gate_proj"]}
    fails(with_adapters(base, {"sums": config, "intents": config}), "v_proj has an adapter of another kind")


def test_a_layer_called_with_other_rows_than_names():
    layer = next(iter(adapter_layers(with_adapters(tiny.tiny_llama()), "sums").values()))
    with pytest.raises(UserError, match="2 names and the batch 3 rows"):
        mixed_batch.mixed_batch_forward(layer, torch.zeros(3, 32), ["sums", "intents"])
