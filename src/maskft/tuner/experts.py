"""Experts fused into one parameter: a mask for each expert's matrix, and a module that computes with the masked ones.

transformers 5 keeps the experts of a layer in 3-D parameters (expert, rows, columns) of one module. Each slice gets a
:class:`MaskedLinear` of its own, which is never called: it holds scores, counts, and what is merged. Its name is the
parameter's with the number of the expert, ``...experts.gate_up_proj.3``.

Shapes: E experts, O rows, I columns of a matrix (which of them is the input differs between architectures).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .config import MaskConfig
from .effective import score_gradient_of
from .layer import MaskedLinear
from .sharded import is_sharded

# As transformers names them. An old list of experts counts before the layer's name: ``experts.3.w1``.
_FUSED = re.compile(r"(?P<parameter>.*\.(?:experts\.[^.\d][^.]*|[^.]+\.weight))\.(?P<expert>\d+)")


class ExpertMatrix(nn.Module):
    """One matrix of a fused parameter, for :class:`MaskedLinear` to mask; the weight stays the experts' own."""

    bias = None

    def __init__(self, experts: nn.Module, parameter: str, index: int) -> None:
        super().__init__()
        # No submodule and no parameter: the weights are in the model once.
        object.__setattr__(self, "place", (experts, parameter, index))

    @property
    def weight(self) -> Tensor:
        """View of the matrix, shape (O, I)."""
        experts, parameter, index = cast(tuple[nn.Module, str, int], self.__dict__["place"])
        return cast(Tensor, getattr(experts, parameter))[index]


class MaskedExperts(nn.Module):
    """A module of fused experts whose 3-D parameters are masked.

    Attributes:
        base_layer: The module.
        matrices: Name of a parameter -> its matrices, one for each expert.
    """

    def __init__(self, base_layer: nn.Module, matrices: Mapping[str, Sequence[MaskedLinear]]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parameter_names = tuple(matrices)
        for name, layers in matrices.items():
            # Not add_module: it refuses a name that can be read, and the experts' own can, see __getattr__.
            setattr(self, name, nn.ModuleList(layers))

    @property
    def matrices(self) -> list[MaskedLinear]:
        """All of them."""
        return [layer for name in self.parameter_names for layer in self._layers(name)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the experts compute, with masked matrices."""
        first = self.matrices[0]
        if first.disable_adapters and first.merged:
            for layer in self.matrices:
                layer.unmerge()
        if first.disable_adapters or first.merged or not first.active_masks:
            return self.base_layer(*args, **kwargs)
        masked = {name: _masked_parameter(self._layers(name)) for name in self.parameter_names}
        return functional_call(self.base_layer, masked, args, kwargs)

    def get_base_layer(self) -> nn.Module:
        """The module of experts."""
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge each matrix, see :class:`MaskedLinear`."""
        for layer in self.matrices:
            layer.merge(safe_merge, adapter_names)

    def _layers(self, name: str) -> list[MaskedLinear]:
        return list(cast(Any, getattr(self, name)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # such as num_experts, which routers read


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the matrices of several experts in 3-D parameters."""
    return type(module).__name__.endswith("Experts") and bool(fused_parameters(module))


def fused_parameters(module: nn.Module) -> list[str]:
    """Names of the 3-D parameters of a module itself."""
    found = module.named_parameters(recurse=False)
    return [name for name, p in found if p.dim() == 3 and p.is_floating_point() and not is_sharded(p)]


def place_of(name: str) -> tuple[str, int] | None:
    """Parameter and expert of a mask's name, ``...experts.gate_up_proj.3``; None: it is the name of a layer."""
    match = _FUSED.fullmatch(name)
    return (match["parameter"], int(match["expert"])) if match else None


def mask_experts(
    module: nn.Module, adapter_name: str, config: MaskConfig, pool: list[MaskedLinear], module_name: str
) -> MaskedExperts:
    """Wrap a module of fused experts; its matrices are named after it."""
    return MaskedExperts(
        module,
        {
            name: [
                MaskedLinear(ExpertMatrix(module, name, n), adapter_name, config, pool, f"{module_name}.{name}.{n}")
                for n in range(len(getattr(module, name)))
            ]
            for name in fused_parameters(module)
        },
    )


def weight_finder(model: nn.Module) -> Callable[[str], Tensor | None]:
    """Finds the weight that a mask is for in a plain model by the mask's name, also a matrix of fused experts.

    What is found is a view: writing to it writes to the model. None: there is no such weight.
    """
    modules = dict(model.named_modules())

    def find(name: str) -> Tensor | None:
        if name in modules:
            return cast(Tensor | None, getattr(modules[name], "weight", None))
        path, _, index = name.rpartition(".")
        path, _, parameter = path.rpartition(".")
        fused = getattr(modules.get(path), parameter, None) if index.isdecimal() else None
        return fused[int(index)] if isinstance(fused, Tensor) and fused.dim() == 3 and int(index) < len(fused) else None

    return find


def _masked_parameter(layers: Sequence[MaskedLinear]) -> Tensor:
    """The 3-D parameter with every matrix masked, shape (E, O, I); its gradient goes to the scores."""
    names = [
        name
        for name in layers[0].active_masks
        if name in layers[0].mask_scores and layers[0].mask_scores[name].requires_grad
    ]
    if not names or not torch.is_grad_enabled():
        return torch.stack([layer.effective_weight() for layer in layers])
    scores = [layer.mask_scores[name] for layer in layers for name in names]
    return cast(Tensor, _MaskedParameter.apply(layers, names, *scores))


class _MaskedParameter(torch.autograd.Function):
    """Masked matrices as one parameter; the gradient goes straight through the masks of the trained adapters."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[MaskedLinear], names: list[str], *scores: Tensor) -> Tensor:
        ctx.save_for_backward(*scores)
        ctx.layers, ctx.names = layers, names
        return torch.stack([layer.effective_weight() for layer in layers])

    @staticmethod
    def backward(ctx: Any, grad_EOI: Tensor) -> tuple[Tensor | None, ...]:
        scores = iter(ctx.saved_tensors)
        gradients = [
            score_gradient_of(layer, name, grad_OI.to(torch.float32, copy=True), next(scores))
            for layer, grad_OI in zip(ctx.layers, grad_EOI, strict=True)
            for name in ctx.names
        ]
        return None, None, *gradients
