"""Adapter folders made from others without a model: masks of one base in, a mask of that base out.

Sets are of what is REMOVED: a union removes what any of its masks removes. Masks are bool, True = keep.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from maskft_base import files
from maskft_base.errors import UserError

from ..tuner.codec import PREFIX, decode_mask, encode_mask, mask_info
from ..tuner.config import MaskConfig
from ..tuner.fingerprints import mask_fingerprint
from ..tuner.targets import listed
from .mask_set import AdapterConfig, read_coded, read_config

OPERATIONS = ("union", "intersect", "vote", "minus")
# Of adapter_config.json: which layers are masked, over what, and what removed weights become.
_OF_THE_BASE = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "removed_value",
    "removed_value_model",
    "removed_value_fingerprint",
    "base_fingerprint",
    "base_quantisation",
    "verify_base",
)
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def combine(operation: str, masks: Sequence[Tensor], at_least: int | None = None) -> Tensor:
    """One mask from several of one matrix.

    Args:
        operation: One of ``OPERATIONS``.
        masks: Bool masks of one shape, True = keep; for ``minus`` the first is what is left.
        at_least: With ``vote``: by how many masks a weight must be removed, from 1 to their number; default: the
            smallest majority.

    Returns:
        Bool mask of the same shape.

    Raises:
        UserError: If ``operation`` is none of these or ``at_least`` is out of its range.
    """
    if operation not in OPERATIONS:
        raise UserError(f"no operation {operation!r}; there are {', '.join(OPERATIONS)}")
    if len(masks) < 2:
        raise UserError(f"{operation} needs two masks or more, and there is {len(masks)}")
    if operation == "minus":
        removed_by_others = ~masks[1]
        for mask in masks[2:]:
            removed_by_others |= ~mask
        return masks[0] | removed_by_others
    votes = {"union": 1, "intersect": len(masks), "vote": num_votes(len(masks), at_least)}[operation]
    removed_by = torch.zeros(masks[0].shape, dtype=torch.int16, device=masks[0].device)
    for mask in masks:
        removed_by += ~mask
    return removed_by < votes


def num_votes(num_masks: int, at_least: int | None) -> int:
    """By how many of so many masks a weight must be removed, where ``at_least`` were asked for."""
    votes = num_masks // 2 + 1 if at_least is None else at_least
    if not 1 <= votes <= num_masks:
        raise UserError(f"at_least is {votes} and there are {num_masks} masks; give a number from 1 to {num_masks}")
    return votes


def read_alike(folders: Sequence[str | Path]) -> list[dict[str, Tensor]]:
    """Coded masks of adapter folders that are over one base; see ``read_coded``.

    Raises:
        UserError: If one is no mask, or two differ in base, how it was held, modules, shapes or what removed weights
            become.
    """
    read = [(folder, read_config(folder), read_coded(folder)) for folder in folders]
    for one in read[1:]:
        _check_alike(*read[0], *one)
    return [coded for _, _, coded in read]


def _check_alike(
    one: str | Path,
    config: AdapterConfig,
    masks: Mapping[str, Tensor],
    other: str | Path,
    its_config: AdapterConfig,
    its_masks: Mapping[str, Tensor],
) -> None:
    both = f"{str(one)!r} and {str(other)!r}"
    if only := sorted(masks.keys() ^ its_masks.keys()):
        raise UserError(f"{both} mask other modules: {listed(only)} only in one; combine masks of the same layers")
    for name in masks:
        shapes = [mask_info(each[name], name)["shape"] for each in (masks, its_masks)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{both} are over other bases: {name} is {shapes[0]} and {shapes[1]}")
    configs = (config, its_config)
    prints = [(each.base_fingerprint or "").partition(":")[0][:12] for each in configs]
    are_known = all(prints)
    for what, values, is_compared in (
        ("were learned on base weights held as", [each.base_quantisation or "float" for each in configs], are_known),
        ("are over other base weights, of fingerprints", prints, are_known),
        ("are over other bases,", [each.base_model_name_or_path for each in configs], not are_known),
        ("put other values where they remove:", [each.removed_value for each in configs], True),
        ("take removed weights from models", [each.removed_value_fingerprint for each in configs], True),
    ):
        if is_compared and values[0] != values[1]:
            raise UserError(f"{both} {what} {values[0]} and {values[1]}; combine masks of one base")


def combine_adapters(
    operation: str, folders: Sequence[str | Path], output_dir: str | Path, at_least: int | None = None
) -> tuple[int, int]:
    """Write an adapter folder with the mask that ``algebra.combine`` makes of each module.

    It loads like any adapter, for inference; a new mask has no scores, so it cannot be trained on.

    Returns:
        Number of weights removed, and number masked.

    Raises:
        UserError: If the folders do not go together, hold weights beside masks, or nothing of the base would be left.
    """
    output_dir = Path(output_dir).absolute()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"output_dir {str(output_dir)!r} is not empty; name another folder")
    for folder in folders:
        weights = read_config(folder).weights_sha256
        if weights:
            raise UserError(
                f"{str(folder)!r} also replaces weights of the base ({listed(weights)}); masks alone combine"
            )
    coded = read_alike(folders)
    made = {
        name: encode_mask(combine(operation, [decode_mask(masks[name], name) for masks in coded], at_least))
        for name in coded[0]
    }
    infos = [mask_info(code, name) for name, code in made.items()]
    removed, numel = (
        sum(info["num_removed"] for info in infos),
        sum(info["shape"][0] * info["shape"][1] for info in infos),
    )
    if removed == numel:
        raise UserError(f"the {operation} removes all {numel:,} weights; combine other masks")
    recipe = {"operation": operation, "of": [read_config(folder).mask_sha256 for folder in folders]}
    if operation == "vote":
        recipe["at_least"] = num_votes(len(folders), at_least)
    with files.whole_folder(output_dir) as partial:
        _write(partial, made, Path(folders[0]), removed / numel, recipe)
    return removed, numel


def _write(folder: Path, coded: Mapping[str, Tensor], like: Path, sparsity: float, recipe: dict[str, Any]) -> None:
    """An adapter folder over the base of ``like``."""
    keys = {f"{PREFIX}{name}.mask_coded": code for name, code in coded.items()}
    safetensors.torch.save_file(keys, str(folder / files.ADAPTER_WEIGHTS), metadata={"format": "pt"})
    known = files.read_json(like / files.ADAPTER_CONFIG)
    config = MaskConfig(
        **{name: known[name] for name in _OF_THE_BASE if known.get(name) is not None},
        # Counts per matrix are free here, which a threshold says; there are no scores to rank.
        selection="threshold",
        rank_by="signed",
        sparsity=sparsity,
        inference_mode=True,
        mask_sha256=mask_fingerprint(dict(coded)),
        recipe=recipe,
    )
    config.save_pretrained(str(folder))
    for name in _BESIDE:
        if (like / name).is_file():
            shutil.copy2(files.own_file(like, name), folder / name)
