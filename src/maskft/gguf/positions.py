"""Rotary positions of a GGUF file that transformers computes in another way than llama.cpp."""

from __future__ import annotations

from typing import Any

from .header import GgufHead
from .names import ARCHITECTURES, dequantised

# Tensors that divide the frequencies, one number each: the first is of Llama 3.1 and later, the others of Phi 3.
_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_short.weight",
    "rope_factors_long.weight",
)


def lost_scaling(head: GgufHead, config: Any) -> str | None:
    """What in the file changes rotary positions and did not reach the model, for a message; None: nothing.

    transformers 5.24 reads the base of the frequencies (``rope.freq_base``) of the architectures that masks are merged
    into, and none of the following.

    Args:
        head: Head of the file.
        config: Configuration of the model that transformers loaded from it.
    """
    architecture = head.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        return None
    kinds, num_rotated = _rotation(config)
    # Another version of transformers may read the scaling: then the model has a kind of its own.
    if kinds == {"default"}:
        for tensor in _FACTORS:
            if tensor in head.tensors and bool((dequantised(head, tensor) != 1).any()):
                return tensor
        # Without its kind llama.cpp takes the factor as linear; 0 stands for none.
        prefix = f"{architecture}.rope"
        kind = head.metadata.get(f"{prefix}.scaling.type", "linear")
        for key in (f"{prefix}.scaling.factor", f"{prefix}.scale_linear"):
            factor = head.metadata.get(key, 1)
            is_number = isinstance(factor, int | float)
            if kind != "none" and is_number and factor not in (0, 1):
                return f"{key} {factor:g}"

    # A part of each head, as in Phi 4 mini.
    key = f"{architecture}.rope.dimension_count"
    in_file = head.metadata.get(key, num_rotated)
    if in_file != num_rotated:
        return f"{key} {in_file}"
    return None


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
