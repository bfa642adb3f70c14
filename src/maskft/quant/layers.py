"""Linear layers whose weight is stored as codes: the weight that a mask reads, and the codes that it sets to zero.

PEFT's quantisation backends dequantise a weight and quantise it again after a merge, with fresh scales. A mask needs
less: it replaces codes by the code of zero and leaves scales alone, so that nothing is rounded and every code can be
put back. ``storage_of`` finds the storage of a layer; a storage reads codes, writes codes, and dequantises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..gguf.zero_codes import (
    FORMATS,
    NAMES_WITH_ZERO,
    read_codes,
    why_not_writable,
    write_codes,
)

# Attributes of a bitsandbytes QuantState that its packing for the CPU replaces; they describe the scale of each block,
# which may itself be quantised ("nested", or double quantisation).
_SCALES = (
    "absmax",
    "nested",
    "offset",
    "state2",
    "dtype",
)
# Indices of 0.0 in bitsandbytes' tables of 16 values.
NF4_ZERO = 7
FP4_ZERO = 0
# Names of bitsandbytes' layers.
_BNB_4BIT = (
    "Linear4bit",
    "LinearNF4",
    "LinearFP4",
)
_BNB_8BIT = "Linear8bitLt"


class Storage(ABC):
    """The codes of one layer.

    Attributes:
        layer: The layer that holds them.
        kind: Name of the format, for messages.
    """

    kind = ""

    def __init__(self, layer: Any) -> None:
        # Torch types its attributes as Tensor | Module.
        self.layer = layer

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the dequantised weight."""

    @abstractmethod
    def dequantise(self) -> Tensor:
        """The weight as floats, shape (out_features, in_features); a new tensor."""

    @abstractmethod
    def codes(self) -> Tensor:
        """The codes, shape (out_features, in_features), an integer dtype."""

    @abstractmethod
    def zero(self) -> Tensor | int:
        """The code of zero, one for all or one for each weight."""

    @abstractmethod
    def write(self, codes: Tensor) -> None:
        """Replace all codes, in place; scales stay as they are."""

    def remove(self, removed: Tensor) -> Tensor:
        """Write the code of zero at the removed weights.

        Args:
            removed: Shape (out_features, in_features), bool.

        Returns:
            The codes that were there, shape (num_removed,), for :meth:`restore`.
        """
        # Indexing with a bool tensor copies, so that `before` keeps the old codes when the layer's change.
        codes = self.codes()
        before = codes[removed].clone()

        # As a tensor of the codes' dtype: zero points may have a wider one, to which torch.where would promote.
        zero = self.zero()
        if isinstance(zero, int):
            zero = torch.tensor(
                zero,
                dtype=codes.dtype,
                device=codes.device,
            )
        zero = zero.to(codes.dtype)

        # All codes are written, of which only the removed ones have changed: formats that pack several codes into a
        # byte cannot write one alone.
        after = torch.where(removed, zero, codes)
        self.write(after)
        return before

    def restore(self, removed: Tensor, before: Tensor) -> None:
        """Put back the codes that :meth:`remove` has replaced.

        Args:
            removed: Shape (out_features, in_features), bool; on the device of the codes.
            before: The return value of :meth:`remove`.
        """
        # Cloned, because some formats return their own tensor, which only `write` may change.
        codes = self.codes().clone()
        codes[removed] = before.to(codes.device)
        self.write(codes)


class Bnb4bit(Storage):
    """``bitsandbytes.nn.Linear4bit``: NF4 or FP4, two codes a byte, the first in the high half."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.kind = f"bitsandbytes {layer.weight.quant_type}"

        # The scales for _unpack, before bitsandbytes rounds them. They are kept on the state, which lives as long as
        # the weight: a Storage is created for every call.
        state = layer.weight.quant_state
        is_packed = getattr(state, "packing_format_for_cpu", False)
        if not is_packed:
            state.maskft_scales = {name: getattr(state, name) for name in _SCALES}

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`Storage`."""
        # Packed for the CPU's kernel, the state says bfloat16.
        self._unpack()
        return self.layer.weight.quant_state.dtype

    def dequantise(self) -> Tensor:
        """See :class:`Storage`."""
        from peft.utils.integrations import dequantize_bnb_weight

        self._unpack()
        weight: Any = self.layer.weight
        values = dequantize_bnb_weight(weight)
        return values.reshape(weight.quant_state.shape)

    def codes(self) -> Tensor:
        """See :class:`Storage`."""
        self._unpack()
        weight: Any = self.layer.weight
        # As bytes: with bnb_4bit_quant_storage they may be stored in a tensor of floats.
        stored = weight.data.view(torch.uint8)
        packed = stored.reshape(-1)

        # The high half of a byte is the first code, the low half the second.
        first = packed >> 4
        second = packed & 0xF
        pairs = torch.stack([first, second], dim=1)
        shape = weight.quant_state.shape
        return pairs.reshape(shape)

    def zero(self) -> int:
        """See :class:`Storage`."""
        if self.layer.weight.quant_type == "nf4":
            return NF4_ZERO
        return FP4_ZERO

    def write(self, codes: Tensor) -> None:
        """See :class:`Storage`."""
        self._unpack()
        # The reverse of `codes`.
        pairs = codes.reshape(-1, 2)
        first = pairs[:, 0]
        second = pairs[:, 1]
        packed = (first << 4) | second

        # In place, through a view of the weight's memory.
        weight: Any = self.layer.weight
        stored = weight.data.view(torch.uint8)
        stored.view(-1).copy_(packed)

    def _unpack(self) -> None:
        """Undo the order that the first forward in eval mode gives to codes on some CPUs.

        bitsandbytes repacks for its AVX-512 kernel then (``packing_format_for_cpu``), and rounds the scales to
        bfloat16. The codes come back exactly, and the scales as they were before, if a mask was there before that
        forward. The plain way, writing into that order, would tie us to the kernel.
        """
        weight: Any = self.layer.weight
        is_packed = getattr(weight.quant_state, "packing_format_for_cpu", False)
        if not is_packed:
            return

        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        # Empty if the model ran in eval mode before it was masked: the rounding cannot be undone then.
        scales = getattr(weight.quant_state, "maskft_scales", {})
        data, state = _convert_weight_packed_for_cpu_inverse(
            weight.data,
            weight.quant_state,
        )
        weight.data = data
        weight.quant_state = state
        # Over the rounded ones, which the function only converts back.
        for name, value in scales.items():
            setattr(state, name, value)


class Bnb8bit(Storage):
    """``bitsandbytes.nn.Linear8bitLt``: one signed byte a weight, a scale a row."""

    kind = "bitsandbytes int8"

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`Storage`."""
        # The scales are float32, whatever the model computes in.
        return torch.float32

    def dequantise(self) -> Tensor:
        """See :class:`Storage`."""
        from peft.utils.integrations import dequantize_bnb_weight

        # PEFT's function takes the scales of the state or, before the first forward pass, those of the parameter.
        return dequantize_bnb_weight(self.layer.weight, state=self.layer.state)

    def codes(self) -> Tensor:
        """See :class:`Storage`."""
        return self.layer.weight.data

    def zero(self) -> int:
        """See :class:`Storage`."""
        return 0

    def write(self, codes: Tensor) -> None:
        """See :class:`Storage`."""
        self.layer.weight.data.copy_(codes)


class Torchao(Storage):
    """Weights of torchao that keep one integer a weight (``qdata``) and whole zero points: int8, int4 and the like."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.kind = f"torchao {type(layer.weight).__name__}"

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`Storage`."""
        return self.layer.weight.dtype

    def dequantise(self) -> Tensor:
        """See :class:`Storage`."""
        return self.layer.weight.dequantize()

    def codes(self) -> Tensor:
        """See :class:`Storage`."""
        # One byte a weight, whatever the number of bits: see _why_not_torchao.
        return self.layer.weight.qdata

    def zero(self) -> Tensor | int:
        """See :class:`Storage`."""
        weight: Any = self.layer.weight
        # Symmetric quantisation: there is none, or, in Int8Tensor of torchao 0.15, not even the attribute.
        zero_point = getattr(weight, "zero_point", None)
        if zero_point is None:
            return 0
        # One zero point for each block of (rows, columns) weights, spread over them.
        rows, columns = weight.block_size
        of_rows = zero_point.repeat_interleave(rows, 0)
        return of_rows.repeat_interleave(columns, 1)

    def write(self, codes: Tensor) -> None:
        """See :class:`Storage`."""
        self.layer.weight.qdata.copy_(codes)


class Gguf(Storage):
    """Transformers' ``GgufLinear``: rows of GGUF's blocks."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        # Never None: storage_of has checked the type.
        self.form = FORMATS[layer.ggml_type]
        self.kind = f"GGUF {self.form.name}"

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`Storage`."""
        # As transformers' dequantize returns it.
        return torch.float32

    def dequantise(self) -> Tensor:
        """See :class:`Storage`."""
        from transformers.integrations.gguf.dequant import dequantize

        # Rows are whole numbers of blocks, so that the blocks of all rows follow each other.
        layer: Any = self.layer
        flat = layer.weight.data.reshape(-1)
        values = dequantize(flat, layer.ggml_type)
        return values.reshape(layer.out_features, layer.in_features)

    def codes(self) -> Tensor:
        """See :class:`Storage`."""
        layer: Any = self.layer
        codes = read_codes(self._blocks(), self.form)
        return codes.reshape(layer.out_features, layer.in_features)

    def zero(self) -> int:
        """See :class:`Storage`."""
        return self.form.zero

    def write(self, codes: Tensor) -> None:
        """See :class:`Storage`."""
        blocks = self._blocks()
        codes = codes.reshape(len(blocks), self.form.block_size)
        # Everywhere: `codes` also holds those that do not change.
        everywhere = torch.ones_like(codes, dtype=torch.bool)
        write_codes(blocks, codes, everywhere, self.form)

    def _blocks(self) -> Tensor:
        """The bytes of the weight, a row for each block; a view, so that writing to it writes to the layer."""
        return self.layer.weight.data.view(-1, self.form.block_bytes)


def storage_of(layer: Any) -> Storage | None:
    """The storage of a layer's codes; None where it has a plain weight, or one that is not supported.

    Nothing is imported to find out: a layer of a library that is not loaded cannot be here.
    """
    # By names of packages and classes, see above.
    name = type(layer).__name__
    if _package(layer) == "bitsandbytes":
        if name in _BNB_4BIT and _has_scales(layer):
            return Bnb4bit(layer)
        if name == _BNB_8BIT and _has_scales(layer):
            # With has_fp16_weights the weight is stored as floats, and quantised in every forward pass.
            if layer.state.has_fp16_weights:
                return None
            return Bnb8bit(layer)

    # transformers' layer over the blocks of a GGUF file. Some files have permuted columns, which a mask would miss.
    if name == "GgufLinear":
        has_zero = layer.ggml_type in FORMATS
        if has_zero and layer.input_permutation is None:
            return Gguf(layer)

    # The rest: plain layers, those that torchao has quantised, and kinds that no mask can be written into.
    if not _has_torchao_weight(layer):
        return None
    if _why_not_torchao(layer.weight) is not None:
        return None
    return Torchao(layer)


def is_quantised(layer: Any) -> bool:
    """Whether the weight of a layer is stored as codes of a library that is known here, supported or not."""
    name = type(layer).__name__
    if _package(layer) == "bitsandbytes":
        return name in _BNB_4BIT or name == _BNB_8BIT
    return _has_torchao_weight(layer) or name in ("GgufLinear", "HQQLinear")


def why_not_quantised(layer: Any) -> str | None:
    """Why a mask cannot be written into a quantised layer, with the way out; None where it can."""
    if storage_of(layer) is not None:
        return None

    # Of the kinds that is_quantised knows; those left over at the end are bitsandbytes'.
    name = type(layer).__name__
    if name == "GgufLinear":
        if layer.ggml_type not in FORMATS:
            return (
                f"it is stored as {why_not_writable(layer.ggml_type)}; quantise it to another type "
                f"({', '.join(NAMES_WITH_ZERO)}), or load with GgufConfig(dequantize=True)"
            )
        return "its columns are permuted in the file; load with GgufConfig(dequantize=True)"
    weight = getattr(layer, "weight", None)
    if _package(weight) == "torchao":
        return _why_not_torchao(weight)
    if name == "HQQLinear":
        return "HQQ's zero points are floats, so that zero has no code; quantise to NF4 or int8 instead"
    if name == _BNB_8BIT and layer.state.has_fp16_weights:
        return "it keeps float16 weights and quantises in every forward pass; load it with has_fp16_weights=False"
    return "bitsandbytes has not quantised it yet, which it does when the model is moved to a device; move it first"


def _has_scales(layer: Any) -> bool:
    """Whether bitsandbytes has quantised the weight of its layer; it does so when the layer is first moved."""
    weight = layer.weight
    if type(layer).__name__ in _BNB_4BIT:
        return getattr(weight, "quant_state", None) is not None
    # The first forward pass moves the scales from the parameter to the state.
    scales = getattr(weight, "SCB", None)
    return scales is not None or layer.state.SCB is not None


def _package(thing: Any) -> str:
    """Name of the package that defines the class of an object."""
    package, _, _ = type(thing).__module__.partition(".")
    return package


def _has_torchao_weight(layer: Any) -> bool:
    """Whether torchao has quantised a linear layer: it keeps the class, and replaces the weight by its own tensor."""
    if not isinstance(layer, nn.Linear):
        return False
    weight = getattr(layer, "weight", None)
    return _package(weight) == "torchao"


def _why_not_torchao(weight: Any) -> str | None:
    """Why a mask cannot be written into a weight of torchao, with the way out; None where it can."""
    kind = type(weight).__name__
    # Two attributes, because torchao's tensors name it differently.
    has_activation_kwargs = getattr(weight, "act_quant_kwargs", None) is not None
    quantises_activations = has_activation_kwargs or getattr(weight, "activation_quantization", None)
    if quantises_activations:
        return f"torchao's {kind} also quantises activations, which do not train; use a weight-only configuration"

    # AWQ and SmoothQuant divide the weight by it, and multiply the input with it again.
    if getattr(weight, "act_pre_scale", None) is not None:
        return f"torchao's {kind} also scales its inputs, which a masked layer would not; quantise without AWQ"

    # One byte for each weight, in its place.
    data = getattr(weight, "qdata", None)
    if data is not None and data.is_floating_point():
        return f"torchao's {kind} holds floats, whose codes maskft cannot write; use Int8WeightOnlyConfig"
    is_of_bytes = data is not None and data.dtype in (torch.int8, torch.uint8)
    is_matrix = is_of_bytes and data.dim() == 2
    is_in_place = is_matrix and data.shape == weight.shape
    if not is_in_place:
        return f"torchao packs the codes of its {kind} for one kernel; use Int8WeightOnlyConfig or IntxWeightOnlyConfig"

    # A weight is scale * (code - zero point): 0 has a code only if the zero point is a whole number.
    zero_point = getattr(weight, "zero_point", None)
    if zero_point is not None and zero_point.is_floating_point():
        return f"zero points of torchao's {kind} are floats, so that zero cannot be stored; quantise symmetrically"
    return None
