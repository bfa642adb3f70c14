"""Where GGUF's block formats keep the code of each weight, and which code is zero.

A GGUF tensor is a matrix of rows, a row a sequence of blocks: a scale (or several), and the codes of 32 or 256
weights, bit by bit. A format with a zero level has a code whose value is ``scale * 0``, whatever the scale. Writing
that code removes the weight exactly, and writing the old code back restores the byte. Scales are never touched.

The layouts are those of llama.cpp's ``ggml-common.h`` and ``ggml-quants.c``; the tests compare every format with
``gguf.dequantize``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# ggml's numbers of its types, with the names that llama.cpp prints. Numbers that are missing here were withdrawn.
TYPE_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


@dataclass(frozen=True)
class Field:
    """Some bits of every code of a block.

    Attributes:
        byte_of: Weight -> the byte of the block that holds the bits, shape (block_size,).
        shift_of: Weight -> the lowest of the bits in that byte, shape (block_size,).
        width: Number of bits.
        offset: Where the bits belong in the code, counted from its lowest bit.
    """

    byte_of: Tensor
    shift_of: Tensor
    width: int
    offset: int = 0


@dataclass(frozen=True)
class Format:
    """A block format with a zero level.

    Attributes:
        name: As llama.cpp prints it.
        block_size: Weights in a block.
        block_bytes: Bytes of a block.
        zero: The code whose value is zero.
        code_bytes: Bytes that hold one code.
        fields: Where the bits of the codes are.
    """

    name: str
    block_size: int
    block_bytes: int
    zero: int
    code_bytes: int
    fields: tuple[Field, ...]


def _float_format(name: str, num_bytes: int) -> Format:
    """A format of single floats, whose bit pattern is the code; +0.0 is all zeros."""
    # Little-endian: the first byte has the lowest bits.
    fields = []
    for byte in range(num_bytes):
        field = Field(
            byte_of=torch.tensor([byte]),
            shift_of=torch.tensor([0]),
            width=8,
            offset=8 * byte,
        )
        fields.append(field)
    return Format(
        name,
        block_size=1,
        block_bytes=num_bytes,
        zero=0,
        code_bytes=num_bytes,
        fields=tuple(fields),
    )


def _formats_of_32() -> dict[int, Format]:
    """Formats whose blocks hold 32 weights; each block begins with a float16 scale, two bytes."""
    weight = torch.arange(32)
    # Byte k of the nibbles has weight k in its low half and weight k + 16 in its high half.
    nibble_byte = weight % 16
    nibble_shift = 4 * (weight // 16)

    # A code c means scale * (c - 8).
    q4_0 = Format(
        "Q4_0",
        block_size=32,
        block_bytes=18,
        zero=8,
        code_bytes=1,
        fields=(Field(2 + nibble_byte, nibble_shift, width=4),),
    )
    # After the scale, 4 bytes with the fifth bit of each weight, then the nibbles: scale * (c - 16).
    q5_0 = Format(
        "Q5_0",
        block_size=32,
        block_bytes=22,
        zero=16,
        code_bytes=1,
        fields=(
            Field(6 + nibble_byte, nibble_shift, width=4),
            Field(2 + weight // 8, weight % 8, width=1, offset=4),
        ),
    )
    # One byte a weight, signed: scale * c. Its bits are taken as they are, so that codes read are 0 to 255.
    no_shift = torch.zeros(32, dtype=torch.int64)
    q8_0 = Format(
        "Q8_0",
        block_size=32,
        block_bytes=34,
        zero=0,
        code_bytes=1,
        fields=(Field(2 + weight, no_shift, width=8),),
    )
    return {2: q4_0, 6: q5_0, 8: q8_0}


def _formats_of_256() -> dict[int, Format]:
    """Formats whose blocks hold 256 weights: llama.cpp's k-quants."""
    # Weights that share a byte are 32, or a multiple of 32, apart. So each is addressed by its half of the block, its
    # quarter of that half, and its lane in that quarter.
    weight = torch.arange(256)
    half = weight // 128
    quarter = weight % 128 // 32  # of its half
    lane = weight % 32

    # 32 bytes of high bits, 64 bytes of pairs of low bits, then scales. A code c = 4 * high + low means
    # scale * (c - 4).
    q3_k = Format(
        "Q3_K",
        block_size=256,
        block_bytes=110,
        zero=4,
        code_bytes=1,
        fields=(
            Field(
                byte_of=32 + 32 * half + lane,
                shift_of=2 * quarter,
                width=2,
            ),
            Field(
                byte_of=lane,
                shift_of=4 * half + quarter,
                width=1,
                offset=2,
            ),
        ),
    )
    # 128 bytes of nibbles, 64 bytes of pairs of high bits, then scales. A code c = 16 * high + low means
    # scale * (c - 32).
    q6_k = Format(
        "Q6_K",
        block_size=256,
        block_bytes=210,
        zero=32,
        code_bytes=1,
        fields=(
            Field(
                byte_of=64 * half + 32 * (quarter % 2) + lane,
                shift_of=4 * (quarter // 2),
                width=4,
            ),
            Field(
                byte_of=128 + 32 * half + lane,
                shift_of=2 * quarter,
                width=2,
                offset=4,
            ),
        ),
    )
    return {11: q3_k, 14: q6_k}


def _formats() -> dict[int, Format]:
    """Number of a ggml type -> its format, for the types that have a zero level."""
    floats = {
        0: _float_format("F32", 4),
        1: _float_format("F16", 2),
        30: _float_format("BF16", 2),
    }
    return {**floats, **_formats_of_32(), **_formats_of_256()}


# Left out are types without a zero level, such as those with a minimum in each block (Q4_1, Q4_K) or a table of values
# that lacks zero (IQ4_NL).
FORMATS = _formats()
NAMES_WITH_ZERO = tuple(FORMATS[kind].name for kind in sorted(FORMATS))
# Weights in a block and its bytes, of the types that are not in FORMATS: to know where a tensor ends.
_OTHER_BLOCKS = {
    "Q4_1": (32, 20),
    "Q5_1": (32, 24),
    "Q8_1": (32, 40),
    "Q2_K": (256, 84),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q8_K": (256, 292),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ3_XXS": (256, 98),
    "IQ1_S": (256, 50),
    "IQ4_NL": (32, 18),
    "IQ3_S": (256, 110),
    "IQ2_S": (256, 82),
    "IQ4_XS": (256, 136),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "F64": (1, 8),
    "IQ1_M": (256, 56),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
}
# Types that have a zero level, but whose layout is not described here: they are rare as weights.
_UNKNOWN_LAYOUT = {
    "Q8_1",
    "Q8_K",
    "I8",
    "I16",
    "I32",
    "I64",
    "F64",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
    "NVFP4",
}


def type_name(kind: int) -> str:
    """Name of a ggml type."""
    return TYPE_NAMES.get(kind, f"ggml type {kind}")


def block_of(kind: int) -> tuple[int, int] | None:
    """Number of weights in a block of a ggml type, and of its bytes; None for a type that is not known here."""
    form = FORMATS.get(kind)
    if form is not None:
        return form.block_size, form.block_bytes
    return _OTHER_BLOCKS.get(type_name(kind))


def why_not_writable(kind: int) -> str:
    """Name of a ggml type that is not in ``FORMATS``, and the reason why it is not, for messages."""
    name = type_name(kind)
    # A type that is newer than this table may have a zero, too.
    if name in _UNKNOWN_LAYOUT or kind not in TYPE_NAMES:
        return f"{name}, whose codes maskft cannot write"
    return f"{name}, which has no code for zero"


def read_codes(blocks: Tensor, form: Format) -> Tensor:
    """Codes of the weights in ``blocks``.

    Args:
        blocks: Bytes, shape (num_blocks, block_bytes), uint8.
        form: Their format.

    Returns:
        Shape (num_blocks, block_size), int32; of four-byte floats the bit pattern, which may be negative.
    """
    device = blocks.device
    codes = torch.zeros(
        len(blocks),
        form.block_size,
        dtype=torch.int32,
        device=device,
    )
    for field in form.fields:
        byte_of = field.byte_of.to(device)
        shift_of = field.shift_of.to(device)
        # For each weight its byte, shape (num_blocks, block_size), as integers that the bits can move in.
        bytes_of_weights = blocks[:, byte_of].int()
        # The bits of the field move to the lowest places, and the others are cut off.
        bits = bytes_of_weights >> shift_of.int()
        all_bits = 2**field.width - 1
        codes |= (bits & all_bits) << field.offset
    return codes


def write_codes(
    blocks: Tensor,
    codes: Tensor | int,
    where: Tensor,
    form: Format,
) -> None:
    """Write codes into ``blocks`` in place, and leave every other bit as it is.

    Args:
        blocks: Bytes, shape (num_blocks, block_bytes), uint8.
        codes: Shape (num_blocks, block_size), int32, or one code for all.
        where: Which weights get one, shape (num_blocks, block_size), bool.
        form: The format.
    """
    device = blocks.device
    for field in form.fields:
        byte_of = field.byte_of.to(device)
        all_bits = 2**field.width - 1
        # Weights that share a byte have different shifts: one shift at a time, no byte is written twice.
        for shift in field.shift_of.unique().tolist():
            weights = (field.shift_of == shift).nonzero().squeeze(1)
            weights = weights.to(device)
            places = byte_of[weights]

            # The bits of the new codes, where they belong in a byte.
            if isinstance(codes, int):
                bits_of_code = (codes >> field.offset) & all_bits
                bits = torch.tensor(
                    bits_of_code << shift,
                    dtype=torch.uint8,
                    device=device,
                )
            else:
                bits_of_codes = (codes[:, weights] >> field.offset) & all_bits
                bits = (bits_of_codes << shift).to(torch.uint8)

            # Only the bits of the field change, and only in the weights that get a code.
            other_bits = 0xFF ^ (all_bits << shift)
            old = blocks[:, places]
            new = (old & other_bits) | bits
            gets_code = where[:, weights]
            blocks[:, places] = torch.where(gets_code, new, old)


def write_zeros(rows: Tensor, removed: Tensor, form: Format) -> None:
    """Write the zero code of every removed weight into packed rows, in place.

    Args:
        rows: Shape (out_features, bytes of a row), uint8, contiguous.
        removed: Shape (out_features, in_features), bool.
        form: The format.
    """
    # Rows are whole numbers of blocks. A view of the bytes, so that writing to it writes to the rows.
    blocks = rows.view(-1, form.block_bytes)
    where = removed.reshape(-1, form.block_size)
    write_codes(blocks, form.zero, where, form)


def removed_codes(rows: Tensor, removed: Tensor, form: Format) -> Tensor:
    """Codes of the removed weights in row order, shape (num_removed,), int32; see :func:`write_zeros`."""
    blocks = rows.view(-1, form.block_bytes)
    where = removed.reshape(-1, form.block_size)
    codes = read_codes(blocks, form)
    return codes[where]


def restore_codes(
    rows: Tensor,
    removed: Tensor,
    codes: Tensor,
    form: Format,
) -> None:
    """Write back the codes that :func:`removed_codes` read before :func:`write_zeros`, in place."""
    blocks = rows.view(-1, form.block_bytes)
    where = removed.reshape(-1, form.block_size)
    # One code for each weight, as write_codes takes them; only those of removed weights are written.
    full = torch.zeros(
        where.shape,
        dtype=torch.int32,
        device=where.device,
    )
    full[where] = codes.to(where.device)
    write_codes(blocks, full, where, form)


def codes_to_bytes(codes: Tensor, form: Format) -> bytes:
    """Codes (int32) as little-endian bytes, ``code_bytes`` each."""
    # (num_codes, 4): a view of the integers' memory.
    as_bytes = codes.contiguous().view(torch.uint8).view(-1, 4)
    # On a little-endian machine the bytes of a small code come first, and the others are zero.
    stored = as_bytes[:, : form.code_bytes].contiguous()
    return stored.numpy().tobytes()


def codes_from_bytes(content: bytes, form: Format) -> Tensor:
    """The inverse of :func:`codes_to_bytes`; shape (num_codes,), int32."""
    if not content:  # torch.frombuffer takes no empty buffer
        return torch.zeros(0, dtype=torch.int32)
    # A bytearray, because torch warns of buffers that cannot be written to.
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    # The bytes that were not stored are zero.
    stored = flat.view(-1, form.code_bytes)
    as_bytes = torch.zeros(len(stored), 4, dtype=torch.uint8)
    as_bytes[:, : form.code_bytes] = stored
    return as_bytes.view(torch.int32).squeeze(1)


def why_no_zero(tensor: str, kind: int) -> str | None:
    """Why a mask cannot be written into a tensor of this type, with the way out; None where it can.

    Args:
        tensor: Name in the file, such as ``blk.3.ffn_gate.weight``.
        kind: Number of its ggml type.
    """
    if kind in FORMATS:
        return None
    # llama-quantize takes the part of the name that all layers share: ffn_gate. It looks for it anywhere in a name, so
    # that "output" would be attn_output as well; for that tensor it has an option.
    _, _, part = tensor.removesuffix(".weight").rpartition(".")
    option = f"--tensor-type {part}=q5_0"
    if part == "output":
        option = "--output-tensor-type q5_0"
    return (
        f"{tensor} is {why_not_writable(kind)}; quantise the model with "
        f"`llama-quantize {option}` (supported: {', '.join(NAMES_WITH_ZERO)})"
    )
