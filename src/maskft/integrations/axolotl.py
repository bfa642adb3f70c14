"""Masks in axolotl: ``plugins: [maskft.integrations.axolotl.MaskPlugin]`` and ``adapter: mask`` in its YAML.

Run with axolotl 0.21.0, which asks plugins (``axolotl.integrations.base``) for adapters that it does not know itself.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field

from maskft_base.errors import UserError

from ..training.callbacks import MaskProgress
from .settings import config_of, refuse_quantised

ADAPTER = "mask"


class MaskArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    mask: dict[str, Any] | None = Field(default=None, description="Fields of maskft.MaskConfig, such as sparsity: 0.1.")


class MaskPlugin(BasePlugin):
    """Gives axolotl the adapter ``mask``."""

    def get_input_args(self) -> str:
        """Where axolotl finds what the plugin adds to its configuration."""
        return f"{MaskArgs.__module__}.{MaskArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The adapter; it is not built like LoRA, and ReLoRA's restarts would not merge it."""
        return [AdapterCapabilities(name=ADAPTER, lora_like=False, relora=False)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig | None] | None:
        """A mask over ``model``, from ``lora_model_dir`` if that is given; None for other adapters.

        Raises:
            UserError: If the base is not quantised as asked, or not by bitsandbytes, or a setting is not one of a mask.
        """
        if cfg.adapter != ADAPTER:
            return None
        refuse_quantised(model)
        # axolotl 0.21 quantises for its own adapters only, and says nothing.
        asked = "load_in_4bit" if cfg.load_in_4bit else "load_in_8bit" if cfg.load_in_8bit else None
        if asked and not getattr(model, "is_quantized", False):
            raise UserError(
                f"{asked}: true did not quantise the base, axolotl does so for its own adapters only; replace it by "
                f"overrides_of_model_kwargs: {{quantization_config: {{{asked}: true}}}}"
            )
        config = config_of(
            dict(cfg.mask or {}),
            "mask",
            target_modules=cfg.lora_target_modules or None,
            modules_to_save=cfg.lora_modules_to_save or None,
            layers_to_transform=cfg.peft_layers_to_transform,
        )
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            masked = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
        else:
            masked = get_peft_model(model, config)
        masked.print_trainable_parameters()
        return masked, config

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Tells masks with a ramp, a schedule or noise how far training is."""
        return [MaskProgress()] if cfg.adapter == ADAPTER else []
