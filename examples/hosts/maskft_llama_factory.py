"""Masks in LLaMA-Factory v1: ``peft_config: {name: mask, sparsity: 0.3}``, run with llamafactory 0.9.5 on one device.

Its trainer has no callback that could report the progress of training, so masks that depend on it (a ramp, a schedule
or noise) raise at their first step.

PYTHONPATH=examples/hosts python -c \
    "import maskft_llama_factory; from llamafactory.v1.launcher import launch; launch()" sft train.yaml
"""

from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin, load_adapter
from peft import get_peft_model

from maskft import MaskConfig


@PeftPlugin("mask").register()
def get_masked_model(model, peft_config, is_train=False):
    """Put a mask over ``model``: a new one, or the saved one of ``adapter_name_or_path``.

    LLaMA-Factory merges a saved one, unless it is trained further.
    """
    # A copy: `pop` must not change LLaMA-Factory's own configuration.
    settings = dict(peft_config)
    settings.pop("name")
    adapter = settings.pop("adapter_name_or_path", None)
    if adapter:
        return load_adapter(model, adapter, is_train)

    # The scores are saved beside the mask, because load_adapter could not train it further without them.
    config = MaskConfig(task_type="CAUSAL_LM", save_scores=True, **settings)
    return get_peft_model(model, config)
