"""What a GGUF file holds and transformers leaves out."""

import dataclasses
import warnings
from types import SimpleNamespace

import pytest
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Phi3Config

from maskft.gguf.header import read_head
from maskft.gguf.left_out import left_out
from maskft.models import load_model

from ..tiny import tiny_llama
from ..tiny_gguf import write_gguf

# As in Llama 3.2: high frequencies stay, low ones are divided by 32.
FACTORS = [1, 1, 1, 1, 2.5, 32, 32, 32]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(2, 288, hidden_size=64, intermediate_size=96, head_dim=16, num_key_value_heads=2)


def test_a_model_whose_frequencies_are_divided_is_loaded_with_a_warning(tmp_path, model):
    path = write_gguf(tmp_path / "base.gguf", model, factors=FACTORS)
    with pytest.warns(UserWarning, match=r"leaves out rope_freqs.weight of .*base.gguf': .* in llama.cpp"):
        loaded = load_model(str(path))
    # The reason: the frequencies are those of the model without the factors.
    assert loaded.model.rotary_emb.inv_freq.tolist() == model.model.rotary_emb.inv_freq.tolist()


def test_without_scaling_there_is_no_warning(tmp_path, model):
    path = write_gguf(tmp_path / "base.gguf", model, factors=[1] * 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_model(str(path))


@pytest.mark.parametrize(
    ("keys", "lost"),
    [
        ({"scaling.type": "linear", "scaling.factor": 8.0}, "llama.rope.scaling.factor 8"),
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, "llama.rope.scaling.factor 4"),
        ({"scale_linear": 2.0}, "llama.rope.scale_linear 2"),
        ({"scaling.type": "none", "scaling.factor": 8.0}, None),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, None),
        ({"scaling.factor": 0.0}, None),
        ({"scaling.factor": "eight"}, None),
        ({"dimension_count": 12}, "llama.rope.dimension_count 12"),
        ({"dimension_count": 16}, None),
        ({"freq_base": 500000.0}, None),
    ],
)
def test_keys_that_change_positions(tmp_path, model, keys, lost):
    head = read_head(write_gguf(tmp_path / "base.gguf", model))
    metadata = head.metadata | {f"llama.rope.{key}": value for key, value in keys.items()}
    expected = [] if lost is None else [lost]
    assert left_out(dataclasses.replace(head, metadata=metadata), model) == expected


def test_rows_that_stay_in_the_order_of_the_file(tmp_path, model):
    """transformers reorders queries and keys only if the file says how many heads of keys there are."""
    head = read_head(write_gguf(tmp_path / "base.gguf", model))
    metadata = {key: value for key, value in head.metadata.items() if key != "llama.attention.head_count_kv"}
    lost = "the order of the rows of queries and keys (the file has no llama.attention.head_count_kv)"
    assert left_out(dataclasses.replace(head, metadata=metadata), model) == [lost]
    # Qwen's are in transformers' order.
    qwen = read_head(write_gguf(tmp_path / "qwen.gguf", model, architecture="qwen2"))
    metadata = {key: value for key, value in qwen.metadata.items() if "head_count_kv" not in key}
    assert left_out(dataclasses.replace(qwen, metadata=metadata), model) == []


@pytest.mark.parametrize(("num_layers", "is_lost"), [(46, True), (42, False)])
def test_the_largest_gemmas_divide_attention_by_another_number(tmp_path, model, num_layers, is_lost):
    head = read_head(write_gguf(tmp_path / "base.gguf", model, architecture="gemma2"))
    head = dataclasses.replace(head, metadata=head.metadata | {"gemma2.block_count": num_layers})
    config = Gemma2Config(hidden_size=64, num_attention_heads=4, head_dim=16)
    gemma = with_config(model, config)
    assert ("query_pre_attn_scalar 16" in left_out(head, gemma)) == is_lost
    config.query_pre_attn_scalar = 16
    assert "query_pre_attn_scalar 16" not in left_out(head, gemma)


def with_config(model, config):
    """A model of these weights with another configuration."""
    return SimpleNamespace(config=config, state_dict=model.state_dict)


def test_a_model_that_scales_positions_itself_has_lost_nothing(tmp_path, model):
    head = read_head(write_gguf(tmp_path / "base.gguf", model, factors=FACTORS))
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 32.0}
    assert left_out(head, with_config(model, LlamaConfig(head_dim=16, rope_parameters=scaled))) == []


def test_the_rotated_part_of_a_head_may_be_in_the_configuration(tmp_path, model):
    head = read_head(write_gguf(tmp_path / "base.gguf", model))
    metadata = head.metadata | {"llama.rope.dimension_count": 12}
    head = dataclasses.replace(head, metadata=metadata)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "pad_token_id": None}
    assert left_out(head, with_config(model, Phi3Config(**sizes))) == ["llama.rope.dimension_count 12"]
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    assert left_out(head, with_config(model, Phi3Config(**sizes, rope_parameters=parameters))) == []


def test_parameters_of_layers_are_looked_at(tmp_path, model):
    head = read_head(write_gguf(tmp_path / "base.gguf", model, factors=FACTORS))
    config = Gemma3TextConfig(head_dim=16)
    assert left_out(head, with_config(model, config)) == ["rope_freqs.weight"]
    config.rope_parameters["full_attention"] = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert left_out(head, with_config(model, config)) == []


def test_biases_that_the_architecture_usually_has_not(tmp_path, model):
    config = LlamaConfig(**{**model.config.to_dict(), "attention_bias": True})
    with_biases = LlamaForCausalLM(config)
    path = write_gguf(tmp_path / "base.gguf", with_biases)
    assert left_out(read_head(path), with_biases) == []
    with pytest.warns(UserWarning, match=r"leaves out blk.0.attn_q.bias and 7 more of .*base.gguf'"):
        load_model(str(path))


def test_of_an_unknown_architecture_nothing_is_said(tmp_path, model):
    head = read_head(write_gguf(tmp_path / "base.gguf", model, architecture="minicpm", factors=FACTORS))
    assert left_out(head, model) == []
