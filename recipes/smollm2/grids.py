"""The values that a four- or eight-bit format can hold: a weight on fresh scales, or on the scales of a given base.

Shapes: a weight is cut into N blocks of B values that share a scale; scales have N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import gguf
from gguf import GGMLQuantizationType


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF's: a value is a code times the scale of its block, minus the block's offset.

    Args:
        lowest: Lowest code.
        highest: Highest code.
        block_size: Number of values that share a scale.
    """

    lowest: int
    highest: int
    block_size: int = 32


BLOCK_TYPES = {
    "Q4_0": BlockType(-8, 7),
    "Q5_0": BlockType(-16, 15),
    "Q8_0": BlockType(-127, 127),
    "Q4_K": BlockType(0, 15),
    "Q6_K": BlockType(-32, 31, block_size=16),
}
# The types that a whole base can be held in.
TYPES = ("Q4_0", "Q8_0", "NF4")


def grid_of(type_name: str) -> BlockGrid | NF4Grid:
    """The grid of one of TYPES, or of BLOCK_TYPES."""
    if type_name == "NF4":
        return NF4Grid()
    return BlockGrid(type_name)


class BlockGrid:
    """GGUF's blocks, as llama-quantize writes them.

    Args:
        type_name: A key of BLOCK_TYPES.
    """

    def __init__(self, type_name: str):
        self._type = GGMLQuantizationType[type_name]
        self.codes = BLOCK_TYPES[type_name]
        self.block_size = self.codes.block_size

    def fresh(self, weight: Tensor) -> Tensor:
        """Values of a weight after quantisation with new scales."""
        # gguf's Python package cannot write the K types. Eight bits in their place round less, so what is stored loses
        # less than it would.
        is_k_type = self._type.name.endswith("_K")
        written = GGMLQuantizationType.Q8_0 if is_k_type else self._type
        packed = gguf.quantize(weight.numpy(), written)
        values = gguf.dequantize(packed, written)
        return torch.from_numpy(np.array(values))  # a copy, because torch cannot share read-only memory

    def scales(self, weight: Tensor) -> Tensor:
        """Scales of a weight whose values are on the grid already; not of K types.

        Returns:
            (N, 2) float32: scale and offset of each block.
        """
        packed = gguf.quantize(weight.numpy(), self._type)
        return self.scales_in(packed)

    def scales_in(self, packed: np.ndarray) -> Tensor:
        """Scales of a tensor as it lies in a file.

        Args:
            packed: (rows, bytes of a row) uint8.

        Returns:
            (N, 2) float32: scale and offset of each block.
        """
        # gguf's Python package does not return scales. Read with codes that are all alike, a block gives them itself.
        _, num_bytes = gguf.GGML_QUANT_SIZES[self._type]
        blocks = packed.reshape(-1, num_bytes).copy()
        if self._type.name == "Q4_K":
            # A superblock: its scale and the scale of its offsets (two float16), 12 bytes of small scales and offsets,
            # 128 bytes of codes, two in each.
            blocks[:, 16:] = 0
            offsets = -self._values(blocks)
            blocks[:, 16:] = 0x11  # all codes 1
            blocks[:, 2:4] = 0  # no offsets
            scales = self._values(blocks)
        elif self._type.name == "Q6_K":
            # A superblock: the low four bits of its codes in 128 bytes, the high two bits in 64, small scales, and its
            # own. Code 33 stands for 1.
            blocks[:, :128] = 0x11
            blocks[:, 128:192] = 0b10101010
            scales = self._values(blocks)
            offsets = torch.zeros_like(scales)
        else:
            # A block begins with its scale, a float16.
            scale_bytes = blocks[:, :2].copy()
            float16_scales = scale_bytes.view(np.float16)
            scales = torch.from_numpy(float16_scales.astype(np.float32))
            offsets = torch.zeros_like(scales)
        return torch.cat([scales, offsets], dim=1)

    def _values(self, blocks: np.ndarray) -> Tensor:
        """The first value of each block that has a scale of its own, (N, 1)."""
        values = gguf.dequantize(blocks, self._type)
        firsts = values.reshape(-1, self.block_size)[:, :1]
        return torch.from_numpy(np.array(firsts))

    def nearest(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Nearest values with given scales and offsets, within the type's codes."""
        blocks = weight.reshape(-1, self.block_size)
        scale = scales[:, :1]
        offset = scales[:, 1:]
        # A block of zeros has the scale 0. Its codes are 0, where a division would give NaN.
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        codes = ((blocks + offset) * inverse).round().clamp(self.codes.lowest, self.codes.highest)
        return (codes * scale - offset).reshape(weight.shape)


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
