"""Finished pieces of a long computation, kept on disk by key, so that a killed computation is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from maskft_common.errors import UserError
from maskft_common.files import append_to, digest, parse_json


class Store:
    """An append-only JSONL file: the settings in the first line, then one piece per line with a checksum.

    Nothing is written before the first piece. A line that a kill cut short, or that was edited, is ignored.

    Args:
        file: The file; created if it does not exist.
        settings: Everything that all pieces depend on, JSON-able.
        discard: Throw away pieces that were computed with other settings, instead of raising.

    Raises:
        UserError: If the file is a link, or holds pieces computed with other settings.
    """

    def __init__(
        self,
        file: Path,
        settings: Mapping,
        *,
        discard: bool = False,
    ):
        self.file = file
        self.values: dict[str, Any] = {}
        # Through JSON, as the line that it is compared with: tuples have become lists there.
        self._settings = _as_json(settings)
        self._out = None

        if file.is_symlink():
            raise UserError(f"{file} is a link, not a file of maskft's own; remove it, or name another output_dir")

        lines = list(_lines(file))
        if lines and lines[0] != self._settings:
            # If the line with the settings is damaged, the first readable line is a piece. Nobody knows its settings
            # any more, so all pieces are computed again.
            first = lines[0]
            is_piece = isinstance(first, dict) and "sha256" in first
            if not discard and not is_piece:
                raise UserError(_other_settings(file, first, self._settings))
            lines = []

        self._is_new = not lines
        if self._is_new:
            # Also without a readable line there may be a file: a kill can cut its first line short.
            file.unlink(missing_ok=True)

        # After the settings. Of two pieces with one key, the later one counts.
        for line in lines[1:]:
            if _is_piece(line):
                key = line["key"]
                self.values[key] = line["value"]

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of ``key``, computed now unless it is known; floats survive unchanged, tuples become lists."""
        if key not in self.values:
            self.add(key, compute())
        return self.values[key]

    def add(self, key: str, value: Any) -> None:
        """Keep one piece."""
        value = _as_json(value)
        self.values[key] = value

        # The file is opened with the first piece.
        if self._out is None:
            folder = self.file.parent
            folder.mkdir(parents=True, exist_ok=True)
            self._out = append_to(self.file)
            if self._is_new:
                self._out.write(_text(self._settings))
            else:
                # The last line may have been cut short by a kill; without a line break the new one would continue it.
                self._out.write("\n")

        piece = {
            "key": key,
            "value": value,
            "sha256": _checksum(key, value),
        }
        self._out.write(_text(piece))
        # To the operating system, so that the piece survives a kill of this process.
        self._out.flush()

    def remove(self) -> None:
        """Delete the file, once the result is written."""
        # Before the file is deleted, as Windows keeps files that are open.
        if self._out:
            self._out.close()
        self.file.unlink(missing_ok=True)


def _lines(file: Path) -> Iterator[Any]:
    """The lines of a file that are JSON; others were cut short by a kill, or edited."""
    if not file.is_file():
        return
    # A kill can also cut a character in two; "replace" reads on, and the line is ignored as any other cut line.
    text = file.read_text(encoding="utf-8", errors="replace")
    # Not splitlines(), which also splits at separators such as U+2028 that a JSON string may contain.
    for line in text.split("\n"):
        try:
            yield parse_json(line)
        except ValueError:
            continue


def _is_piece(line: Any) -> bool:
    """Whether a line is a piece with its checksum."""
    if not isinstance(line, dict):
        return False
    key = line.get("key")
    if not isinstance(key, str):
        return False
    value = line.get("value")
    try:
        return line.get("sha256") == _checksum(key, value)
    except RecursionError:
        # Writing JSON takes more stack than reading it: a value may be nested just deeply enough to be read.
        return False


def _other_settings(file: Path, found: Any, wanted: Mapping) -> str:
    if not isinstance(found, dict):
        found = {}
    keys = {*found, *wanted}
    differing = sorted(key for key in keys if found.get(key) != wanted.get(key))
    names = ", ".join(differing)
    return (
        f"{file} holds finished pieces of a run with other settings ({names}); name another output_dir, or pass "
        "--overwrite to throw them away"
    )


def _as_json(value: Any) -> Any:
    """The value as it is read again from a file."""
    text = json.dumps(value)
    return json.loads(text)


def _checksum(key: str, value: Any) -> str:
    # Against cut and edited lines, not against an attacker: 64 bits are enough.
    sha256 = digest([key, value])
    return sha256[:16]


def _text(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
