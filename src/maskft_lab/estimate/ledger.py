"""Bytes of optimizers, and passes over layers: counted from numbers, without a model."""

from __future__ import annotations

from collections.abc import Callable, Collection

# Bytes of optimizer state per trained parameter, as a function of the parameter's own size. 8-bit states carry a
# float32 scale per block of 256, 4-bit ones per block of 128, for each of the two moments.
OPTIMIZER_BYTES: dict[str, Callable[[int], float]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), lambda size: 2 * size),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"), lambda size: 2 * (1 + 4 / 256)),
    "adamw_torch_4bit": lambda size: 2 * (0.5 + 4 / 128),
    "sgd": lambda size: 0,
}


def layer_passes(
    num_layers: int, trained_layers: Collection[int], is_lora: bool = False, is_checkpointed: bool = False
) -> dict[str, int]:
    """Count what training costs per token, in passes over one decoder layer; a pass is about 2 FLOPs per weight.

    A token goes forward through all L layers; gradients of activations go back through those from the lowest trained
    one up, L - a; and each trained layer computes the gradient of its weights, which for LoRA is next to nothing.
    """
    back = num_layers - min(trained_layers)
    passes = {
        "forward": num_layers,
        "activation_gradients": back,
        "weight_gradients": 0 if is_lora else len(trained_layers),
        "recomputed": back if is_checkpointed else 0,
    }
    return passes | {"total": sum(passes.values()), "full": 3 * num_layers}
