"""The floor: what training some layers of a model cannot do without, counted in passes over one decoder layer.

A token goes forward through all L layers; gradients of activations go back through those from the lowest trained one
up, L - a; and each trained layer computes the gradient of its weights. A pass is about 2 FLOPs per weight of a layer.
"""

from __future__ import annotations

from collections.abc import Collection


def layer_passes(num_layers: int, trained_layers: Collection[int]) -> dict[str, int]:
    """Count the floor of training ``trained_layers`` and, as ``full``, of training all.

    Args:
        num_layers: Decoder layers of the model.
        trained_layers: Indices of those that hold trained weights, at least one, in [0, num_layers).

    Returns:
        Passes per token: forward, activation_gradients, weight_gradients, their total, and full = 3 L.
    """
    activations = num_layers - min(trained_layers)
    return {
        "forward": num_layers,
        "activation_gradients": activations,
        "weight_gradients": len(trained_layers),
        "total": num_layers + activations + len(trained_layers),
        "full": 3 * num_layers,
    }
