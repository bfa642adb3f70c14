"""What training rows share with each other and with the sets that are evaluated on."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.lib.stride_tricks import sliding_window_view

from ..errors import UserError, did_you_mean
from ..files import digest
from .formats import Row
from .registry import TEST_SETS, TestSet
from .sources import find_files, is_hub_name, load_from_hub, numbered, read_file

NGRAM = 13  # words, as in GPT-3's check, https://arxiv.org/abs/2005.14165, appendix C
SHORTEST = 8  # words: a test item of fewer words is too common a phrase to tell anything
BATCH_ROWS = 2_000  # training rows whose windows are hashed at once
QUESTION_COLUMNS = ("question", "problem", "prompt", "instruction", "query")


def example_texts(example: Row) -> list[str]:
    """Return the texts of an example in their order: every message, or prompt and completion, or the plain text."""
    texts = []
    for column, value in example.items():
        if column in ("id", "answer", "answer_type") or value is None:
            continue
        texts += [value] if isinstance(value, str) else [message["content"] for message in value]
    return texts


def unique_rows(examples: Dataset) -> list[int]:
    """Return the indices of the rows without exact copies of earlier ones: same texts up to white space and NFKC."""
    seen: set[str] = set()
    kept = []
    for index, example in enumerate(examples):
        texts = (" ".join(unicodedata.normalize("NFKC", text).split()) for text in example_texts(example))
        content = digest("\0".join(texts))
        if content not in seen:
            seen.add(content)
            kept.append(index)
    return kept


@dataclass(frozen=True)
class Contamination:
    """What training rows share with one test set.

    Attributes:
        num_items: Number of items in the test set.
        num_too_short: Items of fewer than `SHORTEST` words, which are not looked for.
        num_items_found: Items that share `NGRAM` words in a row (all words of a shorter item) with a training row.
        num_rows: Training rows that share so much with an item.
    """

    num_items: int
    num_too_short: int
    num_items_found: int
    num_rows: int


def words(text: str) -> list[str]:
    """Split a text into words without case and punctuation."""
    return re.findall(r"\w+", text.casefold())


class NgramIndex:
    """The n-grams of the items of several test sets, to be found in training rows.

    Only words of the test sets are told apart, so a window with any other word in it is passed over at once. Windows
    are compared by a 64-bit hash, and what agrees is compared word by word: nothing is found that is not there.
    """

    def __init__(self, test_sets: dict[str, Sequence[str]]):
        self.test_sets = test_sets
        self._ids: dict[str, int] = {}
        self._items: dict[tuple[int, ...], set[tuple[str, int]]] = {}
        self._too_short = dict.fromkeys(test_sets, 0)
        for name, texts in test_sets.items():
            for item, text in enumerate(texts):
                ids = [self._ids.setdefault(word, len(self._ids) + 1) for word in words(text)]
                if len(ids) < SHORTEST:
                    self._too_short[name] += 1
                    continue
                length = min(NGRAM, len(ids))
                for start in range(len(ids) - length + 1):
                    self._items.setdefault(tuple(ids[start : start + length]), set()).add((name, item))
        lengths = sorted({len(ngram) for ngram in self._items})
        self._hashes = {
            length: np.sort(_hashes(np.array([g for g in self._items if len(g) == length], dtype=np.uint64)))
            for length in lengths
        }

    def search(self, rows: Iterable[Sequence[str]]) -> tuple[dict[str, Contamination], list[int]]:
        """Look for the items in training rows.

        Args:
            rows: The texts of each row. An n-gram does not run from one text into the next.

        Returns:
            What was found of each test set, and the indices of the rows in which something was found.
        """
        found_rows: dict[str, set[int]] = {name: set() for name in self.test_sets}
        found_items: dict[str, set[int]] = {name: set() for name in self.test_sets}
        batch: list[int] = []
        owners: list[int] = []
        count = 0
        for count, texts in enumerate(rows, start=1):
            for text in texts:
                ids = [self._ids.get(word, 0) for word in words(text)] + [0]  # 0: a word of no item, or the end
                batch += ids
                owners += [count - 1] * len(ids)
            if count % BATCH_ROWS == 0:
                self._search_batch(batch, owners, found_rows, found_items)
                batch, owners = [], []
        self._search_batch(batch, owners, found_rows, found_items)
        report = {
            name: Contamination(
                num_items=len(texts),
                num_too_short=self._too_short[name],
                num_items_found=len(found_items[name]),
                num_rows=len(found_rows[name]),
            )
            for name, texts in self.test_sets.items()
        }
        return report, sorted(set().union(*found_rows.values()))

    def _search_batch(self, batch: list[int], owners: list[int], found_rows: dict, found_items: dict) -> None:
        ids = np.array(batch, dtype=np.uint64)
        for length, known in self._hashes.items():
            if len(ids) < length:
                continue
            windows = sliding_window_view(ids, length)
            # The window is free of foreign words where the count of those does not grow along it.
            foreign = np.concatenate([[0], np.cumsum(ids == 0)])
            starts = np.flatnonzero(foreign[length:] == foreign[:-length])
            hashes = _hashes(windows[starts])
            place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            for start in starts[known[place] == hashes]:
                for name, item in self._items.get(tuple(batch[start : start + length]), ()):
                    found_rows[name].add(owners[start])
                    found_items[name].add(item)


def _hashes(ngrams: np.ndarray) -> np.ndarray:
    """Hash n-grams of word ids, shape (num_ngrams, length), uint64, to uint64: a polynomial that may overflow."""
    total = np.zeros(len(ngrams), dtype=np.uint64)
    for column in range(ngrams.shape[1]):
        total = total * np.uint64(0x9E3779B97F4A7C15) + ngrams[:, column]
    return total


def load_test_texts(names: str, data_dir: str | None) -> dict[str, list[str]]:
    """Read the questions of test sets.

    Args:
        names: Names of ``registry.TEST_SETS`` or data files, separated by commas.
        data_dir: Folder to look for them in; without it, the hub is asked.
    """
    return {name: _test_texts(name, data_dir) for name in set_names(names)}


def set_names(names: str) -> list[str]:
    """The names in a list with commas between."""
    return [name.strip() for name in names.split(",")]


def _test_texts(name: str, data_dir: str | None) -> list[str]:
    known = TEST_SETS.get(name)
    if known is None and is_hub_name(name):
        raise UserError(
            f"contamination_sets: no test set {name!r}{did_you_mean(name, TEST_SETS)}; "
            f"name a data file or some of {', '.join(TEST_SETS)}"
        )
    files = test_set_files(name, data_dir)
    if not files and data_dir:
        raise UserError(
            f"data_dir {data_dir} holds no file of the test set {name}; add one of "
            f"{', '.join(f'{each}.jsonl' for each in _file_names(name))} (or .json, .parquet, .gz)"
        )
    rows = (row for file in files for row in read_file(file)) if files else _from_hub(known)
    columns = (known.column,) if known else QUESTION_COLUMNS
    return [_question(row, columns, f"{name}: {where}") for where, row in rows]


def test_set_files(name: str, data_dir: str | None) -> list[Path]:
    """The files here that a test set is read from; none: it comes from the hub, or is missing in ``data_dir``."""
    if name not in TEST_SETS:
        return [] if is_hub_name(name) else [Path(name).expanduser()]
    return find_files(data_dir, _file_names(name), TEST_SETS[name].split) if data_dir else []


def _file_names(name: str) -> list[str]:
    return [name, *TEST_SETS[name].file_names]


def _from_hub(known: TestSet) -> Iterable[tuple[str, Row]]:
    for config in known.configs:
        yield from numbered(load_from_hub(known.hub_id, config, known.split))


def _question(row: Row, columns: Sequence[str], where: str) -> str:
    column = next((column for column in columns if isinstance(row.get(column), str)), None)
    if column is None:
        raise UserError(f"{where}: expected the column {' or '.join(columns)}, found {', '.join(map(repr, row))}")
    return row[column]
