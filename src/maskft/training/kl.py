"""KL(base || model) on the supervised tokens of training rows: a term of the loss that holds a model near its base."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..data import IGNORED


class KLToBase:
    """``weight`` times the mean KL(base || model) over supervised tokens, in nats per token.

    Args:
        model: What is trained. The base is the model without its adapter, else a frozen copy of it as it is now.
        weight: Above 0.
    """

    def __init__(self, model, weight: float):
        self.weight = weight
        self._has_adapter = hasattr(model, "peft_config")
        self._base = None if self._has_adapter else copy.deepcopy(model).requires_grad_(False).eval()
        decoder = (model.get_base_model() if self._has_adapter else model).get_decoder()
        self._head, self._hidden_BTD = model.get_output_embeddings(), None
        decoder.register_forward_hook(self._keep)

    def _keep(self, module, args, output) -> None:
        if module.training and torch.is_grad_enabled():
            self._hidden_BTD = output[0]

    def __call__(self, model, inputs: Mapping[str, Any], num_tokens: Tensor | int | None) -> Tensor:
        """The term for the batch that ``model`` has just computed; ``num_tokens``: what its loss is divided by."""
        labels_BT = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        is_supervised_BT = labels_BT != IGNORED
        log_probs = self._head(self._hidden_BTD[is_supervised_BT]).float().log_softmax(-1)
        of_base = self._base_log_probs(model, inputs, is_supervised_BT)
        self._hidden_BTD = None
        total = torch.nn.functional.kl_div(log_probs, of_base, reduction="sum", log_target=True)
        count = is_supervised_BT.sum() if num_tokens is None else num_tokens
        return self.weight * total / torch.as_tensor(count).clamp(min=1)

    @torch.no_grad()
    def _base_log_probs(self, model, inputs: Mapping[str, Any], is_supervised_BT: Tensor) -> Tensor:
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        with self._as_base(model) as base:
            return base(**asked, use_cache=False).logits[is_supervised_BT].float().log_softmax(-1)

    @contextmanager
    def _as_base(self, model) -> Iterator:
        if self._base is not None:
            yield self._base
            return
        model.eval()
        with model.disable_adapter():
            yield model
        model.train()
