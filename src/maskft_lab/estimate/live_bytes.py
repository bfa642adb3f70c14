"""Following the bytes that are alive, and counting FLOPs, while a model runs on fake tensors, which have no data."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from trl.kernels import chunked_logprob

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of storages that operations make, until they are freed, and counts FLOPs.

    The ``existing`` tensors do not count. torch's FlopCounterMode is not used, only its formulas: it holds on to the
    inputs of modules, which would count as memory here.
    """

    def __init__(self, existing: list[Tensor]):
        super().__init__()
        self.live = self.peak = self.gradients = self.gradients_at_peak = 0
        self.largest = self.largest_product = self.flops = 0
        self._known = weakref.WeakKeyDictionary((tensor.untyped_storage(), 0) for tensor in existing)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := _FLOPS.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        if func.overloadpacket in _PRODUCTS and out.dtype != torch.float32:
            self.largest_product = max(self.largest_product, out.numel())
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known[storage] = size = storage.nbytes()
                weakref.finalize(storage, self._free, size)
                self.live += size
                self.largest = max(self.largest, size)
                if self.live > self.peak:
                    self.peak, self.gradients_at_peak = self.live, self.gradients
        return out

    def _free(self, size: int) -> None:
        self.live -= size

    def count_as_gradient(self, tensor: Tensor) -> None:
        """Say that what is alive in ``tensor`` is a gradient and not an activation."""
        self.gradients += tensor.untyped_storage().nbytes()


class Gradients:
    """Keeps gradients as training would: in ``.grad``, and those of masked weights in one float32 buffer each."""

    def __init__(self, model: nn.Module, masked: set[int], live: LiveBytes):
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.masked, self.live = masked, live
        self.buffers: dict[int, Tensor] = {}

    def __enter__(self):
        self._handles = [p.register_post_accumulate_grad_hook(self._keep) for p in self.trained]
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        for parameter in self.trained:
            parameter.grad = None

    def of_an_earlier_micro_batch(self) -> None:
        """Make the gradients that an earlier micro-batch of the same optimizer step has left."""
        for parameter in self.trained:
            if id(parameter) in self.masked:
                self._count(parameter, torch.empty(parameter.shape, dtype=torch.float32))
            else:
                parameter.grad = torch.empty_like(parameter)
                self._count(parameter, parameter.grad)

    def _keep(self, parameter: nn.Parameter) -> None:
        if id(parameter) not in self.buffers:
            self._count(parameter, parameter.grad.float() if id(parameter) in self.masked else parameter.grad)
        if id(parameter) in self.masked:
            parameter.grad = None

    def _count(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self.buffers[id(parameter)] = gradient
        self.live.count_as_gradient(gradient)


_PRODUCTS = (aten.mm, aten.addmm, aten.bmm)

# The last three run on CPU tensors, fake or not, and torch has no formula for them. Attention counts without the half
# that a causal mask saves.
_FLOPS = {
    **flop_registry,
    aten.addmm_: lambda out, left, right, **_: 2 * left.shape[0] * left.shape[1] * right.shape[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad.shape, q.shape, k.shape, v.shape
    ),
}


@contextlib.contextmanager
def triton_head(device: str) -> Iterator[None]:
    """Let TRL's output head fold its tiles without allocating, as its Triton kernels do on a GPU."""
    if device == "cpu":
        yield
        return

    def add_product(total, left, right):
        # Expanded single values have the shapes, for the FLOPs, and no storage, as on a GPU.
        total.addmm_(*(total.new_empty(1, 1).expand(factor.shape) for factor in (left, right)))

    replaced = {"_forward_tile": _nothing, "_backward_tile": _nothing, "_addmm_fp32": add_product}
    originals = {name: getattr(chunked_logprob, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(chunked_logprob, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(chunked_logprob, name, function)


def _nothing(*_, **__) -> None:
    pass


def make_fake(model: nn.Module) -> None:
    """Put fake CPU tensors, which choose CPU kernels, in place of a model's meta tensors; tied ones stay tied."""
    # Replaced tensors are held on to, or another could take their id.
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
                    made[id(tensor)] = (tensor, fake)
                tensors[name] = made[id(tensor)][1]
