"""A mask as the places in a checkpoint's weights that become zero, for programs that have no maskft.

``NAME.indices`` holds the flat places (row by row in the weight NAME of the checkpoint, ascending) as int32, or int64
where int32 is too small; the metadata hold the shapes and the adapter that it was exported from.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from maskft_base import files
from maskft_base.errors import UserError

from ..tuner.codec import decode_mask
from ..tuner.experts import place_of
from ..tuner.targets import listed
from .mask_set import read_coded, read_config

EXPORT_FORMAT = "maskft.patch.1"
_ORIGIN = ("base_model_name_or_path", "base_fingerprint", "mask_sha256")


def removed_places(adapter: str | Path) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Flat places that merging an adapter sets to zero, and the shapes of the weights, by the names of the weights.

    Raises:
        UserError: If the adapter does more than set weights to zero.
    """
    config, coded = read_config(adapter), read_coded(adapter)
    if config.removed_value != "zero":
        raise UserError(f"{str(adapter)!r} sets weights to those of {config.removed_value_model}; run maskft merge")
    if config.weights_sha256:
        raise UserError(f"{str(adapter)!r} also replaces weights ({listed(config.weights_sha256)}); run maskft merge")
    weights: dict[str, dict[int, str]] = {}  # name of a weight -> number of the expert, -1: it is a matrix -> its mask
    for module in coded:
        parameter, expert = place_of(module) or (f"{module}.weight", -1)
        weights.setdefault(parameter, {})[expert] = module
    places, shapes = {}, {}
    for parameter, matrices in weights.items():
        mask = torch.stack([decode_mask(coded[matrices[n]], matrices[n]) for n in sorted(matrices)])
        shapes[parameter] = tuple(mask.shape[1:] if -1 in matrices else mask.shape)
        flat = (~mask).view(-1).nonzero().view(-1)
        places[parameter] = flat.to(torch.int32) if math.prod(mask.shape) < 2**31 else flat
    return places, shapes


def export(adapter: str | Path, file: str | Path) -> tuple[int, int]:
    """Write the places that ``adapter`` removes into a new ``file``; returns how many, and in how many weights."""
    if Path(file).exists():
        raise UserError(f"{str(file)!r} is there already; name another file")
    places, shapes = removed_places(adapter)
    config = read_config(adapter)
    origin = {key: str(getattr(config, key)) for key in _ORIGIN if getattr(config, key)}
    metadata = {"format": EXPORT_FORMAT, "shapes": json.dumps(shapes), **origin}
    files.write_bytes(file, safetensors.torch.save({f"{name}.indices": t for name, t in places.items()}, metadata))
    return sum(map(len, places.values())), len(places)
