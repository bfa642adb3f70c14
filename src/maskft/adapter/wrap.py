"""A model with an adapter whose saving looks nothing up."""

from __future__ import annotations

from functools import partial

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def add_adapter(model: PreTrainedModel, config: PeftConfig, revision: str | None = None) -> PeftModel:
    """``peft.get_peft_model`` for a model whose vocabulary stays as it is.

    PEFT would otherwise ask the hub, at every save, whether the base has as many tokens, and warn when it cannot.
    """
    adapted = get_peft_model(model, config, revision=revision)
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted
