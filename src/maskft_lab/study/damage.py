"""Finished runs and results that are no longer what was written: found by checksums."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from maskft_common import files, layout
from maskft_common.errors import UserError

from ..results.schema import read_result
from .record import read_record


def written_files(folder: Path) -> dict[str, str]:
    """Name -> sha256 of what a run has left in its folder: weights, tokenizer, accounts; not its log and checkpoints.

    Whole files are read, some seconds for each 10 GB.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: files.digest_file(path) for name, path in names.items() if _is_kept(name)}


def _is_kept(name: str) -> bool:
    first, last = name.partition("/")[0], name.rpartition("/")[2]
    passing = first.startswith("checkpoint-") or last.startswith(".") or last.endswith((".lock", ".partial"))
    # A card is its author's, who may write another.
    return not passing and name not in (layout.LOG, layout.RUN, layout.CARD)


def damage_of_run(folder: Path) -> str | None:
    """What is wrong with a run that has a ``run.json``; None where all files it names are as they were written.

    Each file is read once per process, and again when it was written to.
    """
    try:
        written = read_record(folder).files
    except (UserError, OSError):
        return f"its {layout.RUN} cannot be read"
    for name, sha256 in written.items():
        path = folder / name
        try:
            found = files.digest_file(path) if path.is_file() else None
        except OSError as error:
            return f"its {name} cannot be read ({error.strerror})"
        if found != sha256:
            return f"its {name} is {'not what was written' if found else 'missing'}"
    return None


def damage_of_result(file: Path) -> str | None:
    """What is wrong with a result file that is there; None where it can be read and its numbers agree."""
    stat = file.stat()
    return _damage_of_result(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16384)
def _damage_of_result(file: Path, mtime_ns: int, size: int) -> str | None:
    try:
        read_result(file)
    except UserError as error:
        return str(error)
    return None


def is_whole_result(file: Path) -> bool:
    """Whether a result file is there, can be read, and its metrics are those of its items."""
    return file.is_file() and damage_of_result(file) is None
