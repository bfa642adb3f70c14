"""What tells a base from another, and a mask from another: sha256 over weights and over masks."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from maskft_base.errors import UserError
from maskft_base.files import digest, digest_tensors

from .codec import mask_info
from .layer import MaskedLinear
from .merging import unmerged_weight
from .sharded import is_sharded

_NUM_SAMPLED = 64  # weights that a fingerprint holds


def check_base(layers: Iterable[MaskedLinear], config: Any) -> None:
    """Refuse base weights other than those that the mask was trained on.

    Args:
        layers: The masked layers.
        config: With ``base_fingerprint``, and the name of the base.
    """
    layers = list(layers)
    if config.base_fingerprint is None:
        return
    if any(layer.weight.device.type == "meta" for layer in layers):
        warnings.warn("base weights are on the meta device; they are not checked against those of the mask's training")
        return
    found = base_fingerprint(layers)
    if not is_the_base(found, {layer.weight.dtype for layer in layers}, config):
        raise UserError(
            f"the adapter was trained on other base weights ({config.base_model_name_or_path}, fingerprint "
            f"{config.base_fingerprint[:12]}) than the model's ({found[:12]}); load the right base, or pass "
            "MaskConfig(verify_base=False) to accept it"
        )


def is_the_base(found: str, dtypes: Collection[torch.dtype], config: Any) -> bool:
    """Whether weights are those that a mask was trained on, as far as how they are held lets one tell.

    Args:
        found: Their fingerprint.
        dtypes: What they are stored in.
        config: The mask's, with a ``base_fingerprint``.
    """
    if torch.float16 in dtypes:
        return _are_close(found, config.base_fingerprint)
    return bool(found.partition(":")[0] == config.base_fingerprint.partition(":")[0])


def _are_close(one: str, other: str) -> bool:
    """Whether the weights in two fingerprints differ by no more than rounding to float16 and to bfloat16 explains."""
    a, b = _sampled(one), _sampled(other)
    return a.shape == b.shape and torch.allclose(a, b, rtol=2**-7, atol=2**-24, equal_nan=True)


def _sampled(fingerprint: str) -> Tensor:
    """The weights in a fingerprint."""
    buffer = bytearray.fromhex(fingerprint.partition(":")[2])
    return torch.frombuffer(buffer, dtype=torch.bfloat16) if buffer else torch.empty(0)


def base_fingerprint(layers: Iterable[MaskedLinear]) -> str:
    """:func:`fingerprint_of` the masked base layers."""
    layers = sorted(layers, key=lambda layer: layer.module_name)
    if layers and layers[0].sharded_weight is not None:
        return layers[0].sharded_weight.base_fingerprint  # the weights themselves are masked by now
    weights = ((layer.module_name, unmerged_weight(layer)) for layer in layers)
    return fingerprint_of(weights, len(layers))


def fingerprint_of(weights: Iterable[tuple[str, Tensor]], number_of_weights: int) -> str:
    """sha256 over names and weights, rounded to bfloat16; a colon; 64 of these weights.

    Rounding makes a model loaded in bfloat16 match the float32 one it was rounded from. float16 rounds differently, and
    is compared by the 64 weights.

    Args:
        weights: Names and weight matrices, in the order of the names; one is in memory at a time.
        number_of_weights: How many there are.
    """
    sampled: list[Tensor] = []

    def rounded() -> Iterator[tuple[str, Tensor]]:
        for number, (name, weight) in enumerate(weights):
            weight = (weight.full_tensor() if is_sharded(weight) else weight).to(torch.bfloat16)
            yield name, weight
            count = _NUM_SAMPLED * (number + 1) // number_of_weights - _NUM_SAMPLED * number // number_of_weights
            places = torch.arange(1, count + 1) * weight.numel() // (count + 1)
            sampled.append(weight.reshape(-1)[places.to(weight.device)].cpu())

    sha256 = weights_fingerprint(rounded())
    return f"{sha256}:{torch.cat(sampled).view(torch.uint8).numpy().tobytes().hex()}"


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names (in their order) and weights, rounded to bfloat16."""
    return digest_tensors((f"{name}{tuple(weight.shape)}", weight.to(torch.bfloat16)) for name, weight in weights)


def mask_fingerprint(coded: dict[str, Tensor]) -> str:
    """sha256 over the names and mask checksums of all modules; equal for equal masks."""
    return digest("".join(f"{name}:{mask_info(coded[name], name)['sha256']};" for name in sorted(coded)))
