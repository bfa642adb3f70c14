"""The masks of an adapter by module name, apart from any model, and reading them from an adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import BeforeValidator, ConfigDict, Field, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from maskft_common import files, layout, schema
from maskft_common.errors import UserError

from .adapter import check_weights
from .codec import FORMAT_VERSION, PREFIX, check_claims, decode_mask, is_of_mask
from .fingerprints import mask_fingerprint

# How the keys of masks end in the file.
_SUFFIX = ".mask_coded"


class MaskSet(dict[str, Tensor]):
    """Module name -> bool mask, True = keep. Each mask is checked when it is put in.

    Example:
        >>> masks = MaskSet({"model.layers.0.mlp.up_proj": torch.tensor([[True, False]])})
        >>> masks.sparsity
        0.5
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        # One by one, because dict's own __init__ would not call __setitem__, which checks each mask.
        for name, mask in (masks or {}).items():
            self[name] = mask

    def __setitem__(self, name: str, mask: Tensor) -> None:
        if mask.dtype != torch.bool or mask.dim() != 2:
            shape = tuple(mask.shape)
            raise ValueError(f"{name}: a mask is a 2-D bool tensor, got {mask.dtype} with shape {shape}")
        super().__setitem__(name, mask)

    @property
    def numel(self) -> int:
        """Number of weights covered."""
        return sum(mask.numel() for mask in self.values())

    @property
    def num_removed(self) -> int:
        """Number of weights removed."""
        total = 0
        for mask in self.values():
            total += int((~mask).sum())
        return total

    @property
    def sparsity(self) -> float:
        """Fraction removed, in [0, 1]; 0 without masks."""
        if self.numel == 0:
            return 0.0
        return self.num_removed / self.numel

    def apply_(self, model: nn.Module) -> None:
        """Zero the removed weights of a plain model in place, as merging an adapter of removed_value zero does.

        Raises:
            UserError: If the model lacks a module, or has a weight of another shape; it is then unchanged.
        """
        # Every mask is checked before the first weight is written.
        weights = self.weights_in(model)

        # Filled and not multiplied: -1 * 0 would leave -0, and inf * 0 NaN.
        for name, mask in self.items():
            removed = ~mask.to(weights[name].device)
            weights[name].data.masked_fill_(removed, 0.0)

    def weights_in(self, model: nn.Module) -> dict[str, Tensor]:
        """The weight of each masked module of a plain model, by the module's name.

        Raises:
            UserError: If the model lacks a module, or has a weight of another shape.
        """
        modules = dict(model.named_modules())
        weights: dict[str, Tensor] = {}
        for name, mask in self.items():
            weight = getattr(modules.get(name), "weight", None)
            if weight is None:
                raise UserError(f"the model has no module {name}; wrong base model?")
            if weight.shape != mask.shape:
                raise UserError(f"{name}: mask {tuple(mask.shape)} and weight {tuple(weight.shape)} differ in shape")
            weights[name] = weight
        return weights

    @classmethod
    def from_adapter(cls, folder: str | Path) -> MaskSet:
        """Read and unpack every mask of an adapter folder.

        Raises:
            UserError: Those of :func:`read_coded`; if a mask does not match its checksum, or if the masks claim more
                weights than their bytes can hold.
        """
        coded = read_coded(folder)
        # Unpacked together they could take more memory than there is.
        check_claims(coded)
        masks = cls()
        for name, data in coded.items():
            masks[name] = decode_mask(data, name)
        return masks


# Reading an adapter folder, which may be a stranger's


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
# A file may say null, which is the same as no recipe.
Recipe = Annotated[dict[str, Any], BeforeValidator(lambda recipe: recipe or {})]


class AdapterConfig(schema.FileModel):
    """The fields of a mask's ``adapter_config.json`` that are read without a model; ``MaskConfig`` has all of them."""

    # The other fields of MaskConfig, and those of later versions.
    model_config = ConfigDict(extra="ignore")

    peft_type: Literal["MASK"]
    format_version: int
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    # The defaults are those of MaskConfig: a file may leave a field out.
    selection: str = "topk"
    sparsity: float = 0.1
    sparsity_ramp: float = 0.0
    progress: Share | None = None
    removed_value: str = "zero"
    removed_value_model: str | None = None
    removed_value_fingerprint: str | None = None
    save_scores: bool = False
    base_fingerprint: Sha256 | None = None
    base_quantisation: str | None = None
    verify_base: bool = True
    # Required: without it nothing shows that the masks are those of this configuration.
    mask_sha256: Sha256
    weights_sha256: dict[str, str] | None = None
    recipe: Recipe = {}

    @field_validator("format_version")
    @classmethod
    def _is_known(cls, version: int) -> int:
        if version > FORMAT_VERSION:
            raise ValueError(f"format_version is {version}, this maskft reads up to {FORMAT_VERSION}; use a newer one")
        return version


def read_config(folder: str | Path) -> AdapterConfig:
    """Read ``adapter_config.json`` of a mask adapter.

    Raises:
        UserError: If the folder is not an adapter, holds a link out of it, or the file has another structure.
    """
    file = _file(folder, layout.ADAPTER_CONFIG)
    content = files.read_json(file)
    return schema.read_model(
        AdapterConfig,
        content,
        file,
        remedy="name the folder of a mask, or save it again",
    )


def weights_file(folder: str | Path) -> Path:
    """The file of masks in an adapter folder, of which only the header is read.

    Raises:
        UserError: If the folder is not an adapter, or the file is missing, a link out of the folder, or cut.
    """
    file = _file(folder, layout.ADAPTER_WEIGHTS)
    try:
        # safetensors says of a file without permission that there is none.
        file.open("rb").close()
        # Opening compares the size of the file with the places of its tensors.
        with safe_open(file, "pt"):
            return file
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is not a readable safetensors file: {error}")


def read_coded(folder: str | Path) -> dict[str, Tensor]:
    """Read the masks of an adapter folder, not yet decoded; module name -> 1-D uint8 tensor, see ``codec``.

    Raises:
        UserError: If the masks are not those of ``adapter_config.json``, by the checksums there.
    """
    config = read_config(folder)
    file = weights_file(folder)
    try:
        tensors = safetensors.torch.load_file(str(file))
    except (SafetensorError, OSError) as error:
        # Beyond the header: a dtype that torch does not have, or a failing disk.
        raise _unreadable(file, error) from error

    # The file may also hold scores, which are left out here.
    coded = {}
    weights = {}
    for key, value in tensors.items():
        if key.endswith(_SUFFIX):
            name = key.removeprefix(PREFIX).removesuffix(_SUFFIX)
            coded[name] = value
        elif not is_of_mask(key):
            weights[key] = value
    if not coded:
        raise UserError(f"{file} holds no mask")
    # Each mask has its own checksum; this one shows that they belong to this configuration.
    if mask_fingerprint(coded) != config.mask_sha256:
        raise UserError(
            f"the masks in {file} do not match mask_sha256 in {layout.ADAPTER_CONFIG}; they are of two adapters"
        )
    check_weights(weights, config.weights_sha256)
    return coded


def _file(folder: str | Path, name: str) -> Path:
    """Path of a file of an adapter folder, which must be there and not be a link out of it."""
    if not layout.holds_adapter(folder):
        raise layout.no_adapter(folder)
    # All files of the folder, because PEFT and transformers read others by their names (tokenizer, chat template).
    files.check_own_files(folder)
    file = Path(folder) / name
    if not file.is_file():
        raise UserError(f"adapter {str(folder)!r} has no {name}: copy the whole folder, or save it again")
    return file
