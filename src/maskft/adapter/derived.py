"""Adapter folders made from others without a model: masks of one base in, a mask of that base out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from maskft_base import files
from maskft_base.errors import UserError

from ..tuner.codec import PREFIX, decode_mask, encode_mask, mask_info
from ..tuner.config import MaskConfig
from ..tuner.model import mask_fingerprint
from ..tuner.targets import listed
from .algebra import agreement, combine, num_votes, verdict
from .mask_set import AdapterConfig, read_coded, read_config

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


class DecodedMasks(Mapping[str, Tensor]):
    """The masks of a folder by module name, each decoded when it is asked for: one is in memory at a time."""

    def __init__(self, coded: Mapping[str, Tensor]) -> None:
        self._coded = coded

    def __getitem__(self, name: str) -> Tensor:
        return decode_mask(self._coded[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._coded)

    def __len__(self) -> int:
        return len(self._coded)


def read_alike(folders: Sequence[str | Path]) -> list[dict[str, Tensor]]:
    """Coded masks of adapter folders that are over one base; see ``read_coded``.

    Raises:
        UserError: If one is no mask, or two differ in base, how it was held, modules, shapes or what removed weights
            become.
    """
    configs, coded = [read_config(folder) for folder in folders], [read_coded(folder) for folder in folders]
    for folder, config, masks in zip(folders[1:], configs[1:], coded[1:], strict=True):
        _check_alike((folders[0], configs[0], coded[0]), (folder, config, masks))
    return coded


def _check_alike(
    first: tuple[str | Path, AdapterConfig, Mapping[str, Tensor]],
    second: tuple[str | Path, AdapterConfig, Mapping[str, Tensor]],
) -> None:
    (one, config, masks), (other, its_config, its_masks) = first, second
    both = f"{str(one)!r} and {str(other)!r}"
    only = sorted(masks.keys() ^ its_masks.keys())
    if only:
        raise UserError(f"{both} mask other modules: {listed(only)} only in one; combine masks of the same layers")
    for name in masks:
        shapes = [mask_info(each[name], name)["shape"] for each in (masks, its_masks)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{both} are over other bases: {name} is {shapes[0]} and {shapes[1]}")
    bases = [(each.base_fingerprint or "").partition(":")[0] for each in (config, its_config)]
    held = [each.base_quantisation or "float" for each in (config, its_config)]
    if all(bases) and held[0] != held[1]:
        raise UserError(
            f"{both} were learned on base weights held as {held[0]} and as {held[1]}; combine masks learned on weights "
            "held alike"
        )
    if all(bases) and bases[0] != bases[1]:
        raise UserError(
            f"{both} are over other base weights (fingerprints {bases[0][:12]} and {bases[1][:12]}); combine masks of "
            "one base"
        )
    names = [each.base_model_name_or_path for each in (config, its_config)]
    if not all(bases) and names[0] != names[1]:
        raise UserError(f"{both} are over other bases: {names[0]} and {names[1]}")
    values = [(each.removed_value, each.removed_value_fingerprint) for each in (config, its_config)]
    if values[0] != values[1]:
        raise UserError(f"{both} put other values where they remove: {values[0][0]} and {values[1][0]}")


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


def compare_adapters(folders: Sequence[str | Path], confidence: float = 0.95) -> list[dict[str, Any]]:
    """Of every two adapter folders, in how much they agree: ``first``, ``second``, their counts and ``agreement``."""
    masks = [DecodedMasks(coded) for coded in read_alike(folders)]
    names = distinct_names(folders)
    removed = [sum(int((~mask).sum()) for mask in each.values()) for each in masks]
    rows = []
    for a, b in combinations(range(len(folders)), 2):
        pair = agreement(masks[a], masks[b], confidence)
        counts = {"num_removed_first": removed[a], "num_removed_second": removed[b]}
        rows.append({"first": names[a], "second": names[b], **counts, **pair, "verdict": verdict(pair)})
    return rows


def distinct_names(folders: Sequence[str | Path]) -> list[str]:
    """Last parts of the paths, as many of them as tell the folders apart."""
    parts = [Path(folder).absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
