"""One mask as bytes: about 0.475 bits per weight at sparsity 0.1, exact, with its own checksum.

Layout of the byte string: a 64-byte header (magic, format version, coding, shape, number removed, sha256 of the packed
mask) followed by the payload. Three codings exist, the smallest one is written: the gaps between removed positions as
bytes, or as pairs of bytes (first all lower ones, then all upper ones), compressed with zstd; or the bitmap, eight
weights a byte.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from .. import files
from ..errors import UserError

FORMAT_VERSION = 1
PREFIX = "base_model.model."  # before the names of modules in PEFT's files
_MAGIC = b"MFTM"
# magic, format version, coding, two sizes, number removed, sha256 of version, sizes, count and packed bits
_HEADER = struct.Struct("<4sHBxIIQ32s8x")
_GAPS, _BITMAP, _WIDE_GAPS = 0, 1, 2
# The highest gap, say 255, means "255 kept weights and no removed one"; any smaller one ends at a removed weight.
_ESCAPES = {_GAPS: 255, _WIDE_GAPS: 65535}
# With fewer removed than one in so many, gaps of one byte are mostly escapes.
_FEW = 100
# What a few bytes may claim where there is no layer to compare with; the output head of Llama 3.1 405B has 2.1e9.
_MAX_NUMEL = 2**31


def encode_mask(mask: Tensor) -> Tensor:
    """Code a 2-D bool mask (True = keep) into a 1-D uint8 tensor on the CPU."""
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"a mask must be a 2-D bool tensor, got {mask.dtype} with shape {tuple(mask.shape)}")
    removed = _removed(mask)
    packed = np.packbits(removed)
    positions = np.flatnonzero(removed)
    payload, coding = packed.tobytes(), _BITMAP
    # Beyond one removed weight in two, gaps cannot be shorter than the bitmap.
    if len(positions) * 2 <= max(len(removed), 1):
        kind = _WIDE_GAPS if len(positions) * _FEW < len(removed) else _GAPS
        gaps = _compress(_gap_bytes(positions, kind))
        if len(gaps) < len(payload):
            payload, coding = gaps, kind
    header = _HEADER.pack(
        _MAGIC,
        FORMAT_VERSION,
        coding,
        *mask.shape,
        len(positions),
        _digest(FORMAT_VERSION, mask.shape, len(positions), packed),
    )
    return torch.frombuffer(bytearray(header + payload), dtype=torch.uint8)


def mask_sha256(mask: Tensor) -> str:
    """The checksum (hex) that ``mask`` would carry when coded."""
    removed = _removed(mask)
    return _digest(FORMAT_VERSION, mask.shape, int(removed.sum()), np.packbits(removed)).hex()


def _removed(mask: Tensor) -> np.ndarray:
    return ~mask.detach().cpu().contiguous().view(-1).numpy()


def is_of_mask(key: str) -> bool:
    """Whether an entry of an adapter file is a mask or its scores, and no weight."""
    return key.endswith((".mask_coded", ".mask_scores"))


def weights_sha256(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 of each tensor's dtype, shape and bytes, by the module names of the unwrapped model."""
    return {
        name.removeprefix(PREFIX): files.digest_tensors([(f"{tensor.dtype}{tuple(tensor.shape)}", tensor)])
        for name, tensor in weights.items()
    }


def decode_mask(coded: Tensor, name: str = "mask", expected: Sequence[int] | None = None) -> Tensor:
    """Decode what :func:`encode_mask` wrote; bool, True = keep.

    Args:
        coded: What was written.
        name: Of the layer, for errors.
        expected: Shape of the layer's weight. A few bytes can claim any shape, and it is compared before memory is
            taken for it.

    Raises:
        UserError: If the bytes are not a mask, are of a newer format, of another shape, or do not match their checksum.
    """
    data = _bytes(coded, name)
    version, shape, removed_count, digest, coding = _read_header(data, name)
    numel, payload = shape[0] * shape[1], data[_HEADER.size :]
    if expected is not None and shape != tuple(expected):
        raise UserError(
            f"the mask of {name} has shape {shape}, the model's weight {tuple(expected)}; wrong base model?"
        )
    try:
        if coding in _ESCAPES:
            # No valid payload is longer than one gap per removed weight plus one per 255 (65,535) kept ones.
            limit = (1 + (coding == _WIDE_GAPS)) * (removed_count + numel // _ESCAPES[coding] + 1)
            if zstandard.frame_content_size(payload) > limit:  # which decompress() would take for its bound
                raise ValueError("more gaps than weights")
            gaps: np.ndarray = np.frombuffer(
                zstandard.ZstdDecompressor().decompress(payload, max_output_size=limit), dtype=np.uint8
            )
            if coding == _WIDE_GAPS:
                gaps = gaps.reshape(2, -1).T.copy().view("<u2").reshape(-1)
            ends = np.cumsum(gaps, dtype=np.int64)
            is_removed = gaps != _ESCAPES[coding]
            ends += np.cumsum(is_removed)
            removed = np.zeros(numel, dtype=np.bool_)
            removed[ends[is_removed] - 1] = True
        elif len(payload) != (numel + 7) // 8:
            raise ValueError("another number of bits than weights")
        else:
            removed = np.unpackbits(np.frombuffer(payload, dtype=np.uint8), count=numel).view(np.bool_)
        intact = (
            int(removed.sum()) == removed_count
            and _digest(version, shape, removed_count, np.packbits(removed)) == digest
        )
    except (zstandard.ZstdError, ValueError, IndexError, MemoryError):
        intact = False
    if not intact:
        raise UserError(f"{name} is corrupted: its bytes do not match its sha256; fetch or save the adapter again")
    return torch.from_numpy(~removed).view(shape)


def mask_info(coded: Tensor, name: str = "mask") -> dict[str, Any]:
    """Header of a coded mask without decoding it: shape, num_removed, sha256 (hex), num_bytes."""
    data = _bytes(coded[: _HEADER.size] if coded.dim() else coded, name)
    _, shape, removed_count, digest, _ = _read_header(data, name)
    return {"shape": shape, "num_removed": removed_count, "sha256": digest.hex(), "num_bytes": coded.numel()}


def _bytes(coded: Tensor, name: str) -> bytes:
    if coded.dtype != torch.uint8 or coded.dim() != 1:
        raise UserError(f"{name} is corrupted: it is no row of bytes; fetch or save the adapter again")
    return coded.detach().cpu().contiguous().numpy().tobytes()


def _read_header(data: bytes, name: str) -> tuple[int, tuple[int, int], int, bytes, int]:
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise UserError(f"{name} is corrupted: it does not start with a mask header; fetch or save the adapter again")
    _, version, coding, rows, columns, removed_count, digest = _HEADER.unpack_from(data)
    if not removed_count <= rows * columns <= _MAX_NUMEL or rows * columns == 0:
        raise UserError(
            f"{name} is corrupted: it removes {removed_count} of {rows} x {columns} weights; fetch or save the adapter "
            "again"
        )
    if version > FORMAT_VERSION:
        raise UserError(
            f"{name} has mask format {version}, this maskft reads up to {FORMAT_VERSION}; "
            "upgrade: pip install -U maskft"
        )
    return version, (rows, columns), removed_count, digest, coding


def _digest(version: int, shape: Sequence[int], removed_count: int, packed: np.ndarray) -> bytes:
    content = struct.pack("<HIIQ", version, *shape, removed_count) + packed.tobytes()
    return bytes.fromhex(files.digest(content))


def _gap_bytes(positions: np.ndarray, coding: int) -> list[bytes]:
    """Number of kept weights before each removed one, with escapes for gaps that are too long."""
    escape, dtype = _ESCAPES[coding], "<u2" if coding == _WIDE_GAPS else "u1"
    gaps = np.diff(positions, prepend=-1) - 1
    escapes, out = gaps // escape, gaps.astype(dtype)
    if escapes.any():
        out = np.full(len(gaps) + int(escapes.sum()), escape, dtype)
        out[np.cumsum(escapes + 1) - 1] = gaps % escape
    return [out.tobytes()] if coding == _GAPS else [part.tobytes() for part in out.view(np.uint8).reshape(-1, 2).T]


def _compress(parts: Sequence[bytes]) -> bytes:
    """One zstd frame; each part begins a block, with a code of its own: lower bytes hardly compress, upper ones do."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=sum(map(len, parts)))
    data = b"".join(
        compressor.compress(part) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for part in parts[:-1]
    )
    return data + compressor.compress(parts[-1]) + compressor.flush()
