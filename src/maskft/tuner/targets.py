"""Which layers of a model may be masked, and which of them a configuration asks for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from maskft_common.errors import UserError, did_you_mean

from .config import MaskConfig
from .layer import MaskedLinear

_LAYER_INDEX = re.compile(r"(?:^|\.)(?P<list>[^.]+)\.(?P<index>\d+)\.")
_PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)
# Inside a masked layer, or one that another adapter saves whole, where a second adapter may look.
_OWN_MODULES = {"base_layer", "mask_scores", "original_module", "modules_to_save"}
_SHOWN = 8


def is_target(config: MaskConfig, name: str) -> Any:
    """Whether a configuration asks for a module, in PEFT's words; what a masked layer is made of is none."""
    return _OWN_MODULES.isdisjoint(name.split(".")) and check_target_module_exists(config, name)


def resolve_targets(config: MaskConfig, model: nn.Module) -> None:
    """Put the names of the linear layers in the place of "all-linear", and check the whole request."""
    if config.target_modules in (None, "all-linear"):
        config.target_modules = sorted(maskable_names(model))
        _leave_out_other_layers(config, model)
        _warn_of_experts(model)
    check_targets(config, model)


def _leave_out_other_layers(config: MaskConfig, model: nn.Module) -> None:
    """Exclude linear layers outside of the numbered ones that share a name with one inside, such as BERT's pooler."""
    names = [name for name, module in model.named_modules() if name and is_target(config, name)]
    others = [name for name in names if not _LAYER_INDEX.search(name)]
    if len(others) in (0, len(names)):
        return
    given = config.exclude_modules
    if isinstance(given, str):
        config.exclude_modules = "|".join([f"(?:{given})", *map(re.escape, others)])
    else:
        config.exclude_modules = [*(given or []), *others]


def check_targets(config: MaskConfig, model: nn.Module) -> None:
    """Raise one clear :class:`UserError` when ``config`` asks for layers that are not there or cannot be masked."""
    modules = {name: module for name, module in model.named_modules() if name and ".base_layer" not in name}
    _check_layer_indices(config, modules)
    _check_not_tied(config, modules, model)
    matched = [name for name in modules if is_target(config, name)]
    reasons = {name: _why_not_maskable(name, modules[name], model) for name in matched}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    if refused:
        name, reason = next(iter(refused.items()))
        maskable = [name for name in matched if name not in refused]
        raise UserError(
            f"{name} cannot be masked: {reason}; matched and maskable: {listed(maskable)}; matched and not maskable: "
            f"{listed(refused)}; name the linear layers you want in target_modules"
        )
    _check_not_shared({name: modules[name] for name in matched}, model)
    targets = config.target_modules or []
    asked = [("target_modules", entry) for entry in targets if matched and not isinstance(targets, str)]
    of_peft = ("classifier", "score") if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()  # which it adds by itself
    asked += [("modules_to_save", entry) for entry in config.modules_to_save or () if entry not in of_peft]
    for option, entry in asked:
        if not any(name == entry or name.endswith(f".{entry}") for name in modules):
            leaves = {name.rpartition(".")[2] for name in modules}
            raise UserError(f"{option} entry {entry!r} matches no layer{did_you_mean(entry, leaves)}; drop it")
    if not matched:
        linear = {name.rpartition(".")[2] for name, m in modules.items() if _why_not_maskable(name, m, model) is None}
        wanted = targets if isinstance(targets, str) else ", ".join(targets)
        hint = did_you_mean(wanted, linear) if "," not in wanted else ""
        hint = " (a text is a regular expression of whole names: give a list)" if targets in [*linear] else hint
        others = [n for n in ("layers_to_transform", "layers_pattern", "exclude_modules") if getattr(config, n)]
        beside = f" with {', '.join(f'{name}={getattr(config, name)!r}' for name in others)}" if others else hint
        raise UserError(
            f"target_modules {wanted!r} match no layer{beside}; the model's linear layers are: "
            f"{', '.join(sorted(linear))}"
        )


def _check_layer_indices(config: MaskConfig, modules: Iterable[str]) -> None:
    if config.layers_to_transform is None:
        return
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    indices = layer_indices(modules, config.layers_pattern)
    missing = sorted(set(wanted) - indices)
    if missing:
        has = f"layers 0 to {max(indices)}" if indices else "no numbered layers"
        raise UserError(f"layers_to_transform names layer {', '.join(map(str, missing))}; the model has {has}")


def layer_indices(names: Iterable[str], layers_pattern: list[str] | str | None = None) -> set[int]:
    """Indices of the decoder layers that module or parameter ``names`` lie in."""
    lists = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    if lists is None:
        return {int(match["index"]) for match in map(_LAYER_INDEX.search, names) if match}
    matches = (match for name in names for match in _LAYER_INDEX.finditer(name))
    return {int(match["index"]) for match in matches if match["list"] in lists}


def _why_not_maskable(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Reason why a module cannot be masked, or None when it can."""
    if isinstance(module, MaskedLinear):
        return None
    if isinstance(module, nn.Embedding):
        return "it is an embedding"
    if not isinstance(module, nn.Linear | Conv1D):
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
            return f"it is a {type(module).__name__}, whose parameter is no matrix"
        return f"it is a {type(module).__name__}, not a linear layer"
    is_plain = type(module).__module__.split(".")[0] in ("torch", "transformers") and module.weight.is_floating_point()
    if not is_plain:
        name = type(module).__name__
        return f"it is quantised, or neither torch's nor transformers' ({name}); load the model without quantisation"
    if type(module).forward not in _PLAIN_FORWARDS and type(module).__name__ != "FalconLinear":
        return f"it is a {type(module).__name__}, which computes something else than a linear map"
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    # Kernels of the Mamba family, and in part its slow path, take these weights themselves; Jamba's only the first.
    read = ("dt_proj",) if type(parent).__name__ == "JambaMambaMixer" else ("dt_proj", "x_proj", "out_proj")
    of_mixer = hasattr(parent, "conv1d") and hasattr(parent, "A_log") and leaf in read
    of_wavlm = type(parent).__name__ == "WavLMAttention" and leaf.endswith("_proj")
    if of_mixer or of_wavlm or isinstance(parent, nn.MultiheadAttention):
        return f"its {type(parent).__name__} reads the weight and does not call the layer"
    if module.weight is _embedding(model):
        return "its weight is tied to the input embeddings"
    return None


def _embedding(model: nn.Module) -> nn.Parameter | None:
    """The weight of the input embeddings."""
    try:
        return getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    except NotImplementedError:  # a model of speech has none
        return None


def _check_not_tied(config: MaskConfig, modules: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Refuse to train one of two modules that share a weight: no checkpoint of the base can hold both."""
    embedding = _embedding(model)
    tied = [
        name for name, module in modules.items() if embedding is not None and getattr(module, "weight", 0) is embedding
    ]
    for entry in config.modules_to_save or [] if len(tied) > 1 else []:
        if any(name.endswith(entry) for name in tied):
            raise UserError(
                f"modules_to_save names {entry!r}, whose weight is shared by {listed(tied)}; a copy of it could not be "
                "merged: leave it out"
            )


def _check_not_shared(targets: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Refuse to mask a weight that is in two places: merging writes there, so a mask of one place is one of all."""
    # A block that is used again is one module under several names, and gets one mask: a place is a parent's attribute.
    everywhere = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, dict[tuple[int, str], str]] = {}
    for name, module in everywhere.items():
        parent, _, attribute = name.rpartition(".")
        for parameter in module.parameters(recurse=False):
            place = id(everywhere[parent]), attribute
            places.setdefault(id(parameter), {}).setdefault(place, name.removesuffix(".base_layer"))
    shared = {
        name: list(places[id(parameter)].values())
        for name, module in targets.items()
        for parameter in getattr(module, "base_layer", module).parameters(recurse=False)
        if parameter.dim() > 1 and len(places[id(parameter)]) > 1
    }
    if shared:
        leaves = dict.fromkeys(name.rpartition(".")[2] for name in shared)
        raise UserError(
            f"{listed(next(iter(shared.values())))} share one weight, so a mask of one would be merged into all; leave "
            f"out every target that shares its weight, with exclude_modules or target_modules: {listed(leaves)}"
        )


def _warn_of_experts(model: nn.Module) -> None:
    """Say which experts "all-linear" leaves out: those that are no linear layers."""
    modules = [module for module in model.modules() if "Expert" in type(module).__name__]
    kinds = {type(m).__name__ for m in modules if any(p.dim() > 2 for p in m.parameters(recurse=False))}
    if kinds:
        warnings.warn(f"experts that are no linear layers are left out: {listed(sorted(kinds))}")


def maskable_names(model: nn.Module) -> set[str]:
    """Last name components of the maskable linear layers inside numbered layers (q_proj, ..., down_proj)."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | MaskedLinear)
        and _OWN_MODULES.isdisjoint(name.split("."))
        and _why_not_maskable(name, module, model) is None
    }
    names = [name for name in found if _LAYER_INDEX.search(name)]
    if not names:  # no stack of layers: every linear layer except an output head
        head = getattr(model, "get_output_embeddings", lambda: None)()
        names = [name for name, module in found.items() if module is not head]
    if not names:
        raise UserError(f"{type(model).__name__} has no linear layer that could be masked")
    return {name.rpartition(".")[2] for name in names}


def listed(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    names = list(names)
    shown = ", ".join(names[:_SHOWN]) if names else "none"
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
