"""Bytes that training keeps, and passes over layers: counted from numbers, without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

# Bytes of optimizer state per trained parameter, as a function of the parameter's own size. 8-bit states carry a
# float32 scale per block of 256, 4-bit ones per block of 128, for each of the two moments.
OPTIMIZER_BYTES: dict[str, Callable[[int], float]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), lambda size: 2 * size),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"), lambda size: 2 * (1 + 4 / 256)),
    "adamw_torch_4bit": lambda size: 2 * (0.5 + 4 / 128),
    "sgd": lambda size: 0,
}


def kept_bytes(base: int, trained: dict[int, int], num_scores: int, compute_size: int, optim: str) -> dict[str, int]:
    """Return the bytes that training keeps from step to step, by term.

    Args:
        base: Bytes of all base weights and buffers.
        trained: Bytes per parameter -> how many of that size are trained, besides scores.
        num_scores: Weights with a trained score, which is float32, as is its gradient.
        compute_size: Bytes per weight in the dtype that matrices are multiplied in.
        optim: One of `OPTIMIZER_BYTES`.
    """
    terms = {"weights": base}
    if num_scores:
        # The base weights stay beside the effective ones.
        terms |= {"effective weights": num_scores * compute_size, "scores": 4 * num_scores}
    moments = OPTIMIZER_BYTES[optim]
    terms["optimizer"] = math.ceil(sum(n * moments(size) for size, n in trained.items()) + num_scores * moments(4))
    terms["gradients"] = sum(size * count for size, count in trained.items()) + 4 * num_scores
    return terms


def layer_passes(
    num_layers: int, trained_layers: Collection[int], is_lora: bool = False, is_checkpointed: bool = False
) -> dict[str, int]:
    """Count what training costs per token, in passes over one decoder layer; a pass is about 2 FLOPs per weight.

    A token goes forward through all L layers; gradients of activations go back through those from the lowest trained
    one up, L - a; and each trained layer computes the gradient of its weights, which for LoRA is next to nothing.

    Args:
        num_layers: Decoder layers of the model.
        trained_layers: Indices of those that hold trained weights, at least one, in [0, num_layers).
        is_lora: Whether LoRA matrices are trained in their place.
        is_checkpointed: Whether activations are computed again (gradient checkpointing).
    """
    back = num_layers - min(trained_layers)
    passes = {
        "forward": num_layers,
        "activation_gradients": back,
        "weight_gradients": 0 if is_lora else len(trained_layers),
        "recomputed": back if is_checkpointed else 0,
    }
    return passes | {"total": sum(passes.values()), "full": 3 * num_layers}
