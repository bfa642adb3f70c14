"""Files of analyses: JSON, whole, finite, with their settings; and the parts of what is still being computed."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from maskft_base import __version__
from maskft_base.errors import UserError
from maskft_base.files import digest, digest_file, write_text

SECONDS_BETWEEN_REPORTS = 30.0


def digest_folder(folder: str | Path) -> str:
    """Digest of a folder's weight files: the identity of a model wherever it lies. Of a hub model its name."""
    weights = sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")])
    return digest([digest_file(file) for file in weights]) if weights else str(folder)


def write_record(file: Path, record: Mapping, settings: Mapping) -> None:
    """Write plain values and lists as JSON, whole or not at all, with what decides them under ``settings``.

    Raises:
        UserError: If a number is NaN or infinite; nothing is written then.
    """
    place = next(_not_finite(record, ""), None)
    if place is not None:
        raise UserError(
            f"{file.name}: {place}; nothing was written: check the runs that it is from, or take a smaller --span"
        )
    write_text(file, json.dumps({"settings": _with_version(settings), **record}, allow_nan=False) + "\n")


def is_finished(file: Path, settings: Mapping) -> bool:
    """Whether ``file`` is there and was made with the same settings by the same version."""
    return file.is_file() and json.loads(file.read_text())["settings"] == json.loads(
        json.dumps(_with_version(settings))
    )


class Parts:
    """Values of a long computation, kept one JSON line each beside the file in which they will end.

    Args:
        file: The file to come; parts are kept as ``.NAME.parts.jsonl``.
        settings: Parts of other settings are thrown away.
        num_parts: How many there will be, to say how far it is.
    """

    def __init__(self, file: Path, settings: Mapping, num_parts: int):
        self.file = file.with_name(f".{file.name}.parts.jsonl")
        head = {"settings": digest(_with_version(settings))}
        known = list(_whole_lines(self.file))
        known = known if known[:1] == [head] else [head]
        self._values = {line["key"]: line["value"] for line in known[1:]}
        self._what, self._num_parts = file.stem, num_parts
        self._next_report = time.monotonic() + SECONDS_BETWEEN_REPORTS
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in known))

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of ``key``, computed now unless it is known. JSON-able; floats survive unchanged."""
        if key not in self._values:
            self._values[key] = compute()
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"key": key, "value": self._values[key]}) + "\n")
            if time.monotonic() > self._next_report:
                self._next_report += SECONDS_BETWEEN_REPORTS
                print(f"{self._what}: {len(self._values)} of {self._num_parts} parts", file=sys.stderr, flush=True)
        return self._values[key]

    def remove(self) -> None:
        """Delete the parts: the file is written."""
        self.file.unlink(missing_ok=True)


def _whole_lines(file: Path) -> Iterator[dict]:
    """Lines of a JSONL file up to one that a kill cut short."""
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else ():
        if line.endswith("\n"):
            yield json.loads(line)


def _not_finite(value: Any, place: str) -> Iterator[str]:
    """Places of numbers that are NaN or infinite."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _not_finite(each, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _not_finite(each, f"{place}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}"


def _with_version(settings: Mapping) -> dict:
    return {**settings, "maskft_version": __version__}
