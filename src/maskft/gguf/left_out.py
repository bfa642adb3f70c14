"""What a GGUF file holds and transformers leaves out of the model that it makes from it, without a word."""

from __future__ import annotations

from typing import Any

from .header import GgufHead
from .names import ARCHITECTURES, PERMUTED, dequantised, names_of_tensors

# Tensors that divide the frequencies of rotary positions, one number each: the first is of Llama 3.1 and later, the
# others of Phi 3.
_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_short.weight",
    "rope_factors_long.weight",
)
# Gemma's models of 27 B by their number of layers: only these scale attention by another number than the head's width.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}


def left_out(head: GgufHead, model: Any) -> list[str]:
    """Tensors and keys of a file that change its outputs and did not reach the model, for a message.

    transformers 5.24 makes a model of a few keys: of rotary positions it reads the base of the frequencies
    (``rope.freq_base``) alone, and of a file with biases where the architecture usually has none it drops them.

    Args:
        head: Head of the file.
        model: The model that transformers loaded from it.

    Returns:
        Empty also for an architecture that masks are not merged into.
    """
    architecture = head.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        return []
    # How transformers finds them as well: by the name that gguf gives to each parameter of the model.
    read = set(names_of_tensors(head, model.state_dict()).values())
    tensors = [tensor for tensor in head.tensors if tensor not in read and tensor not in _FACTORS]
    return [
        *tensors,
        *_order_of_rows(head, architecture),
        *_positions(head, architecture, model.config),
        *_scale(head, architecture, model.config),
    ]


def _order_of_rows(head: GgufHead, architecture: str) -> list[str]:
    """Whether transformers leaves the rows of queries and keys in the file's order, which makes another model."""
    # It puts them back only if the file says how many heads both have. llama.cpp's converter writes the second number
    # only if the model's configuration has it.
    key = f"{architecture}.attention.head_count_kv"
    if architecture in PERMUTED and key not in head.metadata:
        return [f"the order of the rows of queries and keys (the file has no {key})"]
    return []


def _scale(head: GgufHead, architecture: str, config: Any) -> list[str]:
    """The scale of attention where llama.cpp knows it by the size of the model, and no key holds it."""
    num_layers = head.metadata.get(f"{architecture}.block_count")
    if num_layers is None or _LARGEST_GEMMA.get(architecture) != num_layers:
        return []
    of_llama_cpp = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar == of_llama_cpp:
        return []
    return [f"query_pre_attn_scalar {of_llama_cpp}"]


def _positions(head: GgufHead, architecture: str, config: Any) -> list[str]:
    """What changes rotary positions in the file and not in the model."""
    found = []
    prefix = f"{architecture}.rope"
    kinds, num_rotated = _rotation(config)
    # Another version of transformers may read the scaling: then the model has a kind of its own.
    if kinds == {"default"}:
        for tensor in _FACTORS:
            if tensor in head.tensors and bool((dequantised(head, tensor) != 1).any()):
                found.append(tensor)
        # Without its kind llama.cpp takes the factor as linear; 0 stands for none.
        kind = head.metadata.get(f"{prefix}.scaling.type", "linear")
        for key in (f"{prefix}.scaling.factor", f"{prefix}.scale_linear"):
            factor = head.metadata.get(key, 1)
            is_number = isinstance(factor, int | float)
            if kind != "none" and is_number and factor not in (0, 1):
                found.append(f"{key} {factor:g}")

    # A part of each head, as in Phi 4 mini.
    key = f"{prefix}.dimension_count"
    in_file = head.metadata.get(key, num_rotated)
    if in_file != num_rotated:
        found.append(f"{key} {in_file}")
    return found


def _rotation(config: Any) -> tuple[set[str], int]:
    """Kinds of scaling of a model's rotary positions, and how many values of a head they rotate."""
    # None: transformers 4 has the attribute only where positions are scaled, by another name.
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Gemma 3 has parameters for each kind of its layers.
    of_layers = [value for value in parameters.values() if isinstance(value, dict)]
    each = of_layers or [parameters]
    kinds = {values.get("rope_type", "default") for values in each}

    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // config.num_attention_heads
    share = each[0].get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return kinds, int(head_dim * share)
