"""Fingerprints of base weights and of masks: sha256 that tells whether two are the same."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from maskft_common.errors import UserError
from maskft_common.files import digest, digest_tensors

from ..tuner.layer import MaskedLinear
from .codec import mask_info


def check_base(layers: Iterable[MaskedLinear], config: Any) -> None:
    """Raise for base weights other than those that the mask was trained on.

    Only warns if weights are on the meta device, or differ but are in float16, or stored otherwise than in training.

    Args:
        layers: The masked layers.
        config: With ``base_fingerprint``, and the name of the base.

    Raises:
        UserError: If the weights are others.
    """
    # A list, because it may be an iterator and is read several times.
    layers = list(layers)
    # Not recorded for a mask over float16: see MaskFiles.encode. A configuration without a checksum of the masks is of
    # a run that goes on, and comes from no file.
    if config.base_fingerprint is None:
        if config.mask_sha256 is not None:
            warnings.warn(
                "the base weights are not checked: the adapter has no fingerprint of them (none is recorded over "
                "float16)"
            )
        return
    is_on_meta = any(layer.weight.device.type == "meta" for layer in layers)
    if is_on_meta:
        warnings.warn("base weights are on the meta device; they are not checked against those of the mask's training")
        return

    found = base_fingerprint(layers)
    # Of dequantised weights, not of the tensors that their codes are stored in.
    dtypes = {layer.get_base_dtype() for layer in layers}
    if is_the_base(found, dtypes, config):
        return

    trained_over = config.base_quantisation
    stored_as = quantisation_of(layers)
    if trained_over != stored_as:
        # The same model in another precision has other values, so that its fingerprint says nothing.
        warnings.warn(
            f"the mask was trained over weights stored as {trained_over or 'floats'}, and these are stored as "
            f"{stored_as or 'floats'}: it was not made for their rounding; measure the result, or train over them"
        )
        return
    raise UserError(
        f"the adapter was trained on other base weights ({config.base_model_name_or_path}, fingerprint "
        f"{config.base_fingerprint[:12]}) than the model's ({found[:12]}); load the right base (or, to accept this "
        "one, in Python: config = MaskConfig.from_pretrained(adapter); config.verify_base = False; and pass config)"
    )


def quantisation_of(layers: Iterable[MaskedLinear]) -> str | None:
    """How the base weights of masked layers are stored, such as ``bitsandbytes nf4``; None: as floats."""
    kinds = set()
    for layer in layers:
        if layer.quantization_backend is not None:
            kinds.add(layer.quantization_backend.backend_name)
    return ", ".join(sorted(kinds)) or None


def is_the_base(found: str, dtypes: Collection[torch.dtype], config: Any) -> bool:
    """Whether weights are those that a mask was trained on.

    Args:
        found: Their fingerprint.
        dtypes: Their dtypes. float16 and bfloat16 round differently, so that float16 weights pass with a warning.
        config: The mask's, with a ``base_fingerprint``.
    """
    if found == config.base_fingerprint:
        return True
    if torch.float16 in dtypes:
        warnings.warn("base weights are in float16, so that they are not checked against those of the mask's training")
        return True
    return False


def base_fingerprint(layers: Iterable[MaskedLinear]) -> str:
    """:func:`weights_fingerprint` of the masked base layers."""
    # By name, so that the order in which a model registers its layers does not matter.
    layers = sorted(layers, key=lambda layer: layer.module_name)
    # Under FSDP2 the weights in memory are masked already, and the fingerprint was taken before.
    if layers and layers[0].masker.base_fingerprint is not None:
        return layers[0].masker.base_fingerprint

    # A generator: each weight is gathered or dequantised when its turn comes. The weight is the unmerged one, as an
    # adapter may be saved while it is merged.
    weights = ((layer.module_name, layer.get_unmerged_weight()) for layer in layers)
    return weights_fingerprint(weights)


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names (in their order) and weights, one in memory at a time.

    Weights are rounded to bfloat16, so that a model loaded in bfloat16 matches the float32 one it was rounded from.
    Negative zeros count as zeros: a model with -0.0 where another has +0.0 computes the same outputs up to the sign of
    zeros, and operations that copy weights do not keep that sign (``torch.lerp(w, w, 0)``; dequantised GGUF files hold
    -0.0). So both are the same base for a mask.
    """
    return digest_tensors(_labelled(weights))


def _labelled(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights:
        # FSDP2 leaves a DTensor on each rank, from which all ranks gather the whole weight.
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        label = f"{name}{tuple(weight.shape)}"
        # IEEE 754: -0.0 + 0.0 is +0.0, and every other number is unchanged.
        yield label, weight.to(torch.bfloat16) + 0.0


def mask_fingerprint(coded: dict[str, Tensor]) -> str:
    """sha256 over the names and mask checksums of all modules; equal for equal masks, however they are coded."""
    parts = []
    # Sorted, so that the order of a file does not matter. The header has the checksum: nothing is decoded.
    for name in sorted(coded):
        info = mask_info(coded[name], name)
        parts.append(f"{name}:{info['sha256']};")
    text = "".join(parts)
    return digest(text)
