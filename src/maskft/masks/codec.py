"""One mask as bytes: the entropy of its sparsity, 0.469 bits per weight at 0.1; exact, with its own checksum.

Layout of the byte string: a 64-byte header (magic, format version, coding, shape, number removed, sha256 of the packed
mask) followed by the payload. The mask is packed, eight weights a byte, and the smallest of three codings is written:

- the bytes by an asymmetric numeral system (``constriction``) whose model is the header's count: every weight is
  removed with the probability num_removed / numel, so that nothing is stored beside the words;
- the bytes compressed by zlib, for masks with structure (whole rows, whole columns);
- the bytes as they are, where no coding saves 1 %.

A mask that removes nothing, or everything, is its header alone.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import constriction
import numpy as np
import torch
from torch import Tensor

from maskft_common import files
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_FORMAT_VERSION

FORMAT_VERSION = ADAPTER_FORMAT_VERSION
PREFIX = "base_model.model."  # before the names of modules in PEFT's files
_MAGIC = b"MFTM"
# magic, format version, coding, two sizes, number removed, sha256 of 1, sizes, count and packed bits
_HEADER = struct.Struct("<4sHBxIIQ32s8x")
HEADER_BYTES = _HEADER.size
# A part of the checksum: it names the mask whatever the format, and adapters are compared by it.
_DIGEST_VERSION = 1
_BITMAP, _ANS, _ZLIB = 1, 3, 5
# A bitmap is read six times as fast, and is written unless this share of it is saved.
_WORTH_CODING = 0.01
_CHUNK = 2**20  # bytes decoded at a time, which keeps the coder's 32-bit symbols small
# What a few bytes may claim where there is no layer to compare with: a matrix of 67 million weights, and more with so
# many weights to a byte. One weight removed in 30,000 takes more.
_FREE_NUMEL, _NUMEL_PER_BYTE, _MAX_NUMEL = 2**26, 2**14, 2**31


def encode_mask(mask: Tensor) -> Tensor:
    """Code a 2-D bool mask (True = keep) into a 1-D uint8 tensor on the CPU."""
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"a mask must be a 2-D bool tensor, got {mask.dtype} with shape {tuple(mask.shape)}")
    removed = ~mask.detach().cpu().contiguous().view(-1).numpy()
    packed, count = np.packbits(removed), int(removed.sum())
    payload, coding = _smallest(packed, removed.size, count)
    digest = _digest(mask.shape, count, packed)
    header = _HEADER.pack(_MAGIC, FORMAT_VERSION, coding, *mask.shape, count, digest)
    return torch.frombuffer(bytearray(header + payload), dtype=torch.uint8)


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
        expected: Shape of the layer's weight, compared before memory is taken for it; None: there is no layer, and a
            few bytes cannot claim any shape.

    Raises:
        UserError: If the bytes are not a mask, are of a newer format, of another shape, or do not match their checksum.
    """
    data = _bytes(coded, name)
    shape, removed_count, digest, coding = _read_header(data, name)
    numel, payload = shape[0] * shape[1], data[_HEADER.size :]
    if expected is not None and shape != tuple(expected):
        raise UserError(
            f"the mask of {name} has shape {shape}, the model's weight {tuple(expected)}; wrong base model?"
        )
    if expected is None and numel > _FREE_NUMEL + _NUMEL_PER_BYTE * len(payload):
        raise UserError(
            f"{name} claims {shape[0]} x {shape[1]} weights in {len(data)} bytes; read it with its base model (--base)"
        )
    try:
        packed = _read_packed(payload, coding, numel, removed_count)
        removed = np.unpackbits(packed, count=numel).view(np.bool_)
        intact = int(removed.sum()) == removed_count and _digest(shape, removed_count, np.packbits(removed)) == digest
    except (zlib.error, ValueError, IndexError, MemoryError):
        intact = False
    if not intact:
        raise UserError(f"{name} is corrupted: its bytes do not match its sha256; fetch or save the adapter again")
    return torch.from_numpy(~removed).view(shape)


def mask_info(coded: Tensor, name: str = "mask") -> dict[str, Any]:
    """Header of a coded mask without decoding it: shape, num_removed, sha256 (hex), num_bytes."""
    data = _bytes(coded[: _HEADER.size] if coded.dim() else coded, name)
    shape, removed_count, digest, _ = _read_header(data, name)
    return {"shape": shape, "num_removed": removed_count, "sha256": digest.hex(), "num_bytes": coded.numel()}


def _bytes(coded: Tensor, name: str) -> bytes:
    if coded.dtype != torch.uint8 or coded.dim() != 1:
        raise UserError(f"{name} is corrupted: it is not a 1-D tensor of bytes; fetch or save the adapter again")
    return coded.detach().cpu().contiguous().numpy().tobytes()


def _read_header(data: bytes, name: str) -> tuple[tuple[int, int], int, bytes, int]:
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise UserError(f"{name} is corrupted: it does not start with a mask header; fetch or save the adapter again")
    _, version, coding, rows, columns, removed_count, digest = _HEADER.unpack_from(data)
    if not removed_count <= rows * columns <= _MAX_NUMEL or rows * columns == 0:
        raise UserError(
            f"{name} is corrupted: it removes {removed_count} of {rows} x {columns} weights; fetch or save the adapter "
            "again"
        )
    if version > FORMAT_VERSION:
        raise UserError(f"{name} has mask format {version}, this maskft reads up to {FORMAT_VERSION}; use a newer one")
    if version != FORMAT_VERSION or coding not in (_BITMAP, _ANS, _ZLIB):
        raise UserError(
            f"{name} is corrupted: there is no mask format {version} with coding {coding}; fetch or save the adapter "
            "again"
        )
    return (rows, columns), removed_count, digest, coding


def _digest(shape: Sequence[int], removed_count: int, packed: np.ndarray) -> bytes:
    content = struct.pack("<HIIQ", _DIGEST_VERSION, *shape, removed_count) + packed.tobytes()
    return bytes.fromhex(files.digest(content))


# Codings of the packed mask


def _smallest(packed: np.ndarray, numel: int, removed_count: int) -> tuple[bytes, int]:
    """The shortest payload, and its coding."""
    if removed_count in (0, numel):
        return b"", _ANS
    plain = packed.tobytes()
    found = [(_write_ans(packed, numel, removed_count), _ANS), (zlib.compress(plain, level=1), _ZLIB)]
    shortest = min(found, key=lambda each: len(each[0]))
    return shortest if len(shortest[0]) <= (1 - _WORTH_CODING) * len(plain) else (plain, _BITMAP)


def _model(numel: int, removed_count: int) -> Any:
    """Model of the bytes of a packed mask in which every weight is removed with the same probability."""
    # Quotients of integers are rounded correctly everywhere; powers of floats are not, and code otherwise.
    by_ones = [removed_count**ones * (numel - removed_count) ** (8 - ones) / numel**8 for ones in range(9)]
    probabilities = np.array([by_ones[byte.bit_count()] for byte in range(256)])
    # Both options have changed their default between releases, and the code with it.
    return constriction.stream.model.Categorical(probabilities, perfect=False, lazy=False)


def _write_ans(packed: np.ndarray, numel: int, removed_count: int) -> bytes:
    """Little-endian 32-bit words without the zero bytes at their end."""
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(packed.astype(np.int32), _model(numel, removed_count))
    words: np.ndarray = coder.get_compressed()
    return words.astype("<u4").tobytes().rstrip(b"\0")


def _read_ans(payload: bytes, numel: int, removed_count: int) -> np.ndarray:
    num_bytes = (numel + 7) // 8
    if removed_count in (0, numel):
        return np.packbits(np.full(numel, removed_count > 0))
    words = np.frombuffer(payload + bytes(-len(payload) % 4), dtype="<u4").astype(np.uint32)
    coder, model = constriction.stream.stack.AnsCoder(words), _model(numel, removed_count)
    packed = np.empty(num_bytes, dtype=np.uint8)
    for start in range(0, num_bytes, _CHUNK):
        packed[start : start + _CHUNK] = coder.decode(model, min(_CHUNK, num_bytes - start))
    if not coder.is_empty():
        raise ValueError("more words than weights")
    return packed


def _read_packed(payload: bytes, coding: int, numel: int, removed_count: int) -> np.ndarray:
    if coding == _ANS:
        return _read_ans(payload, numel, removed_count)
    if coding == _ZLIB:
        payload = zlib.decompressobj().decompress(payload, (numel + 7) // 8 + 1)
    if len(payload) != (numel + 7) // 8:
        raise ValueError("another number of bits than weights")
    return np.frombuffer(payload, dtype=np.uint8)
