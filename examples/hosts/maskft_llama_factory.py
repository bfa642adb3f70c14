"""Masks in LLaMA-Factory v1: ``peft_config: {name: mask, sparsity: 0.3}``, run with llamafactory 0.9.5 on one device.

Its trainer tells nobody how far training is, so that masks with a ramp, a schedule or noise end at their first step.

PYTHONPATH=examples/hosts python -c \
    "import maskft_llama_factory; from llamafactory.v1.launcher import launch; launch()" sft train.yaml
"""

from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin, load_adapter
from peft import get_peft_model

from maskft import MaskConfig


@PeftPlugin("mask").register()
def get_masked_model(model, peft_config, is_train=False):
    """A mask over ``model``: that of ``adapter_name_or_path`` (merged, unless it is trained further), or a new one."""
    settings = dict(peft_config)
    settings.pop("name")
    adapter = settings.pop("adapter_name_or_path", None)
    if adapter:
        return load_adapter(model, adapter, is_train)
    return get_peft_model(model, MaskConfig(task_type="CAUSAL_LM", save_scores=True, **settings))
