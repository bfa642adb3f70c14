"""Results of files and folders, ours and lm-eval's samples; ``NAME=PATH`` names a model."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from maskft_common import files, layout
from maskft_common.errors import UserError
from maskft_common.files import parse_json, read_text

from .lm_eval_samples import is_samples_file, read_samples, samples_in
from .schema import Result, check_result, read_result, result_file


def read_all(paths: Iterable[str]) -> list[Result]:
    """Return the results of files and folders, in the order given.

    A folder is one of results: its ``result.json``, or all in it and below but points of paths and partial results;
    or one of lm-eval's ``samples_*.jsonl``, which are the tasks of one model.

    Args:
        paths: Paths, or ``NAME=PATH``.

    Raises:
        UserError: If something is no result.
    """
    results: list[Result] = []
    for name, path in map(_name_and_path, paths):
        found = _files_of(path)
        if is_samples_file(found[0]):
            results.append(read_samples(found, name))
            continue
        for result in map(read_result, found):
            results.append(check_result({**result, "name": name}, path) if name else result)
    return results


def input_files(paths: Iterable[str]) -> set[Path]:
    """Return every file that would be read, resolved."""
    return {file.resolve() for _, path in map(_name_and_path, paths) for file in _files_of(path)}


def check_output(output: str | None, results: Iterable[str]) -> None:
    """Refuse an output file that is one of the results, which it would replace."""
    if output and Path(output).resolve() in input_files(results):
        raise UserError(f"--output {output} is one of the results and would replace it: name another file")


def _name_and_path(text: str) -> tuple[str | None, Path]:
    name, separator, path = text.partition("=")
    if not text or (separator and not path):
        raise UserError(f"{text!r} names no file; give a result, a folder of results, or NAME=PATH")
    if separator and name and not files.is_there(text) and "/" not in name:
        return name, Path(path)
    return None, Path(text)


def _files_of(path: Path) -> list[Path]:
    """Return the files that a path stands for, at least one."""
    if not path.is_dir() or (path / layout.RESULT).is_file():
        return [result_file(path)]
    if samples := samples_in(path):
        return samples
    found = sorted([*path.rglob("*.json"), *path.rglob("*.json.gz")])
    below = [f for f in found if not re.search(r"(^|/)path/|\.partial/", f"{f.relative_to(path)}") and _is_result(f)]
    return below or [result_file(path)]


def _is_result(file: Path) -> bool:
    if file.name == layout.RESULT or not file.is_file():
        return file.is_file()  # also a damaged result.json, so that reading it says so
    try:
        text = read_text(file)
        # A folder of runs is full of tokenizers, which would take long to parse.
        content = parse_json(text) if '"evaluation"' in text else None
    except (ValueError, OSError, EOFError, zlib.error):
        return False
    return isinstance(content, dict) and content.get("kind") == "evaluation"
