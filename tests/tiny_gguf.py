"""GGUF files of tiny models, written with gguf's own writer as llama.cpp's converter writes them."""

from __future__ import annotations

import numpy as np
import torch

import gguf
from gguf import GGMLQuantizationType as Type

from .tiny_tokenizer import CHATML, MERGES, tiny_tokenizer

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def tensor_name(name):
    """The name in a file of a parameter of transformers."""
    module, _, kind = name.rpartition(".")
    for ours, theirs in NAMES.items():
        if module == ours:
            return f"{theirs}.{kind}"
        if module.endswith(f".{ours}"):
            block = module.split(".")[2]
            return f"blk.{block}.{theirs}.{kind}"
    raise KeyError(name)


def permuted(weight, num_heads):
    """Rows of queries or keys as llama.cpp's converter orders them: a loop over the definition."""
    half = weight.shape[0] // num_heads // 2
    rows = []
    for head in range(num_heads):
        for i in range(half):
            rows.append(weight[head * 2 * half + i])
            rows.append(weight[head * 2 * half + half + i])
    return torch.stack(rows)


def write_gguf(path, model, kind=Type.Q4_0, kinds=None, architecture="llama", added=None, factors=None):
    """Write a model of Llama's shape.

    Args:
        path: The new file.
        model: A causal language model of transformers.
        kind: Type of its linear layers.
        kinds: Name of a tensor -> its type, where it is another.
        architecture: What the file calls it.
        added: More keys of whole numbers.
        factors: Numbers that divide the frequencies of rotary positions.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (added or {}).items():
        writer.add_uint32(key, value)
    _add_tokenizer(writer, config.vocab_size)

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float()
        module = name.split(".")[-2]
        if architecture == "llama" and module in heads:
            weight = permuted(weight, heads[module])
        tensor = tensor_name(name)
        is_linear = weight.dim() == 2 and module != "embed_tokens"
        found = (kinds or {}).get(tensor, kind if is_linear else Type.F32)
        writer.add_tensor(tensor, gguf.quantize(weight.numpy(), found), raw_dtype=found)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer, vocab_size):
    tokenizer = tiny_tokenizer()
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    tokens.append("<|endoftext|>")  # which transformers would add
    tokens += [f"<unused{index}>" for index in range(len(tokens), vocab_size)]
    tokens = tokens[:vocab_size]
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>", "<|im_end|>"}
    types = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_unk_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


def read_gguf(path):
    """Values by tensor name, with gguf's own reader."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        for tensor in reader.tensors
    }
