"""Wanda (https://arxiv.org/abs/2306.11695): weights ranked by their magnitude and the norm of their input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskft_common.errors import UserError

from ..tuner import MaskedLinear, adapter_layers
from .fixed import ranks_per_output


def wanda_keys(
    model: Any,
    rows: Iterable[Sequence[int] | Tensor],
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """Rank of abs(weight) * norm of its input among the inputs of its output, for :func:`maskft.start_scores`.

    Ranks, because magnitudes of different outputs have no common scale: removing the lowest gives Wanda's mask.

    Args:
        model: A model with a mask adapter, as ``get_peft_model`` returns it.
        rows: Token ids of some rows (a hundred are enough), without padding.
        adapter_name: The adapter.

    Returns:
        Module name -> float32 ranks in the shape of its weight.

    Raises:
        UserError: If the model has no such adapter, or a layer sees no token of the rows.
    """
    layers = list(adapter_layers(model, adapter_name).values())
    if not layers or not hasattr(model, "disable_adapter"):
        raise UserError(f"the model has no mask adapter named {adapter_name!r}: pass what get_peft_model returned")

    # The inputs of the unmasked model: the masks of an adapter without keys are not known yet. In evaluation mode,
    # because dropout would change them.
    was_training = model.training
    model.eval()
    try:
        # The cast is for mypy, for which hasattr above has narrowed the type.
        with cast(Any, model).disable_adapter():
            norms = input_norms(model, layers, rows)
    finally:
        model.train(was_training)

    keys = {}
    for layer, norms_of_layer in zip(layers, norms, strict=True):
        # get_base_weight dequantises; a weight in four bits has no magnitudes.
        weight = layer.get_base_weight()
        scores = weight.float().abs() * norms_of_layer
        output_dim = 1 if layer.is_transposed else 0
        ranks = ranks_per_output(scores, output_dim)
        keys[layer.module_name] = ranks.float()
    return keys


@torch.inference_mode()
def input_norms(
    model: Any,
    layers: Sequence[MaskedLinear],
    rows: Iterable[Sequence[int] | Tensor],
) -> list[Tensor]:
    """L2 norm of every input feature of ``layers`` over all tokens of ``rows``.

    One pass over the unmasked model; the published method measures each layer behind the pruned ones.

    Args:
        model: The model, its adapter disabled.
        layers: The layers that are to be masked.
        rows: Token ids; no padding, one row per forward pass.

    Returns:
        One float32 tensor per layer, (1, I), or (I, 1) where the weight is stored transposed.

    Raises:
        UserError: If a row is not a list of token ids, or a layer sees no token.
    """
    # Per layer, the sum of squares over all tokens seen so far, (I,); None: it has seen no token.
    squares: list[Tensor | None] = [None] * len(layers)

    # A function that makes the hook of one layer: hooks defined in a loop would all see the last index.
    def make_hook(index: int) -> Callable[..., None]:
        def add_squares(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            num_inputs = x.shape[-1]
            x_TI = x.reshape(-1, num_inputs)
            # In float32: half precision overflows for the squares of large activations.
            squares_TI = x_TI.float().pow(2)
            squares_I = squares_TI.sum(0)
            before = squares[index]
            if before is None:
                squares[index] = squares_I
            else:
                squares[index] = before + squares_I

        return add_squares

    hooks = []
    for index, layer in enumerate(layers):
        hook = layer.register_forward_pre_hook(make_hook(index))
        hooks.append(hook)
    try:
        for row in rows:
            # Likely mistakes: a row of a data set, which is a mapping, and a text.
            is_of_tokens = not isinstance(row, Mapping | str)
            ids = None
            if is_of_tokens:
                device = layers[0].weight.device
                ids = torch.as_tensor(row, device=device)
            # An empty list becomes a float tensor.
            is_row = ids is not None and ids.dim() == 1 and not ids.dtype.is_floating_point
            if not is_row:
                raise UserError("a calibration row is not a list of token ids; give input_ids, without padding")
            model(input_ids=ids.unsqueeze(0), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()

    norms = []
    for layer, squares_I in zip(layers, squares, strict=True):
        if squares_I is None:
            name = layer.module_name
            raise UserError(f"no calibration row reached {name}; leave it out of target_modules, or give more rows")
        norms_I = squares_I.sqrt()
        # Shaped to be multiplied with the weight, (O, I) or, transposed, (I, O).
        input_dim = 0 if layer.is_transposed else 1
        norms.append(norms_I.unsqueeze(1 - input_dim))
    return norms
