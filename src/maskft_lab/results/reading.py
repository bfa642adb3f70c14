"""Results from wherever they are: our own files, lm-eval's samples, inspect-ai's logs; ``NAME=PATH`` names a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from maskft_base import files
from maskft_base.errors import UserError

from . import inspect_logs, lm_eval_samples
from .elsewhere import cluster_label
from .schema import Result, read_result, result_file, validate_result


class _Source(NamedTuple):
    """Files of one harness that belong together: those of one folder."""

    kind: str  # maskft, lm-eval or inspect-ai
    name: str | None
    folder: Path


def read_all(paths: Sequence[str], cluster_by: str | None = None) -> list[Result]:
    """Return the results of files and folders, in the order given.

    A folder is one with a ``result.json``, with lm-eval's ``samples_*.jsonl`` or with inspect-ai's ``*.eval``. Files of
    lm-eval in one folder are tasks of one model; logs of inspect-ai say which model they are of.

    Args:
        paths: Paths, or ``NAME=PATH``.
        cluster_by: Field of the items (documents, metadata) that names the clusters.

    Raises:
        UserError: If something is no result.
    """
    found: dict[_Source, list[Path]] = {}
    ours: dict[_Source, Path] = {}
    for index, text in enumerate(paths):
        name, path = _name_and_path(text)
        for kind, file in _files_of(path):
            # Files of our own are a model each, those of other harnesses a task each.
            folder = Path(str(index)) if kind == "maskft" else file.resolve().parent
            source = _Source(kind, name, folder)
            if kind == "maskft":
                ours[source] = file
            found.setdefault(source, []).append(file)
    results: list[Result] = []
    for source, group in found.items():
        if source.kind == "maskft":
            results.append(_own(ours[source], source.name, cluster_by))
        elif source.kind == "lm-eval":
            results.append(lm_eval_samples.read_samples(list(dict.fromkeys(group)), source.name, cluster_by))
        else:
            results += inspect_logs.read_logs(list(dict.fromkeys(group)), source.name, cluster_by)
    return results


def input_files(paths: Sequence[str]) -> set[Path]:
    """Return every file that would be read, resolved."""
    return {file.resolve() for text in paths for _, file in _files_of(_name_and_path(text)[1])}


def _name_and_path(text: str) -> tuple[str | None, Path]:
    name, separator, path = text.partition("=")
    if separator and name and not files.is_there(text) and "/" not in name:
        return name, Path(path)
    return None, Path(text)


def _files_of(path: Path) -> list[tuple[str, Path]]:
    if path.is_dir() and not (path / files.RESULT).is_file():
        samples = sorted(file for file in path.glob("samples_*.jsonl*") if lm_eval_samples.is_samples_file(file))
        logs = sorted(path.glob("*.eval"))
        if samples or logs:
            return [("lm-eval", file) for file in samples] or [("inspect-ai", file) for file in logs]
    if lm_eval_samples.is_samples_file(path):
        return [("lm-eval", path)]
    if path.suffix == ".eval" or (path.suffix == ".json" and _is_inspect_json(path)):
        return [("inspect-ai", path)]
    return [("maskft", result_file(path))]


def _is_inspect_json(path: Path) -> bool:
    """Whether a JSON file begins as inspect-ai's logs do, and not as our results."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            start = file.read(2000)
    except OSError:
        return False
    return '"schema_version"' not in start and '"eval"' in start and '"status"' in start


def _own(file: Path, name: str | None, cluster_by: str | None) -> Result:
    result = read_result(file)
    if name:
        result["name"] = name
    if cluster_by:
        for task, record in result["tasks"].items():
            for item in record["items"]:
                item["cluster_id"] = cluster_label(item.get(cluster_by), f"{file}, {task}, {cluster_by}")
    if not name and not cluster_by:
        return result
    try:
        return validate_result(result, file)
    except UserError as error:
        raise UserError(f"--cluster_by {cluster_by}: {error}" if cluster_by else str(error)) from None
