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
        file: The file; made if it does not exist.
        settings: What all pieces depend on, JSON-able.
        discard: Throw away pieces that were made with other settings, instead of raising.

    Raises:
        UserError: If the file is a link, or holds pieces made with other settings.
    """

    def __init__(self, file: Path, settings: Mapping, *, discard: bool = False):
        self.file = file
        self.values: dict[str, Any] = {}
        self._settings = _as_json(settings)
        self._out = None
        if file.is_symlink():
            raise UserError(f"{file} is a link and no file of ours; remove it, or name another output_dir")

        lines = list(_lines(file))
        if lines and lines[0] != self._settings:
            is_piece = isinstance(lines[0], dict) and "sha256" in lines[0]  # the line of the settings is damaged
            if not discard and not is_piece:
                raise UserError(_other_settings(file, lines[0], self._settings))
            lines = []
        self._is_new = not lines
        if self._is_new:
            file.unlink(missing_ok=True)  # a kill may have cut its first line short
        for line in lines[1:]:
            if _is_piece(line):
                self.values[line["key"]] = line["value"]

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of ``key``, computed now unless it is known; floats survive unchanged, tuples become lists."""
        if key not in self.values:
            self.add(key, compute())
        return self.values[key]

    def add(self, key: str, value: Any) -> None:
        """Keep one piece."""
        value = _as_json(value)
        self.values[key] = value
        if self._out is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._out = append_to(self.file)
            # The line break ends a line that a kill cut short.
            self._out.write(_text(self._settings) if self._is_new else "\n")
        self._out.write(_text({"key": key, "value": value, "sha256": _checksum(key, value)}))
        self._out.flush()

    def remove(self) -> None:
        """Delete the file: the result is written."""
        if self._out:
            self._out.close()
        self.file.unlink(missing_ok=True)


def _lines(file: Path) -> Iterator[Any]:
    """The lines of a file that are JSON; others were cut short by a kill, or edited."""
    if not file.is_file():
        return
    # A kill may also have cut a character in two: its line's checksum will not match.
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            yield parse_json(line)
        except ValueError:
            continue


def _is_piece(line: Any) -> bool:
    """Whether a line is a piece with its checksum."""
    if not isinstance(line, dict) or not isinstance(line.get("key"), str):
        return False
    try:
        return line.get("sha256") == _checksum(line["key"], line.get("value"))
    except RecursionError:  # nested just deeply enough to be read
        return False


def _other_settings(file: Path, found: Any, wanted: Mapping) -> str:
    found = found if isinstance(found, dict) else {}
    differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    return (
        f"{file} holds finished pieces of a run with other settings ({', '.join(differing)}); name another output_dir, "
        "or pass --overwrite to throw them away"
    )


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _checksum(key: Any, value: Any) -> str:
    return digest([key, value])[:16]


def _text(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
