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
# Before the names of modules in PEFT's files.
PREFIX = "base_model.model."
# Behind them: saved scores, and their checksum. That is in the file and not in the configuration, because trainers that
# resume load the file alone.
SCORES = ".mask_scores"
SCORES_SHA256 = ".mask_scores_sha256"
_MAGIC = b"MFTM"
# magic, format version, coding, rows, columns, number removed, sha256 as _digest makes it; x are unused bytes
_HEADER = struct.Struct("<4sHBxIIQ32s8x")
HEADER_BYTES = _HEADER.size
# Hashed with every mask, and the same in all format versions, so that adapters of different versions can be compared.
_DIGEST_VERSION = 1

# Codings, as numbered in the header.
_BITMAP = 1
_ANS = 3
_ZLIB = 5
# A bitmap is read six times as fast, and is written unless coding saves this share of it.
_WORTH_CODING = 0.01
# Bytes decoded at a time, which keeps the coder's 32-bit symbols small.
_CHUNK = 2**20

# Limits for files that are read without a model, where no layer says how large a mask may be. One weight removed in
# 30,000 takes more bytes than one for 2**14 weights.
_MAX_NUMEL = 2**31
_NUMEL_PER_BYTE = 2**14
# More than the matrices of 70B models have: a mask that removes nothing is its header alone.
_FREE_NUMEL = 2**28
_FREE_NUMEL_OF_ADAPTER = 2**31


def encode_mask(mask: Tensor) -> Tensor:
    """Code a 2-D bool mask (True = keep) into a 1-D uint8 tensor on the CPU.

    Raises:
        ValueError: If the mask is not a 2-D bool tensor.
        UserError: If it has no weights, or more than can be read again.
    """
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"a mask must be a 2-D bool tensor, got {mask.dtype} with shape {tuple(mask.shape)}")
    # The limits of _read_header. Checked here as well, because a mask that cannot be read again would be lost.
    if not 0 < mask.numel() <= _MAX_NUMEL:
        rows, columns = mask.shape
        raise UserError(
            f"a mask of {rows} x {columns} weights cannot be saved, the limits are 1 and {_MAX_NUMEL:,} weights; leave "
            "its layer out of target_modules"
        )

    # Row by row, whatever the memory layout of the mask is. In the file a set bit is a removed weight.
    flat = mask.detach().cpu().contiguous().view(-1)
    removed = ~flat.numpy()
    packed = np.packbits(removed)
    num_removed = int(removed.sum())

    payload, coding = _smallest(packed, removed.size, num_removed)
    # Over the packed mask and not the payload: masks are compared without decoding, whatever their coding is.
    digest = _digest(mask.shape, num_removed, packed)
    header = _HEADER.pack(
        _MAGIC,
        FORMAT_VERSION,
        coding,
        *mask.shape,
        num_removed,
        digest,
    )
    # A bytearray, because torch warns of a tensor over bytes, which cannot be written to.
    content = bytearray(header + payload)
    return torch.frombuffer(content, dtype=torch.uint8)


def is_of_mask(key: str) -> bool:
    """Whether an entry of an adapter file is a mask, its scores or their checksum, and no weight."""
    return key.endswith((".mask_coded", SCORES, SCORES_SHA256))


def scores_sha256(scores: Tensor) -> Tensor:
    """sha256 of the dtype, shape and bytes of scores; 1-D uint8 of 32 bytes, on the CPU."""
    # A bytearray, as in encode_mask.
    content = bytearray.fromhex(_tensor_sha256(scores))
    return torch.frombuffer(content, dtype=torch.uint8)


def check_scores_sha256(scores: Tensor, expected: Tensor | None, name: str) -> None:
    """Raise if saved scores are not those of their checksum; None: a file that was saved before there was one.

    Args:
        scores: The scores of a file.
        expected: Their checksum there.
        name: Of the layer, for the error.
    """
    if expected is None:
        return
    found = scores_sha256(scores)
    if not torch.equal(found, expected.cpu()):
        raise UserError(
            f"{name}: the saved scores do not match their sha256, so the file is damaged; fetch it again, or resume "
            "from another checkpoint"
        )


def _tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes: the same bytes in another shape or dtype are another tensor."""
    label = f"{tensor.dtype}{tuple(tensor.shape)}"
    return files.digest_tensors([(label, tensor)])


def weights_sha256(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 of each tensor's dtype, shape and bytes, by the module names of the unwrapped model."""
    checksums = {}
    for name, tensor in weights.items():
        module = name.removeprefix(PREFIX)
        checksums[module] = _tensor_sha256(tensor)
    return checksums


def decode_mask(
    coded: Tensor,
    name: str = "mask",
    expected: Sequence[int] | None = None,
) -> Tensor:
    """Decode the bytes that :func:`encode_mask` wrote; bool, True = keep.

    Args:
        coded: The bytes of a mask, 1-D uint8.
        name: Of the layer, for errors.
        expected: Shape of the layer's weight, compared before memory is taken for it; None: there is no layer, and a
            few bytes cannot claim any shape.

    Raises:
        UserError: If the bytes are not a mask, are of a newer format, of another shape, or do not match their checksum.
    """
    data = _bytes(coded, name)
    shape, num_removed, digest, coding = _read_header(data, name)
    rows, columns = shape
    numel = rows * columns
    payload = data[_HEADER.size :]

    # Before anything of the claimed size is allocated: the header may be a stranger's.
    if expected is not None and shape != tuple(expected):
        raise UserError(
            f"the mask of {name} has shape {shape}, the model's weight {tuple(expected)}; wrong base model?"
        )
    if expected is None and numel > _FREE_NUMEL + _NUMEL_PER_BYTE * len(payload):
        raise UserError(
            f"{name} claims {rows} x {columns} weights in {len(data)} bytes; read it with its base model (--base)"
        )

    try:
        packed = _read_packed(payload, coding, numel, num_removed)
        # With a count, the bits after the last weight are left out. The view takes the 0 and 1 as they are.
        bits = np.unpackbits(packed, count=numel)
        removed = bits.view(np.bool_)
        has_count = int(removed.sum()) == num_removed
        # Packed again, because the bits after the last weight must be zero.
        packed_again = np.packbits(removed)
        digest_of_found = _digest(shape, num_removed, packed_again)
        is_intact = has_count and digest_of_found == digest
    except (zlib.error, ValueError, IndexError, MemoryError):
        # A damaged payload may fail anywhere in the decoders, which is the same fault as a wrong checksum.
        is_intact = False
    if not is_intact:
        raise UserError(f"{name} is corrupted: its bytes do not match its sha256; fetch or save the adapter again")
    return torch.from_numpy(~removed).view(shape)


def check_claims(coded: Mapping[str, Tensor]) -> None:
    """Raise for masks that claim more weights in total than their bytes can hold; for files unpacked without a model.

    :func:`decode_mask` lets each mask claim a large matrix; 60 of them would take 16 GB. Readers that unpack one mask
    at a time do without this check: an empty mask of a 7B model is a header for each matrix.

    Args:
        coded: Module name -> coded mask.

    Raises:
        UserError: If they claim too many, or one has no valid header.
    """
    numel, _ = total_counts(coded)
    num_bytes = sum(data.numel() for data in coded.values())
    if numel > _FREE_NUMEL_OF_ADAPTER + _NUMEL_PER_BYTE * num_bytes:
        raise UserError(
            f"the adapter claims {numel:,} weights in {num_bytes:,} bytes; so many are not unpacked without its base "
            "model: name a mask that removes more, or fetch it again"
        )


def mask_info(coded: Tensor, name: str = "mask") -> dict[str, Any]:
    """Header of a coded mask without decoding it: shape, num_removed, sha256 (hex), num_bytes."""
    # A scalar cannot be sliced, and _bytes raises for it.
    header = coded[: _HEADER.size] if coded.dim() else coded
    data = _bytes(header, name)
    shape, num_removed, digest, _ = _read_header(data, name)
    return {
        "shape": shape,
        "num_removed": num_removed,
        "sha256": digest.hex(),
        "num_bytes": coded.numel(),
    }


def total_counts(coded: Mapping[str, Tensor]) -> tuple[int, int]:
    """Number of weights that coded masks (by module name) cover, and number of those that they remove."""
    numel = 0
    num_removed = 0
    for name, data in coded.items():
        info = mask_info(data, name)
        rows, columns = info["shape"]
        numel += rows * columns
        num_removed += info["num_removed"]
    return numel, num_removed


def _bytes(coded: Tensor, name: str) -> bytes:
    """The bytes of a coded mask; raises if the tensor cannot be one."""
    if coded.dtype != torch.uint8 or coded.dim() != 1:
        raise UserError(f"{name} is corrupted: it is not a 1-D tensor of bytes; fetch or save the adapter again")
    on_cpu = coded.detach().cpu().contiguous()
    return on_cpu.numpy().tobytes()


def _read_header(data: bytes, name: str) -> tuple[tuple[int, int], int, bytes, int]:
    """Shape, number removed, sha256 and coding of a mask; raises unless they can be those of one."""
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise UserError(f"{name} is corrupted: it does not start with a mask header; fetch or save the adapter again")
    _, version, coding, rows, columns, num_removed, digest = _HEADER.unpack_from(data)
    # Python's integers do not overflow: 2**32 - 1 rows and columns are a number above the limit.
    numel = rows * columns
    if numel == 0 or not num_removed <= numel <= _MAX_NUMEL:
        raise UserError(
            f"{name} is corrupted: it removes {num_removed} of {rows} x {columns} weights; fetch or save the adapter "
            "again"
        )
    if version > FORMAT_VERSION:
        raise UserError(f"{name} has mask format {version}, this maskft reads up to {FORMAT_VERSION}; use a newer one")
    # No release wrote an older version.
    if version != FORMAT_VERSION or coding not in (_BITMAP, _ANS, _ZLIB):
        raise UserError(
            f"{name} is corrupted: there is no mask format {version} with coding {coding}; fetch or save the adapter "
            "again"
        )
    return (rows, columns), num_removed, digest, coding


def _digest(
    shape: Sequence[int],
    num_removed: int,
    packed: np.ndarray,
) -> bytes:
    """sha256 of a mask, whatever its coding."""
    # Little-endian and without padding ("<"), so that every machine hashes the same bytes.
    numbers = struct.pack("<HIIQ", _DIGEST_VERSION, *shape, num_removed)
    sha256 = files.digest(numbers + packed.tobytes())
    return bytes.fromhex(sha256)


# Codings of the packed mask


def _smallest(
    packed: np.ndarray,
    numel: int,
    num_removed: int,
) -> tuple[bytes, int]:
    """The shortest payload, and its coding."""
    # The mask follows from the header alone.
    if num_removed in (0, numel):
        return b"", _ANS

    plain = packed.tobytes()
    by_ans = _write_ans(packed, numel, num_removed)
    by_zlib = zlib.compress(plain, level=1)
    if len(by_ans) <= len(by_zlib):
        payload = by_ans
        coding = _ANS
    else:
        payload = by_zlib
        coding = _ZLIB

    # Reading a bitmap is so much faster that a small gain is not worth it.
    if len(payload) > (1 - _WORTH_CODING) * len(plain):
        return plain, _BITMAP
    return payload, coding


def _model(numel: int, num_removed: int) -> Any:
    """Model of the bytes of a packed mask in which every weight is removed with the same probability."""
    # The decoder needs the encoder's probabilities bit for bit, on any machine: quotients of integers are rounded
    # correctly everywhere, powers of floats are not.
    num_kept = numel - num_removed
    # The probability of a byte depends on its number of ones alone: p^ones * (1 - p)^(8 - ones), p = removed / numel.
    by_ones = []
    for num_ones in range(9):
        num_zeros = 8 - num_ones
        numerator = num_removed**num_ones * num_kept**num_zeros
        by_ones.append(numerator / numel**8)
    of_bytes = [by_ones[byte.bit_count()] for byte in range(256)]
    probabilities = np.array(of_bytes)
    # Both options have changed their default between releases, and the code with it.
    return constriction.stream.model.Categorical(
        probabilities,
        perfect=False,
        lazy=False,
    )


def _write_ans(
    packed: np.ndarray,
    numel: int,
    num_removed: int,
) -> bytes:
    """Little-endian 32-bit words without the zero bytes at their end."""
    coder = constriction.stream.stack.AnsCoder()
    # The coder is a stack: encoded from the end, bytes are decoded from the start, and so in chunks.
    symbols = packed.astype(np.int32)
    coder.encode_reverse(symbols, _model(numel, num_removed))
    words: np.ndarray = coder.get_compressed()
    content = words.astype("<u4").tobytes()
    # _read_ans pads the last word again. The coder never ends in a zero word, so that no whole word is stripped.
    return content.rstrip(b"\0")


def _read_ans(
    payload: bytes,
    numel: int,
    num_removed: int,
) -> np.ndarray:
    """The inverse of :func:`_write_ans`; raises some error if the payload is not of such a mask."""
    # The mask is its header alone.
    if num_removed in (0, numel):
        removed = np.full(numel, num_removed > 0)
        return np.packbits(removed)

    # The zero bytes that _write_ans left out, up to a whole word.
    zeros_at_end = bytes(-len(payload) % 4)
    little_endian = np.frombuffer(payload + zeros_at_end, dtype="<u4")
    # The coder takes words in the byte order of the machine.
    words = little_endian.astype(np.uint32)
    coder = constriction.stream.stack.AnsCoder(words)
    model = _model(numel, num_removed)

    num_bytes = _num_packed_bytes(numel)
    packed = np.empty(num_bytes, dtype=np.uint8)
    for start in range(0, num_bytes, _CHUNK):
        count = min(_CHUNK, num_bytes - start)
        end = start + count
        packed[start:end] = coder.decode(model, count)
    # Decoding uses up a valid payload exactly.
    if not coder.is_empty():
        raise ValueError("more words than weights")
    return packed


def _read_packed(
    payload: bytes,
    coding: int,
    numel: int,
    num_removed: int,
) -> np.ndarray:
    """The packed mask of a payload; raises some error if they do not fit."""
    if coding == _ANS:
        return _read_ans(payload, numel, num_removed)

    num_bytes = _num_packed_bytes(numel)
    if coding == _ZLIB:
        # Limited, so that a small file cannot fill the memory; one byte more shows that it is too long.
        decompressor = zlib.decompressobj()
        payload = decompressor.decompress(payload, num_bytes + 1)
    if len(payload) != num_bytes:
        raise ValueError("another number of bits than weights")
    return np.frombuffer(payload, dtype=np.uint8)


def _num_packed_bytes(numel: int) -> int:
    return (numel + 7) // 8
