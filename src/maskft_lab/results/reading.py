"""Results from wherever they are: our own files, lm-eval's samples, inspect-ai's logs; ``NAME=PATH`` names a model."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import zstandard

from maskft_base import files
from maskft_base.errors import UserError, first_line
from maskft_base.files import parse_json, read_text

from .elsewhere import Asked, Directions, Log, results_of, set_cluster
from .inspect_logs import read_log
from .lm_eval_samples import is_samples_file, read_samples
from .schema import Result, check_result, read_result, result_file

# What a damaged or strange file may end in, however it is damaged.
_DAMAGE = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError),
    *(NotImplementedError, zipfile.BadZipFile, zlib.error, zstandard.ZstdError),
)


def read_all(paths: Sequence[str], cluster_by: str | None = None, directions: Directions | None = None) -> list[Result]:
    """Return the results of files and folders, in the order given.

    A folder is one of results (its ``result.json``, or all in it and below), of lm-eval's ``samples_*.jsonl`` or of
    inspect-ai's ``*.eval``. Files of lm-eval in one folder are tasks of one model; logs of inspect-ai say which model
    they are of. Logs given under one name are of one model, and several of one task are its seeds, in their order.

    Args:
        paths: Paths, or ``NAME=PATH``.
        cluster_by: Field of the items (documents, metadata) that names the clusters.
        directions: Metric of a log -> whether more of it is better.

    Raises:
        UserError: If something is no result.
    """
    asked = Asked(cluster_by, directions or {})
    places: dict[tuple[str, str], list[Result]] = {}  # in the order given
    logs: dict[tuple[str, str], list[Log]] = {}
    for index, text in enumerate(paths):
        name, path = _name_and_path(text)
        seen: set[tuple[tuple[str, str], str]] = set()
        for file in _files_of(path):
            if not _is_log(file):
                places.setdefault(("place", str(index)), []).append(_own(file, name, cluster_by))
                continue
            log = _log(file, asked)
            # Folders of lm-eval may hold models of one name.
            unnamed = ("folder", str(file.parent.resolve())) if is_samples_file(file) else ("model", log.model)
            key = ("name", name) if name else unnamed
            if (key, log.task) in seen or (not name and log.task in (other.task for other in logs.get(key, []))):
                raise UserError(
                    f"{file}: a second log of task {log.task} and model {log.model}: give each a name, NAME={file}; "
                    "logs of one name are its seeds"
                )
            seen.add((key, log.task))
            places.setdefault(key, [])
            logs.setdefault(key, []).append(log)
    for key, group in logs.items():
        places[key] = results_of(key[1] if key[0] == "name" else group[0].model, group)
    return [result for results in places.values() for result in results]


def read_results(places: Iterable[str]) -> list[Result]:
    """Read result files, and those in folders and all folders below, where other JSON files are passed over.

    Returns:
        The results in the order of the places. A file reached twice, or a copy of one, counts once.

    Raises:
        UserError: If a place does not exist or holds no result.
    """
    results: list[Result] = []
    for place in map(Path, places):
        found = _results_below(place) if place.is_dir() else [place]
        if not found:
            raise UserError(f"{place} holds no result.json and no other result file; give a folder of results")
        for result in map(read_result, found):
            if result not in results:
                results.append(result)
    return results


def input_files(paths: Sequence[str]) -> set[Path]:
    """Return every file that would be read, resolved."""
    return {file.resolve() for text in paths for file in _files_of(_name_and_path(text)[1])}


def _name_and_path(text: str) -> tuple[str | None, Path]:
    name, separator, path = text.partition("=")
    if separator and name and not files.is_there(text) and "/" not in name:
        return name, Path(path)
    return None, Path(text)


def _files_of(path: Path) -> Iterator[Path]:
    """Yield the files that a path stands for."""
    if not path.is_dir() or (path / files.RESULT).is_file():
        yield result_file(path)
        return
    samples = sorted(file for file in path.glob("samples_*.jsonl*") if is_samples_file(file))
    yield from samples or sorted(path.glob("*.eval")) or _results_below(path) or [result_file(path)]


def _results_below(folder: Path) -> list[Path]:
    return [file for file in sorted([*folder.rglob("*.json"), *folder.rglob("*.json.gz")]) if _is_result(file)]


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


def _is_log(path: Path) -> bool:
    """Whether a file is named as logs of other harnesses are, or begins as inspect-ai's JSON does."""
    if is_samples_file(path) or path.suffix == ".eval":
        return True
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(2000)
    return '"schema_version"' not in start and '"eval"' in start and '"status"' in start


def _log(file: Path, asked: Asked) -> Log:
    try:
        return read_samples(file, asked) if is_samples_file(file) else read_log(file, asked)
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{file}: cannot be read as a log ({first_line(error)}): is the file whole?") from None


def _own(file: Path, name: str | None, cluster_by: str | None) -> Result:
    result = read_result(file)
    if name:
        result["name"] = name
    if not name and not cluster_by:
        return result
    for task, record in result["tasks"].items() if cluster_by else ():
        for item in record["items"]:
            set_cluster(item, dict(item), Asked(cluster_by), f"{file}, {task}")
    return check_result(result, file)
