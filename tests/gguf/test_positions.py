"""Rotary positions that transformers computes in another way than llama.cpp."""

import dataclasses
import warnings

import pytest
from transformers import LlamaConfig, Phi3Config

from maskft.gguf.header import read_head
from maskft.gguf.positions import lost_scaling
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
    with pytest.warns(UserWarning, match=r"base.gguf' changes rotary positions \(rope_freqs.weight\).* in llama.cpp"):
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
    assert lost_scaling(dataclasses.replace(head, metadata=metadata), model.config) == lost


def test_a_model_that_scales_them_itself_has_lost_nothing(tmp_path, model):
    head = read_head(write_gguf(tmp_path / "base.gguf", model, factors=FACTORS))
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 32.0}
    assert lost_scaling(head, LlamaConfig(head_dim=16, rope_parameters=scaled)) is None


def test_the_rotated_part_of_a_head_may_be_in_the_configuration(tmp_path, model):
    head = read_head(write_gguf(tmp_path / "base.gguf", model))
    metadata = head.metadata | {"general.architecture": "phi3", "phi3.rope.dimension_count": 12}
    head = dataclasses.replace(head, metadata=metadata)
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    assert lost_scaling(head, Phi3Config(**sizes, rope_parameters=parameters)) is None
    assert lost_scaling(head, Phi3Config(**sizes)) == "phi3.rope.dimension_count 12"
