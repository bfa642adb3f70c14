"""A tiny random language model, its tokenizer and an exercise, so that the examples run offline in seconds."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<eos>", "<image>")


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer; ``<pad>`` is token 0, ``<eos>`` 1, ``<image>`` 2."""
    # A BPE model without merges has one token per byte, so it can encode any text and needs no training.
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def text_config() -> LlamaConfig:
    """Return the configuration of a Llama of four layers and 0.1 M parameters."""
    return LlamaConfig(
        vocab_size=260,  # 256 bytes and the special tokens
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def language_model(seed: int = 0) -> LlamaForCausalLM:
    """Return the model of :func:`text_config` with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(text_config())


def sums(first: range, second: range) -> Dataset:
    """Return additions as rows with ``prompt`` and ``completion``."""
    rows = []
    for a in first:
        for b in second:
            rows.append({"prompt": f"{a}+{b}=", "completion": f"{a + b}"})
    return Dataset.from_list(rows)
