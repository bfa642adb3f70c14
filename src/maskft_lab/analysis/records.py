"""Files of analyses: JSON, whole, finite, with their settings; and the finished pieces of an unfinished one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maskft_common import __version__
from maskft_common.errors import UserError
from maskft_common.files import digest, digest_file, parse_json, write_text

from ..results.schema import refuse_constant
from ..store import Store

Report = Callable[[int, int], None]  # called with the pieces that are done, and with all there are


def no_report(num_done: int, total: int) -> None:
    """Report nothing."""


def digest_folder(folder: str | Path) -> str:
    """Digest of a folder's weight files, or of a GGUF file: the identity of a model, whatever its path.

    Of a hub model its name.
    """
    path = Path(folder)
    if path.is_file():
        return digest_file(path)
    safetensors = path.glob("*.safetensors")
    pickles = path.glob("*.bin")
    weights = sorted([*safetensors, *pickles])
    # No files to read: a name on the hub.
    if not weights:
        return str(folder)
    # Sharded models have several files; their names, like the folder's, do not count.
    digests = [digest_file(file) for file in weights]
    return digest(digests)


def write_record(
    file: Path,
    record: Mapping,
    settings: Mapping,
) -> None:
    """Write plain values and lists as JSON, whole or not at all, after the ``settings`` that they depend on.

    Raises:
        UserError: If a number is NaN or infinite; nothing is written then.
    """
    # First in the file, so that a reader sees at once under which settings the numbers were computed.
    content = {"settings": _with_version(settings), **record}
    # JSON has no NaN; Python would write one that other readers refuse.
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise UserError(
            f"{file.name}: a number is NaN or infinite ({error}), and nothing was written: check the losses of the "
            "runs that it is computed from"
        ) from error
    write_text(file, text + "\n")


def read_record(file: Path) -> dict[str, Any]:
    """The record that an analysis wrote.

    Raises:
        UserError: If it is not a JSON object, or holds NaN or infinity.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = parse_json(text, parse_constant=refuse_constant)
        return dict(content)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{file} is not as maskft analyze writes it ({error}): delete it and run maskft analyze again"
        ) from error


def is_finished(file: Path, settings: Mapping) -> bool:
    """Whether ``file`` is there and was made with the same settings by the same version."""
    if not file.is_file():
        return False
    # As JSON gives them back: a tuple becomes a list.
    settings_text = json.dumps(_with_version(settings))
    wanted = json.loads(settings_text)
    # A file that is damaged raises, and is not overwritten: it may hold hours of computation.
    found = read_record(file).get("settings")
    return found == wanted


def pieces_of(file: Path, settings: Mapping) -> Store:
    """The finished pieces of the record that ``file`` will hold; pieces of other settings are deleted."""
    # Hidden, so that neither a report nor a user takes the pieces for the record.
    parts = file.with_name(f".{file.name}.parts.jsonl")
    return Store(parts, _with_version(settings), discard=True)


def _with_version(settings: Mapping) -> dict:
    """The settings and the version: another version may compute other numbers from the same settings."""
    return {**settings, "maskft_version": __version__}
