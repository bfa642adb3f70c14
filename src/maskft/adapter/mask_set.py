"""A set of masks by module name: what an adapter is, apart from any model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import files
from ..errors import UserError
from ..tuner.codec import FORMAT_VERSION, decode_mask, encode_mask, mask_info

_PREFIX = "base_model.model."
_SUFFIX = ".mask_coded"


class MaskSet(dict[str, Tensor]):
    """Module name -> bool mask, True = keep. Checked when a mask is put in.

    Example:
        >>> masks = MaskSet({"model.layers.0.mlp.up_proj": torch.tensor([[True, False]])})
        >>> masks.sparsity
        0.5
    """

    def __init__(self, masks: Mapping[str, Tensor] = ()):
        super().__init__()
        for name, mask in dict(masks).items():
            self[name] = mask

    def __setitem__(self, name: str, mask: Tensor) -> None:
        if not name:
            raise ValueError("a mask needs a module name")
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"{name}: a mask is a 2-D bool tensor, got {mask.dtype} with shape {tuple(mask.shape)}")
        super().__setitem__(name, mask)

    @property
    def numel(self) -> int:
        """Number of weights covered."""
        return sum(mask.numel() for mask in self.values())

    @property
    def num_removed(self) -> int:
        """Number of weights removed."""
        return sum(int((~mask).sum()) for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Fraction removed, in [0, 1]."""
        return self.num_removed / self.numel if self.numel else 0.0

    @property
    def density(self) -> float:
        """Fraction kept, ``1 - sparsity``."""
        return 1.0 - self.sparsity

    def matching(self, name: str) -> Tensor:
        """The mask of ``name``, or one clear error."""
        if name not in self:
            raise UserError(f"the adapter has no mask for {name}; it was made for other layers")
        return self[name]

    def overlap(self, other: MaskSet) -> float:
        """Jaccard index of what the two sets remove, in [0, 1]; 1 when both remove nothing."""
        if self.keys() != other.keys():
            raise ValueError("the two sets cover different modules")
        both = sum(int((~self[n] & ~other[n]).sum()) for n in self)
        either = sum(int((~self[n] | ~other[n]).sum()) for n in self)
        return both / either if either else 1.0

    def apply_(self, model: nn.Module) -> None:
        """Zero the removed weights of a plain model in place, exactly as merging an adapter does."""
        modules = dict(model.named_modules())
        missing = [name for name in self if name not in modules]
        if missing:
            raise UserError(f"the model has no module {missing[0]}; wrong base model?")
        for name, mask in self.items():
            weight = modules[name].weight
            if weight.shape != mask.shape:
                raise UserError(f"{name}: mask {tuple(mask.shape)} and weight {tuple(weight.shape)} differ in shape")
        for name, mask in self.items():
            modules[name].weight.data.masked_fill_(~mask.to(modules[name].weight.device), 0.0)

    @classmethod
    def from_adapter(cls, folder: str | Path) -> MaskSet:
        """Read and check every mask of an adapter folder."""
        return cls({name: decode_mask(coded, name) for name, coded in read_coded(folder).items()})

    def save(self, file: str | Path) -> None:
        """Write the coded masks as a safetensors file with an adapter's keys."""
        safetensors.torch.save_file({f"{_PREFIX}{n}{_SUFFIX}": encode_mask(m) for n, m in self.items()}, str(file))


def read_config(folder: str | Path) -> dict:
    """``adapter_config.json`` of a mask adapter, or one clear error."""
    file = Path(folder) / files.ADAPTER_CONFIG
    if not file.is_file():
        raise UserError(f"{str(folder)!r} is not an adapter folder: it has no {files.ADAPTER_CONFIG}")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if config.get("peft_type") != "MASK":
        raise UserError(f"{str(folder)!r} is a {config.get('peft_type')} adapter, not a mask")
    if config.get("format_version", 0) > FORMAT_VERSION:
        raise UserError(
            f"{str(folder)!r} has format version {config['format_version']}, this maskft reads up to {FORMAT_VERSION}; "
            "upgrade: pip install -U maskft"
        )
    return config


def read_coded(folder: str | Path) -> dict[str, Tensor]:
    """Coded masks of an adapter folder by module name, not yet decoded."""
    file = Path(folder) / files.ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"{str(folder)!r} is not an adapter folder: it has no {files.ADAPTER_WEIGHTS}")
    try:
        tensors = safetensors.torch.load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from error
    coded = {
        key.removeprefix(_PREFIX).removesuffix(_SUFFIX): value
        for key, value in tensors.items()
        if key.endswith(_SUFFIX)
    }
    if not coded:
        raise UserError(f"{file} holds no mask")
    return coded


def describe(folder: str | Path) -> list[dict]:
    """One row per module, in name order: module, shape, numel, num_removed, sparsity, num_bytes."""
    rows = []
    for name, coded in sorted(read_coded(folder).items(), key=lambda item: _natural(item[0])):
        info = mask_info(coded, name)
        numel = info["shape"][0] * info["shape"][1]
        rows.append({"module": name, "numel": numel, "sparsity": info["num_removed"] / numel, **info})
    return rows


def _natural(name: str) -> list:
    """Sort key that puts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]
