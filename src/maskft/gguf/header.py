"""The head of a GGUF file: its metadata, and where each tensor is. Tensor bytes stay on the disk.

``gguf.GGUFReader`` reads every token of the vocabulary into objects, which takes seconds and says nothing about
places; rewriting a head needs the places of its keys, so they are walked here.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskft_common.errors import UserError

from .zero_codes import block_of, type_name

MAGIC = b"GGUF"
# Version 1 had counts and lengths of 32 bits.
_VERSIONS = (2, 3)
# Magic, version, number of tensors, number of metadata keys.
_COUNTS = struct.Struct("<4sIQQ")
# The data of tensors starts at a multiple of this many bytes, unless the metadata has another number.
_ALIGNMENT_KEY = "general.alignment"
_ALIGNMENT = 32
# GGUF's numbers of the types of metadata values.
STRING = 8
ARRAY = 9
UINT64 = 10
# The types of scalars -> struct's code.
_SCALARS = {
    0: "B",  # uint8
    1: "b",  # int8
    2: "H",  # uint16
    3: "h",  # int16
    4: "I",  # uint32
    5: "i",  # int32
    6: "f",  # float32
    7: "?",  # bool
    UINT64: "Q",
    11: "q",  # int64
    12: "d",  # float64
}
# Errors that bytes of a damaged head can raise while they are read as lengths, types, texts and numbers.
_DAMAGED = (
    struct.error,
    ValueError,
    TypeError,
    KeyError,
    ArithmeticError,
    MemoryError,
)


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a file.

    Attributes:
        shape: In torch's order: (out_features, in_features).
        kind: Number of its ggml type.
        start: First byte in the file.
        num_bytes: None where this version does not know the type.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    num_bytes: int | None


@dataclass(frozen=True)
class GgufHead:
    """The part of a file before the bytes of its tensors.

    Attributes:
        path: The file.
        file_bytes: Size of the file.
        metadata: Scalars, strings and arrays of scalars (tuples) by key; of an array of strings its length.
        keys: Key -> its first byte, and the one after its value.
        tensors: Name -> place, in the order of the file.
        infos: First byte of the table of tensors, and the one after it.
        data_start: First byte of the tensors' data, aligned.
        version: Of the format.
    """

    path: Path
    file_bytes: int
    metadata: dict[str, Any]
    keys: dict[str, tuple[int, int]]
    tensors: dict[str, TensorPlace]
    infos: tuple[int, int]
    data_start: int
    version: int

    @property
    def alignment(self) -> int:
        """The tensors' data starts at a multiple of this many bytes."""
        return int(self.metadata.get(_ALIGNMENT_KEY, _ALIGNMENT))


class _Cursor:
    """Reads values one after another; beyond the end of the file struct raises."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, form: str) -> tuple:
        """Values in the format of struct, little-endian."""
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def string(self) -> str:
        """A text: its length in bytes, and UTF-8."""
        (length,) = self.take("Q")
        end = self.at + length
        # A slice beyond the end of the file is shorter, and no error.
        content = self.data[self.at : end]
        if len(content) != length:
            raise struct.error("the file ends inside a text")
        self.at = end
        return content.decode("utf-8")

    def value(self, kind: int) -> Any:
        """The value of one metadata key, see :attr:`GgufHead.metadata`."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            (scalar,) = self.take(_SCALARS[kind])
            return scalar

        # An array: the type of its elements, their number, the elements.
        element_kind, length = self.take("IQ")
        if element_kind in _SCALARS:
            code = _SCALARS[element_kind]
            return self.take(f"{length}{code}")
        if element_kind != STRING:
            raise ValueError(f"an array of type {element_kind}")
        # A vocabulary: the only way to its end leads over every length.
        for _ in range(length):
            # Not self.string(), which would copy and decode each of 100,000 tokens.
            (num_bytes,) = struct.unpack_from("<Q", self.data, self.at)
            self.at += 8 + num_bytes
        return length


def read_head(path: str | Path) -> GgufHead:
    """Read the head of a GGUF file.

    Args:
        path: The file.

    Raises:
        UserError: If the file does not exist, is not a GGUF file, is one of several parts, or is cut or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{str(path)!r} does not exist")
    if not path.is_file():
        raise UserError(f"{str(path)!r} is not a file")

    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise UserError(f"{str(path)!r} is not a GGUF file: it does not start with the letters GGUF")
        # Mapped into memory, so that only the pages of the head are read.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # A UserError has its message already, and is a ValueError too.
            try:
                head = _walk(path, data)
            except UserError:
                raise
            except _DAMAGED as error:
                kind = type(error).__name__
                raise UserError(
                    f"{str(path)!r} is cut or damaged: its head cannot be read ({kind}: {error}); download it again"
                ) from error
    _check_whole(head)
    return head


def _walk(path: Path, data: mmap.mmap) -> GgufHead:
    """Read a head from its first byte to its last: counts, metadata, table of tensors."""
    cursor = _Cursor(data)
    _, version, num_tensors, num_keys = cursor.take("4sIQQ")
    if version not in _VERSIONS:
        # Of a file in the other byte order the number is huge.
        raise UserError(
            f"{str(path)!r} is GGUF version {version}; this maskft reads little-endian versions 2 and 3: convert the "
            "model again, or a file of the other byte order with gguf-convert-endian"
        )

    # Metadata: a name, the type of the value, the value.
    metadata: dict[str, Any] = {}
    keys: dict[str, tuple[int, int]] = {}
    for _ in range(num_keys):
        start = cursor.at
        key = cursor.string()
        (kind,) = cursor.take("I")
        metadata[key] = cursor.value(kind)
        keys[key] = (start, cursor.at)

    # The table of tensors: a name, the sizes, the type, the place behind the head.
    infos_start = cursor.at
    found = []
    for _ in range(num_tensors):
        name = cursor.string()
        (num_dims,) = cursor.take("I")
        # In the file the innermost dimension comes first.
        shape = cursor.take(f"{num_dims}Q")[::-1]
        kind, offset = cursor.take("IQ")
        _check_rows(name, shape, kind)
        found.append((name, shape, kind, offset))
    infos = (infos_start, cursor.at)

    # The head is padded to the alignment.
    alignment = int(metadata.get(_ALIGNMENT_KEY, _ALIGNMENT))
    if alignment < 1:
        raise ValueError(f"{_ALIGNMENT_KEY} is {alignment}")
    num_units = -(-cursor.at // alignment)  # rounded up
    data_start = num_units * alignment

    # Offsets in the table count from there.
    tensors = {}
    for name, shape, kind, offset in found:
        tensors[name] = TensorPlace(
            shape=shape,
            kind=kind,
            start=data_start + offset,
            num_bytes=_num_bytes(shape, kind),
        )
    return GgufHead(
        path=path,
        file_bytes=len(data),
        metadata=metadata,
        keys=keys,
        tensors=tensors,
        infos=infos,
        data_start=data_start,
        version=version,
    )


def _check_rows(name: str, shape: tuple[int, ...], kind: int) -> None:
    """Raise ValueError for rows that are no whole number of blocks, which llama.cpp refuses too."""
    block = block_of(kind)
    if block is None or not shape:
        return
    block_size, _ = block
    num_columns = shape[-1]
    if num_columns % block_size != 0:
        raise ValueError(f"{name} has rows of {num_columns} weights, and {type_name(kind)} blocks of {block_size}")


def _num_bytes(shape: tuple[int, ...], kind: int) -> int | None:
    """Bytes of a tensor; None if its type is not known here."""
    block = block_of(kind)
    if block is None:
        return None
    block_size, block_bytes = block
    # A row is a whole number of blocks.
    num_blocks = math.prod(shape) // block_size
    return num_blocks * block_bytes


def _check_whole(head: GgufHead) -> None:
    """Raise for one part of a split model, for tensors over the same bytes, and for a file that is cut."""
    # Written by llama-gguf-split into every part.
    num_parts = head.metadata.get("split.count", 0)
    if isinstance(num_parts, int) and num_parts > 1:
        raise UserError(
            f"{str(head.path)!r} is one of {num_parts} parts of a model; join them first: "
            "llama-gguf-split --merge FIRST_PART WHOLE"
        )
    # Also without tensors: the head is padded in memory up to there, and the alignment may be any number.
    if head.data_start > head.file_bytes:
        raise UserError(
            f"{str(head.path)!r} is cut: its head ends at byte {head.data_start:,}, the file at {head.file_bytes:,}; "
            "download it again"
        )
    # In the order of their places. Two tensors over the same bytes could not be written one after the other.
    end = head.data_start
    for name, place in sorted(head.tensors.items(), key=lambda item: item[1].start):
        if place.start < end:
            raise UserError(
                f"{str(head.path)!r} is damaged: {name} starts at byte {place.start:,}, before the tensor in front of "
                f"it ends at {end:,}; download it again"
            )
        # Of an unknown type only the start is checked.
        num_bytes = place.num_bytes or 0
        end = place.start + num_bytes
        if end > head.file_bytes:
            raise UserError(
                f"{str(head.path)!r} is cut: {name} ends at byte {end:,}, the file at {head.file_bytes:,}; "
                "download it again"
            )


def head_bytes(
    head: GgufHead,
    added: dict[str, str | int] | None = None,
    without: str | None = None,
) -> bytes:
    """The head with other keys, padded to its alignment.

    The offsets in the table of tensors count from the end of the head, so that the table is copied as it is.

    Args:
        head: The head.
        added: Keys to add after the others: texts, and whole numbers of 64 bits.
        without: Leave out the keys that start with this.
    """
    infos_start, infos_end = head.infos
    with head.path.open("rb") as file:
        old = file.read(infos_end)

    # Keys that stay are copied byte for byte: without the added ones, the result is the old head again.
    keys = []
    for key, (start, end) in head.keys.items():
        is_left_out = without and key.startswith(without)
        if not is_left_out:
            keys.append(old[start:end])
    for key, value in (added or {}).items():
        keys.append(_key_bytes(key, value))

    # Only the number of keys differs; the tensors are the same.
    counts = _COUNTS.pack(
        MAGIC,
        head.version,
        len(head.tensors),
        len(keys),
    )
    infos = old[infos_start:infos_end]
    content = b"".join([counts, *keys, infos])
    # Zeros up to the next multiple.
    padding = bytes(-len(content) % head.alignment)
    return content + padding


def _key_bytes(key: str, value: str | int) -> bytes:
    """A metadata key: its name, the type of the value, the value."""
    name = _text_bytes(key)
    if isinstance(value, int):
        return name + struct.pack("<IQ", UINT64, value)
    kind = struct.pack("<I", STRING)
    return name + kind + _text_bytes(value)


def _text_bytes(text: str) -> bytes:
    """A text: its length in bytes, and UTF-8."""
    content = text.encode("utf-8")
    length = struct.pack("<Q", len(content))
    return length + content
