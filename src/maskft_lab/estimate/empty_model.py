"""Models without data: parameters that have a shape and a dtype and take no memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from maskft.tuner.targets import layer_indices
from maskft_common.errors import UserError, first_line

# Even without data, a module takes some microseconds and kilobytes: a configuration may be a stranger's.
MAX_LAYERS = 2_000


def model_without_data(
    config: PretrainedConfig, dtype: torch.dtype | None = None, attention: str | None = None
) -> PreTrainedModel:
    """Return a model of a configuration, to be called under ``torch.device("meta")``.

    Args:
        config: The model's configuration.
        dtype: Of its parameters; None: the configuration's.
        attention: ``attn_implementation``; None: the model's default.

    Raises:
        UserError: If the configuration is not one of a causal language model with decoder layers.
    """
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(num_layers, int) and num_layers > MAX_LAYERS:
        raise UserError(f"the configuration has {num_layers:,} layers; there are estimates up to {MAX_LAYERS:,}")

    named = {}
    if attention:
        # Flash attention, from whichever package, keeps the tensors that sdpa keeps.
        named["attn_implementation"] = attention if attention == "eager" else "sdpa"
    try:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False, **named)
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"the configuration makes no causal language model: {first_line(error)}") from error
    if not layer_indices(name for name, _ in model.named_modules()):
        raise UserError(f"the configuration has no decoder layers ({type(model).__name__}); is it complete?")
    return model


def bytes_saved_for_backward(
    model: nn.Module, batch_sizes: tuple[int, ...], num_tokens: int, autocast: torch.dtype | None
) -> list[int]:
    """Bytes that a forward pass saves for the backward pass, for each batch size.

    The model's meta tensors are replaced by fake CPU tensors: those choose the kernels of a CPU, meta tensors others.

    Args:
        model: A model without data, with a fused head (``add_fused_lm_head``).
        batch_sizes: Rows of each batch.
        num_tokens: Tokens of each row.
        autocast: The dtype of autocast; None: without.
    """
    with FakeTensorMode():
        _make_fake(model)
        return [_saved_bytes(model, rows, num_tokens, autocast) for rows in batch_sizes]


def _saved_bytes(model: nn.Module, rows: int, num_tokens: int, autocast: torch.dtype | None) -> int:
    own = {_storage_id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    # By id; the storages are held, or a later one could get the id of one that was freed.
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _storage_id(tensor) not in own:
            saved[_storage_id(tensor)] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(rows, num_tokens, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        model.train()
        model(**inputs, fused_lm_head=True).log_probs.sum()
    return sum(storage.nbytes() for storage in saved.values())


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # fake tensors have no data_ptr


def _make_fake(model: nn.Module) -> None:
    """Replace all tensors of a model; tied tensors stay tied."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        _replace(module._parameters, made)
        _replace(module._buffers, made)


def _replace(tensors: Mapping[str, torch.Tensor | None], made: dict[torch.Tensor, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor not in made:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            made[tensor] = fake
        tensors[name] = made[tensor]
