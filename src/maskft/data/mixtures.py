"""Mixtures: several sets, each with a count or a fraction of its rows, read as examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datasets import Dataset, concatenate_datasets

from maskft_common.errors import UserError
from maskft_common.files import digest, is_there

from .formats import OPTIONAL_COLUMNS, to_examples
from .registry import TRAINING_SETS
from .sources import find_rows, has_configurations, is_hub_name


@dataclass(frozen=True)
class Part:
    """One set of a mixture.

    Attributes:
        name: The set.
        amount: A whole number of rows, or a fraction of them in (0, 1]; None takes all.
    """

    name: str
    amount: int | float | None = None

    def num_rows(self, existing: int) -> int:
        """Return how many of ``existing`` rows are taken.

        Raises:
            UserError: If the mixture asks for more rows than there are.
        """
        if self.amount is None:
            return existing
        # 1.0 is all rows, and 1 is one row.
        if isinstance(self.amount, float):
            # A small fraction of a small set would round to 0.
            return max(1, round(self.amount * existing))
        if self.amount > existing:
            raise UserError(
                f"the mixture asks for {self.amount:,} rows of {self.name}, which has {existing:,}; ask for fewer"
            )
        return self.amount


def parse_mixture(text: str) -> list[Part]:
    """Read ``name``, ``name:7473`` (rows), ``name:0.5`` (a fraction of the rows), or several with commas between.

    >>> parse_mixture("metamathqa:40000, gsm8k:0.5")
    [Part(name='metamathqa', amount=40000), Part(name='gsm8k', amount=0.5)]

    Raises:
        UserError: If an entry is empty or comes twice, or its amount is not a number of rows or a fraction.
    """
    # A file's name may have a comma or a colon.
    if is_there(text):
        return [Part(text)]

    parts: list[Part] = []
    for piece in text.split(","):
        entry = piece.strip()
        if not entry:
            raise UserError(f"the mixture {text!r} has an empty entry; write name:rows,name:rows")

        # From the right: the name itself may have a colon.
        name, colon, text_of_amount = entry.rpartition(":")
        # ":5" has no name before the colon, and is taken for a name.
        if colon and name:
            amount = _amount(entry, text_of_amount)
            part = Part(name.strip(), amount)
        else:
            part = Part(entry)

        names = [other.name for other in parts]
        if part.name in names:
            raise UserError(f"the mixture names {part.name} twice; give it one amount")
        parts.append(part)
    return parts


def hub_ids(text: str) -> list[str]:
    """Names on the hub of the sets of a mixture; files have none."""
    if not text:
        return []

    ids = []
    for part in parse_mixture(text):
        if not is_hub_name(part.name):
            continue
        known = TRAINING_SETS.get(part.name)
        # A set that is not registered is named as on the hub.
        if known is None:
            ids.append(part.name)
        else:
            ids.append(known.hub_id)
    return ids


def rename_sets(text: str, change: Callable[[str], str]) -> str:
    """Return a mixture as text with every set's name changed."""
    entries = []
    for part in parse_mixture(text):
        entry = change(part.name)
        # As parse_mixture reads it again: a float has a point, and stays a fraction.
        if part.amount is not None:
            entry = f"{entry}:{part.amount}"
        entries.append(entry)
    return ",".join(entries)


def _amount(entry: str, text: str) -> int | float:
    """The amount of an entry: an int is a number of rows, a float a fraction of them."""
    # 40_000 is a number in Python and YAML, and not for isdecimal().
    digits = text.strip().replace("_", "")
    value: int | float
    try:
        if digits.isdecimal():
            value = int(digits)
        else:
            value = float(text)
    except ValueError:
        raise UserError(
            f"{entry!r}: {text!r} is neither a number of rows (40000) nor a fraction of them (0.5)"
        ) from None

    # "not ... <=", because NaN is neither.
    is_too_large = isinstance(value, float) and not value <= 1
    if value <= 0 or is_too_large:
        raise UserError(f"{entry!r}: give a whole number of rows, at least 1, or a fraction in (0, 1]")
    return value


@dataclass(frozen=True)
class ReadSet:
    """One set of a mixture as examples, and how many of them the mixture takes."""

    name: str
    examples: Dataset
    count: int

    def draw(
        self,
        seed: int,
        pool: Sequence[int] | None = None,
        count: int | None = None,
    ) -> Dataset:
        """Choose ``count`` rows out of ``pool``, in their order: those whose id has the smallest seeded hash.

        So more rows contain fewer rows, and the order of a file does not matter.

        Args:
            seed: Seed of the hash.
            pool: Indices of rows to choose from; None: all rows.
            count: Number of rows; None: as many as the mixture takes.
        """
        if pool is None:
            pool = range(len(self.examples))
        if count is None:
            count = self.count
        # Chosen by hash, and then in the order of the file: shuffling is left to the mixture and the trainer.
        if count < len(pool):
            ids = self.examples["id"][:]

            # Of the id and not of the place, so that a sorted file gives the same rows.
            def seeded_hash(index: int) -> str:
                return digest(f"{seed} {ids[index]}")

            by_hash = sorted(pool, key=seeded_hash)
            smallest = by_hash[:count]
            pool = sorted(smallest)
        return self.examples.select(pool)


@dataclass(frozen=True)
class Reader:
    """How sets are read; the same for all sets of a mixture.

    Attributes:
        split: Split of a hub data set; None for held-out data, see `sources.split_of`.
        config: Configuration of a hub data set.
        as_chat: Whether questions and answers become messages. None: where ``tokenizer`` has a chat template.
        tokenizer: None counts as having a template.
        text_field: Name of the column of plain text.
        data_dir: Folder to look for sets in before the hub is asked.
        seed: Of the rows that a mixture takes.
    """

    split: str | None = "train"
    config: str | None = None
    as_chat: bool | None = None
    tokenizer: object = None
    text_field: str = "text"
    data_dir: str | None = None
    seed: int = 0

    def read(self, mixture: str) -> list[ReadSet]:
        """Read every set of a mixture as examples (see the package's docstring)."""
        parts = parse_mixture(mixture)
        is_of_several = len(parts) > 1
        # All sets are read before an amount is compared: a set that cannot be read is the first error.
        read = [self._examples(part, of_mixture=is_of_several) for part in parts]

        sets = []
        for part, examples in zip(parts, read, strict=True):
            count = part.num_rows(len(examples))
            sets.append(ReadSet(part.name, examples, count))
        return sets

    def _examples(self, part: Part, of_mixture: bool) -> Dataset:
        as_chat = self.as_chat
        # Base models have no template: their tokenizers get plain text.
        if as_chat is None:
            as_chat = self.tokenizer is None or bool(self.tokenizer.chat_template)

        config = self.config if has_configurations(part.name, of_mixture) else None
        rows, known = find_rows(part.name, self.split, config, self.data_dir)
        formats = known.formats if known else None
        # Conversations, as the sets of a mixture must have the same columns. Tokens and labels are the same for both:
        # a row for which they are not is refused.
        return to_examples(
            rows,
            part.name,
            as_chat,
            self.text_field,
            formats,
            as_messages=of_mixture,
        )


def load_examples(
    mixture: str,
    split: str | None = "train",
    **kwargs,
) -> Dataset:
    """Read a set, or the rows that a mixture takes, as examples (see the package's docstring).

    Args:
        mixture: A set or a mixture; see `parse_mixture`.
        split: Split of hub data sets; None: that of held-out data.
        **kwargs: The other fields of `Reader`.
    """
    reader = Reader(split=split, **kwargs)
    drawn = [each.draw(reader.seed) for each in reader.read(mixture)]
    return mix(drawn, reader.seed)


def mix(parts: Sequence[Dataset], seed: int) -> Dataset:
    """Concatenate the parts of a mixture and shuffle them; a single part is left as it is.

    Raises:
        UserError: If some parts are plain text and others are messages.
    """
    # Its rows stay in the order of the file; the trainer shuffles them in every epoch.
    if len(parts) == 1:
        return parts[0]

    # Optional columns may differ: concatenating fills a missing one with None.
    layouts = []
    for part in parts:
        layouts.append(set(part.column_names) - set(OPTIONAL_COLUMNS))
    is_alike = all(layout == layouts[0] for layout in layouts)
    if not is_alike:
        columns = set().union(*layouts) - {"id"}
        found = ", ".join(sorted(columns))
        # The names of all columns of text: they show which of the two forms the parts have.
        raise UserError(
            f"a mixture must be all messages or all plain text, not {found}; "
            "set as_chat to true, or leave out the plain text"
        )
    # Shuffled, so that the first rows (max_train_samples) are of all sets.
    whole = concatenate_datasets(list(parts))
    return whole.shuffle(seed=seed)
