"""The values that a four- or eight-bit format can hold: a weight on fresh scales, or on the scales of a given base.

Shapes: a weight is cut into N blocks of B values that share a scale; a scale is (N, 1).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import gguf
from gguf import GGMLQuantizationType

# Lowest and highest code of GGUF's symmetric types. A value is a code times the scale of its block.
CODES = {
    "Q4_0": (-8, 7),
    "Q8_0": (-127, 127),
}
TYPES = (*CODES, "NF4")


def grid_of(type_name: str) -> BlockGrid | NF4Grid:
    """The grid of one of TYPES."""
    if type_name == "NF4":
        return NF4Grid()
    return BlockGrid(type_name)


class BlockGrid:
    """GGUF's blocks of 32 values with a float16 scale, as llama-quantize writes them.

    Args:
        type_name: A key of CODES.
    """

    block_size = 32

    def __init__(self, type_name: str):
        self._type = GGMLQuantizationType[type_name]
        self._codes = CODES[type_name]

    def fresh(self, weight: Tensor) -> Tensor:
        """Values of a weight after quantisation with new scales."""
        packed = gguf.quantize(weight.numpy(), self._type)
        values = gguf.dequantize(packed, self._type)
        return torch.from_numpy(np.array(values))  # a copy, because torch cannot share read-only memory

    def scales(self, weight: Tensor) -> Tensor:
        """Scales of a weight whose values are on the grid already."""
        # gguf's Python package does not return scales, so they are read from the bytes: a block begins with its scale,
        # a float16.
        _, num_bytes = gguf.GGML_QUANT_SIZES[self._type]
        packed = gguf.quantize(weight.numpy(), self._type)
        blocks = packed.reshape(-1, num_bytes)
        scale_bytes = blocks[:, :2].copy()
        scales = scale_bytes.view(np.float16)
        return torch.from_numpy(scales.astype(np.float32))

    def nearest(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Nearest values with given scales: whole multiples of them, within the type's codes."""
        blocks = weight.reshape(-1, self.block_size)
        # A block of zeros has the scale 0. Its codes are 0, where a division would give NaN.
        inverse = torch.where(scales == 0, 0.0, 1 / scales)
        lowest, highest = self._codes
        codes = (blocks * inverse).round().clamp(lowest, highest)
        return (codes * scales).reshape(weight.shape)


class NF4Grid:
    """bitsandbytes' NormalFloat4: blocks of 64 values, 16 levels between -1 and 1, float32 scales (QLoRA's format).

    As by default in bitsandbytes, the scales are not quantised a second time ("double quantisation").

    Raises:
        ImportError: Without bitsandbytes (extra ``quant``).
    """

    block_size = 64

    def __init__(self) -> None:
        # Here, because the other types do not need bitsandbytes.
        from bitsandbytes import functional

        self._functional = functional
        self._levels = functional.get_4bit_type(
            "nf4",
            device="cpu",
            blocksize=self.block_size,
        )

    def fresh(self, weight: Tensor) -> Tensor:
        """Values of a weight after quantisation with new scales: the largest magnitude of each block."""
        packed, state = self._quantize(weight)
        return self._functional.dequantize_4bit(packed, state).reshape(weight.shape)

    def scales(self, weight: Tensor) -> Tensor:
        """Scales of a weight whose values are on the grid already."""
        _, state = self._quantize(weight)
        return state.absmax.reshape(-1, 1)

    def nearest(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Nearest levels with given scales."""
        blocks = weight.reshape(-1, self.block_size)
        # A block of zeros has the scale 0. A division by it would give NaN.
        inverse = torch.where(scales == 0, 0.0, 1 / scales)
        scaled = blocks * inverse

        # The levels are not evenly spaced, so codes cannot be rounded: the boundary between two levels is halfway
        # between them.
        below = self._levels[:-1]
        above = self._levels[1:]
        boundaries = (above + below) / 2
        codes = torch.bucketize(scaled.contiguous(), boundaries)
        return (self._levels[codes] * scales).reshape(weight.shape)

    def _quantize(self, weight: Tensor):
        return self._functional.quantize_4bit(
            weight,
            blocksize=self.block_size,
            quant_type="nf4",
        )
