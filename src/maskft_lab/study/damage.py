"""Finished runs and results whose files are no longer as they were written, found by checksums."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from maskft_common import files, layout
from maskft_common.errors import UserError

from ..results.schema import read_result
from .run_record import read_run_record


def written_files(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the files of a run: weights, tokenizer, records; not its log and checkpoints.

    Whole files are read: some seconds for each 10 GB.
    """
    # In a fixed order, so that a run made twice has the same record.
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and _is_kept(name):
            digests[name] = files.digest_file(path)
    return digests


def _is_kept(name: str) -> bool:
    """Whether a file, named relative to the run's folder, stays as it is once the run is finished."""
    # run.json itself holds the checksums, and the log may still grow.
    if name in (layout.LOG, layout.RUN, layout.CARD):  # a card is its author's to edit
        return False
    # Most checkpoints are deleted once the run is finished.
    top_folder, *_ = name.split("/")
    is_checkpoint = top_folder.startswith("checkpoint-")

    file_name = name.rpartition("/")[2]
    is_hidden = file_name.startswith(".")  # also temporary files of writes that were cut off
    is_temporary = is_hidden or file_name.endswith((".lock", ".partial"))
    return not is_checkpoint and not is_temporary


def damage_of_run(folder: Path) -> str | None:
    """The damage to a run that has a ``run.json``; None if all files it names are as they were written.

    Each file is read once per process, and again after it was written to.
    """
    try:
        record = read_run_record(folder)
    except (UserError, OSError):
        return f"its {layout.RUN} cannot be read"

    # The first damage is enough: the remedy is to delete the whole run.
    for name, sha256 in record.files.items():
        path = folder / name
        # A file may vanish, or its disk fail, between two of these steps.
        try:
            if not path.is_file():
                return f"its {name} is missing"
            if files.digest_file(path) != sha256:
                return f"its {name} differs from the file that was written"
        except OSError as error:
            return f"its {name} cannot be read ({error.strerror})"
    return None


def damage_of_result(file: Path) -> str | None:
    """The damage to an existing result file; None if it can be read and its metrics agree with its items."""
    # A study asks about each result many times; parsing again is needed only after the file has changed.
    stat = file.stat()
    return _damage_of_result(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16384)
def _damage_of_result(
    file: Path,
    mtime_ns: int,
    size: int,
) -> str | None:
    # The time and size are arguments only as a part of the cache's key.
    try:
        read_result(file)
    except UserError as error:
        return str(error)
    return None


def is_whole_result(file: Path) -> bool:
    """Whether a result file exists, can be read, and its metrics agree with its items."""
    return file.is_file() and damage_of_result(file) is None
