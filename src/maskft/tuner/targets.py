"""Which layers of a model may be masked, and which of them a configuration asks for."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from maskft_common.errors import UserError, did_you_mean

from .config import MaskConfig
from .quantized import find_quantized_weight

# A module in a numbered list of layers, such as model.layers.3.mlp.gate_proj: the list is "layers", the index 3.
_LAYER_INDEX = re.compile(r"(?:^|\.)(?P<list>[^.]+)\.(?P<index>\d+)\.")
# With an active mask, the masked layer computes the linear map itself and does not call its base layer, whose forward
# may be another one.
_PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)
# Modules inside a masked layer, or inside one that another adapter saves whole; a second adapter leaves them alone.
_INNER_MODULES = {"base_layer", "mask_scores", "original_module", "modules_to_save"}
# Names that a message lists before "and N more".
_NUM_LISTED = 8


def is_target(config: MaskConfig, name: str) -> Any:
    """Whether a configuration asks for a module, by PEFT's matching."""
    # PEFT itself leaves out modules inside the layers of earlier adapters, but not the copies of modules_to_save.
    if not _INNER_MODULES.isdisjoint(name.split(".")):
        return False
    return check_target_module_exists(config, name)


def resolve_targets(config: MaskConfig, model: nn.Module) -> None:
    """Replace "all-linear" by the names of the linear layers, and check the whole request.

    Args:
        config: Its ``target_modules`` and ``exclude_modules`` are filled in.
        model: The model, before any layer is replaced by this adapter.

    Raises:
        UserError: If a layer that was asked for does not exist or cannot be masked.
    """
    if config.target_modules in (None, "all-linear"):
        # PEFT resolves "all-linear" to every nn.Linear, and would include layers that cannot be masked. Sorted, so that
        # the saved configuration does not depend on the order of a set.
        config.target_modules = sorted(maskable_names(model))
        _exclude_other_layers(config, model)
        _warn_of_experts(model)
        _leave_out_quantised(config, model)
        _leave_out_adapters(config, model)
        _leave_out_saved(config, model)
    check_targets(config, model)


def maskable_names(model: nn.Module) -> set[str]:
    """Last name components of the maskable linear layers inside numbered layers (q_proj, ..., down_proj).

    Raises:
        UserError: If the model has none.
    """
    # Parts of other adapters, such as LoRA's matrices, are linear layers, too; PEFT never puts an adapter on them.
    with_adapter = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    inside_adapters = tuple(f"{name}." for name in with_adapter)

    found = {}
    for name, module in model.named_modules():
        is_inner = not _INNER_MODULES.isdisjoint(name.split("."))
        if is_inner or name.startswith(inside_adapters) or not _is_linear(module):
            continue
        if _why_not_maskable(name, module, model) is None:
            found[name] = module

    # The decoder layers. Outside of them are heads, poolers and projectors of other modalities.
    names = [name for name in found if _LAYER_INDEX.search(name)]
    if not names:
        # No stack of layers: every linear layer except an output head.
        get_head = getattr(model, "get_output_embeddings", None)
        head = None if get_head is None else get_head()
        names = [name for name, module in found.items() if module is not head]
    if not names:
        raise UserError(f"{type(model).__name__} has no linear layer that could be masked")
    return {_last(name) for name in names}


def check_targets(config: MaskConfig, model: nn.Module) -> None:
    """Raise one clear :class:`UserError` if ``config`` asks for layers that do not exist or cannot be masked."""
    modules = {}
    for name, module in model.named_modules():
        if name and ".base_layer" not in name:  # neither the model itself, nor inside a layer that is masked already
            modules[name] = module

    # In the order of their causes: a wrong index or name also leads to "no layer matches".
    _check_layer_indices(config, modules)
    _check_full_names(config, modules)
    _check_lists_are_found(config, modules)
    _check_not_tied(config, modules, model)
    _check_not_masked(config, modules)

    matched = [name for name in modules if is_target(config, name)]
    targets = {name: modules[name] for name in matched}
    _check_not_saved(config, modules)
    # If nothing matched, of the next three only a misspelt entry of modules_to_save raises.
    _check_maskable(matched, modules, model)
    _check_not_shared(targets, model)
    _check_every_entry_matches(config, modules, has_targets=bool(matched))
    if not matched:
        _raise_no_match(config, modules, model)


def layer_indices(names: Iterable[str], layers_pattern: list[str] | str | None = None) -> set[int]:
    """Indices of the decoder layers that module or parameter ``names`` lie in.

    Args:
        names: Names of modules or parameters.
        layers_pattern: Names of the lists of layers to count; None: the outermost list in each name.
    """
    indices = set()
    if layers_pattern is None:
        # The outermost list is that of the decoder layers; one inside it may be of experts.
        for name in names:
            match = _LAYER_INDEX.search(name)
            if match:
                indices.add(int(match["index"]))
        return indices

    lists = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for name in names:
        for match in _LAYER_INDEX.finditer(name):
            if match["list"] in lists:
                indices.add(int(match["index"]))
    return indices


def listed(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    names = list(names)
    if not names:
        return "none"

    shown = ", ".join(names[:_NUM_LISTED])
    num_more = len(names) - _NUM_LISTED
    if num_more <= 0:
        return shown
    return f"{shown} and {num_more} more"


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of any kind, masked or not."""
    if isinstance(module, nn.Linear | Conv1D | BaseTunerLayer):
        return True
    return find_quantized_weight(module) is not None


def _last(name: str) -> str:
    """The last component of a module's name: ``q_proj`` of ``model.layers.0.self_attn.q_proj``."""
    return name.rpartition(".")[2]


def _is_named(name: str, entry: str) -> bool:
    """Whether an entry of a list names a module, as PEFT matches it: in full, or by the end of its name."""
    return name == entry or name.endswith(f".{entry}")


def _exclude_other_layers(config: MaskConfig, model: nn.Module) -> None:
    """Exclude linear layers outside the numbered ones that share a name with one inside, such as BERT's pooler."""
    # "all-linear" becomes last name components, and `dense` of the pooler is one of BERT's layers, too.
    has_numbered = False
    others = []
    for name, _ in model.named_modules():
        if not name or not is_target(config, name):
            continue
        if _LAYER_INDEX.search(name):
            has_numbered = True
        else:
            others.append(name)
    if has_numbered:
        _exclude(config, others)


def _exclude(config: MaskConfig, names: list[str]) -> None:
    """Add those of the names that are targets to ``exclude_modules``."""
    names = [name for name in names if is_target(config, name)]
    if not names:
        return

    given = config.exclude_modules
    if isinstance(given, str):  # a regular expression, to which the names are added as alternatives
        alternatives = [f"(?:{given})", *map(re.escape, names)]
        config.exclude_modules = "|".join(alternatives)
    else:
        config.exclude_modules = [*(given or []), *names]


def _warn_of_experts(model: nn.Module) -> None:
    """Warn of the experts that "all-linear" leaves out: those that are not linear layers."""
    kinds = set()
    for module in model.modules():
        kind = type(module).__name__
        # transformers stacks the weights of all experts into one parameter of three dimensions.
        has_stacked_weights = any(parameter.dim() > 2 for parameter in module.parameters(recurse=False))
        if "Expert" in kind and has_stacked_weights:
            kinds.add(kind)
    if kinds:
        warnings.warn(f"experts that are not linear layers are left out: {listed(sorted(kinds))}")


def _leave_out_quantised(config: MaskConfig, model: nn.Module) -> None:
    """Leave out those layers of a partly quantised model that cannot be masked, and warn."""
    kinds = set()
    names = []
    for name, module in model.named_modules():
        is_inner = not _INNER_MODULES.isdisjoint(name.split("."))
        # By their sizes, as layers of a quantisation library that is not known here have no common class.
        is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
        if is_inner or not is_linear:
            continue
        # PEFT's own have the sizes of the layers inside.
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue

        # Quantised in a way that masks do not support, or by a library that is not known.
        quantized = find_quantized_weight(module)
        if quantized is not None:
            is_left_out = quantized.why_not(module) is not None
        else:
            is_left_out = not isinstance(module, nn.Linear) or _is_foreign(module)
        if is_left_out:
            kinds.add(type(module).__name__)
            names.append(name)
    if kinds:
        # "all-linear" became last name components, which a layer of the same name elsewhere may have.
        _exclude(config, names)
        warnings.warn(
            f"linear layers that are quantised, or of an unknown kind, are left out: {listed(sorted(kinds))}; the mask "
            "covers the other layers only: load the model without quantisation to mask all"
        )


def _leave_out_adapters(config: MaskConfig, model: nn.Module) -> None:
    """Leave out linear layers that have an adapter of another kind, and warn."""
    names = []
    for name, module in model.named_modules():
        is_masked = hasattr(module, "mask_scores")
        if not isinstance(module, BaseTunerLayer) or is_masked:
            continue
        if isinstance(module.get_base_layer(), nn.Linear | Conv1D):
            names.append(name)
    if names:
        # As above: LoRA may be on `v_proj` of some layers only.
        _exclude(config, names)
        warnings.warn(
            f"linear layers with an adapter of another kind are left out: {listed(names)}; to mask them, merge that "
            "adapter first"
        )


def _leave_out_saved(config: MaskConfig, model: nn.Module) -> None:
    """Leave out layers that another adapter saves whole, and names of which this one saves every layer whole."""
    names = []
    of_others = []
    for name, module in model.named_modules():
        if name:
            names.append(name)
        if isinstance(module, AuxiliaryTrainingWrapper):
            of_others.append(name)
    _exclude(config, of_others)

    saved = _saved_targets(config, names)
    left = [entry for entry in config.target_modules or () if entry not in saved]
    if left:  # else `_check_not_saved` raises
        config.target_modules = left


def _saved_targets(config: MaskConfig, names: Iterable[str]) -> list[str]:
    """Entries of ``target_modules`` that ``modules_to_save`` covers; a regular expression is one entry."""
    if not config.modules_to_save:
        return []
    # PEFT matches no target inside of these modules, and trains and saves them in full.
    without = copy.copy(config)
    without.modules_to_save = None
    asked = [name for name in names if is_target(without, name)]
    masked = [name for name in asked if is_target(config, name)]

    entries = config.target_modules or []
    if isinstance(entries, str):
        return [entries] if asked and not masked else []
    saved = []
    for entry in entries:
        is_asked = any(_is_named(name, entry) for name in asked)
        is_masked = any(_is_named(name, entry) for name in masked)
        if is_asked and not is_masked:
            saved.append(entry)
    return saved


# Why a module cannot be masked


def _why_not_maskable(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Reason why a module cannot be masked, or None if it can."""
    kind = type(module).__name__
    if hasattr(module, "mask_scores"):  # masked already
        return None
    if isinstance(module, nn.Embedding):
        return "it is an embedding"
    if isinstance(module, BaseTunerLayer):
        return f"it has an adapter of another kind ({type(module).__module__}), which would have to be merged first"

    # The layer itself: how it stores its weight, and whether it computes a linear map.
    quantized = find_quantized_weight(module)
    if quantized is not None:
        reason = quantized.why_not(module)
    elif not isinstance(module, nn.Linear | Conv1D):
        # transformers stacks the weights of all experts into one parameter of three dimensions.
        is_stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        if is_stacked:
            return f"it is a {kind}, whose parameter is not a matrix"
        return f"it is a {kind}, not a linear layer"
    else:
        reason = _why_not_plain(module)
    if reason is not None:
        return reason

    # Its surroundings: another module that reads the same weight would not see the mask.
    parent = model.get_submodule(name.rpartition(".")[0])
    if _parent_reads_weight(parent, _last(name)):
        return f"its {type(parent).__name__} reads the weight and does not call the layer"
    if module.weight is _embedding(model):
        return "its weight is tied to the input embeddings"
    return None


def _why_not_plain(module: nn.Module) -> str | None:
    """Reason why a linear layer is not one of torch's or transformers' plain ones, or None."""
    kind = type(module).__name__
    if _is_foreign(module):
        return f"it is quantised, or neither torch's nor transformers' ({kind}); load the model without quantisation"
    # Merging would write into a tensor that is computed anew at every access.
    if parametrize.is_parametrized(module):
        return "its weight is computed from others (torch's parametrize, such as weight_norm), which has to be removed"
    # A subclass may compute something else. Falcon's is a linear map, written as two operations.
    if type(module).forward not in _PLAIN_FORWARDS and kind != "FalconLinear":
        return f"it is a {kind}, which computes something else than a linear map"
    return None


def _is_foreign(module: nn.Module) -> bool:
    """Whether a linear layer is neither torch's nor transformers', or does not hold floats."""
    package, _, _ = type(module).__module__.partition(".")
    weight: Any = getattr(module, "weight", None)
    # compressed-tensors leaves torch's class, and packed codes under another name.
    if weight is None:
        return True
    # Floats of one byte, as in transformers' FP8 layers, are codes that mean nothing without their scale.
    is_float = weight.is_floating_point() and weight.element_size() > 1
    return package not in ("torch", "transformers") or not is_float


# Class of transformers -> its linear layers whose weight it takes without calling the layer, always or in training.
_READ_WEIGHTS = {
    "Gemma3nTextAltUp": ("correction_coefs",),
    "LongcatFlashTopkRouter": ("classifier",),
    "TDNNLayer": ("kernel",),
    "LSHSelfAttention": ("query_key", "value"),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
}


def _parent_reads_weight(parent: nn.Module, leaf: str) -> bool:
    """Whether a module takes the weight of its linear layer ``leaf`` without calling the layer.

    A mask is applied in the forward pass of the layer, so that such a module would never see it.
    """
    # Both pass their weights to torch's function for a whole attention layer.
    if isinstance(parent, nn.MultiheadAttention):
        return True
    # In eval mode it passes its weights to a kernel for the whole layer, and the mask would only act in training.
    if isinstance(parent, nn.TransformerEncoderLayer):
        has_fast_path = type(parent).forward is nn.TransformerEncoderLayer.forward
        return has_fast_path and leaf in ("linear1", "linear2")
    kind = type(parent).__name__
    if kind == "WavLMAttention":
        return leaf.endswith("_proj")
    if kind in _READ_WEIGHTS:
        return leaf in _READ_WEIGHTS[kind]
    # With slow_but_exact, Bloom multiplies slices of these two.
    if kind in ("BloomAttention", "BloomMLP"):
        is_sliced = getattr(parent, "slow_but_exact", False) and getattr(parent, "pretraining_tp", 1) > 1
        return is_sliced and leaf in ("dense", "dense_4h_to_h")
    if hasattr(parent, "conv1d") and hasattr(parent, "A_log"):
        # Kernels of the Mamba family, and in part its slow path; Jamba's read only the first.
        if kind == "JambaMambaMixer":
            return leaf == "dt_proj"
        return leaf in ("dt_proj", "x_proj", "out_proj")
    return False


def _embedding(model: nn.Module) -> nn.Parameter | None:
    """The weight of the input embeddings."""
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    if get_input_embeddings is None:
        return None
    try:
        return getattr(get_input_embeddings(), "weight", None)
    except NotImplementedError:  # a speech model has none
        return None


# Checks of a request


def _check_layer_indices(config: MaskConfig, modules: Iterable[str]) -> None:
    """Raise for a decoder layer that the model does not have; PEFT leaves it out in silence."""
    if config.layers_to_transform is None:
        return
    if isinstance(config.layers_to_transform, int):
        wanted = {config.layers_to_transform}
    else:
        wanted = set(config.layers_to_transform)

    names = list(modules)
    indices = layer_indices(names, config.layers_pattern)
    if config.layers_pattern and not indices:
        lists = {match["list"] for name in names for match in _LAYER_INDEX.finditer(name)}
        raise UserError(
            f"layers_pattern {config.layers_pattern!r} names no list of layers; the model's lists are: "
            f"{listed(sorted(lists))}"
        )
    missing = sorted(wanted - indices)
    if missing:
        named = ", ".join(map(str, missing))
        has = f"layers 0 to {max(indices)}" if indices else "no numbered layers"
        raise UserError(f"layers_to_transform names layer {named}; the model has {has}")


def _check_full_names(config: MaskConfig, modules: Iterable[str]) -> None:
    """Raise for a layer that is named in full, which PEFT takes whatever ``layers_to_transform`` says."""
    chosen = config.layers_to_transform
    # An adapter that was saved is taken as it is.
    if chosen is None or config.is_saved or not isinstance(config.target_modules, list):
        return
    wanted = {chosen} if isinstance(chosen, int) else set(chosen)
    in_full = set(config.target_modules).intersection(modules)
    for name in sorted(in_full):
        if not layer_indices([name], config.layers_pattern) <= wanted:
            raise UserError(
                f"layers_to_transform has no effect on {name}, which target_modules names in full: leave one of the "
                "two out"
            )


def _check_lists_are_found(config: MaskConfig, modules: Iterable[str]) -> None:
    """Raise for a list of layers at the top of a model, as in ``AutoModel``, in which PEFT finds no index.

    It looks for a list with a module above it. In ``layers.1.q_proj`` there is none, and in
    ``layers.1.experts.0.up_proj`` it takes that of the experts. Lists of ``layers_pattern`` are found at the top, too.
    """
    has_indices = config.layers_to_transform is not None and not config.layers_pattern
    entries = config.target_modules
    # An adapter that was saved is taken as it is.
    if not has_indices or config.is_saved or not isinstance(entries, list):
        return
    lists: dict[str, str] = {}
    for name in modules:
        match = _LAYER_INDEX.match(name)
        # One that is named in full is a target whatever its index: see _check_full_names.
        is_asked_for = name not in entries and any(_is_named(name, entry) for entry in entries)
        if match and is_asked_for:
            lists.setdefault(match["list"], name)
    if lists:
        name = next(iter(lists.values()))
        raise UserError(
            f"layers_to_transform: PEFT finds no layer index in {name}, because its list is at the top of the model; "
            f"add layers_pattern={sorted(lists)}"
        )


def _check_not_tied(
    config: MaskConfig,
    modules: Mapping[str, nn.Module],
    model: nn.Module,
) -> None:
    """Raise if modules_to_save names a module that shares its weight: no checkpoint of the base could hold both."""
    embedding = _embedding(model)
    if embedding is None:
        return

    # The embedding itself is one of them; with a tied head there are two.
    tied = []
    for name, module in modules.items():
        if getattr(module, "weight", None) is embedding:
            tied.append(name)
    if len(tied) < 2:
        return

    # By the end of the name, as PEFT matches modules_to_save.
    for entry in config.modules_to_save or []:
        if any(name.endswith(entry) for name in tied):
            raise UserError(
                f"modules_to_save names {entry!r}, whose weight is shared by {listed(tied)}; a copy of it could not be "
                "merged: leave it out"
            )


def _check_not_masked(config: MaskConfig, modules: Mapping[str, nn.Module]) -> None:
    """Raise if modules_to_save names a module in which layers are masked already.

    PEFT would copy them with the masks of the other adapters, and could save none of these adapters afterwards.
    """
    masked = [name for name, module in modules.items() if hasattr(module, "mask_scores")]
    for entry in config.modules_to_save or []:
        # By the end of the name, as above.
        saved = [name for name in modules if name.endswith(entry)]
        for name in masked:
            if any(f"{name}.".startswith(f"{module}.") for module in saved):
                raise UserError(
                    f"modules_to_save names {entry!r}, in which another adapter masks {name}: leave it out, or start "
                    "from the model without that adapter"
                )


def _check_not_saved(config: MaskConfig, modules: Iterable[str]) -> None:
    """Raise for a target that ``modules_to_save`` covers; PEFT leaves it out in silence."""
    # Adapters that were saved before there was this check are still loaded.
    if config.mask_sha256 is not None:
        return
    for entry in _saved_targets(config, modules):
        raise UserError(
            f"target_modules {entry!r} would be masked nowhere, because modules_to_save (to which PEFT adds the heads "
            f"of classifiers) trains it in full: {listed(config.modules_to_save or ())}; leave it out of one of the two"
        )


def _check_maskable(
    matched: list[str],
    modules: Mapping[str, nn.Module],
    model: nn.Module,
) -> None:
    """Raise for the first layer that was asked for and cannot be masked, with lists of those that can and cannot."""
    refused = {}
    for name in matched:
        reason = _why_not_maskable(name, modules[name], model)
        if reason is not None:
            refused[name] = reason
    if refused:
        name, reason = next(iter(refused.items()))
        maskable = [name for name in matched if name not in refused]
        raise UserError(
            f"{name} cannot be masked: {reason}; matched and maskable: {listed(maskable)}; matched and not maskable: "
            f"{listed(refused)}; name the linear layers you want in target_modules"
        )


def _check_not_shared(targets: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Raise for a weight that is in two places: merging a mask of one would write to both."""
    # A block that is used twice is one module under several names and gets one mask, so a place is an attribute of a
    # parent, whatever the parent's name.
    everywhere = dict(model.named_modules(remove_duplicate=False))
    # id of a parameter -> place -> the first name of the module there. Ids, because parameters compare by value.
    places: dict[int, dict[tuple[int, str], str]] = {}
    for name, module in everywhere.items():
        parent, _, attribute = name.rpartition(".")
        place = (id(everywhere[parent]), attribute)
        for parameter in module.parameters(recurse=False):
            places_of_parameter = places.setdefault(id(parameter), {})
            places_of_parameter.setdefault(place, name.removesuffix(".base_layer"))

    # Biases are left as they are, and only matrices are compared. The matrix of a layer that is masked already is in
    # its base layer.
    shared = {}
    for name, module in targets.items():
        base_layer = getattr(module, "base_layer", module)
        for parameter in base_layer.parameters(recurse=False):
            names = list(places[id(parameter)].values())
            if parameter.dim() > 1 and len(names) > 1:
                shared[name] = names
    if shared:
        first = next(iter(shared.values()))
        leaves = dict.fromkeys(_last(name) for name in shared)
        raise UserError(
            f"{listed(first)} share one weight, so a mask of one would be merged into all; leave "
            f"out every target that shares its weight, with exclude_modules or target_modules: {listed(leaves)}"
        )


def _check_every_entry_matches(
    config: MaskConfig,
    modules: Iterable[str],
    has_targets: bool,
) -> None:
    """Raise for a name in a list that matches nothing, such as a misspelt one; PEFT leaves it out in silence."""
    names = list(modules)
    entries = []
    # If no target matches at all, _raise_no_match says more. A regular expression has no entries.
    if has_targets and not isinstance(config.target_modules, str):
        for entry in config.target_modules or ():
            entries.append(("target_modules", entry))
    # A misspelt layer would be masked under its right name. What a saved adapter covers is decided.
    if not config.is_saved and not isinstance(config.exclude_modules, str):
        for entry in config.exclude_modules or ():
            entries.append(("exclude_modules", entry))
    # PEFT adds these two by itself for classifiers, whether the model has them or not.
    is_classifier = config.task_type in ("SEQ_CLS", "TOKEN_CLS")
    added_by_peft = ("classifier", "score") if is_classifier else ()
    for entry in config.modules_to_save or ():
        if entry not in added_by_peft:
            entries.append(("modules_to_save", entry))

    for option, entry in entries:
        is_matched = any(_is_named(name, entry) for name in names)
        if not is_matched:
            leaves = {_last(name) for name in names}
            hint = did_you_mean(entry, leaves)
            raise UserError(f"{option} entry {entry!r} matches no layer{hint}; remove it")


def _raise_no_match(
    config: MaskConfig,
    modules: Mapping[str, nn.Module],
    model: nn.Module,
) -> None:
    """Raise because no layer matches, with the likely reason."""
    # The names to choose from.
    linear = set()
    for name, module in modules.items():
        if _why_not_maskable(name, module, model) is None:
            linear.add(_last(name))

    targets = config.target_modules or []
    wanted = targets if isinstance(targets, str) else ", ".join(targets)
    # Fields that leave out layers which target_modules alone would match.
    narrowed = []
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        value = getattr(config, name)
        if value:
            narrowed.append(f"{name}={value!r}")

    # The likeliest reason first.
    if narrowed:
        hint = f" with {', '.join(narrowed)}"
    elif isinstance(targets, str) and targets in linear:
        hint = " (a text is a regular expression of whole names: give a list)"
    elif "," not in wanted:  # one name, maybe misspelt
        hint = did_you_mean(wanted, linear)
    else:
        hint = ""
    known = ", ".join(sorted(linear))
    raise UserError(f"target_modules {wanted!r} match no layer{hint}; the model's linear layers are: {known}")
