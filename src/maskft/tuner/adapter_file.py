"""The file of weights in an adapter folder, ``adapter_model.safetensors`` or ``.bin``, after PEFT has written it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .codec import is_of_mask


class ScoresOfSave(dict[str, Tensor]):
    """Scores that the state dict which is being saved leaves out; a copied configuration has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()


def find_weights(folder: str | Path) -> Path | None:
    """The file of weights that PEFT would load from ``folder``; None where there is none."""
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    return next((file for file in (Path(folder) / name for name in names) if file.is_file()), None)


def weights_beside_masks(file: Path) -> dict[str, Tensor]:
    """Tensors of the file that are neither masks nor scores: modules_to_save and resized embeddings."""
    if file.suffix == ".bin":
        return {name: value for name, value in _load_bin(file).items() if not is_of_mask(name)}
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys() if not is_of_mask(name)}


def add_tensors(file: Path, added: Mapping[str, Tensor]) -> None:
    """Write the file again with more tensors in it."""
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in added.items()}
    if file.suffix == ".bin":
        torch.save(_load_bin(file) | on_cpu, file)
        return
    with safe_open(file, "pt") as tensors:
        found = {name: tensors.get_tensor(name) for name in tensors.keys()}
    save_file(found | on_cpu, file, metadata={"format": "pt"})


def _load_bin(file: Path) -> dict[str, Tensor]:
    return dict(torch.load(file, map_location="cpu", weights_only=True))
