"""The file of weights in an adapter folder, ``adapter_model.safetensors``, after PEFT has written it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .codec import is_of_mask


class ScoresOfSave(dict[str, Tensor]):
    """Scores that the state dict which is being saved leaves out; a copied configuration has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()


def weights_beside_masks(file: Path) -> dict[str, Tensor]:
    """Tensors of the file that are neither masks nor scores: modules_to_save and resized embeddings."""
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys() if not is_of_mask(name)}


def add_tensors(file: Path, added: Mapping[str, Tensor]) -> None:
    """Write the file again with more tensors in it."""
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in added.items()}
    save_file(load_file(file) | on_cpu, file, metadata={"format": "pt"})
