"""Masks in LLaMA-Factory v1 (llamafactory 0.9.5), on one device: ``peft_config: {name: mask, sparsity: 0.1}``.

    python examples/hosts/llama_factory_mask.py sft train.yaml

It loads no plugins by itself, so this file registers the mask and then starts its launcher. Its trainer takes no
callbacks from outside: masks that need the progress of training (a ramp, a schedule, noise) end at their first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin, load_adapter
from peft import get_peft_model

import maskft


@PeftPlugin("mask").register()
def masked_model(model: Any, peft_config: Mapping[str, Any], is_train: bool = False) -> Any:
    """Return a mask over ``model``: that of ``adapter_name_or_path`` if given, else a new one."""
    options = dict(peft_config)
    options.pop("name")
    if adapter := options.pop("adapter_name_or_path", None):
        return load_adapter(model, adapter, is_train)
    # save_scores: its checkpoints can be resumed.
    config = maskft.MaskConfig(task_type="CAUSAL_LM", save_scores=True, inference_mode=not is_train, **options)
    return get_peft_model(model, config)


if __name__ == "__main__":
    from llamafactory.v1.launcher import launch

    launch()
