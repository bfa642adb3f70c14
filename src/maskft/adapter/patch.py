"""A mask as a sparse patch that a server can apply and undo: names of weights, and the places that become zero.

A patch file is safetensors. ``NAME.indices`` holds the flat places (row by row in the weight NAME of the checkpoint,
rising) as int32, or int64 where int32 does not reach; the metadata hold the shapes and where the mask is from. Nothing
but torch and safetensors is needed to use one:

    patch = read_patch("mask.safetensors")
    undo = apply_patch(dict(model.named_parameters()), patch)
    undo_patch(dict(model.named_parameters()), undo)       # bit for bit what was there
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskft_base import files
from maskft_base.errors import UserError

from ..tuner.codec import decode_mask
from ..tuner.experts import place_of
from ..tuner.targets import listed
from .mask_set import read_coded, read_config

PATCH_FORMAT = "maskft.patch.1"
_SUFFIX = ".indices"
_ORIGIN = ("base_model_name_or_path", "base_fingerprint", "mask_sha256")

# Name of a weight -> flat places (1-D int64, on the CPU) and the values that were there (1-D, dtype of the weight).
Undo = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Patch:
    """What becomes zero.

    Attributes:
        indices: Name of a weight in the checkpoint -> flat places in it, 1-D int32 or int64, rising.
        shapes: Name -> shape of the whole weight.
        origin: ``base_model_name_or_path``, ``base_fingerprint`` and ``mask_sha256`` of the adapter, where known.
    """

    indices: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def num_removed(self) -> int:
        """Number of weights that become zero."""
        return sum(places.numel() for places in self.indices.values())


def patch_of_adapter(adapter: str | Path) -> Patch:
    """The patch that does what merging an adapter folder does.

    Raises:
        UserError: If the adapter does more than set weights to zero.
    """
    config, coded = read_config(adapter), read_coded(adapter)
    if config.removed_value != "zero":
        raise UserError(
            f"removed weights of {str(adapter)!r} take their values in {config.removed_value_model}, and a patch holds "
            "places only; run maskft merge"
        )
    if config.weights_sha256:
        raise UserError(
            f"{str(adapter)!r} also replaces weights of the base ({listed(config.weights_sha256)}); run maskft merge"
        )
    patch = Patch({}, {}, {key: str(getattr(config, key)) for key in _ORIGIN if getattr(config, key)})
    fused: dict[str, dict[int, str]] = {}  # parameter -> expert -> name of its mask
    for module, code in coded.items():
        place = place_of(module)
        if place is not None:
            fused.setdefault(place[0], {})[place[1]] = module
            continue
        mask = decode_mask(code, module)
        _add(patch, f"{module}.weight", [mask], tuple(mask.shape))
    for parameter, experts in fused.items():
        masks = [decode_mask(coded[experts[n]], experts[n]) for n in sorted(experts)]
        _add(patch, parameter, masks, (len(masks), *masks[0].shape))
    return patch


def _add(patch: Patch, name: str, masks: Sequence[Tensor], shape: tuple[int, ...]) -> None:
    """Add a weight whose masks lie one after another: one, or that of each expert."""
    offsets = [sum(mask.numel() for mask in masks[:n]) for n in range(len(masks))]
    flat = [(~mask).view(-1).nonzero().view(-1) + offset for mask, offset in zip(masks, offsets, strict=True)]
    places = torch.cat(flat)
    patch.indices[name] = places.to(torch.int32) if math.prod(shape) < 2**31 else places
    patch.shapes[name] = shape


def write_patch(patch: Patch, file: str | Path) -> None:
    """Write a patch file, whole or not at all.

    Raises:
        UserError: If ``file`` is there already or cannot be written.
    """
    file = Path(file)
    if file.exists():
        raise UserError(f"{str(file)!r} is there already; name another file")
    metadata = {"format": PATCH_FORMAT, "shapes": json.dumps(patch.shapes), **patch.origin}
    content = safetensors.torch.save({f"{name}{_SUFFIX}": t for name, t in patch.indices.items()}, metadata)
    files.write_bytes(file, content)


def read_patch(path: str | Path) -> Patch:
    """Read and check a patch file, or make the patch of an adapter folder.

    Raises:
        UserError: If it is neither, or a place lies outside its weight, or the places do not rise.
    """
    if files.holds_adapter(path):
        return patch_of_adapter(path)
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != PATCH_FORMAT:
                raise UserError(
                    f"{str(path)!r} is no patch: its format is {metadata.get('format')!r}, not {PATCH_FORMAT!r}"
                )
            shapes = {name: tuple(map(int, shape)) for name, shape in json.loads(metadata["shapes"]).items()}
            indices = {key.removesuffix(_SUFFIX): file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(path)!r} is no patch file: {error}") from error
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{str(path)!r} is damaged: {error}") from error
    if indices.keys() != shapes.keys():
        raise UserError(
            f"{str(path)!r} is damaged: {listed(indices.keys() ^ shapes.keys())} have places or a shape alone"
        )
    for name, places in indices.items():
        _check_places(name, places, shapes[name])
    return Patch(indices, shapes, {key: metadata[key] for key in _ORIGIN if key in metadata})


def _check_places(name: str, places: Tensor, shape: tuple[int, ...]) -> None:
    if places.dim() != 1 or places.dtype not in (torch.int32, torch.int64):
        raise UserError(f"the patch of {name} is damaged: places are {places.dtype} of {places.dim()} dimensions")
    if places.numel() and not (
        0 <= int(places[0]) and int(places[-1]) < math.prod(shape) and bool((places[1:] > places[:-1]).all())
    ):
        raise UserError(f"the patch of {name} is damaged: its places do not rise from 0 to below {math.prod(shape)}")


@torch.no_grad()
def apply_patch(weights: Mapping[str, Tensor], patch: Patch) -> Undo:
    """Set the places of a patch to +0 in place, after everything was checked.

    Args:
        weights: Name -> weight, as ``dict(model.named_parameters())`` or a ``state_dict``; any device, floating point.
        patch: The patch.

    Returns:
        What ``undo_patch`` needs. Of several patches that lie over one another, the last is undone first.

    Raises:
        UserError: If a weight is missing, of another shape, or not floating point; nothing was changed then.
    """
    missing = [name for name in patch.indices if name not in weights]
    if missing:
        raise UserError(f"the model has no weight {listed(missing)}; the patch is of another model")
    for name, shape in patch.shapes.items():
        if tuple(weights[name].shape) != shape:
            raise UserError(f"{name} has shape {tuple(weights[name].shape)}, in the patch {shape}; wrong base model?")
        if not weights[name].is_floating_point():
            raise UserError(f"{name} is {weights[name].dtype}: a quantised weight cannot be patched; load it whole")
    undo: Undo = {}
    for name, places in patch.indices.items():
        weight, places = weights[name].detach(), places.to(torch.int64)
        there = places.to(weight.device)
        undo[name] = places, weight.take(there)
        weight.put_(there, weight.new_zeros(()).expand(places.numel()))
    return undo


@torch.no_grad()
def undo_patch(weights: Mapping[str, Tensor], undo: Undo) -> None:
    """Put back, bit for bit, what ``apply_patch`` has replaced; ``weights`` as there."""
    for name, (places, values) in undo.items():
        weights[name].detach().put_(places.to(weights[name].device), values.to(weights[name].device))
