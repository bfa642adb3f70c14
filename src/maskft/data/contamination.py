"""What training rows share with each other and with the sets that are evaluated on."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from datasets import Dataset

from maskft_base.errors import UserError, did_you_mean
from maskft_base.files import digest

from .formats import OPTIONAL_COLUMNS, Row
from .registry import TEST_SETS
from .sources import find_files, is_hub_name, load_from_hub, numbered, read_file

NGRAM = 13  # words, as in GPT-3's check, https://arxiv.org/abs/2005.14165, appendix C
SHORTEST = 8  # words: a test item of fewer words is too common a phrase to tell anything
QUESTION_COLUMNS = ("question", "problem", "prompt", "instruction", "query")


def example_texts(example: Row) -> list[str]:
    """Return the texts of an example in their order: every message, or prompt and completion, or the plain text."""
    texts = []
    for column, value in example.items():
        if column in ("id", *OPTIONAL_COLUMNS) or value is None:
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
    """The n-grams of the items of several test sets, to be found in training rows; each by its first words."""

    def __init__(self, test_sets: dict[str, Sequence[str]]):
        self.test_sets = test_sets
        self._too_short = dict.fromkeys(test_sets, 0)
        self._ngrams: dict[tuple[str, ...], list[tuple[list[str], str, int]]] = {}
        for name, texts in test_sets.items():
            for item, text in enumerate(texts):
                of_item = words(text)
                self._too_short[name] += len(of_item) < SHORTEST
                length = max(SHORTEST, min(NGRAM, len(of_item)))
                for start in range(len(of_item) - length + 1):
                    ngram = of_item[start : start + length]
                    self._ngrams.setdefault(tuple(ngram[:SHORTEST]), []).append((ngram, name, item))

    def search(self, rows: Iterable[Sequence[str]]) -> tuple[dict[str, Contamination], list[int]]:
        """Look for the items in the texts of each training row; an n-gram does not run from one text into the next.

        Returns:
            What was found of each test set, and the indices of the rows in which something was found.
        """
        found = [set().union(*map(self._found_in, texts)) for texts in rows]
        report = {}
        for name, texts in self.test_sets.items():
            items = [{item for owner, item in of_row if owner == name} for of_row in found]
            num_found, num_rows = len(set().union(*items)), sum(map(bool, items))
            report[name] = Contamination(len(texts), self._too_short[name], num_found, num_rows)
        return report, [index for index, of_row in enumerate(found) if of_row]

    def _found_in(self, text: str) -> set[tuple[str, int]]:
        found, row = set(), words(text)
        for start in range(len(row) - SHORTEST + 1):
            for ngram, name, item in self._ngrams.get(tuple(row[start : start + SHORTEST]), ()):
                if row[start : start + len(ngram)] == ngram:
                    found.add((name, item))
        return found


def load_test_texts(names: str, data_dir: str | None) -> dict[str, list[str]]:
    """Read the questions of test sets (names of ``registry.TEST_SETS`` or data files) in ``data_dir`` or the hub."""
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
    found = (
        map(read_file, files)
        if files
        else (numbered(load_from_hub(known.hub_id, config, known.split)) for config in known.configs)
    )
    rows = chain.from_iterable(found)
    columns = (known.column,) if known else QUESTION_COLUMNS
    return [_question(row, columns, f"{name}: {where}") for where, row in rows]


def test_set_files(name: str, data_dir: str | None) -> list[Path]:
    """The files here that a test set is read from; none: it comes from the hub, or is missing in ``data_dir``."""
    if name not in TEST_SETS:
        return [] if is_hub_name(name) else [Path(name).expanduser()]
    return find_files(data_dir, _file_names(name), TEST_SETS[name].split) if data_dir else []


def _file_names(name: str) -> list[str]:
    return [name, *TEST_SETS[name].file_names]


def _question(row: Row, columns: Sequence[str], where: str) -> str:
    column = next((column for column in columns if isinstance(row.get(column), str)), None)
    if column is None:
        raise UserError(f"{where}: expected the column {' or '.join(columns)}, found {', '.join(map(repr, row))}")
    return row[column]
