"""Where rows come from: data files, a folder of them, and the hub. Procedural tasks are in ``procedural.py``."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from ..errors import UserError, did_you_mean, first_line
from ..files import is_there
from .procedural import PROCEDURAL_PREFIX

FILE_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
OTHER_FILE_ENDINGS = (".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".xz", ".bz2", ".yaml", ".yml", ".md")

Row = Mapping[str, Any]


def is_hub_name(name: str) -> bool:
    """Whether ``name`` can only mean a hub data set: it does not exist here and does not look like a file."""
    looks_like_file = name.startswith((".", "/", "~")) or name.lower().endswith(FILE_ENDINGS + OTHER_FILE_ENDINGS)
    return not (looks_like_file or is_there(name) or name.startswith(PROCEDURAL_PREFIX))


def numbered(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Name the place of each row, counted from 1."""
    return ((f"row {n}", row) for n, row in enumerate(rows, start=1))


def _similar_file(path: Path) -> str:
    try:
        return did_you_mean(path.name, sorted(sibling.name for sibling in path.parent.iterdir()))
    except OSError:
        return ""


def read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each row of a data file with the place where it stands, such as ``line 3``."""
    if not path.exists():
        raise UserError(f"data file {path} does not exist{_similar_file(path)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one file in it ({', '.join(FILE_ENDINGS)})")
    if not path.name.lower().endswith(FILE_ENDINGS):
        raise UserError(f"data file {path} has an unsupported ending; convert it to one of {', '.join(FILE_ENDINGS)}")
    try:
        yield from _parquet_rows(path) if path.name.lower().endswith(".parquet") else _json_rows(path)
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip's errors are among these
        raise UserError(f"data file {path} cannot be read: {first_line(error)}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        # A .json file may hold one array, or like .jsonl one object per line.
        if ".jsonl" not in path.name.lower():
            text = lines.read()
            if text.lstrip().startswith("["):
                yield from numbered(_parse_json(text, path, first_line=1))
                return
            lines = io.StringIO(text)
        for n, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {n}", _parse_json(line, path, first_line=n)


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"data file {path} is not JSON at line {line}: {error.msg} (column {error.colno})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches()
        yield from numbered(row for batch in batches for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"data file {path} is not a readable parquet file: {first_line(error)}") from None


def load_from_hub(
    name: str, config: str | None, split: str, data_files: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Download one split of a hub data set, or read it from the hub's cache, or open it as a stream."""
    asked = {"data_files": data_files, "streaming": streaming}
    try:
        return datasets.load_dataset(name, config, split=split, **{key: value for key, value in asked.items() if value})
    except Exception as error:  # many types: no network, no such name, no such configuration or split
        raise UserError(
            f"{name!r} is no file here{_similar_file(Path(name))} and the hub gave no split {split!r} of it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None


def find_files(data_dir: str, names: Sequence[str], split: str, only_split: bool = False) -> list[Path]:
    """Find the data of the first of ``names`` that ``data_dir`` or one of its folders holds, whatever the case.

    That is a file ``NAME_SPLIT.jsonl`` (or another of `FILE_ENDINGS`), or ``NAME.jsonl``, or a folder ``NAME`` as it is
    downloaded from the hub, with a split in one file or many.

    Args:
        data_dir: The folder.
        names: Names of the set.
        split: The split.
        only_split: A file without a split in its name is another split's.

    Returns:
        The files in the order of their names; empty if there is none.

    Raises:
        UserError: If ``data_dir`` is no folder.
    """
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"data_dir {data_dir} is not a folder; name the one that holds the data files")
    places = sorted([*folder.iterdir(), *folder.glob("*/*")])
    for name in names:
        stems = [f"{name}_{split}".lower(), name.lower()]
        for stem in stems[: 1 if only_split else 2]:
            for ending in FILE_ENDINGS:
                found = [path for path in places if path.name.lower() == stem + ending and path.is_file()]
                if found:
                    return found[:1]
        shards = [
            shard
            for path in places
            if path.name.lower() == stems[1] and path.is_dir()
            for shard in path.rglob(f"{split}*")
            if shard.name.lower().endswith(FILE_ENDINGS)
        ]
        if shards:
            return sorted(shards)
    return []
