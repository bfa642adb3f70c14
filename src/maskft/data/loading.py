"""One set of rows, of a registered name, a file, the hub or a procedural task, as examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from random import Random

from datasets import Dataset

from ..errors import UserError, did_you_mean
from .formats import Row, to_examples
from .procedural import PROCEDURAL_PREFIX, procedural_rows
from .registry import TRAINING_SETS, TrainingSet
from .sources import find_files, is_hub_name, load_from_hub, numbered, read_file

SHUFFLE_BUFFER = 10_000  # rows of a stream that are held in memory to draw from


@dataclass(frozen=True)
class Reader:
    """How sets are read; the same for all sets of a mixture.

    Attributes:
        split: Split of a hub data set; None for held-out data, see `split_of`.
        config: Configuration of a hub data set.
        as_chat: Whether questions and answers become messages. None: where ``tokenizer`` has a chat template.
        tokenizer: None counts as having a template.
        text_field: Name of the column of plain text.
        size: Number of exercises of a procedural task.
        seed: Of a procedural task, and of the rows taken from a stream.
        options: Of a procedural task.
        data_dir: Folder to look for sets in before the hub is asked.
        streaming: Read only as many rows as are taken.
        as_messages: Write a prompt and a completion that are messages as one conversation, as mixtures need it. Tokens
            and labels are the same for both.
    """

    split: str | None = "train"
    config: str | None = None
    as_chat: bool | None = None
    tokenizer: object = None
    text_field: str = "text"
    size: int = 500
    seed: int = 0
    options: dict | None = None
    data_dir: str | None = None
    streaming: bool = False
    as_messages: bool = False

    def read(self, name: str, num_rows: int | None = None) -> Dataset:
        """Read one set as examples (see the package's docstring).

        Args:
            name: A file, a name of ``registry.py``, the name of a file in ``data_dir``, a hub name, or a procedural
                task.
            num_rows: Of a stream: how many rows to take. Of a procedural task: how many to make.
        """
        as_chat = self.as_chat
        if name.startswith(PROCEDURAL_PREFIX):
            task = name.removeprefix(PROCEDURAL_PREFIX)
            made = procedural_rows(task, num_rows or self.size, self.seed, self.options or {}, as_chat is not True)
            rows, known = numbered(made), None
        else:
            rows, known = self._find(name)
            if self.streaming:
                rows = self._take(rows, name, num_rows)
        if as_chat is None:
            as_chat = self.tokenizer is None or bool(self.tokenizer.chat_template)
        return to_examples(rows, name, as_chat, self.text_field, known and known.formats, self.as_messages)

    def _find(self, name: str) -> tuple[Iterable[tuple[str, Row]], TrainingSet | None]:
        """Return the rows of a set with their places, and what is registered about the set."""
        known = TRAINING_SETS.get(name) if is_hub_name(name) else None
        # The options are for one set; in a mixture, what is known of a set wins.
        split = split_of(name, self.split, self.as_messages)
        config = known and (known.config if self.as_messages else self.config or known.config)
        files = local_files(name, self.data_dir, split)
        if files:
            rows = chain.from_iterable(map(read_file, files))
            of_mixture = known is not None and known.source is not None
            return _only_source(rows, name, known) if of_mixture else rows, known
        if known and self.data_dir:
            end = "" if split == "train" else f"_{split}"
            wanted = ", ".join(f"{each}{end}.jsonl" for each in _file_names(name))
            raise UserError(
                f"data_dir {self.data_dir} holds none of {wanted} (or .json, .parquet, .gz) for {name}; add one, or "
                f"leave data_dir out to download {known.hub_id}"
            )
        if known is None:
            if "/" not in name and (similar := did_you_mean(name, TRAINING_SETS)):
                raise UserError(f"there is no file and no known data set {name!r}{similar}")
            return numbered(load_from_hub(name, self.config, split, streaming=self.streaming)), None
        rows = load_from_hub(known.hub_id, config, split, known.data_files, self.streaming)
        if known.source:
            rows = rows.filter(lambda source: source == known.source, input_columns="source")
        return numbered(rows), known

    def _take(self, rows: Iterable[tuple[str, Row]], name: str, num_rows: int | None) -> Iterator[tuple[str, Row]]:
        """Take ``num_rows`` of a stream, drawn from a buffer that moves along it."""
        if num_rows is None:
            raise UserError(f"streaming reads as many rows as are asked for: give {name} a count, such as {name}:10000")

        taken = 0
        for pair in islice(_shuffled(rows, self.seed), num_rows):
            taken += 1
            yield pair
        if taken < num_rows:
            raise too_few_rows(name, num_rows, taken)


def split_of(name: str, asked: str | None, of_mixture: bool = False) -> str:
    """The split that a set is read from.

    Args:
        name: The set.
        asked: The split asked for; None: of held-out data, for which registered sets name one and others have ``test``.
        of_mixture: Whether ``asked`` is for several sets; of registered ones it then tells training from held-out data.
    """
    known = _registered(name)
    if asked is None:
        return known.heldout_split if known else "test"
    if of_mixture and name in TRAINING_SETS:
        return "train" if asked.startswith("train") else known.heldout_split
    return asked


def _registered(name: str) -> TrainingSet | None:
    """What is registered of a set, by its name here or on the hub."""
    return TRAINING_SETS.get(name) or next((known for known in TRAINING_SETS.values() if known.hub_id == name), None)


def local_files(name: str, data_dir: str | None, split: str) -> list[Path]:
    """Find the files here that a set is read from; none: it comes from the hub, or is generated."""
    if name.startswith(PROCEDURAL_PREFIX):
        return []
    if not is_hub_name(name):
        return [Path(name).expanduser()]
    # The plain name of a training set is that of its training split.
    only_split = _registered(name) is not None and split != "train"
    return find_files(data_dir, _file_names(name), split, only_split) if data_dir else []


def _file_names(name: str) -> list[str]:
    known = TRAINING_SETS.get(name)
    return [name, *known.file_names, known.hub_id.rpartition("/")[2]] if known else [name.rpartition("/")[2]]


def _shuffled(rows: Iterable[tuple[str, Row]], seed: int) -> Iterator[tuple[str, Row]]:
    """Yield rows in a seeded order, as `datasets.IterableDataset.shuffle` does, which cannot hash a file being read."""
    random = Random(seed)
    buffer: list[tuple[str, Row]] = []
    for pair in rows:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(pair)
            continue
        index = random.randrange(SHUFFLE_BUFFER)
        yield buffer[index]
        buffer[index] = pair
    random.shuffle(buffer)
    yield from buffer


def too_few_rows(name: str, asked: int, existing: int) -> UserError:
    """Return the error of a mixture that asks for more rows than a set has."""
    return UserError(f"the mixture asks for {asked:,} rows of {name}, which has {existing:,}; ask for fewer")


def _only_source(rows: Iterable[tuple[str, Row]], name: str, known: TrainingSet) -> Iterator[tuple[str, Row]]:
    """Keep the rows of the set out of a file of the whole mixture; a file without ``source`` is the set itself."""
    found = False
    for where, row in rows:
        if not isinstance(row, dict) or row.get("source", known.source) == known.source:
            found = True
            yield where, row
    if not found:
        raise UserError(
            f"{name}: no row has the source {known.source!r}; give the file of {known.hub_id} or of the set"
        )
