"""Masks in axolotl: a plugin for its YAML, run with axolotl 0.21.0.

plugins: [maskft_axolotl.MaskPlugin]      # with this folder on PYTHONPATH
adapter: mask
mask: {sparsity: 0.3}                     # fields of maskft.MaskConfig
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from maskft import MaskConfig, MaskProgress


class MaskArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    mask: dict[str, Any] | None = None


class MaskPlugin(BasePlugin):
    """Gives axolotl the adapter ``mask``."""

    def get_input_args(self):
        """Where axolotl finds what the plugin adds to its configuration."""
        return f"{MaskArgs.__module__}.MaskArgs"

    def get_adapter_capabilities(self):
        """It is not built like LoRA, and ReLoRA's restarts would not merge it."""
        return [AdapterCapabilities(name="mask", lora_like=False, relora=False)]

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        """A mask over ``model``, from ``lora_model_dir`` if that is given; None for other adapters."""
        if cfg.adapter != "mask":
            return None
        given = {
            "target_modules": cfg.lora_target_modules,
            "modules_to_save": cfg.lora_modules_to_save,
            "layers_to_transform": cfg.peft_layers_to_transform,
            "save_scores": True,  # to resume
            **(cfg.mask or {}),
        }
        config = MaskConfig(task_type="CAUSAL_LM", **{name: value for name, value in given.items() if value})
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config

    def add_callbacks_pre_trainer(self, cfg, model):
        """Tells masks with a ramp, a schedule or noise how far training is."""
        return [MaskProgress()] if cfg.adapter == "mask" else []
