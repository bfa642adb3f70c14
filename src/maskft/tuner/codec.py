"""One mask as bytes: about 0.475 bits per weight at sparsity 0.1, exact, with its own checksum.

Layout of the byte string: a 64-byte header (magic, format version, coding, shape, number removed, sha256 of the packed
mask) followed by the payload. Three codings exist, the smallest one is written: the gaps between removed positions as
bytes, or as pairs of bytes (first all lower ones, then all upper ones), compressed with zstd; or the bitmap, eight
weights a byte.
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
_GAPS, _BITMAP, _WIDE_GAPS = 0, 1, 2
# The highest gap, say 255, means "255 kept weights and no removed one"; any smaller one ends at a removed weight.
_ESCAPES = {_GAPS: 255, _WIDE_GAPS: 65535}
# With fewer removed than one in so many, gaps of one byte are mostly escapes.
_FEW = 100


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
        if coding in _ESCAPES:
            # No valid payload is longer than one gap per removed weight plus one per 255 (65,535) kept ones.
            limit = (1 + (coding == _WIDE_GAPS)) * (removed_count + numel // _ESCAPES[coding] + 1)
            data = np.frombuffer(
                zstandard.ZstdDecompressor().decompress(payload, max_output_size=limit), dtype=np.uint8
            )
            gaps = data if coding == _GAPS else data.reshape(2, -1).T.copy().view("<u2").reshape(-1)
            ends = np.cumsum(gaps, dtype=np.int64)
            is_removed = gaps != _ESCAPES[coding]
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
