"""Saved masks in place of saved scores: how the tuner writes and reads adapter files, see ``tuner/adapter_files.py``.

Writing codes each mask and records checksums and the fingerprint of the base. Reading is strict: missing, extra,
mis-shaped or corrupted entries, and another base, are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from peft.functional import delete_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import WEIGHTS_NAME
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from maskft_common.errors import UserError
from maskft_common.files import from_anywhere, use_default_modes
from maskft_common.layout import ADAPTER_WEIGHTS

from ..models import without_adapter
from ..tuner.adapter_files import AdapterFiles, StateDict
from ..tuner.config import MaskConfig
from ..tuner.layer import MaskedLinear
from ..tuner.model import MaskModel, adapter_layers, unwrapped_name, without_compiled
from ..tuner.targets import listed
from .adapter_file import add_tensors, weights_beside_masks
from .card import write_card
from .codec import (
    FORMAT_VERSION,
    SCORES,
    SCORES_SHA256,
    check_scores_sha256,
    decode_mask,
    encode_mask,
    is_of_mask,
    scores_sha256,
    total_counts,
    weights_sha256,
)
from .fingerprints import base_fingerprint, check_base, mask_fingerprint, quantisation_of

# The folders that transformers' Trainer writes, and those in them: PEFT gives an adapter that is not named "default" a
# folder of its own. Not deeper ones: a run may be anywhere.
_CHECKPOINT = re.compile(rf"(^|/){PREFIX_CHECKPOINT_DIR}-\d+(/[^/]+)?$")


class CodedMask:
    """A mask as it was loaded: entropy-coded, decoded when it is needed."""

    def __init__(self, coded: Tensor, module_name: str) -> None:
        # A copy, because the tensor may be a view of the whole file in memory, with the scores in it.
        self.coded = coded.detach().cpu().clone()
        self.module_name = module_name

    def mask(self, shape: torch.Size) -> Tensor:
        """The mask; bool, True = keep; raises if its shape is not ``shape``."""
        return decode_mask(self.coded, self.module_name, shape)


class _Scores(dict[str, Tensor]):
    """Scores that the file leaves out unless the folder is a checkpoint; a copied configuration has none."""

    # PEFT deep-copies the configuration in some saves, and would copy gigabytes of scores with it.
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()


class MaskFiles(AdapterFiles):
    """Adapter files that hold coded masks."""

    # For inference the masks are enough.
    loads_scores = False

    def encode(
        self,
        model: nn.Module,
        config: MaskConfig,
        adapter_name: str,
        state_dict: StateDict,
        of_peft: StateDict,
    ) -> StateDict:
        """Code the masks, and fill checksums and fingerprints into ``config``.

        Raises:
            UserError: If the masks remove every weight, or scores are NaN.
        """
        layers = adapter_layers(model, adapter_name)
        # The keys end in the name of the adapter, which PEFT takes out before it writes the file.
        out: StateDict = {}
        # By the names of the unwrapped model, over which the checksum is taken.
        coded: StateDict = {}
        scores_of_save = _Scores()
        for name, layer in layers.items():
            # One mask after another, which take a byte a weight until they are coded.
            code = encode_mask(_mask(layer, name, adapter_name, state_dict))
            coded[unwrapped_name(name)] = code
            # A file of a compiled model is one of the plain model.
            name_in_file = without_compiled(name)
            out[f"{name_in_file}.mask_coded.{adapter_name}"] = code

            # The weights of a masked output head, which PEFT would save in full beside the mask.
            for kind in ("weight", "bias"):
                state_dict.pop(f"{name}.base_layer.{kind}", None)

            # A mask that was loaded for inference has no scores.
            if adapter_name in layer.mask_scores:
                key = f"mask_scores.{adapter_name}"
                scores = state_dict.get(f"{name}.{key}", layer.mask_scores[adapter_name])
                if config.save_scores:
                    out[f"{name_in_file}.{key}"] = scores
                    # Scores that are still sharded are those of a rank that writes no file.
                    if not hasattr(scores, "full_tensor"):
                        out[f"{name_in_file}{SCORES_SHA256}.{adapter_name}"] = scores_sha256(scores)
                else:
                    scores_of_save[f"{name_in_file}{SCORES}"] = scores

        _check_keeps_some(coded, config)

        # Modules that are saved whole, by their names in the file. PEFT adds them after this call.
        own = f".modules_to_save.{adapter_name}."
        modules = {key.replace(own, "."): value for key, value in state_dict.items() if own in key}

        # Kept until save_config, which knows the folder.
        config.scores_of_save = scores_of_save
        config.weights_of_save = weights_sha256(modules)
        # PEFT writes the configuration after the tensors, with these fields.
        config.format_version = FORMAT_VERSION
        # Trained anew from the configuration of another mask, whose recipe and verdict do not hold for this one.
        if config.is_new and not config.inference_mode and config.recipe is config.recipe_of_file:
            config.recipe = None
        config.is_new = False
        config.mask_sha256 = mask_fingerprint(coded)
        # float16 rounds in another way than bfloat16, so that its fingerprint would match no other dtype's. What counts
        # is the dequantised weight: layer.weight of a quantised layer has the dtype that codes are stored in.
        is_half = any(layer.get_base_dtype() == torch.float16 for layer in layers.values())
        if is_half:
            config.base_fingerprint = None
        else:
            config.base_fingerprint = base_fingerprint(layers.values())
        config.base_quantisation = quantisation_of(layers.values())
        return out

    def decode(
        self,
        model: nn.Module,
        config: MaskConfig,
        adapter_name: str,
        state_dict: StateDict,
        remap: Callable[[StateDict], StateDict],
    ) -> StateDict:
        """Check every entry against the model, give the masks to their layers, and return the rest.

        Raises:
            UserError: If entries are missing, extra, mis-shaped or corrupted, or the base is another one.
        """
        # A new adapter is being loaded with its configuration. Later calls load other tensors into it, such as those of
        # the best checkpoint, whose checksums are not in the configuration.
        was_new = config.is_new
        config.is_new = False

        # It will be trained further, and the recipe and verdict are those of the mask before.
        if was_new and not config.inference_mode:
            config.recipe = None

        is_of_config = was_new and config.mask_sha256 is not None
        is_for_inference = was_new and config.inference_mode
        try:
            if is_for_inference and not is_of_config:
                raise UserError(
                    "adapter_config.json has no mask_sha256, so nothing in the adapter's file can be checked; save the "
                    "adapter again, or fetch it from where it was saved (if it was saved as scores: "
                    "maskft.masks.disable())"
                )
            return _load_masks(model, config, adapter_name, state_dict, is_of_config)
        except UserError:
            # Leave nothing of the adapter, so that another file may be loaded under its name, with the configuration of
            # that file. One that was added to be trained stays.
            if is_of_config or is_for_inference:
                _remove(model, adapter_name)
            raise

    def save_config(
        self,
        config: MaskConfig,
        folder: Path,
        save: Callable[[], None],
    ) -> None:
        """Write ``adapter_config.json`` with the checksums of the weights beside the masks, and the card.

        In a Trainer's checkpoint folder the scores join the masks, so that any trainer resumes from it.

        Args:
            config: Configuration of the adapter; paths and checksums are filled in.
            folder: Adapter folder, in which PEFT has written the tensors.
            save: Writes ``adapter_config.json``.
        """
        for name in ("base_model_name_or_path", "removed_value_model"):
            model = getattr(config, name)
            if model:
                # A relative path would be right in one working directory only.
                setattr(config, name, from_anywhere(model))

        file = folder / ADAPTER_WEIGHTS
        # Taken out of the configuration, with which gigabytes of scores would stay in memory.
        scores = config.scores_of_save
        config.scores_of_save = None
        checksums = config.weights_of_save or {}
        config.weights_of_save = None
        _check_not_pickled(config, folder)
        # Without a file, a configuration is saved alone, or before the tensors: transformers' own save_pretrained has
        # another order than PEFT's. There a file may be that of an earlier save, so that its modules do not count.
        if file.is_file():
            is_checkpoint = _CHECKPOINT.search(folder.as_posix()) is not None
            if scores and is_checkpoint:
                # Checksums here and not in `encode`: most saves leave the scores out, and hashing gigabytes takes time.
                added = dict(scores)
                for name, value in scores.items():
                    module = name.removesuffix(SCORES)
                    added[f"{module}{SCORES_SHA256}"] = scores_sha256(value)
                add_tensors(file, added)
            use_default_modes(folder, file.name)
            # Read back from the file: PEFT adds weights of its own after it has asked for the masks.
            in_file = weights_sha256(weights_beside_masks(file))
            checksums = in_file | checksums
        if file.is_file() or checksums:
            config.weights_sha256 = checksums or None
        save()
        if file.is_file():
            # Over PEFT's, whose lines do not load a mask.
            write_card(folder, config)


def _remove(model: Any, adapter_name: str) -> None:
    """Remove an adapter that does not load.

    Args:
        model: A PeftModel, or a model that the adapter was injected into.
        adapter_name: The adapter.
    """
    tuner_layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    has_others = any(not isinstance(layer, MaskedLinear) for layer in tuner_layers)
    if has_others and len(model.peft_config) == 1:
        # The base has an adapter of another kind under the same name. PEFT has one configuration for both, and would
        # delete and unload both.
        for layer in adapter_layers(model, adapter_name).values():
            layer.delete_adapter(adapter_name)
    elif isinstance(model, PeftModel):
        model.delete_adapter(adapter_name)
        if not model.peft_config:
            # The caller is from_pretrained, which now returns no model: the base is as it was before.
            model.base_model.unload()
    else:
        delete_adapter(model, adapter_name, MaskModel.prefix, MaskedLinear)
        del model.peft_config[adapter_name]


def _mask(
    layer: MaskedLinear,
    name: str,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
) -> Tensor:
    """Mask of the layer of this name; scores are those of ``state_dict``, which may be gathered from all ranks."""
    if adapter_name not in layer.mask_scores:
        # Loaded for inference.
        return layer.get_mask(adapter_name)
    scores = state_dict.get(f"{name}.mask_scores.{adapter_name}")
    return layer.masker.mask(adapter_name, scores)


def _check_keeps_some(coded: Mapping[str, Tensor], config: MaskConfig) -> None:
    """Raise if no weight is left."""
    numel, num_removed = total_counts(coded)
    if num_removed < numel:
        return
    # The remedy is the option that decides in this learner how many weights are removed.
    if config.selection == "threshold":
        why = f"every score is below the threshold, {config.threshold}; set that or learning_rate lower"
    elif config.selection == "topk":
        why = f"sparsity is {config.sparsity}; set it lower"
    else:
        why = "every score is 0 or less; set init_value or price higher, or learning_rate lower"
    raise UserError(f"the mask removes all {numel:,} weights: {why}")


def _check_not_pickled(config: MaskConfig, folder: Path) -> None:
    """Raise if PEFT has written a pickle, which ``safe_serialization=False`` asks for, or an older one is there."""
    pickled = folder / WEIGHTS_NAME
    if not pickled.is_file():
        return
    if not (folder / ADAPTER_WEIGHTS).is_file():  # PEFT has just written it
        pickled.unlink()
    # PEFT sets it while it saves.
    config.inference_mode = False
    raise UserError(
        f"masks are saved as safetensors, and {folder} has a {WEIGHTS_NAME}: remove it, or leave out "
        "safe_serialization=False"
    )


def _load_masks(
    model: nn.Module,
    config: MaskConfig,
    adapter_name: str,
    state_dict: StateDict,
    is_of_config: bool,
) -> StateDict:
    """Check the tensors of a file and give the masks to their layers; see :meth:`MaskFiles.decode`.

    Args:
        model: The wrapped model.
        config: Configuration of the adapter.
        adapter_name: The adapter.
        state_dict: Tensors of the file.
        is_of_config: Whether the checksums in ``config`` are those of the file.
    """
    # By module names of the unwrapped model, which files have; PEFT wants the full names back.
    layers = {}
    full_names = {}
    for full_name, layer in adapter_layers(model, adapter_name).items():
        name = unwrapped_name(full_name)
        layers[name] = layer
        full_names[name] = full_name
    coded = _entries(state_dict, "mask_coded")
    scores = _entries(state_dict, "mask_scores")
    checksums = _entries(state_dict, "mask_scores_sha256")
    rest = {key: value for key, value in state_dict.items() if not is_of_mask(key)}

    # For a resized vocabulary PEFT writes the weights of modules_to_save under two names, and reads one of them.
    own = f".modules_to_save.{adapter_name}."
    once = {}
    # By the names under which the configuration has their checksums.
    hashed_weights = {}
    for key, value in rest.items():
        name_in_file = key.replace(own, ".")
        hashed_weights[name_in_file] = value
        if ".modules_to_save." not in name_in_file:
            once[key] = value
    # Without checksums nothing but masks and modules_to_save may come with the file.
    hashed: Collection[str] = ()
    if config.mask_sha256 is not None:
        hashed = config.weights_sha256 or ()

    # Names, checksums, the base and the scores are checked before anything is loaded: no layer is left with a mask of
    # a file that is refused.
    _check_names(layers, coded, once, adapter_name, hashed)
    _check_has_weights(model, once)
    if is_of_config:
        if mask_fingerprint(coded) != config.mask_sha256:
            raise UserError(
                "the masks do not match mask_sha256 in adapter_config.json; the two files are of two adapters, or "
                "key_mapping renames modules, which masks do not support"
            )
        check_weights(hashed_weights, config.weights_sha256)
    # Decoded for the errors alone: a layer keeps the coded mask, which takes less memory.
    for name, layer in layers.items():
        shape = layer.get_base_weight().shape
        decode_mask(coded[name], name, shape)
    _check_has_scores(layers, scores, adapter_name)
    if config.verify_base:
        check_base(layers.values(), config)
    _check_scores(layers, scores, checksums, adapter_name)

    # Nothing below raises for what is in the file. The masks go to their layers, and the scores too if the adapter is
    # to be trained.
    for name, layer in layers.items():
        layer.saved_masks[adapter_name] = CodedMask(coded[name], layer.module_name)
        if adapter_name in layer.mask_scores:
            _restore_scores(layer, adapter_name, scores[name])
            # PEFT warns of parameters that a file does not set; these are set already.
            once[f"{full_names[name]}.mask_scores.{adapter_name}"] = layer.mask_scores[adapter_name].data
        # A cached masked weight belongs to the mask before.
        layer.masker.forget()
    return once


def _entries(state_dict: Mapping[str, Tensor], kind: str) -> StateDict:
    """The entries of one kind, by module name."""
    suffix = f".{kind}"
    entries = {}
    for key, value in state_dict.items():
        if key.endswith(suffix):
            name = unwrapped_name(key.removesuffix(suffix))
            entries[name] = value
    return entries


def _restore_scores(layer: MaskedLinear, adapter_name: str, saved: Tensor) -> None:
    """Copy saved scores, which :func:`_check_scores` has checked, into the layer."""
    parameter = layer.mask_scores[adapter_name]
    # With low_cpu_mem_usage parameters start on the meta device, where nothing can be copied to.
    if parameter.device.type == "meta":
        fresh = layer.fresh_scores(layer.mask_configs[adapter_name])
        parameter = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
        layer.mask_scores[adapter_name] = parameter
    # In place: an optimizer may hold the parameter already.
    with torch.no_grad():
        parameter.copy_(saved)


# Checks


def _check_names(
    layers: Mapping[str, MaskedLinear],
    coded: Mapping[str, Tensor],
    rest: Collection[str],
    adapter_name: str,
    declared: Collection[str],
) -> None:
    """Raise for missing masks, extra masks, and entries of other kinds.

    Args:
        layers: The layers of the adapter, by module name.
        coded: The masks of the file, by module name.
        rest: Keys of the file that are neither masks nor scores.
        adapter_name: The adapter.
        declared: Keys that the configuration has checksums of.
    """
    missing = [name for name in layers if name not in coded]
    if missing:
        raise UserError(f"the adapter file has no mask for {listed(missing)}; it is incomplete, save it again")
    extra = [name for name in coded if name not in layers]
    if extra:
        raise UserError(
            f"the adapter file has masks for {listed(extra)}, which the model or adapter_config.json does not have; "
            "it was made for another model or configuration"
        )

    # PEFT would load any other key into the base model without a warning.
    saved = f".modules_to_save.{adapter_name}."
    # A weight inside a masked layer is never replaced, whatever the configuration declares.
    masked = tuple(f"{name}." for name in layers)
    unknown = []
    for key in rest:
        name = unwrapped_name(key)
        is_declared = name in declared and not name.startswith(masked)
        if saved not in key and not is_declared:
            unknown.append(key)
    if unknown:
        raise UserError(
            f"the adapter file has entries that are neither masks nor modules_to_save nor in its weights_sha256: "
            f"{listed(unknown)}; it is not loaded, because they would overwrite base weights"
        )


def _check_has_weights(model: nn.Module, replaced: Collection[str]) -> None:
    """Raise if the file replaces weights that the model does not have, which PEFT would drop without a word.

    Such as the head of a classifier, whose mask is loaded over a causal language model.
    """
    if not replaced:
        return
    # Tied weights have two names each.
    tensors = chain(
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    there = {unwrapped_name(name) for name, _ in tensors}
    names = [unwrapped_name(key) for key in replaced]
    missing = [name for name in names if name not in there]
    if missing:
        kind = type(without_adapter(model)).__name__
        raise UserError(
            f"the adapter replaces {listed(missing)}, which {kind} does not have; load the adapter over a model of the "
            "class that it was trained with"
        )


def _check_has_scores(
    layers: Mapping[str, MaskedLinear],
    scores: Collection[str],
    adapter_name: str,
) -> None:
    """Raise if the file has no scores for a layer that is to be trained."""
    for name, layer in layers.items():
        if adapter_name in layer.mask_scores and name not in scores:
            raise UserError(
                "the adapter holds a mask but not its scores, so it cannot be trained further: save it with "
                "MaskConfig(save_scores=True), or load it for inference"
            )


def _check_scores(
    layers: Mapping[str, MaskedLinear],
    scores: Mapping[str, Tensor],
    checksums: Mapping[str, Tensor],
    adapter_name: str,
) -> None:
    """Raise if the scores of a layer that is to be trained have another shape, contain NaN, or are damaged."""
    for name, layer in layers.items():
        if adapter_name not in layer.mask_scores:
            continue
        saved = scores[name]
        shape = layer.mask_scores[adapter_name].shape
        if saved.shape != shape:
            raise UserError(f"{layer.module_name}: saved scores have shape {tuple(saved.shape)}, not {tuple(shape)}")
        # In float32, as they are restored: a file may hold any dtype.
        if bool(saved.to(torch.float32).isnan().any()):
            raise UserError(f"{layer.module_name}: the saved scores contain NaN; resume from an earlier checkpoint")
        check_scores_sha256(saved, checksums.get(name), layer.module_name)


def check_weights(found: Mapping[str, Tensor], declared: Mapping[str, str] | None) -> None:
    """Raise unless ``declared``, from ``adapter_config.json``, has the checksums of the weights beside the masks."""
    expected = declared or {}
    sha256 = weights_sha256(found)
    # A name that only one of the two has differs as well.
    different = []
    for name in sorted({*expected, *sha256}):
        if expected.get(name) != sha256.get(name):
            different.append(name)
    if different:
        raise UserError(
            f"weights_sha256 in adapter_config.json does not name these weights of the adapter file, or names others: "
            f"{listed(different)}; they would replace the base's: fetch or save the adapter again"
        )
