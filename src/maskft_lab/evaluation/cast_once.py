"""Autocast without casting the same weights in every forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..generation.greedy import free_memory_bytes

# Of the free memory. The batches of answers then take half of what the copies leave (`memory_bound_rows`).
USABLE_PART_OF_MEMORY = 1 / 2


def weights_cast_once(model) -> AbstractContextManager:
    """Keep the cast weights of linear layers inside the context; results stay the same bit for bit.

    autocast keeps them itself only where gradients are computed. Without, it casts all float32 weights in every forward
    pass, which takes longer than a token of a small batch. The copies are made when a layer is first used.

    Args:
        model: Its weights must not change inside the context.

    Returns:
        A context to enter inside autocast. It does nothing if autocast is off, or if the copies might not fit into half
        of the free memory.
    """
    device = model.device
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    dtype = torch.get_autocast_dtype(device.type)
    num_cast = sum(weight.numel() for weight in model.parameters() if _is_cast(weight))
    if num_cast * dtype.itemsize > USABLE_PART_OF_MEMORY * free_memory_bytes(device):
        return nullcontext()
    return _CastOnce(dtype)


class _CastOnce(TorchFunctionMode):
    """Gives ``F.linear`` a weight in the dtype in which autocast would compute.

    A mode, because it sees the products of all kinds of layers, and leaves whatever else is done with the weights
    alone: an embedding that is tied to the head, or the norms of DoRA's columns, which are taken in float32.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        # By identity. The weight is kept beside its copy: the identity of one that is freed may return.
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func,
        types,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Layers pass the weight as second argument. One that is passed by name is left to autocast.
        if func is F.linear and len(args) > 1 and _is_cast(args[1]):
            x, weight, *rest = args
            # Models turn autocast off for parts that have to be in float32, and it leaves float64 as it is.
            if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
                return func(x, self._copy(weight), *rest, **kwargs)
        return func(*args, **kwargs)

    def _copy(self, weight: Tensor) -> Tensor:
        key = id(weight)
        if key not in self.copies:
            self.copies[key] = (weight, weight.detach().to(self.dtype))
        _, copy = self.copies[key]
        return copy


def _is_cast(weight: Any) -> bool:
    """Whether autocast would cast this weight of a linear layer."""
    # Subclasses of Parameter hold codes of quantised weights. Other tensors are computed anew in each forward pass.
    return type(weight) is nn.Parameter and weight.dtype == torch.float32
