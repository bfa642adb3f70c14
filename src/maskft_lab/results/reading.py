"""Results from wherever they are: our own files, and lm-eval's samples; ``NAME=PATH`` names a model."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from maskft_base import files
from maskft_base.files import parse_json, read_text

from .lm_eval_samples import is_samples_file, read_samples
from .schema import Result, check_result, read_result, result_file


def read_all(paths: Iterable[str]) -> list[Result]:
    """Return the results of files and folders, in the order given.

    A folder is one of results (its ``result.json``, or all in it and below), or of lm-eval's ``samples_*.jsonl``, which
    are tasks of one model. Several of lm-eval under one name are its seeds, in their order.

    Args:
        paths: Paths, or ``NAME=PATH``.

    Raises:
        UserError: If something is no result.
    """
    results: list[Result] = []
    logs: list[Result] = []
    for name, path in map(_name_and_path, paths):
        found = _files_of(path)
        if not is_samples_file(found[0]):
            own = map(read_result, found)
            results += [check_result({**result, "name": name}, path) if name else result for result in own]
            continue
        logs.append(read_samples(found, name))
        results.append(logs[-1])
    counts, seen = Counter(log["name"] for log in logs), Counter[str]()
    for log in logs:
        if counts[log["name"]] > 1:
            log["model"]["seed"] = seen[log["name"]]
            seen[log["name"]] += 1
    return results


def input_files(paths: Iterable[str]) -> set[Path]:
    """Return every file that would be read, resolved."""
    return {file.resolve() for _, path in map(_name_and_path, paths) for file in _files_of(path)}


def _name_and_path(text: str) -> tuple[str | None, Path]:
    name, separator, path = text.partition("=")
    if separator and name and not files.is_there(text) and "/" not in name:
        return name, Path(path)
    return None, Path(text)


def _files_of(path: Path) -> list[Path]:
    """Return the files that a path stands for, at least one."""
    if not path.is_dir() or (path / files.RESULT).is_file():
        return [result_file(path)]
    samples = sorted(file for file in path.glob("samples_*.jsonl*") if is_samples_file(file))
    below = (file for file in sorted([*path.rglob("*.json"), *path.rglob("*.json.gz")]) if _is_result(file))
    return samples or list(below) or [result_file(path)]


def _is_result(file: Path) -> bool:
    if file.name == files.RESULT or not file.is_file():
        return file.is_file()  # also a damaged result.json, so that reading it says so
    try:
        text = read_text(file)
        # A folder of runs is full of tokenizers, which would take long to parse.
        content = parse_json(text) if '"evaluation"' in text else None
    except (ValueError, OSError, EOFError, zlib.error):
        return False
    return isinstance(content, dict) and content.get("kind") == "evaluation"
