"""The mask tuner: finds the layers that a configuration asks for and replaces them by masked ones."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from torch import Tensor, nn

from maskft_common.errors import UserError, did_you_mean

from .adapter_files import adapter_files
from .config import REMOVED_VALUES, MaskConfig
from .layer import MaskedLinear
from .mixed_batch import adapter_names_for_layers
from .quantized import keep_codes
from .scores import ranked_scores
from .targets import is_target, resolve_targets

# Add-ons that need the whole model, such as a hook on its forward: (model) -> function that undoes it. Called once for
# every model that is wrapped, before its first layer is replaced.
MODEL_HOOKS: list[Callable[[nn.Module], Callable[[], None]]] = []

# Before the names of modules in a PeftModel.
_PREFIX = "base_model.model."
# By which PEFT and transformers know the tensors of an adapter: the name of the method and an underscore.
METHOD_PREFIX = "mask_"
# torch.compile(module) puts this before the names of what is inside.
_COMPILED = "_orig_mod."
# TRL's name of the frozen adapter that preference training compares with.
_REFERENCE = "ref"

NO_TOKEN_INDICES = (
    "trainable_token_indices is not supported by masks: train new tokens with the weights, before the mask (or, where "
    "input and output embeddings are not tied, with modules_to_save=['embed_tokens'])"
)


class MaskModel(BaseTuner):
    """Wraps a model so that chosen linear layers are masked; see ``peft.get_peft_model(model, MaskConfig(...))``.

    Attributes:
        model: The wrapped model.
        peft_config: Adapter name -> :class:`MaskConfig`.
    """

    # PEFT takes a module that has it in its name for a part of a masked layer, and deletes no adapter there. So it is
    # longer than METHOD_PREFIX: models have modules like mask_decoder.
    prefix: str = "mask_scores"
    tuner_layer_cls = MaskedLinear
    # The default is every linear layer: see targets.py.
    target_module_mapping: dict[str, list[str]] = {}

    # Undo the add-ons of MODEL_HOOKS; None until they are called. A class attribute, because BaseTuner.__init__ injects
    # the adapter before a subclass could set one.
    _undo_hooks: list[Callable[[], None]] | None = None

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        """Make sure that no two adapters share a configuration object.

        PEFT calls it for every adapter that is added, before it looks for layers.
        """
        assert isinstance(peft_config, MaskConfig)
        # Not checked in MaskConfig: TRL sets it after the configuration was created.
        if peft_config.trainable_token_indices is not None:
            raise UserError(NO_TOKEN_INDICES)

        # Two adapters may come with one configuration object, in one model or two. The second gets a copy, because
        # progress and checksums are written into it.
        names = [name for name, config in self.peft_config.items() if config is peft_config]
        adapter_name = names[-1]  # PEFT has just added it under this name, which it does not pass on
        _check_name(adapter_name, peft_config)
        is_second_here = len(names) > 1
        # `is_new` is an attribute of the class until it is set below. In vars(), it shows that a model has this object.
        was_used = "is_new" in vars(peft_config) and not peft_config.inference_mode
        if is_second_here or was_used:
            peft_config = copy.copy(peft_config)
            self.peft_config[adapter_name] = peft_config

        if is_second_here and adapter_name == _REFERENCE:
            # TRL adds its reference with the configuration of the adapter that it trains.
            peft_config.copy_of = names[0]
        elif was_used:
            # Filled in for the other adapter. One that is loaded for inference keeps the values of its file. One that
            # is loaded to be trained gets them again, so that its file is checked.
            for field, value in peft_config.filled_from_file.items():
                setattr(peft_config, field, value)
            peft_config.copy_of = ""
        peft_config.is_new = True
        # After the fields of the file are set again: until training starts, any progress is that of the file.
        peft_config.is_progress_of_file = peft_config.progress is not None
        # Only a configuration from a file has a checksum of its masks.
        peft_config.recipe_of_file = peft_config.recipe if peft_config.mask_sha256 is not None else None
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        # PEFT calls it for every module of the model, after _prepare_model.
        assert isinstance(peft_config, MaskConfig)
        return is_target(peft_config, key)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check the whole request before the first layer is replaced, so that an error leaves the model as it was."""
        assert isinstance(peft_config, MaskConfig)
        _check_not_on_disk(model)
        resolve_targets(peft_config, model)

        # Of all layers at once: they come from another model, which is loaded here and freed again.
        values_of = REMOVED_VALUES[peft_config.removed_value]
        self._removed_values = values_of(peft_config, model)
        if self._undo_hooks is None:
            self._undo_hooks = [attach(model) for attach in MODEL_HOOKS]
        if not peft_config.inference_mode:
            self._undo_hooks.append(keep_codes(model))

        # Left by an earlier PeftModel over the same base, maybe in layers that this adapter does not mask: they would
        # be trained and saved with it. Last, because a request that is refused leaves the model as it was.
        adapter_name = next(name for name, config in self.peft_config.items() if config is peft_config)
        for layer in adapter_layers(model, adapter_name).values():
            layer.delete_adapter(adapter_name)

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
        """Mask one module that matches; PEFT calls it in the order of ``named_modules``."""
        assert isinstance(peft_config, MaskConfig)
        # A layer that is masked already gets a further adapter, not a second layer around it.
        if isinstance(target, MaskedLinear):
            target.update_layer(adapter_name, peft_config)
            layer = target
        else:
            # Without PEFT's prefix, which the key has if the model is another tuner's PeftModel.
            layer = MaskedLinear(target, adapter_name, peft_config, unwrapped_name(current_key))
            self._replace_module(parent, target_name, layer, target)
            layer.place = (weakref.ref(parent), target_name)

        # Popped, so that the layers alone hold the values.
        if self._removed_values:
            layer.removed_values[adapter_name] = self._removed_values.pop(current_key)

    def _replace_module(
        self,
        parent: Any,
        child_name: str,
        new_module: nn.Module,
        child: nn.Module,
    ) -> None:
        """Replace a module; PEFT's way needs a ``weight``, and many classification heads do not have one."""
        if hasattr(child, "weight"):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(
        self,
        *args: Any,
        adapter_names: Any = None,
        **kwargs: Any,
    ) -> Iterator[None]:
        """Give each masked layer its rows' adapter names, for PEFT's batches of several adapters."""
        with adapter_names_for_layers(self, adapter_names, args, kwargs):
            yield

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; if adapters are disabled, they are so in the layers that are masked anew, too."""
        layers = adapter_layers(model, adapter_name=None).values()
        are_disabled = any(layer.disable_adapters for layer in layers)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if are_disabled:
            self.disable_adapter_layers()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters.

        Raises:
            UserError: If there is no adapter of a name; PEFT's layers would leave it out in silence.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        # A name that is given twice would be in every list of active adapters twice.
        names = list(dict.fromkeys(names))
        self._check_names(names)
        super().set_adapter(names, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the only active one, activate one other adapter on all layers.

        PEFT lets each layer choose its own first adapter, and layers may have different ones.
        """
        was_active = self.active_adapters == [adapter_name]
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:
            first = next(iter(self.peft_config))
            self.set_adapter(first)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the places of a copy's layers, which are weak references and are not copied with it."""
        super().__setstate__(state)
        for name, module in self.model.named_modules():
            if not isinstance(module, MaskedLinear):
                continue

            # Below the layers of other tuners, the masked layer is their base_layer.
            outermost = name
            while outermost.endswith(".base_layer"):
                outermost = outermost.removesuffix(".base_layer")
            parent_name, _, attribute = outermost.rpartition(".")
            parent = self.model.get_submodule(parent_name)
            module.place = (weakref.ref(parent), attribute)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights; ``unmerge_adapter`` undoes it.

        Args:
            adapter_names: Adapters to merge; default: the active ones.
            safe_merge: Raise if a masked weight is not finite.

        Raises:
            UserError: If there is no adapter of a name, or a layer cannot be merged; nothing is merged then.
            ValueError: With ``safe_merge``, if a masked weight is not finite; nothing is merged then.
        """
        self._check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(safe_merge, adapter_names)
        else:
            layers = adapter_layers(self.model, adapter_name=None).values()
            # PEFT unloads the outermost layer only, and a mask below another adapter would be lost.
            for layer in layers:
                layer.check_not_wrapped()
            # PEFT would leave what merge_adapter has written in the weights of the base.
            for layer in layers:
                if layer.merged:
                    layer.unmerge()

        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        # The plain model is left, on which nothing of the add-ons may stay.
        for undo in self._undo_hooks or []:
            undo()
        self._undo_hooks = None
        return model

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Check all layers before the first one is merged or unloaded, so that an error leaves the model as it was."""
        # PEFT's layers leave out a name that they do not have. A text instead of a list is left to them: they raise.
        if adapter_names is not None and not isinstance(adapter_names, str):
            self._check_names(adapter_names)
        for layer in adapter_layers(self.model, adapter_name=None).values():
            with onload_layer(layer):
                layer.check_merge(safe_merge, adapter_names)

    def _check_names(self, adapter_names: Iterable[str]) -> None:
        """Raise for a name that no adapter has."""
        for name in adapter_names:
            if name not in self.peft_config:
                hint = did_you_mean(name, self.peft_config)
                known = ", ".join(self.peft_config)
                raise UserError(f"the model has no adapter named {name!r}{hint}; it has: {known}")

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Tensors to save: PEFT's, or coded masks in their place, see ``adapter_files.py``."""
        assert isinstance(config, MaskConfig)
        if not adapter_layers(model, adapter_name):
            raise UserError(
                f"adapter {adapter_name!r} masks no layer of the model, so that there is nothing to save: save an "
                "adapter before merge_and_unload or unload, and what they return by its own save_pretrained"
            )
        # The scores, as PEFT selects them; it adds modules_to_save and resized embeddings later.
        of_peft = super()._get_adapter_state_dict(
            model,
            config,
            adapter_name,
            state_dict,
            unwanted_adapter_names,
        )
        files = adapter_files()
        return files.encode(model, config, adapter_name, state_dict, of_peft)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Tensors that PEFT is to load, after masks were given to their layers; see ``adapter_files.py``."""
        assert isinstance(config, MaskConfig)
        # Passed on as a function: only files of plain scores need PEFT's mapping of names.
        remap = partial(super()._remap_adapter_state_dict_for_load, model, config, adapter_name)
        files = adapter_files()
        return files.decode(model, config, adapter_name, state_dict, remap)


def _check_name(adapter_name: str, config: MaskConfig) -> None:
    """Raise for a name that torch's dictionaries cannot have as a key.

    They raise, too, but when the key is half added: the layer could no longer be used, with any adapter.
    """
    # A mask that was loaded for inference is in a plain dictionary, which takes all names.
    has_scores = not config.inference_mode or adapter_files().loads_scores
    if not has_scores and not config.modules_to_save:
        return

    # Of scores, and of PEFT's copies of modules_to_save.
    dictionaries = (nn.ParameterDict(), nn.ModuleDict())
    is_attribute = any(hasattr(dictionary, adapter_name) for dictionary in dictionaries)
    if is_attribute or "." in adapter_name or not adapter_name:
        raise UserError(
            f"adapter name {adapter_name!r} cannot be the name of a parameter in torch (it is empty, has a dot, or is "
            "an attribute of torch's modules): choose another"
        )


def _check_not_on_disk(model: nn.Module) -> None:
    """Raise for layers on disk: PEFT's offload would overwrite the base model's own file, and then fail.

    See ``PeftModel._update_offload``, which loading an adapter calls.
    """
    device_map = getattr(model, "hf_device_map", None) or {}
    on_disk = [name for name, device in device_map.items() if device == "disk"]
    if on_disk:
        raise UserError(
            f"{on_disk[0]} is offloaded to disk by device_map, and masks do not work there; load the model without "
            "device_map, or in a smaller dtype"
        )


def adapter_layers(model: nn.Module, adapter_name: str | None = "default") -> dict[str, MaskedLinear]:
    """Masked layers of one adapter (None: of any) by module name, as in ``model.named_modules()``; in module order."""
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, MaskedLinear):
            continue
        if adapter_name is None or adapter_name in module.mask_configs:
            # FSDP1 puts this before the names of wrapped modules; state dicts do not have it.
            plain_name = name.replace("_fsdp_wrapped_module.", "")
            layers[plain_name] = module
    return layers


def unwrapped_name(name: str) -> str:
    """Name of a module in the plain model: other wrappers have put names before PEFT's, and torch.compile between."""
    name = without_compiled(name)
    return name.rpartition(_PREFIX)[2]


def without_compiled(name: str) -> str:
    """Name of a module as if no part of the model was compiled by ``torch.compile``."""
    return name.replace(_COMPILED, "")


def current_masks(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Masks of an adapter by the module names of the unwrapped model; bool, True = keep.

    Raises:
        UserError: If the model has no such adapter, or its scores are NaN.
    """
    layers = adapter_layers(model, adapter_name)
    if not layers:
        raise UserError(f"the model has no mask adapter named {adapter_name!r}")

    masks = {}
    for full_name, layer in layers.items():
        name = unwrapped_name(full_name)
        masks[name] = layer.get_mask(adapter_name)
    return masks


@torch.no_grad()
def start_scores(
    model: nn.Module,
    keys: Mapping[str, Tensor],
    adapter_name: str = "default",
) -> None:
    """Let the scores of an adapter start in the order of ``keys``: of each matrix, the lowest are removed first.

    Args:
        model: A model with a mask adapter, not yet sharded.
        keys: Module name (of the unwrapped model) -> ranking values of every masked weight, any dtype, finite.
        adapter_name: The adapter.

    Raises:
        UserError: If a masked layer has no keys, or keys of another shape or that are not finite.
    """
    layers = adapter_layers(model, adapter_name)
    # An adapter that was loaded for inference masks layers, too, but has no scores to set.
    has_scores = any(adapter_name in layer.mask_scores for layer in layers.values())
    if not has_scores:
        raise UserError(f"the model has no mask adapter named {adapter_name!r} whose scores are trained")

    # All keys are checked before the first scores are set, so that an error leaves the adapter as it was.
    keys_of = {}
    for full_name, layer in layers.items():
        name = unwrapped_name(full_name)
        shape = layer.mask_scores[adapter_name].shape
        found = keys.get(name)
        if found is None or found.shape != shape:
            has = "none" if found is None else f"shape {tuple(found.shape)}"
            raise UserError(f"the keys of {name} must have shape {tuple(shape)}; found {has}")
        if not bool(torch.isfinite(found).all()):
            raise UserError(f"the keys of {name} are not finite, so they cannot be ranked")
        keys_of[full_name] = found

    for full_name, layer in layers.items():
        config = layer.mask_configs[adapter_name]
        ranked = ranked_scores(config, keys_of[full_name])
        layer.mask_scores[adapter_name].copy_(ranked)
        # A compiled graph would keep the weight of the scores before.
        layer.masker.forget()
