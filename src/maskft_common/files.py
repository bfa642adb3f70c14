"""Reading and writing files whole, digests of their content, and links that are refused."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, cast

from .errors import UserError
from .layout import RESULTS, RUNS

if TYPE_CHECKING:
    from torch import Tensor

# Limit for files that may come from a stranger: a gzipped file of 1.7 MB can hold 400 MB. The history of a long
# training has a few MB, the results of a study less than one.
MAX_JSON_BYTES = 64 * 2**20


def is_there(name: str) -> bool:
    """Whether a file or folder of this name exists; False for a text that cannot be a path."""
    try:
        return expand_user(name).exists()
    except (OSError, ValueError):  # too long, a null byte
        return False


def without_folder(name: str) -> str:
    """The last part of a path that exists, since records are shared and folders of a machine are not; else the name."""
    if not is_there(name):
        return name
    # Absolute, because "." has no last part.
    return Path(name).absolute().name


def expand_user(name: str | os.PathLike) -> Path:
    """The path of this name, ``~`` and ``~USER`` replaced.

    ``Path.expanduser`` raises RuntimeError for a user who does not exist, as in ``~data/rows.jsonl`` where
    ``~/data/rows.jsonl`` was meant. Here the name stays as it is, and the reader reports that there is no such file.
    """
    path = os.path.expanduser(Path(name))
    return Path(path)


def from_anywhere(name: str) -> str:
    """A model's name that is valid in any working directory: the absolute path of a folder, a hub name unchanged."""
    path = Path(name)
    # A model is a folder, or a GGUF file. A name on the hub is neither, unless a folder here has the same name, which
    # transformers takes too.
    if path.is_dir():
        return str(path.resolve())
    is_gguf_file = name.lower().endswith(".gguf") and path.is_file()
    if is_gguf_file:
        # The file may be a link, such as the hub's cache has, to a name that does not end in .gguf: it keeps its own.
        folder = path.parent.resolve()
        return str(folder / path.name)
    return name


# Files of strangers


def own_file(folder: str | Path, name: str) -> Path:
    """Return the path of a file in a folder.

    Raises:
        UserError: If it is a link that leads out of the folder.
    """
    folder = Path(folder)
    file = folder / name
    if not _is_inside(file, folder):
        # Not resolve(), which raises RuntimeError for a link to itself.
        target = os.path.realpath(file)
        raise UserError(f"{str(file)!r} is a link to {target!r}, outside of its folder; copy the file there")
    return file


def check_own_files(folder: str | Path, subfolders: Iterable[str] = ()) -> None:
    """Raise for a folder with a file that is a link out of it.

    Libraries read files of a model's folder by name and save their content elsewhere: a link to somebody's key would
    end up, as a plain file, in the folder that is uploaded next. Links in a snapshot of the hub's cache lead to the
    blobs beside the snapshots, and pass.

    Args:
        folder: A stranger's folder.
        subfolders: Names of folders in it whose files are read as well.

    Raises:
        UserError: For the first link that leads out of the folder.
    """
    folder = Path(folder)
    places = [folder]
    for name in subfolders:
        place = folder / name
        # A subfolder may itself be a link out of the folder.
        own_file(folder, name)
        if place.is_dir():
            places.append(place)

    for place in places:
        # Sorted, so that the error names the same file on every machine.
        for file in sorted(place.iterdir()):
            # A folder in the model's folder is read only where it is one of ``subfolders``.
            is_link_to_file = file.is_symlink() and not file.is_dir()
            if is_link_to_file and not _is_hub_blob(file, folder):
                name = str(file.relative_to(folder))
                own_file(folder, name)


def _is_inside(file: Path, folder: Path) -> bool:
    # Both are resolved: the folder may be below a link, as /tmp is on macOS.
    try:
        target = file.resolve()
        return target.is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to itself
        return False


def _is_hub_blob(file: Path, folder: Path) -> bool:
    """Whether a link is one of huggingface_hub's: ``NAME/snapshots/COMMIT/FILE`` -> ``NAME/blobs/HASH``."""
    snapshots = folder.resolve().parent
    if snapshots.name != "snapshots":
        return False
    blobs = snapshots.parent / "blobs"
    return _is_inside(file, blobs)


def check_regular(path: str | os.PathLike) -> None:
    """Raise for a pipe or a device, which a reader would wait for without end; a missing file passes.

    Raises:
        UserError: If the path is something else than a regular file.
    """
    path = Path(path)
    # Both follow links: a link to a file is a file.
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise UserError(f"{str(path)!r} is {kind}, not a regular file; name a file")


# Reading


def size(num_bytes: float) -> str:
    """A number of bytes for people, in powers of 1,000: ``64 MB``."""
    for unit in ("bytes", "kB", "MB"):
        # From 999.5 on three digits would be rounded to 1e+03.
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def open_text(file: Path, encoding: str = "utf-8") -> TextIO:
    """Open a text file for reading, which may be gzipped (``.gz``)."""
    check_regular(file)
    if file.suffix.lower() != ".gz":
        return open(file, encoding=encoding)
    # The cast is for mypy: with "rt" gzip gives a text file.
    stream = gzip.open(file, "rt", encoding=encoding)
    return cast(TextIO, stream)


def read_text(file: Path, max_length: int = MAX_JSON_BYTES) -> str:
    """Return the text of a file, which may be gzipped (``.gz``).

    Args:
        file: The file.
        max_length: Limit of its characters once unpacked.

    Raises:
        UserError: If it has more.
    """
    with open_text(file) as stream:
        # One more than allowed shows that there is more.
        text = stream.read(max_length + 1)
    if len(text) > max_length:
        raise UserError(f"{file} has more than {max_length // 2**20} MiB of text; name a smaller file")
    return text


def read_json(file: Path) -> Any:
    """Return the content of a JSON file of settings or records.

    Raises:
        UserError: If it is not JSON, not a regular file, or larger than ``MAX_JSON_BYTES``.
    """
    check_regular(file)
    # By its size, before it is read: these files are not compressed.
    if file.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{file} has more than {MAX_JSON_BYTES // 2**20} MiB; it is too large for a file of settings")
    try:
        text = file.read_text(encoding="utf-8")
        return parse_json(text)
    except ValueError as error:
        # ValueError also covers bytes that are not UTF-8, and integers of 5,000 digits.
        raise UserError(f"{file} is not JSON: {error}") from error


def parse_json(text: str | bytes, **options: Any) -> Any:
    """``json.loads``, which raises ValueError also for lists nested deeper than Python's stack."""
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError(str(error)) from None


# Writing


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all (temporary file beside it, then renamed); missing folders are made."""
    # Python has half a surrogate pair for a byte of a file's name that is not UTF-8. It is written as JSON escapes it.
    content = text.encode("utf-8", errors="backslashreplace")
    write_bytes(path, content)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file as ``write_text`` does."""
    path = expand_user(path)
    try:
        # As root, the rename would put a file in the place of a device: /dev/null, or the link /dev/stdout.
        check_regular(path)
        if path.is_symlink() and path.absolute().is_relative_to("/dev"):
            raise UserError(f"{str(path)!r} is no file of its own; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        # Many of our files have a fixed name in a folder of a run or a study: on a full disk no other path helps.
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room on that disk" if is_full else "give another path"
        raise UserError(f"{path}: cannot be written ({error.strerror}): {remedy}") from error


def check_place(path: str | os.PathLike, option: str) -> None:
    """Raise if no file can be written at ``path``, before the work whose result it is to hold.

    Args:
        path: The file, which may exist.
        option: Name of the option, for the message.

    Raises:
        UserError: If it is a folder, or if a file is in the place of one of its folders.
    """
    file = expand_user(path)
    if file.is_dir():
        raise UserError(f"{option} {str(path)!r} is a folder: name a file in it")
    for folder in file.parents:
        if folder.exists():
            if not folder.is_dir():
                raise UserError(f"{option} {str(path)!r}: {str(folder)!r} is a file and no folder: name another place")
            return


def write_rows(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as gzipped JSON lines, whole or not at all as ``write_text`` does."""
    # Without a name and a time in the header of gzip, the same rows give the same bytes.
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=0) as out:
        for row in rows:
            line = json.dumps(row) + "\n"
            out.write(line.encode())
    write_bytes(path, packed.getvalue())


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file to write into; it is renamed to ``path`` unless there is an error."""
    partial = _beside(path)
    try:
        # "x": never into a file that is there, or through a link.
        with partial.open("xb") as file:
            yield file
            # The content is on the disk before the name, so that a power cut leaves no file with missing bytes.
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):  # after an error; once renamed, it no longer exists
            partial.unlink()


def new_folder(folder: str | Path, option: str) -> Path:
    """Return the absolute path of an output folder that does not exist yet, or is empty.

    Args:
        folder: The folder.
        option: Name of the option that gives it, for the message.

    Raises:
        UserError: If something is in the folder, or at its place, or no folder can be made there.
    """
    # Else an empty name would be the working directory.
    if not str(folder):
        raise UserError(f"{option} is an empty name; name a new folder")
    folder = expand_user(folder)
    # Before links are resolved.
    check_no_link(folder)
    folder = folder.resolve()
    check_utf8(folder, option)
    is_empty_folder = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty_folder:
        raise UserError(f"{option} {str(folder)!r} is not empty; name another folder")

    # It is made at the end, below the first of its parents that is there: a mistake would cost the work before.
    parent = next(parent for parent in folder.parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{option} {str(folder)!r}: {str(parent)!r} is not a folder; name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {str(folder)!r}: {str(parent)!r} cannot be written to; name another folder")
    return folder


def check_utf8(folder: str | Path, option: str) -> None:
    """Raise for the name of an output folder of weights that is not UTF-8, which safetensors does not take.

    Args:
        folder: The folder.
        option: Name of the option that gives it, for the message.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        # Python has half a surrogate pair for each byte that is not UTF-8.
        raise UserError(
            f"{option} {str(folder)!r} is not UTF-8, as names of weight files must be; name another"
        ) from None


def check_output_dir(folder: Path) -> None:
    """Check before the work that an output folder can be written to; it need not exist yet.

    Raises:
        UserError: If it, or what it would be made in, is a file or cannot be written to, or if we would write through a
            link (:func:`check_no_link`).
    """
    check_no_link(folder)
    path = folder.absolute()
    first_there = next(place for place in (path, *path.parents) if place.exists())
    if not first_there.is_dir():
        problem = "it is a file"
    elif not os.access(first_there, os.W_OK | os.X_OK):
        problem = "there is no permission for it"
    else:
        return
    raise UserError(f"output_dir {str(folder)!r} cannot be written below {first_there}: {problem}; name another")


def check_no_link(folder: Path) -> None:
    """Raise for an output folder that is, or is below, a link to no folder, or that holds a link to a file.

    We would write to the target of such a link.
    """
    # Above it as well: no folder can be made below such a link.
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.is_dir():
            where = "" if place == folder else f": {str(place)!r}"
            raise UserError(
                f"output_dir {str(folder)!r}{where} is a link that leads to no folder; remove it, or name another"
            )
    # The folders that we write into: a run's or a study's own, those of its runs and results, and checkpoints. A link
    # to a folder, such as one to another disk, is the user's choice.
    for pattern in ("*", f"{RUNS}/*/*", f"{RESULTS}/*/*", "checkpoint-*/*"):
        for file in folder.glob(pattern):
            if file.is_symlink() and not file.is_dir():
                raise UserError(f"{str(file)!r} is a link and no file of ours; remove it, or name another output_dir")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into; it is renamed to ``folder`` (missing, or empty) unless there is an error."""
    partial = _beside(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        # As in whole_file: the content of its files is on the disk before the name.
        for file in partial.rglob("*"):
            if file.is_file() and not file.is_symlink():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after an error; once renamed, it no longer exists


def append_to(file: Path) -> TextIO:
    """Open a text file of ours to append to; an OSError for a link, through which we would write elsewhere."""
    # Python's own open() has no O_NOFOLLOW. 0666 is the mode that it gives new files, less the umask.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(file, flags, 0o666)
    # Opened from a descriptor, "w" does not truncate the file, and O_APPEND sends every write to its end. Names
    # that are not UTF-8 are written as in write_text.
    return open(descriptor, "w", encoding="utf-8", errors="backslashreplace")


def _beside(path: Path) -> Path:
    """A name beside ``path`` that nothing else has."""
    # Beside it, because a rename is atomic within one file system only. Hidden, and random for several processes.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def use_default_modes(folder: str | Path, pattern: str = "*.safetensors") -> None:
    """Give files the mode that ``open`` gives new files, ``0666 & ~umask``.

    safetensors writes through a temporary file of mode 0600, so that another user's server could not read the weights
    of a model whose other files it can read.

    Args:
        folder: Where they were saved.
        pattern: Which of its files.
    """
    found = []
    for file in Path(folder).glob(pattern):
        if file.is_file() and not file.is_symlink():  # a link's file is somebody else's
            found.append(file)
    if not found:
        return

    # Python can read the umask only by changing it, for all threads; the mode of a new file tells it as well.
    probe = _beside(Path(folder) / "mode")
    probe.touch()
    try:
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()

    for file in found:
        file.chmod(mode)


# Digests


def digest(content: Any) -> str:
    """Digest of bytes or a text (as UTF-8), or of any other value as JSON with sorted keys."""
    # Sorted keys: equal dicts have equal digests, whatever the order in which they were filled.
    if not isinstance(content, str | bytes):
        content = json.dumps(content, sort_keys=True, default=str)
    if isinstance(content, str):
        content = content.encode()
    return hashlib.sha256(content).hexdigest()


def digest_file(file: str | Path, is_sampled: bool = False) -> str:
    """Digest of a file's content, kept in memory until the file is written to.

    Args:
        file: The file.
        is_sampled: Read only 1,024 blocks of 4 KiB, spread evenly, of a file larger than these: for weights, of which
            every matrix is then sampled.
    """
    # Resolved, so that a file has one entry in memory, however it is named.
    file = Path(file).resolve()
    mtime_ns = file.stat().st_mtime_ns
    return _digest_file(file, mtime_ns, is_sampled)


# The time of the last change is a part of the key: a file that was written to is read again.
@lru_cache(maxsize=16384)
def _digest_file(file: Path, mtime_ns: int, is_sampled: bool) -> str:
    num_blocks = 1024
    block_bytes = 4096
    file_bytes = file.stat().st_size
    is_small = file_bytes <= num_blocks * block_bytes
    if is_small or not is_sampled:
        return digest_now(file)

    found = hashlib.sha256()
    with file.open("rb") as stream:
        for number in range(num_blocks):
            # The first block is at the beginning, the last one at the end.
            start = number * (file_bytes - block_bytes) // (num_blocks - 1)
            stream.seek(start)
            block = stream.read(block_bytes)
            found.update(block)
    return found.hexdigest()


def digest_now(file: Path) -> str:
    """Digest of a file's content as it is on the disk, without the memory of :func:`digest_file`."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of tensors in their order, each with a label that describes its bytes (name, dtype, shape)."""
    import torch

    found = hashlib.sha256()
    for label, tensor in tensors:
        found.update(label.encode())
        # numpy has no bfloat16, so that the tensor is viewed as bytes first.
        flat = tensor.detach().cpu().contiguous().view(-1)
        as_bytes = flat.view(torch.uint8)
        found.update(as_bytes.numpy())
    return found.hexdigest()
