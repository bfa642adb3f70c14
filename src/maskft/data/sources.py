"""Where rows come from: data files and the hub."""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset
from pyarrow import csv, parquet

from maskft_common.errors import UserError, did_you_mean, first_line
from maskft_common.files import check_regular, expand_user, is_there, open_text, parse_json
from maskft_common.layout import DATA_FILE_ENDINGS

from .formats import half_pair
from .registry import TRAINING_SETS, TrainingSet

# Of a CSV file as it is read at a time: a row may not be longer, and that of a whole document can be.
_CSV_BLOCK_BYTES = 64 * 2**20

# Not read, but a name that ends so is meant as a file, and not looked up on the hub.
_OTHER_FILE_ENDINGS = (".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".xz", ".bz2", ".yaml", ".yml", ".md")

Row = Mapping[str, Any]
# Each with its place, such as "line 3".
Rows = Iterable[tuple[str, Row]]


# Files


def read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each row of a data file with its place, such as ``line 3``.

    JSON is read line by line and not by ``datasets``, which would guess dates, fill in missing keys (so ids would
    change) and name no line in its errors.

    Args:
        path: A file with one of ``DATA_FILE_ENDINGS``.

    Raises:
        UserError: If there is no such file, its ending is unknown, or its content cannot be read.
    """
    # An ending may be written in capitals.
    name = path.name.lower()
    if not path.exists():
        raise UserError(f"data file {path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one file in it ({', '.join(DATA_FILE_ENDINGS)})")
    # A pipe could be read once, and the rows are read again to name the data.
    check_regular(path)
    if not name.endswith(DATA_FILE_ENDINGS):
        raise UserError(f"data file {path} has an unsupported ending; convert it to {', '.join(DATA_FILE_ENDINGS)}")

    try:
        if name.endswith(".parquet"):
            yield from numbered(_parquet_rows(path))
        elif name.endswith(".csv"):
            yield from numbered(_csv_rows(path))
        else:
            yield from _json_rows(path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"data file {path} is not UTF-8 text: {error.reason} at byte {error.start}; save it in that encoding"
        ) from None
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        # gzip's errors are among these.
        raise UserError(f"data file {path} cannot be read: {first_line(error)}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    file = parquet.ParquetFile(path)
    _check_columns(file.schema_arrow.names, path)
    # A batch at a time: rows are Python objects, and all of a large file would not fit into memory.
    for batch in file.iter_batches():
        try:
            rows = batch.to_pylist()
        except (OverflowError, LookupError) as error:
            # A date after the year 9999, a time zone that is not known.
            raise UserError(
                f"data file {path} holds a value that Python has no type for ({type(error).__name__}: "
                f"{first_line(error)}); leave out its column"
            ) from None
        yield from rows


def _csv_rows(path: Path) -> list[Row]:
    """Rows with every value as text; by itself pyarrow guesses numbers and dates."""
    # Read twice: types are declared by the names of columns, which are not known before.
    parsing = csv.ParseOptions(newlines_in_values=True)
    reading = csv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
    guessed = csv.read_csv(path, reading, parsing)
    # Spreadsheets of many countries write semicolons, which would be parts of one name.
    names = guessed.column_names
    if len(names) == 1 and any(separator in names[0] for separator in ";\t|"):
        raise UserError(f"data file {path} has one column, {names[0]!r}: separate columns by commas")
    _check_columns(names, path)
    # pyarrow gives bytes where a text is not UTF-8, and converting them has another error.
    for name, column in zip(names, guessed.columns, strict=True):
        if pyarrow.types.is_binary(column.type):
            raise UserError(f"data file {path} is not UTF-8 text, in column {name!r}; save it in that encoding")
    types = dict.fromkeys(guessed.column_names, pyarrow.string())
    table = csv.read_csv(
        path,
        reading,
        parsing,
        csv.ConvertOptions(column_types=types),
    )
    return table.to_pylist()


def _check_columns(names: Sequence[str], path: Path) -> None:
    """Raise for two columns of one name, of which a row would keep the last."""
    for name, count in Counter(names).items():
        # Spreadsheets write empty columns without a name.
        if name and count > 1:
            raise UserError(f"data file {path} has {count} columns named {name!r}; give each its own name")


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    # utf-8-sig: some editors begin a file with a byte order mark, which is not JSON.
    with open_text(path, "utf-8-sig") as lines:
        # A .json file may hold one array, or like .jsonl one object per line.
        if ".jsonl" not in path.name.lower():
            text = lines.read()
            # An array is one JSON value, parsed as a whole: its rows are numbered, as their lines are not known.
            if text.lstrip().startswith("["):
                rows = _parse_json(text, path, first=1)
                yield from numbered(rows)
                return
            if _is_one_value(text):
                raise UserError(
                    f"data file {path} holds one object over several lines; write a list of rows, or a row per line"
                )
            lines = io.StringIO(text)

        for number, line in enumerate(lines, start=1):
            # Without the line break: the parser would report a line that ends too early at the line after it.
            text = line.rstrip()
            if text:
                row = _parse_json(text, path, first=number)
                yield f"line {number}", row


def _is_one_value(text: str) -> bool:
    """Whether several lines are one JSON value: the first of them would not be JSON, though the file is."""
    if "\n" not in text.strip():
        return False
    try:
        # Lines that are a value each end this after the first.
        parse_json(text)
    except ValueError:
        return False
    return True


def _parse_json(
    text: str,
    path: Path,
    first: int,
) -> Any:
    """Parse JSON that begins at line ``first`` of a file."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        # Lines are counted from 1, in the file and in the error.
        line = first + error.lineno - 1
        raise UserError(f"data file {path} is not JSON at line {line}: {error.msg} (column {error.colno})") from None
    except ValueError as error:
        # A number of 5,000 digits, lists in lists without end.
        raise UserError(f"data file {path} cannot be read at line {first}: {error}") from None


def check_unicode(row: Row, place: str) -> None:
    """Raise for a text with half a surrogate pair, which JSON can spell, and no tokenizer or file takes.

    Args:
        row: The row, or those of its columns that are used.
        place: Its file and place, for the message.

    Raises:
        UserError: If there is one.
    """
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {half_pair(error)}") from None


def numbered(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Yield each row with its place, counted from 1: ``row 1``."""
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


# Names


def is_hub_name(name: str) -> bool:
    """Whether ``name`` can only mean a hub data set: it does not exist here and does not look like a file."""
    is_path = name.startswith((".", "/", "~"))
    has_file_ending = name.lower().endswith(DATA_FILE_ENDINGS + _OTHER_FILE_ENDINGS)
    return not (is_path or has_file_ending or is_there(name))


def has_configurations(name: str, of_mixture: bool) -> bool:
    """Whether a configuration that is asked for would be that of this set.

    A file has none, a registered set only where its entry names one; in a mixture registered sets keep their own.
    """
    if not is_hub_name(name):
        return False
    known = TRAINING_SETS.get(name)
    return known is None or (known.config is not None and not of_mixture)


def split_of(name: str, asked: str | None) -> str:
    """The split that a set is read from.

    Args:
        name: The set.
        asked: The split that was asked for; None: that of held-out data, which registered sets name and others call
            ``test``.
    """
    if asked:
        return asked
    known = _registered(name)
    return known.heldout_split if known else "test"


def local_file(
    name: str,
    data_dir: str | None,
    split: str,
) -> Path | None:
    """The file that a set is read from, here or in ``data_dir``; None where the set is on the hub.

    A file's name is looked for in the current folder first. For a set's name, the files of `_stems` are looked for.

    Raises:
        UserError: If ``data_dir`` is needed and not a folder.
    """
    if not is_hub_name(name):
        file = expand_user(name)
        if data_dir is None or file.exists():
            return file
        # Also where it is missing, so that the error names data_dir. An absolute path stays as it is.
        return expand_user(data_dir) / file

    if data_dir is None:
        return None
    folder = expand_user(data_dir)
    if not folder.is_dir():
        raise UserError(f"data_dir {data_dir} is not a folder; name the one that holds the data files")
    # Every ending of one stem before the next stem: a file of the split wins over one without.
    for stem, ending in product(_stems(name, split), DATA_FILE_ENDINGS):
        file = folder / f"{stem}{ending}"
        if file.is_file():
            return file
    return None


def _stems(name: str, split: str) -> list[str]:
    """Names, without ending, of the files that a set may be in: ``NAME_SPLIT``, and ``NAME`` for the training rows.

    Of a set that is not registered nobody knows which split is held out, so that ``NAME`` serves for each.
    """
    # gsm8k of openai/gsm8k.
    stem = name.rpartition("/")[2]
    is_heldout = _registered(name) is not None and split != "train"
    if is_heldout:
        return [f"{stem}_{split}"]
    return [f"{stem}_{split}", stem]


def _registered(name: str) -> TrainingSet | None:
    """The registered set of this name, here or on the hub; None: it is not registered."""
    if name in TRAINING_SETS:
        return TRAINING_SETS[name]
    # Several sets are parts of one hub data set, and have the same held-out split: the first one will do.
    for known in TRAINING_SETS.values():
        if known.hub_id == name:
            return known
    return None


# Rows of a set


def find_rows(
    name: str,
    split: str | None,
    config: str | None = None,
    data_dir: str | None = None,
) -> tuple[Rows, TrainingSet | None]:
    """Find the rows of a file, a registered set, a file in ``data_dir`` or a hub data set.

    Args:
        name: The file or the set.
        split: The split of a hub data set; None: that of held-out data.
        config: Configuration of a hub data set that has some (`has_configurations`); default: that of the registered
            set.
        data_dir: Folder to look for files in before the hub is asked.

    Returns:
        The rows, and the registered set, or None.

    Raises:
        UserError: If the rows cannot be found.
    """
    known = TRAINING_SETS.get(name) if is_hub_name(name) else None
    split = split_of(name, split)
    # A file, named by itself or found in data_dir.
    file = local_file(name, data_dir, split)
    if file is not None:
        rows = read_file(file)
        if known and known.source:
            rows = _of_source(rows, known.source)
        return rows, known

    # A registered set that is not in data_dir is an error and no download: the folder is meant for machines offline.
    if known and data_dir:
        wanted = ", ".join(f"{stem}.jsonl" for stem in _stems(name, split))
        raise UserError(
            f"data_dir {data_dir} holds none of {wanted} (or .json, .parquet, .gz) for {name}; add one, or leave "
            f"data_dir out to download {known.hub_id}"
        )

    if known is None:
        # A misspelt registered name; names of users' data sets on the hub have a slash.
        similar = did_you_mean(name, TRAINING_SETS)
        if "/" not in name and similar:
            raise UserError(f"there is no file and no known data set {name!r}{similar}")
        return numbered(load_from_hub(name, config, split)), None

    found = load_from_hub(
        known.hub_id,
        config or known.config,
        split,
        known.data_files,
    )
    if known.source:
        # input_columns: the other columns, with the conversations, are not decoded for it.
        found = found.filter(
            lambda source: source == known.source,
            input_columns="source",
        )
    return numbered(found), known


def _of_source(rows: Rows, source: str) -> Iterator[tuple[str, Row]]:
    """The rows of one source, where a file holds those of a whole mixture; a file without the column is that source."""
    for place, row in rows:
        # A row that is not an object is an error, which to_examples raises.
        if not isinstance(row, dict) or row.get("source", source) == source:
            yield place, row


def load_from_hub(
    name: str,
    config: str | None,
    split: str,
    data_files: str | None = None,
) -> Dataset:
    """Download one split of a hub data set, or read it from the hub's cache.

    Raises:
        UserError: If the hub does not give it.
    """
    options = {}
    if data_files:
        options["data_files"] = data_files
    try:
        return datasets.load_dataset(name, config, split=split, **options)
    except Exception as error:
        # Of many types: no network, no such name, no such configuration or split.
        raise UserError(
            f"{name!r} is not a local file, and the hub gave no split {split!r} of it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None
