"""Several saved masks as one: the union, the intersection or a majority vote of the places they remove."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from maskft_common import files, layout
from maskft_common.errors import UserError, printable

from ..models import TOKENIZER_FILES
from ..tuner.config import MaskConfig
from .codec import PREFIX, decode_mask, encode_mask, mask_info, total_counts
from .fingerprints import mask_fingerprint
from .mask_set import AdapterConfig, read_coded, read_config

# Name -> how many of n masks have to remove a place for the combination to remove it.
COMBINATIONS: dict[str, Callable[[int], int]] = {
    "union": lambda n: 1,
    "intersection": lambda n: n,
    "vote": lambda n: n // 2 + 1,
}


def combine_masks(coded_sets: Sequence[Mapping[str, Tensor]], combination: str) -> dict[str, Tensor]:
    """Combine masks place by place; a module that a mask does not have is one of which it removes nothing.

    Masks come and go coded, and are decoded one module of one mask at a time: those of a large model, at a byte a
    weight, would not fit into memory together.

    Args:
        coded_sets: For each of two or more masks of one base model, module name -> coded mask, see ``codec``.
        combination: ``union`` removes a place that any mask removes, ``intersection`` one that all remove, ``vote``
            one that more than half of them remove.

    Returns:
        Module name -> coded mask.

    Raises:
        UserError: If the masks of a module differ in shape, or the combination removes nothing, or everything.
    """
    num_of = COMBINATIONS[combination]
    num_needed = num_of(len(coded_sets))
    # A dictionary as a set that keeps the order of the masks.
    modules: dict[str, None] = {}
    for coded in coded_sets:
        modules.update(dict.fromkeys(coded))

    combined = {}
    for module in modules:
        found = [coded[module] for coded in coded_sets if module in coded]
        infos = [mask_info(data, module) for data in found]
        has_one_shape = all(info["shape"] == infos[0]["shape"] for info in infos)
        if not has_one_shape:
            shapes = " and ".join(str(info["shape"]) for info in infos)
            raise UserError(f"the masks of {module} have shapes {shapes}; combine masks of one base model")

        # With fewer masks than needed nothing is removed, and the module is left out.
        if len(found) < num_needed:
            continue
        # How many masks remove each place; one that does not have the module removes none. Added up one after another
        # in two bytes a weight: torch's sum over a stack of masks would take eight beside the stack.
        num_removing = torch.zeros(infos[0]["shape"], dtype=torch.int16)
        for data in found:
            num_removing += ~decode_mask(data, module)
        combined[module] = encode_mask(num_removing < num_needed)

    numel, num_removed = total_counts(combined)
    if num_removed == numel > 0:
        # As a mask that removes all weights is not saved after training.
        raise UserError(
            f"the {combination} of these {len(coded_sets)} masks removes all {numel:,} weights; name masks that remove "
            "less"
        )
    if num_removed == 0:
        # A union of masks removes nothing only if none of them does.
        remedy = "name masks that remove weights" if combination == "union" else "try union"
        raise UserError(f"the {combination} of these {len(coded_sets)} masks removes nothing; {remedy}")
    return combined


def combine_adapters(
    adapters: Sequence[str | Path],
    combination: str,
    output_dir: str | Path,
) -> str:
    """Write the combination of saved masks as one adapter with its card.

    ``set_adapter`` with a list of names, of the same adapters loaded into one model, is the union without a file.

    Args:
        adapters: Adapter folders, two or more, over one base.
        combination: One of :data:`COMBINATIONS`.
        output_dir: Folder of the new adapter; must not exist or be empty.

    Returns:
        The number of weights it removes, in a line.

    Raises:
        UserError: If the adapters are not over one base, or hold more than masks that remove to zero.
    """
    if len(adapters) < 2:
        raise UserError(f"{combination} needs two adapters or more; found {len(adapters)}")
    # Checked first: an output that cannot be written is an error before minutes of decoding.
    output_dir = files.new_folder(output_dir, "output")

    # All checks on configurations come before the first mask is decoded.
    configs = [read_config(adapter) for adapter in adapters]
    for adapter, config in zip(adapters, configs, strict=True):
        _check_only_masks(adapter, config)
    base = _common_base(adapters, configs)
    coded_sets = [read_coded(adapter) for adapter in adapters]
    combined = combine_masks(coded_sets, combination)

    # The configuration of an adapter with these masks, as if it had been trained.
    new_config = MaskConfig(
        # Whole names: patterns that were right for one adapter could match modules which the combination leaves alone.
        target_modules=sorted(combined),
        # A learner whose count is free: with `topk`, `maskft verify` would expect the same share of each matrix.
        selection="logit",
        base_model_name_or_path=base,
        revision=configs[0].revision,
        task_type=configs[0].task_type,
        # There are no scores to train.
        inference_mode=True,
        mask_sha256=mask_fingerprint(combined),
        base_fingerprint=_base_fingerprint(adapters, configs, coded_sets, combined),
        base_quantisation=_base_quantisation(configs),
        recipe=_recipe(adapters, configs, combination),
    )

    # The files that PEFT would write, without a model: the tensors first, as saving the configuration reads them.
    with files.whole_folder(output_dir) as partial:
        tensors = {}
        for module, code in combined.items():
            tensors[f"{PREFIX}{module}.mask_coded"] = code
        file = partial / layout.ADAPTER_WEIGHTS
        save_file(tensors, file, metadata={"format": "pt"})
        files.use_default_modes(partial)
        new_config.save_pretrained(str(partial))
        tokenizers = [_tokenizer_files(adapter) for adapter in adapters]
        have_one = all(of_part == tokenizers[0] for of_part in tokenizers)
        if have_one:
            for name, content in tokenizers[0].items():
                files.write_bytes(partial / name, content)

    # Without a fingerprint, loading cannot tell whether the base is the right one: the summary says so.
    unchecked = "" if new_config.base_fingerprint else "; the base's fingerprint is not recorded"
    others = "" if have_one else "; their tokenizers or chat templates differ, and the base's is used"
    alone = []
    for coded in coded_sets:
        _, num_removed = total_counts(coded)
        alone.append(f"{num_removed:,}")
    numel, num_removed = total_counts(combined)
    return (
        f"{output_dir}: the {combination} of {len(adapters)} masks removes {num_removed:,} of {numel:,} weights in "
        f"{len(combined)} modules ({'; '.join(alone)} alone){unchecked}{others}"
    )


def _tokenizer_files(adapter: str | Path) -> dict[str, bytes]:
    """The files of a tokenizer and its chat template in an adapter folder, by name; none if the adapter has none."""
    # Links out of the folder are errors, as they are where a tokenizer is loaded.
    files.check_own_files(Path(adapter))
    found = {}
    for pattern in TOKENIZER_FILES:
        for file in Path(adapter).glob(pattern):
            if file.is_file():
                found[file.name] = file.read_bytes()
    return found


def _check_only_masks(adapter: str | Path, config: AdapterConfig) -> None:
    """Raise for an adapter that does more than setting weights to zero."""
    if config.removed_value != "zero":
        raise UserError(
            f"adapter {str(adapter)!r} has removed_value={config.removed_value!r}; only masks that remove to zero can "
            "be combined"
        )
    if config.weights_sha256:
        raise UserError(
            f"adapter {str(adapter)!r} holds weights beside its masks (modules_to_save), of which only one adapter's "
            "could be kept; combine adapters that hold masks alone"
        )


def _common_base(adapters: Sequence[str | Path], configs: Sequence[AdapterConfig]) -> str | None:
    """The base that all adapters name, the first of its names; raises for names of several models."""
    first = configs[0]
    for adapter, config in zip(adapters, configs, strict=True):
        # One model may have two names, such as its folders on two machines. Equal fingerprints are of the same weights
        # of the same modules.
        is_recorded = first.base_fingerprint is not None
        is_one_model = is_recorded and config.base_fingerprint == first.base_fingerprint
        if _base_text(config) != _base_text(first) and not is_one_model:
            raise UserError(
                f"adapter {str(adapters[0])!r} is over {_base_text(first)} and {str(adapter)!r} over "
                f"{_base_text(config)}; combine masks of one base model"
            )
    return first.base_model_name_or_path


def _base_text(config: AdapterConfig) -> str:
    """Name of an adapter's base with its revision on the hub."""
    name = repr(config.base_model_name_or_path)
    # None is the main one.
    if config.revision in (None, "main"):
        return name
    return f"{name} (revision {config.revision!r})"


def _base_fingerprint(
    adapters: Sequence[str | Path],
    configs: Sequence[AdapterConfig],
    coded_sets: Sequence[Mapping[str, Tensor]],
    combined: Mapping[str, Tensor],
) -> str | None:
    """Fingerprint of the base for the combination, from an adapter of the same modules; None: no adapter has these.

    A fingerprint is over the weights of the masked modules, so those of adapters with other modules cannot be compared.

    Raises:
        UserError: If two adapters of the same modules have different fingerprints.
    """
    # Masked modules -> the first adapter that masks them, and its fingerprint.
    found: dict[frozenset[str], tuple[str | Path, str]] = {}
    for adapter, config, coded in zip(adapters, configs, coded_sets, strict=True):
        # A set, because a fingerprint is over the modules by name, whatever their order in the file is.
        modules = frozenset(coded)
        # Over float16 none is recorded, and nothing is known.
        if config.base_fingerprint is None:
            continue
        other, fingerprint = found.setdefault(modules, (adapter, config.base_fingerprint))
        if config.base_fingerprint != fingerprint:
            raise UserError(
                f"adapters {str(other)!r} and {str(adapter)!r} were trained on other weights of their base "
                f"(fingerprints {fingerprint[:12]} and {config.base_fingerprint[:12]}); combine masks of one model"
            )

    # The union may have more modules than each of its parts, and the intersection fewer.
    of_same = found.get(frozenset(combined))
    if of_same is None:
        return None
    _, fingerprint = of_same
    return fingerprint


def _base_quantisation(configs: Sequence[AdapterConfig]) -> str | None:
    """How the weights under the masks were stored in training, in the words of ``quantisation_of``; None: as floats."""
    kinds = set()
    for config in configs:
        # One text may name several kinds, for a base whose layers differ.
        if config.base_quantisation:
            of_config = config.base_quantisation.split(", ")
            kinds.update(of_config)
    return ", ".join(sorted(kinds)) or None


def _recipe(
    adapters: Sequence[str | Path],
    configs: Sequence[AdapterConfig],
    combination: str,
) -> dict[str, Any]:
    """The recipe for the card: each part by its folder's name and its mask's fingerprint."""
    recipe = {"combination": f"{combination} of {len(adapters)} masks"}
    parts = zip(adapters, configs, strict=True)
    for number, (adapter, config) in enumerate(parts, start=1):
        # Only the last part of the path: the card is published, and the rest is private. It is resolved, as "." has no
        # last part.
        name = printable(Path(adapter).resolve().name)
        recipe[f"part {number}"] = f"{name} (mask fingerprint {config.mask_sha256})"
    return recipe
