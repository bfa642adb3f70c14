"""The mask tuner: finds the layers, swaps them for masked ones, and reads and writes the adapter file."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskft_common.errors import UserError

from ..masks.adapter_file import ScoresOfSave
from ..masks.codec import FORMAT_VERSION, PREFIX, decode_mask, encode_mask, is_of_mask, weights_sha256
from ..masks.fingerprints import base_fingerprint, check_base, mask_fingerprint
from .config import NO_TOKEN_INDICES, MaskConfig
from .layer import MaskedLinear
from .mixed_batch import adapter_names_for_layers
from .removed_value import removed_values
from .scores import Float32ParameterDict, check_scores, mask_from_scores, ranked_scores
from .sharded import is_sharded, refresh
from .targets import is_target, listed, resolve_targets

_REFERENCE = "ref"  # TRL's name of the adapter that preference training compares with


class MaskModel(BaseTuner):
    """Wraps a model so that chosen linear layers are masked; made by ``peft.get_peft_model(model, MaskConfig(...))``.

    Attributes:
        model: The wrapped model.
        peft_config: Adapter name -> :class:`MaskConfig`.
    """

    prefix: str = "mask_"
    tuner_layer_cls = MaskedLinear
    target_module_mapping: dict[str, list[str]] = {}
    _undo: tuple[Any, RemovableHandle] | None = None

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, MaskConfig)
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        if peft_config.trainable_token_indices is not None:  # TRL sets it after the configuration was made
            raise UserError(NO_TOKEN_INDICES)
        # Two adapters of one configuration object, in one model or two: the second has its own from here on.
        names = [name for name, config in self.peft_config.items() if config is peft_config]
        was_used = "is_new" in vars(peft_config) and not peft_config.inference_mode
        if len(names) > 1 or was_used:
            self.peft_config[names[-1]] = peft_config = copy.copy(peft_config)
        if len(names) > 1 and names[-1] == _REFERENCE:  # which trainers want to be the first adapter, frozen
            peft_config.copy_of = names[0]
        # It was another adapter's, whose state a new one does not have; one that is loaded has what its file says.
        elif was_used:
            for field in ("mask_sha256", "base_fingerprint", "weights_sha256", "progress", "recipe"):
                setattr(peft_config, field, None)
        peft_config.is_new = True
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        assert isinstance(peft_config, MaskConfig)
        return is_target(peft_config, key)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check the whole request before the first layer is replaced, so that an error leaves the model as it was."""
        assert isinstance(peft_config, MaskConfig)
        resolve_targets(peft_config, model)
        self._removed_values = removed_values(peft_config, model)
        if self._undo is not None:
            return
        whole: Any = model  # torch's type of an attribute is Tensor | Module
        unsplit = getattr(whole, "_no_split_modules", None)
        self._undo = (unsplit, whole.register_forward_pre_hook(refresh_masks))
        if unsplit:
            # accelerate makes an FSDP unit of each; as units of their own, scores are never gathered in forward.
            whole._no_split_modules = {*unsplit, Float32ParameterDict.__name__}

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        if self._undo is not None:
            model._no_split_modules = self._undo[0]
            self._undo[1].remove()
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """Give each masked layer its rows' adapter names, for PEFT's batches of several adapters."""
        with adapter_names_for_layers(self, adapter_names, kwargs):
            yield

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MaskConfig)
        if isinstance(target, MaskedLinear):
            target.update_layer(adapter_name, peft_config)
            layer = target
        else:
            layer = MaskedLinear(target, adapter_name, peft_config, current_key)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        if self._removed_values:
            layer.removed_values[adapter_name] = self._removed_values.pop(current_key)

    def _replace_module(self, parent: Any, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a module; PEFT's way needs a ``weight``, which many classification heads do not have."""
        if not hasattr(child, "weight"):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Code the masks; fill the fingerprints into ``config``. ``state_dict`` may hold gathered, unsharded scores."""
        assert isinstance(config, MaskConfig)
        layers = adapter_layers(model, adapter_name)
        masks = _current_masks(layers, config, adapter_name, state_dict)
        if not any(bool(mask.any()) for mask in masks.values()):
            why = "every score is 0 or less; set init_value or price higher, or learning_rate lower"
            if config.selection == "threshold":
                why = f"every score is below the threshold, {config.threshold}; set that or learning_rate lower"
            elif config.selection == "topk":
                why = f"sparsity is {config.sparsity}; set it lower"
            number = sum(mask.numel() for mask in masks.values())
            raise UserError(f"the mask removes all {number:,} weights: {why}")
        out: dict[str, Tensor] = {}
        config.scores_of_save = ScoresOfSave()
        for name, mask in masks.items():
            out[f"{name}.mask_coded.{adapter_name}"] = encode_mask(mask)
            for kind in ("weight", "bias"):  # of a masked head, which PEFT would save in full beside the mask
                state_dict.pop(f"{name}.base_layer.{kind}", None)
            if adapter_name in layers[name].mask_scores:
                key = f"{name}.mask_scores.{adapter_name}"
                scores = state_dict.get(key, layers[name].mask_scores[adapter_name])
                if config.save_scores:
                    out[key] = scores
                else:
                    config.scores_of_save[f"{name}.mask_scores"] = scores
        config.format_version = FORMAT_VERSION
        config.is_new = False
        config.mask_sha256 = mask_fingerprint({_module_name(n): out[f"{n}.mask_coded.{adapter_name}"] for n in masks})
        is_half = any(layer.weight.dtype == torch.float16 for layer in layers.values())
        config.base_fingerprint = None if is_half else base_fingerprint(layers.values())  # see is_the_base
        return out

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check every entry against the model, hand the masks to their layers, and pass on what is not a mask."""
        assert isinstance(config, MaskConfig)
        was_new, config.is_new = config.is_new, False
        if was_new and not config.inference_mode:  # trained further: recipe and verdict are another mask's
            config.recipe = None
        if was_new and config.inference_mode and config.mask_sha256 is None:
            raise UserError(
                "adapter_config.json has no mask_sha256, so nothing in the adapter's file can be checked; save the "
                "adapter again, or fetch it from where it was saved"
            )
        is_of_config = was_new and config.mask_sha256 is not None
        try:
            return _load_masks(model, config, adapter_name, state_dict, is_of_config)
        except UserError:
            whole: Any = model
            if is_of_config and len(whole.peft_config) > 1:  # nothing of it stays, and another file may be loaded
                whole.delete_adapter(adapter_name)
            raise


def _load_masks(
    model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: dict[str, Tensor], is_of_config: bool
) -> dict[str, Tensor]:
    found = adapter_layers(model, adapter_name)
    names = {_module_name(name): name for name in found}
    layers = {_module_name(name): layer for name, layer in found.items()}
    coded, scores = _entries(state_dict, "mask_coded"), _entries(state_dict, "mask_scores")
    rest = {key: value for key, value in state_dict.items() if not is_of_mask(key)}
    hashed = () if config.mask_sha256 is None else config.weights_sha256 or ()
    # Of a resized vocabulary PEFT writes what modules_to_save hold twice, and reads it once.
    own = f".modules_to_save.{adapter_name}."
    once = {key: value for key, value in rest.items() if ".modules_to_save." not in key.replace(own, ".")}
    _check_names(layers, coded, once, adapter_name, hashed)
    if is_of_config and mask_fingerprint(coded) != config.mask_sha256:
        raise UserError("the masks do not match mask_sha256 in adapter_config.json; the two files are of two adapters")
    if is_of_config:
        check_weights({key.replace(own, "."): value for key, value in rest.items()}, config.weights_sha256)
    for name, layer in layers.items():
        decode_mask(coded[name], name, layer.weight.shape)
    if any(adapter_name in layer.mask_scores and name not in scores for name, layer in layers.items()):
        raise UserError(
            "the adapter holds a mask but not its scores, so it cannot be trained further: save it with "
            "MaskConfig(save_scores=True), or load it for inference"
        )
    if config.verify_base:
        check_base(layers.values(), config)
    for name, layer in layers.items():
        layer.mask_coded[adapter_name] = coded[name].detach().cpu().clone()
        if adapter_name in layer.mask_scores:
            _restore_scores(layer, adapter_name, scores[name])
            # PEFT reports parameters that a file does not set; these are set already.
            once[f"{names[name]}.mask_scores.{adapter_name}"] = layer.mask_scores[adapter_name].data
        layer.effective.forget()
    return once


@torch.no_grad()
def start_scores(model: nn.Module, keys: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Let the scores of an adapter start in the order of ``keys``: of each matrix, the lowest are removed first.

    Args:
        model: A model with a mask adapter, not yet sharded.
        keys: Module name (of the unwrapped model) -> ranking values of every masked weight, any dtype, finite.
        adapter_name: The adapter.

    Raises:
        UserError: If a masked layer has no keys, or keys of another shape or with NaN.
    """
    layers = adapter_layers(model, adapter_name)
    if not any(adapter_name in layer.mask_scores for layer in layers.values()):
        raise UserError(f"the model has no mask adapter named {adapter_name!r} whose scores are trained")
    for name, layer in layers.items():
        scores, found = layer.mask_scores[adapter_name], keys.get(_module_name(name))
        if found is None or found.shape != scores.shape:
            has = "none" if found is None else f"shape {tuple(found.shape)}"
            raise UserError(f"the keys of {_module_name(name)} must have shape {tuple(scores.shape)}; found {has}")
        if not bool(torch.isfinite(found).all()):
            raise UserError(f"the keys of {_module_name(name)} are not finite, so they cannot be ranked")
        scores.copy_(ranked_scores(layer.mask_configs[adapter_name], found))
        layer.effective.forget()


def refresh_masks(model: nn.Module, *_: Any) -> None:
    """Bring masks that FSDP2 has sharded up to date, before it gathers a layer; every rank must call it.

    Does nothing in any other case. It is a hook before the model's forward.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        refresh(model, [module for module in model.modules() if isinstance(module, MaskedLinear)], base_fingerprint)


def adapter_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, MaskedLinear]:
    """Masked layers of one adapter by module name (as in ``model.named_modules()``), in module order."""
    return {
        name.replace("_fsdp_wrapped_module.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, MaskedLinear) and adapter_name in module.mask_configs
    }


def _entries(state_dict: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The entries of one kind, by module name."""
    suffix = f".{kind}"
    return {_module_name(k.removesuffix(suffix)): value for k, value in state_dict.items() if k.endswith(suffix)}


def _module_name(name: str) -> str:
    """Name of a module in the unwrapped model."""
    return name.rpartition(PREFIX)[2]  # other wrappers put a name before it


def current_masks(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Masks of an adapter by the module names of the unwrapped model; bool, True = keep."""
    layers = adapter_layers(model, adapter_name)
    if not layers:
        raise UserError(f"the model has no mask adapter named {adapter_name!r}")
    config = next(iter(layers.values())).mask_configs[adapter_name]
    return {_module_name(name): mask for name, mask in _current_masks(layers, config, adapter_name, {}).items()}


def _current_masks(
    layers: Mapping[str, MaskedLinear], config: MaskConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    masks = {}
    for name, layer in layers.items():
        if adapter_name in layer.mask_scores:
            scores = state_dict.get(f"{name}.mask_scores.{adapter_name}", layer.mask_scores[adapter_name])
            if not is_sharded(scores):
                check_scores(scores, name, config)
            masks[name] = mask_from_scores(config, scores)
        else:
            masks[name] = layer.get_mask(adapter_name)
    return masks


def _restore_scores(layer: MaskedLinear, adapter_name: str, saved: Tensor) -> None:
    """Put saved scores into the layer."""
    parameter = layer.mask_scores[adapter_name]
    if parameter.device.type == "meta":
        fresh = layer.fresh_scores(layer.mask_configs[adapter_name])
        parameter = layer.mask_scores[adapter_name] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
    if saved.shape != parameter.shape:
        raise UserError(
            f"{layer.module_name}: saved scores have shape {tuple(saved.shape)}, not {tuple(parameter.shape)}"
        )
    values = saved.to(parameter.device, torch.float32)
    if bool(values.isnan().any()):
        raise UserError(f"{layer.module_name}: the saved scores contain NaN; resume from an earlier checkpoint")
    with torch.no_grad():
        parameter.copy_(values)


# Checks


def _check_names(
    layers: Mapping[str, MaskedLinear],
    coded: Mapping[str, Tensor],
    rest: Collection[str],
    adapter_name: str,
    declared: Collection[str],
) -> None:
    missing, extra = [n for n in layers if n not in coded], [n for n in coded if n not in layers]
    if missing:
        raise UserError(f"the adapter file has no mask for {listed(missing)}; it is incomplete, save it again")
    if extra:
        raise UserError(
            f"the adapter file has masks for {listed(extra)}, which the model or adapter_config.json does not have; "
            "it was made for another model or configuration"
        )
    # PEFT would load any other key into the base model without a word.
    saved = f".modules_to_save.{adapter_name}."
    masked = tuple(f"{name}." for name in layers)
    known = {key for key in rest if _module_name(key) in declared and not _module_name(key).startswith(masked)}
    unknown = [key for key in rest if saved not in key and key not in known]
    if unknown:
        raise UserError(
            f"the adapter file has entries that are neither masks nor modules_to_save nor in its weights_sha256: "
            f"{listed(unknown)}; it is not loaded, because they would overwrite base weights"
        )


def check_weights(found: Mapping[str, Tensor], declared: Mapping[str, str] | None) -> None:
    """Refuse weights beside the masks unless ``declared``, from ``adapter_config.json``, has their checksums."""
    expected, sha256 = declared or {}, weights_sha256(found)
    different = sorted(name for name in {*expected, *sha256} if expected.get(name) != sha256.get(name))
    if different:
        raise UserError(
            f"weights_sha256 in adapter_config.json does not name these weights of the adapter file, or names others: "
            f"{listed(different)}; they would replace the base's: fetch or save the adapter again"
        )
