"""One mask as bytes: about 0.475 bits per weight at sparsity 0.1, exact, with its own checksum.

Layout of the byte string: a 64-byte header (magic, format version, coding, shape, number removed, sha256 of the packed
mask) followed by the payload. Two codings exist, the smaller one is written: the gaps between removed positions as
bytes, compressed with zstd; or the bitmap, eight weights a byte.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from .. import files
from ..errors import UserError

FORMAT_VERSION = 1
_MAGIC = b"MFTM"
# magic, format version, coding, two sizes, number removed, sha256 of version, sizes, count and packed bits
_HEADER = struct.Struct("<4sHBxIIQ32s8x")
_GAPS, _BITMAP = 0, 1
# A gap byte of 255 means "255 kept weights and no removed one"; any smaller byte ends at a removed weight.
_ESCAPE = 255


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
        gaps = zstandard.ZstdCompressor(level=1).compress(_gap_bytes(positions).tobytes())
        if len(gaps) < len(payload):
            payload, coding = gaps, _GAPS
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


def decode_mask(coded: Tensor, name: str = "mask") -> Tensor:
    """Decode what :func:`encode_mask` wrote; bool, True = keep.

    Raises:
        UserError: If the bytes are not a mask, are of a newer format, or do not match their checksum; ``name`` is in
            the message.
    """
    data = coded.detach().cpu().contiguous().numpy().tobytes()
    version, shape, removed_count, digest, coding = _read_header(data, name)
    numel, payload = shape[0] * shape[1], data[_HEADER.size :]
    try:
        if coding == _GAPS:
            # No valid payload is longer than one byte per removed weight plus one per 255 kept ones.
            limit = removed_count + numel // _ESCAPE + 1
            gaps = np.frombuffer(
                zstandard.ZstdDecompressor().decompress(payload, max_output_size=limit), dtype=np.uint8
            )
            ends = np.cumsum(gaps, dtype=np.int64)
            is_removed = gaps != _ESCAPE
            ends += np.cumsum(is_removed)
            removed = np.zeros(numel, dtype=np.bool_)
            removed[ends[is_removed] - 1] = True
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
    data = coded[: _HEADER.size].cpu().numpy().tobytes()
    _, shape, removed_count, digest, _ = _read_header(data, name)
    return {"shape": shape, "num_removed": removed_count, "sha256": digest.hex(), "num_bytes": coded.numel()}


def _read_header(data: bytes, name: str) -> tuple[int, tuple[int, int], int, bytes, int]:
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise UserError(f"{name} is corrupted: it does not start with a mask header; fetch or save the adapter again")
    _, version, coding, rows, columns, removed_count, digest = _HEADER.unpack_from(data)
    if removed_count > rows * columns:
        raise UserError(f"{name} is corrupted: it removes more weights than it has; fetch or save the adapter again")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{name} has mask format {version}, this maskft reads up to {FORMAT_VERSION}; "
            "upgrade: pip install -U maskft"
        )
    return version, (rows, columns), removed_count, digest, coding


def _digest(version: int, shape: Sequence[int], removed_count: int, packed: np.ndarray) -> bytes:
    content = struct.pack("<HIIQ", version, *shape, removed_count) + packed.tobytes()
    return bytes.fromhex(files.digest(content))


def _gap_bytes(positions: np.ndarray) -> np.ndarray:
    """Number of kept weights before each removed one, as bytes with escapes for gaps of 255 and more."""
    gaps = np.diff(positions, prepend=-1) - 1
    escapes = gaps // _ESCAPE
    if not escapes.any():
        return gaps.astype(np.uint8)
    out = np.full(len(gaps) + int(escapes.sum()), _ESCAPE, dtype=np.uint8)
    out[np.cumsum(escapes + 1) - 1] = (gaps % _ESCAPE).astype(np.uint8)
    return out
