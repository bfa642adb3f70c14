"""A mask written into a GGUF file, taken out of it again, and checked in it.

The result is the base file with the zero code at every removed weight, and keys named ``maskft.*`` in its metadata:
which mask, sha256 of the base file, and the codes that were removed. So one file is served, and the mask and this file
give back the base bit for bit. (A second file for the codes would be lost, and the base itself may be gone: ``ollama``
and caches of the hub rename and delete.)

Files are read and written in pieces: memory holds one mask, a piece of its tensor and the removed codes. Only where the
base is compared with the one that the mask was trained over, one tensor at a time is in memory as floats.
"""

from __future__ import annotations

import base64
import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from maskft_common import __version__
from maskft_common.errors import UserError
from maskft_common.files import digest_now, whole_file

from ..gguf.header import GgufHead, head_bytes, read_head
from ..gguf.names import dequantised, find_tensors, to_file_order
from ..gguf.zero_codes import (
    FORMATS,
    Format,
    codes_from_bytes,
    codes_to_bytes,
    removed_codes,
    restore_codes,
    type_name,
    write_zeros,
)
from .codec import decode_mask, mask_info, total_counts
from .fingerprints import weights_fingerprint
from .mask_set import AdapterConfig, read_coded, read_config

# Keys of the metadata. --undo leaves out all that begin with the prefix, including keys that a later version adds.
PREFIX = "maskft."
_MASK = "maskft.mask_sha256"
_BASE = "maskft.base_sha256"
_COUNT = "maskft.num_removed"
# In the order of the file, deflated, base64. A text, because readers of GGUF take an array apart into its elements.
_CODES = "maskft.removed_codes"
_VERSION = "maskft.version"

# llama.cpp reads no text of more bytes: GGUF_MAX_STRING_LENGTH of its gguf.cpp.
_MAX_TEXT = 2**30
# Bytes of unchanged data that are copied at a time.
_PIECE_BYTES = 2**24
# A mask that was trained in float16, or combined of masks of other modules.
_NO_FINGERPRINT = (
    "not checked: whether the mask was trained over these weights, because it records no fingerprint of them"
)

# Whole rows of about so many at a time.
_PIECE_WEIGHTS = 2**22


def merge_into_gguf(
    adapter: str | Path,
    gguf: str | Path,
    output: str | Path,
    accept_other_base: bool = False,
) -> list[str]:
    """Write a mask into a copy of a GGUF file, exactly.

    Args:
        adapter: Adapter folder.
        gguf: The base, never changed.
        output: The new file.
        accept_other_base: Also write the mask into other weights than it was trained over; a line says which.

    Returns:
        Lines that report it.

    Raises:
        UserError: If something does not fit; nothing is left half-written then.
    """
    output = Path(output)
    _check_output(output)
    head = read_head(gguf)
    check_takes_mask(head)
    masks = _Masks.of_adapter(adapter, head)
    known = _check_base(masks, head, accept_other_base)

    # From here on the file is read three times: for the codes, which are part of the head and so come before the data;
    # for the sha256 of the base, which is in the head as well; and for the data.
    added = {
        _MASK: masks.config.mask_sha256,
        _BASE: digest_now(head.path),
        _COUNT: masks.num_removed,
        _CODES: _encode_codes(masks),
        _VERSION: __version__,
    }
    with _new_file(output) as file:
        file.write(head_bytes(head, added))
        for piece in masks.patched():
            file.write(piece)
    return [
        f"{output}: {masks.num_removed:,} of {masks.numel:,} weights in {len(masks.tensors)} tensors "
        f"({masks.type_names}) set to zero; every other value and every scale is the base's",
        known,
    ]


def check_takes_mask(head: GgufHead) -> None:
    """Raise for a file that cannot take a mask and give back its bytes later, whatever the mask.

    Raises:
        UserError: If it holds a mask already, a key of ours, or a head that cannot be written again.
    """
    if _MASK in head.metadata:
        raise UserError(
            f"{str(head.path)!r} already holds a mask ({str(head.metadata[_MASK])[:12]}); use its base, or take it out "
            "first: maskft merge MASK --gguf FILE --undo --output BASE.gguf"
        )
    # --undo would leave such a key out, and not give back this file.
    ours = [key for key in head.metadata if key.startswith(PREFIX)]
    if ours:
        raise UserError(
            f"{str(head.path)!r} has the key {ours[0]!r} without a mask; take it out first: gguf-new-metadata "
            f"--remove-metadata {ours[0]}"
        )
    # --undo writes the head from its parts, and has to give back the base byte for byte.
    if not _can_be_rewritten(head):
        raise UserError(
            f"{str(head.path)!r} has bytes in its head that --undo could not restore; write it again with "
            "llama-quantize"
        )


def undo_in_gguf(
    adapter: str | Path,
    gguf: str | Path,
    output: str | Path,
) -> list[str]:
    """Take a mask out of a GGUF file: the base's bytes, checked by their sha256.

    Args:
        adapter: Folder of the mask that is in the file.
        gguf: A file that :func:`merge_into_gguf` wrote; never changed.
        output: The new file.

    Returns:
        Lines that report it.

    Raises:
        UserError: If the file does not hold this mask, or something else in it was changed.
    """
    output = Path(output)
    _check_output(output)
    head = read_head(gguf)
    masks = _masks_in(adapter, head)
    # Computed while the file is written, so that it is not read once more.
    digest = hashlib.sha256()
    with _new_file(output) as file:
        for piece in masks.base_file():
            digest.update(piece)
            file.write(piece)
        # Before the file gets its name: with another sha256 it is deleted.
        sha256 = digest.hexdigest()
        _check_digest(sha256, head)
    return [f"{output}: {masks.num_removed:,} weights restored; sha256 {sha256} is that of the base"]


def verify_gguf(
    adapter: str | Path,
    gguf: str | Path,
    base: str | Path | None = None,
) -> list[str]:
    """Check that a GGUF file is its base with exactly this mask; returns one line per check that passed.

    Args:
        adapter: Folder of the mask.
        gguf: The file.
        base: The base file to compare with; None: with the sha256 that was recorded when the mask was merged.

    Raises:
        UserError: At the first check that fails.
    """
    head = read_head(gguf)
    if base is not None:
        # For its errors, before minutes of reading: the file is missing, or is not a GGUF file.
        read_head(base)
    masks = _masks_in(adapter, head)
    version = head.metadata.get(_VERSION)
    passed = [f"holds the mask {masks.config.mask_sha256[:12]}, merged by maskft {version}"]

    # Restoring the codes checks that each removed weight is zero.
    digest = hashlib.sha256()
    for piece in masks.base_file():
        digest.update(piece)
    sha256 = digest.hexdigest()
    passed.append(f"all {masks.num_removed:,} removed weights of {masks.numel:,} are zero")

    _check_digest(sha256, head)
    passed.append(f"with their codes restored the file is its base: sha256 {sha256}")

    if base is not None:
        if digest_now(Path(base)) != sha256:
            raise UserError(f"{str(base)!r} is not the base of {str(gguf)!r}: its sha256 is not {sha256}")
        passed.append(f"that is {base}")
    if masks.config.base_fingerprint is None:
        passed.append(_NO_FINGERPRINT)
    return passed


def _masks_in(adapter: str | Path, head: GgufHead) -> _Masks:
    """The masks of an adapter, which must be the one in the file, with the codes that it removed."""
    # The value may have any type: the file may be a stranger's.
    found = head.metadata.get(_MASK)
    if found is None:
        raise UserError(f"{str(head.path)!r} holds no mask: maskft merge writes one into it")
    masks = _Masks.of_adapter(adapter, head)
    if found != masks.config.mask_sha256:
        raise UserError(
            f"{str(head.path)!r} holds another mask ({str(found)[:12]}) than {str(adapter)!r} "
            f"({masks.config.mask_sha256[:12]})"
        )
    # The base's head is written from the keys and tensors that were read, and counts no removed weights.
    if not _can_be_rewritten(head) or head.metadata.get(_COUNT) != masks.num_removed:
        raise UserError(
            f"the head of {str(head.path)!r} was changed after the merge: merge the mask into the base again"
        )
    # Their number follows from the mask, which has just been found to be the one in the file.
    masks.codes = _decode_codes(head, masks.num_code_bytes)
    return masks


def _encode_codes(masks: _Masks) -> str:
    """The codes of the removed weights as a text for the metadata; raises if llama.cpp could not read it."""
    # Piece by piece: the codes of a large mask take more memory than deflated.
    compressor = zlib.compressobj()
    packed = bytearray()
    for codes in masks.removed_codes():
        packed += compressor.compress(codes)
    packed += compressor.flush()
    text = base64.b64encode(packed).decode("ascii")
    if len(text) > _MAX_TEXT:
        raise UserError(
            f"the codes of {masks.num_removed:,} removed weights take {len(text):,} bytes of metadata, of which "
            f"llama.cpp reads {_MAX_TEXT:,}: merge into a file of fewer bits, or use a mask that removes fewer weights"
        )
    return text


def _decode_codes(head: GgufHead, num_bytes: int) -> bytes:
    """The removed codes in the metadata of a file; raises unless they have this many bytes."""
    problem = UserError(f"{str(head.path)!r}: its {_CODES} is damaged; merge the mask into the base again")
    # Damage ends in one of the errors below: the key is missing, or is not text, not base64, or not deflated.
    try:
        # Without `validate` characters outside of the alphabet are skipped.
        packed = base64.b64decode(head.metadata[_CODES], validate=True)
        # Limited, so that a small text cannot fill the memory; one byte more shows that there are too many.
        decompressor = zlib.decompressobj()
        codes = decompressor.decompress(packed, num_bytes + 1)
    except (KeyError, TypeError, ValueError, zlib.error):
        raise problem from None
    if len(codes) != num_bytes:
        raise problem
    return codes


def _check_digest(found: str, head: GgufHead) -> None:
    """Raise unless ``found``, of the file without its mask, is the sha256 that was recorded of the base."""
    recorded = head.metadata.get(_BASE)
    if found != recorded:
        raise UserError(
            f"{str(head.path)!r} is not its base with this mask: without the mask its sha256 is {found[:12]}, the "
            f"base's was {str(recorded)[:12]}; something else was changed"
        )


def _check_base(masks: _Masks, head: GgufHead, accept_other_base: bool) -> str:
    """Compare the file's weights with those that the mask was trained over; returns the line to print."""
    config = masks.config
    if config.base_fingerprint is None:
        return _NO_FINGERPRINT

    expected = config.base_fingerprint
    # By name, as base_fingerprint() sorts the layers of a model.
    modules = sorted(masks.tensors)
    # A generator: one matrix is in memory at a time.
    weights = ((module, dequantised(head, masks.tensors[module])) for module in modules)
    found = weights_fingerprint(weights)
    if found == expected:
        return "the masked tensors hold the weights that the mask was trained over (fingerprints match)"

    difference = (
        f"the mask was trained over other weights ({config.base_model_name_or_path}, fingerprint {expected[:12]}) than "
        f"{str(head.path)!r} holds ({masks.type_names}, {found[:12]})"
    )
    if not accept_other_base:
        raise UserError(
            f"{difference}; train over this file (maskft train --gguf_file), or, if it is the same model in another "
            "precision, add --accept_other_base and measure the result"
        )
    return f"{difference}; measure the result before you serve it"


@dataclass
class _Masks:
    """The masks of an adapter over the tensors of one file.

    Attributes:
        config: The adapter's configuration.
        coded: Module name -> its mask, coded.
        head: The file's.
        tensors: Module name -> name of its tensor.
        codes: Codes that were removed, in the order of the file; empty before they are.
    """

    config: AdapterConfig
    coded: Mapping[str, Tensor]
    head: GgufHead
    tensors: dict[str, str]
    codes: bytes = b""

    @classmethod
    def of_adapter(cls, adapter: str | Path, head: GgufHead) -> _Masks:
        """Read an adapter; raises if it is more than zeros, or does not fit the file."""
        config = read_config(adapter)
        if config.removed_value != "zero":
            raise UserError(
                f"adapter {str(adapter)!r} gives removed weights the values of {config.removed_value_model}; only "
                "zero can be written into a quantised file"
            )
        if config.weights_sha256:
            raise UserError(
                f"adapter {str(adapter)!r} also replaces weights ({', '.join(config.weights_sha256)}), which a mask "
                "in a quantised file cannot; train without modules_to_save"
            )
        coded = read_coded(adapter)
        shapes = {}
        for module, data in coded.items():
            info = mask_info(data, module)
            shapes[module] = info["shape"]
        # Before a mask is decoded: it raises unless every tensor has the shape that its mask claims.
        tensors = find_tensors(head, shapes)
        return cls(config, coded, head, tensors)

    @property
    def type_names(self) -> str:
        """Names of the ggml types of the tensors, for messages."""
        names = set()
        for tensor in self.tensors.values():
            place = self.head.tensors[tensor]
            names.add(type_name(place.kind))
        return ", ".join(sorted(names))

    @property
    def numel(self) -> int:
        """Number of weights that the masks cover."""
        numel, _ = total_counts(self.coded)
        return numel

    @property
    def num_removed(self) -> int:
        """Number of weights that the masks remove."""
        _, num_removed = total_counts(self.coded)
        return num_removed

    @property
    def num_code_bytes(self) -> int:
        """Bytes of the codes of all removed weights."""
        num_bytes = 0
        for module, form in self._in_order():
            info = mask_info(self.coded[module])
            num_bytes += info["num_removed"] * form.code_bytes
        return num_bytes

    def removed_codes(self) -> Iterator[bytes]:
        """Codes of the removed weights, tensor by tensor in the order of the file."""
        with self.head.path.open("rb") as file:
            for module, form in self._in_order():
                for rows, removed in self._pieces(file, module, form):
                    codes = removed_codes(rows, removed, form)
                    yield codes_to_bytes(codes, form)

    def patched(self) -> Iterator[bytes]:
        """The data of all tensors, removed weights at zero."""
        with self.head.path.open("rb") as file:
            at = self.head.data_start  # first byte that is not written yet
            for module, form in self._in_order():
                place = self.head.tensors[self.tensors[module]]
                # The tensors between the last masked one and this one are not changed.
                yield from _copy(file, at, place.start)
                for rows, removed in self._pieces(file, module, form):
                    write_zeros(rows, removed, form)
                    yield rows.numpy().tobytes()
                at = place.start + place.num_bytes
            yield from _copy(file, at, self.head.file_bytes)

    def base_file(self) -> Iterator[bytes]:
        """The file without the mask: its head, and the data of all tensors with the removed codes restored.

        Raises:
            UserError: If a removed weight is not zero.
        """
        # The offsets of tensors count from the end of the head, so that the table in it is right without the keys.
        yield head_bytes(self.head, without=PREFIX)

        used = 0  # bytes of codes
        with self.head.path.open("rb") as file:
            at = self.head.data_start  # first byte that is not written yet
            for module, form in self._in_order():
                tensor = self.tensors[module]
                place = self.head.tensors[tensor]
                yield from _copy(file, at, place.start)
                for rows, removed in self._pieces(file, module, form):
                    # A removed weight that is not zero was changed after the merge.
                    are_zero = removed_codes(rows, removed, form) == form.zero
                    if not bool(are_zero.all()):
                        raise UserError(f"{str(self.head.path)!r}: {tensor} has weights where the mask removes them")
                    # The codes of this piece follow those of the pieces before it.
                    num_bytes = int(removed.sum()) * form.code_bytes
                    stored = self.codes[used : used + num_bytes]
                    used += num_bytes
                    codes = codes_from_bytes(stored, form)
                    restore_codes(rows, removed, codes, form)
                    yield rows.numpy().tobytes()
                at = place.start + place.num_bytes
            yield from _copy(file, at, self.head.file_bytes)

    def _in_order(self) -> list[tuple[str, Format]]:
        """Modules in the order of their tensors in the file, with the formats of these."""
        places = {}
        for module, tensor in self.tensors.items():
            places[module] = self.head.tensors[tensor]

        # The codes are stored in this order, and every function that reads them has to keep it.
        in_order = []
        for module in sorted(places, key=lambda module: places[module].start):
            form = FORMATS[places[module].kind]
            in_order.append((module, form))
        return in_order

    def _pieces(
        self,
        file: BinaryIO,
        module: str,
        form: Format,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Packed rows of a tensor, and which of their weights are removed; some rows at a time."""
        tensor = self.tensors[module]
        place = self.head.tensors[tensor]
        num_rows, num_columns = place.shape
        # The mask is in transformers' order, and the rows of some tensors are in another one.
        mask = decode_mask(self.coded[module], module, place.shape)
        removed = ~to_file_order(self.head, tensor, mask)

        # ggml quantises row by row: a block never reaches into the next row.
        blocks_in_row = num_columns // form.block_size
        row_bytes = blocks_in_row * form.block_bytes
        step = max(1, _PIECE_WEIGHTS // num_columns)  # rows
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            start = place.start + first * row_bytes
            content = _read(file, start, count * row_bytes)
            # A bytearray, because callers write into the rows.
            writable = bytearray(content)
            flat = torch.frombuffer(writable, dtype=torch.uint8)
            rows = flat.view(count, row_bytes)
            yield rows, removed[first : first + count]


def _copy(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The bytes from ``start`` to ``end``, in pieces."""
    while start < end:
        num_bytes = min(_PIECE_BYTES, end - start)
        yield _read(file, start, num_bytes)
        start += num_bytes


def _read(file: BinaryIO, start: int, num_bytes: int) -> bytes:
    """Exactly this many bytes; raises if the file ends before, or its disk fails."""
    try:
        file.seek(start)
        content = file.read(num_bytes)
    except OSError as error:
        # Here, because around the writing of a file it would pass for an error of that one.
        raise UserError(f"{file.name!r} cannot be read ({error.strerror}); copy it again") from error
    # read_head has compared the size of the file with the places of its tensors.
    if len(content) != num_bytes:
        raise UserError(f"{file.name!r} became shorter while it was read; start again")
    return content


def _can_be_rewritten(head: GgufHead) -> bool:
    """Whether the parts of a head that were read give its bytes: not if a key is there twice, or padding is not 0."""
    with head.path.open("rb") as file:
        return head_bytes(head) == file.read(head.data_start)


def _check_output(output: Path) -> None:
    """Raise unless a new file can be at this path, before minutes are spent on its content."""
    # exists() follows links, and is False for a link that leads nowhere.
    if output.exists() or output.is_symlink():
        # The base itself as well, under any of its names.
        raise UserError(f"output {str(output)!r} exists; name a new file")
    if not output.parent.is_dir():
        raise UserError(f"output {str(output)!r}: the folder {str(output.parent)!r} does not exist")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise UserError(f"output {str(output)!r}: {str(output.parent)!r} cannot be written to; name another folder")


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file whole or not at all.

    Raises:
        UserError: If the disk is full or cannot be written to.
    """
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        # An OSError that Python itself raises has a message and no strerror.
        reason = error.strerror or error
        raise UserError(f"{str(path)!r} cannot be written ({reason}); free space or name another") from error
