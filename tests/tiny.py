"""Tiny random models of transformers' own classes, made the same in every test, and adapters without one."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from maskft.masks.codec import PREFIX, encode_mask
from maskft.masks.fingerprints import mask_fingerprint
from maskft_common import layout

IS_OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)

# What TRL's trainers need on a CPU, and some steps of a tiny model.
TRAINER = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 6,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "gradient_checkpointing": False,
}


def tiny_llama(num_layers=3, vocab_size=96, seed=0, **overrides):
    settings = {"vocab_size": vocab_size, "num_hidden_layers": num_layers, "eos_token_id": 1, "bos_token_id": None}
    return decoder(transformers.LlamaConfig, transformers.LlamaForCausalLM, seed, **{**settings, **overrides})


def decoder(config_class, model_class, seed=0, **overrides):
    """A decoder of any architecture."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "pad_token_id": 0,
    }  # fmt: skip
    return model_class(config_class(**{**settings, **overrides})).eval()


def tiny_gpt2(seed=0, **overrides):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=1, **overrides
    )
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {
    "llama": tiny_llama,
    "qwen3": lambda: decoder(transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "mistral": lambda: decoder(transformers.MistralConfig, transformers.MistralForCausalLM),
    "gemma3": lambda: decoder(transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "gpt2": tiny_gpt2,
}


def token_ids(batch=2, length=9, vocab_size=96, seed=1):
    return torch.randint(2, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def write_coded(masks, folder):
    """Write an adapter's weights file with these masks; returns them coded."""
    coded = {name: encode_mask(mask) for name, mask in masks.items()}
    save_file({f"{PREFIX}{name}.mask_coded": code for name, code in coded.items()}, folder / layout.ADAPTER_WEIGHTS)
    return coded


def save_masks(masks, folder, **config):
    """Write an adapter folder that holds ``masks`` (module name -> bool tensor) and no more."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = mask_fingerprint(write_coded(masks, folder))
    config = {"peft_type": "MASK", "format_version": 2, "mask_sha256": sha256, **config}
    (folder / layout.ADAPTER_CONFIG).write_text(json.dumps(config))
