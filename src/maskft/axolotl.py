"""Masks in axolotl, as a plugin; run with axolotl 0.21.0.

In its YAML::

    plugins: [maskft.axolotl.MaskPlugin]
    adapter: mask
    mask: {sparsity: 0.3}  # fields of maskft.MaskConfig

Nothing else of maskft imports this module, and axolotl is not a dependency of maskft.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from maskft_common.errors import UserError, did_you_mean

from .tuner import MaskConfig, MaskProgress
from .tuner.model import NO_TOKEN_INDICES


class MaskArgs(BaseModel):
    """The field that the plugin adds to axolotl's configuration."""

    # A dict and not MaskConfig's fields one by one: MaskConfig checks them, with its own messages.
    mask: dict[str, Any] | None = None


class MaskPlugin(BasePlugin):
    """Gives axolotl the adapter ``mask``."""

    def get_input_args(self) -> str:
        """Import path of the fields that the plugin adds to axolotl's configuration."""
        return f"{MaskArgs.__module__}.MaskArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """One adapter, which is not built like LoRA; ReLoRA's restarts would not merge it."""
        return [AdapterCapabilities(name="mask", lora_like=False, relora=False)]

    def load_adapter(
        self,
        model: Any,
        cfg: Any,
        inference: bool = False,
        config_only: bool = False,
    ) -> tuple[PeftModel | None, MaskConfig] | None:
        """Put a mask over ``model``, from ``lora_model_dir`` if that is given.

        Args:
            model: The base model.
            cfg: axolotl's configuration.
            inference: The mask is loaded to be used, not to be trained.
            config_only: Only the configuration is wanted.

        Returns:
            The model with its mask and the mask's configuration; None for another adapter.
        """
        if cfg.adapter != "mask":
            return None

        _check_options(cfg)
        # axolotl names most options of adapters after LoRA.
        options = {
            "target_modules": "all-linear" if cfg.lora_target_linear else cfg.lora_target_modules,
            "exclude_modules": cfg.lora_exclude_modules,
            "modules_to_save": cfg.lora_modules_to_save,
            "layers_to_transform": cfg.peft_layers_to_transform,
            "layers_pattern": cfg.peft_layers_pattern,
            # axolotl resumes from the adapter that it saved.
            "save_scores": True,
        }
        # axolotl has None or an empty list for an option that is not given.
        given = {name: value for name, value in options.items() if value}
        # Fields under `mask` win over axolotl's own options. 0 and false are values there, such as `sparsity: 0`.
        for name, value in (cfg.mask or {}).items():
            if value is not None:
                given[name] = value
        given.setdefault("task_type", "CAUSAL_LM")
        known = [field.name for field in fields(MaskConfig)]
        for name in given:
            if name not in known:
                raise UserError(f"mask has {name!r}, which is no field of MaskConfig{did_you_mean(name, known)}")
        config = MaskConfig(**given)
        if config_only:
            return None, config

        # axolotl's own option of an adapter to load, whatever its type is. The folder has its configuration; the fields
        # under `mask` are still in the file that trained it, from which axolotl merges it.
        if cfg.lora_model_dir:
            masked = PeftModel.from_pretrained(
                model,
                cfg.lora_model_dir,
                is_trainable=not inference,
            )
            config = masked.peft_config["default"]
            # axolotl resumes from the adapter that it saved.
            config.save_scores = True
        else:
            masked = get_peft_model(model, config)
        return masked, config

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[MaskProgress]:
        """Masks with a ramp, a schedule or noise need to know how far training is."""
        if cfg.adapter != "mask":
            return []
        return [MaskProgress()]


def _check_options(cfg: Any) -> None:
    """Raise for options of axolotl that choose what is trained, and that masks cannot follow.

    Those that say how LoRA does it, such as ``lora_r``, have no meaning for a mask and are not read.
    """
    if cfg.peft_trainable_token_indices:
        # The text begins with PEFT's name of the option.
        raise UserError(f"peft_{NO_TOKEN_INDICES}")
    for name in ("lora_target_parameters", "peft_layer_replication"):
        value = getattr(cfg, name)
        if value:
            raise UserError(f"{name} is {value!r}, which masks do not support; leave it out")
    if cfg.lora_target_linear and cfg.lora_target_modules:
        raise UserError(
            "lora_target_linear names every linear layer and lora_target_modules some of them; leave one of the two out"
        )
