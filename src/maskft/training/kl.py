"""KL(base || model) on the supervised tokens of training rows: a term of the loss that holds a model near its base."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..data.tokenizing import IGNORED


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
        self._decoder = (model.get_base_model() if self._has_adapter else model).get_decoder()
        self._output = None
        self._decoder.register_forward_hook(self._keep)

    def _keep(self, module, args, output) -> None:
        if module.training and torch.is_grad_enabled():
            self._output = output

    @torch.no_grad()
    def of_base(self, model, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Which tokens come before a label, (B, T), and the base's log-probabilities there, (N, V).

        To be called before the forward pass of ``model``: under FSDP2 that of the base unmasks the weights which the
        backward pass gathers again.
        """
        is_supervised_BT = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED) != IGNORED
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        with self._as_base(model, is_supervised_BT.device) as base:
            logits = base(**asked, use_cache=False).logits[is_supervised_BT]
        return is_supervised_BT, logits.float().log_softmax(-1)

    def __call__(self, model, of_base: tuple[Tensor, Tensor], num_tokens: Tensor | int | None) -> Tensor:
        """The term for the batch that ``model`` has just computed; ``num_tokens``: what its loss is divided by."""
        is_supervised_BT, base_log_probs = of_base
        log_probs = self._logits(model, is_supervised_BT).float().log_softmax(-1)
        total = torch.nn.functional.kl_div(log_probs, base_log_probs, reduction="sum", log_target=True)
        count = len(base_log_probs) if num_tokens is None else num_tokens
        return self.weight * total / torch.as_tensor(count).clamp(min=1)

    def _logits(self, model, is_supervised_BT: Tensor) -> Tensor:
        """Logits (N, V) of what the decoder has just computed, by the model itself, which may scale or cap them."""
        hidden_1ND = self._output.last_hidden_state[is_supervised_BT][None]
        kept = type(self._output)(**{**self._output, "last_hidden_state": hidden_1ND})
        self._decoder.forward = lambda *args, **kwargs: kept  # over the method of its class
        try:
            return model(inputs_embeds=hidden_1ND.detach(), use_cache=False).logits[0]
        finally:
            del self._decoder.forward
            self._output = None

    @contextmanager
    def _as_base(self, model, device: torch.device) -> Iterator:
        if self._base is not None:
            yield self._base.to(device)  # it was copied before the model was moved there
            return
        model.eval()
        with model.disable_adapter():
            yield model
        model.train()
