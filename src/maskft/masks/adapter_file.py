"""The file of weights in an adapter folder, ``adapter_model.safetensors``, after PEFT has written it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskft_common import files

from .codec import PREFIX, SCORES, SCORES_SHA256, check_scores_sha256, is_of_mask


def weights_beside_masks(file: Path) -> dict[str, Tensor]:
    """Tensors of the file that are neither masks nor scores: modules_to_save and resized embeddings."""
    weights = {}
    with safe_open(file, "pt") as tensors:  # reads only the tensors that are asked for
        for name in tensors.keys():
            if not is_of_mask(name):
                weights[name] = tensors.get_tensor(name)
    return weights


def holds_scores(file: Path) -> bool:
    """Whether the file has the scores of a layer; reads names alone."""
    with safe_open(file, "pt") as tensors:
        return any(name.endswith(SCORES) for name in tensors.keys())


def check_scores(file: Path) -> int:
    """Compare the scores of the file with their checksums, one layer after another; returns how many have one.

    Raises:
        UserError: If scores are damaged.
    """
    num_checked = 0
    with safe_open(file, "pt") as tensors:
        names = set(tensors.keys())
        for name in sorted(names):
            module = name.removesuffix(SCORES)
            checksum = f"{module}{SCORES_SHA256}"
            if module == name or checksum not in names:
                continue
            scores = tensors.get_tensor(name)
            expected = tensors.get_tensor(checksum)
            check_scores_sha256(scores, expected, module.removeprefix(PREFIX))
            num_checked += 1
    return num_checked


def add_tensors(file: Path, added: Mapping[str, Tensor]) -> None:
    """Rewrite the file with more tensors in it; of two with one name, the added one is kept."""
    tensors = load_file(file)
    for name, value in added.items():
        # safetensors raises for tensors that are not contiguous.
        on_cpu = value.detach().cpu()
        tensors[name] = on_cpu.contiguous()
    # With the metadata that PEFT writes.
    metadata = {"format": "pt"}
    save_file(tensors, file, metadata=metadata)
    files.use_default_modes(file.parent, file.name)
