"""The values that a four- or eight-bit format can hold: a weight on fresh scales, or on the scales of a given base.

Shapes: a weight is cut into N blocks of B values that share a scale; a scale is (N, 1).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import gguf
from gguf import GGMLQuantizationType

# Codes of symmetric GGUF types: a value is a whole number in this range, times the scale of its block.
CODES = {"Q4_0": (-8, 7), "Q8_0": (-127, 127)}
TYPES = (*CODES, "NF4")


def grid_of(type_name: str) -> BlockGrid | NF4Grid:
    """The grid of one of TYPES."""
    return NF4Grid() if type_name == "NF4" else BlockGrid(type_name)


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
        """Values of a weight after it was quantised with scales of its own."""
        packed = gguf.quantize(weight.numpy(), self._type)
        return torch.from_numpy(np.array(gguf.dequantize(packed, self._type)))

    def scales(self, weight: Tensor) -> Tensor:
        """Scales of a weight whose values are on the grid already."""
        num_bytes = gguf.GGML_QUANT_SIZES[self._type][1]
        packed = gguf.quantize(weight.numpy(), self._type).reshape(-1, num_bytes)
        # A block begins with its scale, in two bytes.
        return torch.from_numpy(packed[:, :2].copy().view(np.float16).astype(np.float32))

    def nearest(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Nearest values with given scales: whole multiples of them, within the type's codes."""
        blocks = weight.reshape(-1, self.block_size)
        # A block of zeros has the scale 0, and every code of it is 0.
        inverse = torch.where(scales == 0, 0.0, 1 / scales)
        codes = (blocks * inverse).round().clamp(*self._codes)
        return (codes * scales).reshape(weight.shape)


class NF4Grid:
    """bitsandbytes' NormalFloat4: blocks of 64 values, 16 levels between -1 and 1, float32 scales (QLoRA's format).

    The scales are not quantised a second time ("double quantisation"), which is the default of bitsandbytes too.

    Raises:
        ImportError: Without bitsandbytes (extra ``quant``).
    """

    block_size = 64

    def __init__(self) -> None:
        from bitsandbytes import functional

        self._functional = functional
        self._levels = functional.get_4bit_type("nf4", device="cpu", blocksize=self.block_size)

    def fresh(self, weight: Tensor) -> Tensor:
        """Values of a weight after it was quantised with scales of its own: the largest magnitude of each block."""
        packed, state = self._quantize(weight)
        return self._functional.dequantize_4bit(packed, state).reshape(weight.shape)

    def scales(self, weight: Tensor) -> Tensor:
        """Scales of a weight whose values are on the grid already."""
        _, state = self._quantize(weight)
        return state.absmax.reshape(-1, 1)

    def nearest(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Nearest levels with given scales."""
        blocks = weight.reshape(-1, self.block_size)
        inverse = torch.where(scales == 0, 0.0, 1 / scales)
        # The boundary between two levels is halfway between them.
        boundaries = (self._levels[1:] + self._levels[:-1]) / 2
        codes = torch.bucketize((blocks * inverse).contiguous(), boundaries)
        return (self._levels[codes] * scales).reshape(weight.shape)

    def _quantize(self, weight: Tensor):
        return self._functional.quantize_4bit(weight, blocksize=self.block_size, quant_type="nf4")
