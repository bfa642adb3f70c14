"""Reading and writing files whole, digests of their content, and links that are refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from .errors import UserError
from .layout import RESULTS, RUNS

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 64 * 2**20  # of what comes from elsewhere; the history of a long training has some MB


def is_there(name: str) -> bool:
    """Whether a file or folder of this name exists; a text that cannot be a name is none."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown user's home
        return False


def from_anywhere(name: str) -> str:
    """A name of a model that also holds in another working folder: of a folder its path, of the hub itself."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def own_file(folder: str | Path, name: str) -> Path:
    """A file of a folder that may be a stranger's: a link that leads out of it is refused."""
    file = Path(folder) / name
    if not file.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(
            f"{str(file)!r} is a link to {str(file.resolve())!r}, outside of its folder; copy the file there"
        )
    return file


def size(num_bytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def open_text(file: Path, encoding: str = "utf-8") -> TextIO:
    """Open a text file for reading, which may be gzipped (``.gz``)."""
    if file.suffix.lower() != ".gz":
        return open(file, encoding=encoding)
    return cast(TextIO, gzip.open(file, "rt", encoding=encoding))


def read_text(file: Path) -> str:
    """Text of a file, which may be gzipped (``.gz``)."""
    with open_text(file) as text:
        return text.read()


def read_json(file: Path) -> Any:
    """What a JSON file of settings or records holds.

    Raises:
        UserError: If it is no JSON, or larger than settings are.
    """
    if file.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{file} has more than {MAX_JSON_BYTES // 2**20} MiB; it is no file of settings")
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error


def parse_json(text: str | bytes, **options: Any) -> Any:
    """``json.loads``, for which lists in lists without end are as wrong as anything else that is no JSON.

    Raises:
        ValueError: Also for what is nested deeper than Python's stack.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all (temporary file beside it, then renamed); missing folders are made."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file as ``write_text`` does."""
    path = Path(path)
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}): give another path") from error


def check_no_link(folder: Path) -> None:
    """Refuse an output folder that is a link to nowhere, or in which a file is a link: it would be written through."""
    if folder.is_symlink() and not folder.is_dir():
        raise UserError(f"output_dir {str(folder)!r} is a link that leads to no folder; remove it, or name another")
    places = (file for parts in ("*", f"{RUNS}/*/*", f"{RESULTS}/*/*", "checkpoint-*/*") for file in folder.glob(parts))
    if link := next((file for file in places if file.is_symlink() and not file.is_dir()), None):
        raise UserError(f"{str(link)!r} is a link and no file of ours; remove it, or name another output_dir")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into, which becomes ``folder`` (none, or empty) unless there is an error."""
    partial = _beside(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def append_to(file: Path) -> TextIO:
    """Open a text file of ours to append to; a link is refused, it would lead the text into a file of someone else."""
    return open(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w", encoding="utf-8")


def _beside(path: Path) -> Path:
    """A name beside ``path`` that nothing else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def digest(content: Any) -> str:
    """Digest of bytes or a text (as UTF-8), or of any other value as JSON with sorted keys."""
    if not isinstance(content, str | bytes):
        content = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def digest_file(file: str | Path, is_sampled: bool = False) -> str:
    """Digest of a file's content, kept in memory until the file is written to.

    Args:
        file: The file.
        is_sampled: Read only 1,024 blocks of 4 KiB, spread evenly, of a file larger than these: for weights, of which
            every matrix is then sampled.
    """
    file = Path(file).resolve()
    return _digest_file(file, file.stat().st_mtime_ns, is_sampled)


@lru_cache(maxsize=16384)
def _digest_file(file: Path, mtime_ns: int, is_sampled: bool) -> str:
    num_blocks, block_bytes = 1024, 4096
    size, found = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        if not is_sampled or size <= num_blocks * block_bytes:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        for number in range(num_blocks):
            stream.seek(number * (size - block_bytes) // (num_blocks - 1))
            found.update(stream.read(block_bytes))
    return found.hexdigest()


def digest_now(file: Path) -> str:
    """Digest of a file's content as it is on the disk, whatever was known of it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of tensors in their order, each with a label that says what its bytes are (name, dtype, shape)."""
    import torch

    found = hashlib.sha256()
    for label, tensor in tensors:
        found.update(label.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
