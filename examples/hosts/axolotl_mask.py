"""Masks in axolotl (0.21.0): an adapter ``mask`` for its YAML. Copy this file beside your configuration.

    PYTHONPATH=. axolotl train config.yaml

with, in config.yaml::

    plugins: [axolotl_mask.MaskPlugin]
    adapter: mask
    mask: {sparsity: 0.1, init_scores: magnitude}   # fields of maskft.MaskConfig
    learning_rate: 3e-4

A base in 4 or 8 bits: ``overrides_of_model_kwargs: {quantization_config: {load_in_4bit: true}}``, because axolotl's
``load_in_4bit`` has no effect on the adapter of a plugin.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, Field

import maskft
from maskft.training.callbacks import MaskProgress


class MaskArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    mask: dict[str, Any] | None = Field(default=None, description="Fields of maskft.MaskConfig.")


class MaskPlugin(BasePlugin):
    """Gives axolotl the adapter ``mask``."""

    def get_input_args(self) -> str:
        """Where axolotl finds what the plugin adds to its configuration."""
        return f"{__name__}.MaskArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The adapter; ReLoRA cannot merge it."""
        return [AdapterCapabilities(name="mask", lora_like=False, relora=False)]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """Return a mask over ``model``, from ``lora_model_dir`` if that is given; None for other adapters."""
        if cfg.adapter != "mask":
            return None
        if (cfg.load_in_4bit or cfg.load_in_8bit) and not getattr(model, "is_quantized", False):
            raise ValueError("load_in_4bit and load_in_8bit did not quantise the base: use overrides_of_model_kwargs")
        options = {
            "target_modules": cfg.lora_target_modules or None,
            "modules_to_save": cfg.lora_modules_to_save or None,
            "layers_to_transform": cfg.peft_layers_to_transform,
        }
        # save_scores: axolotl's checkpoints can be resumed.
        config = maskft.MaskConfig(task_type="CAUSAL_LM", save_scores=True, **options, **(cfg.mask or {}))
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Masks with a ramp, a schedule or noise need the progress of training."""
        return [MaskProgress()] if cfg.adapter == "mask" else []
