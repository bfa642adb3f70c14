"""Mixtures: several sets, each with a count or a fraction of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datasets import Dataset, concatenate_datasets

from ..errors import UserError
from ..files import digest, is_there
from .loading import Reader, too_few_rows


@dataclass(frozen=True)
class Part:
    """One set of a mixture.

    Attributes:
        name: What the reader finds the set by.
        amount: A whole number of rows, or a fraction of them in (0, 1]; None takes all.
    """

    name: str
    amount: int | float | None = None

    @property
    def count(self) -> int | None:
        """The number of rows, where it is known before reading."""
        return self.amount if isinstance(self.amount, int) else None

    def num_rows(self, existing: int) -> int:
        """Return how many of ``existing`` rows are taken, and refuse to take more."""
        if self.amount is None:
            return existing
        if isinstance(self.amount, float):
            return max(1, round(self.amount * existing))
        if self.amount > existing:
            raise too_few_rows(self.name, self.amount, existing)
        return self.amount


def parse_mixture(text: str) -> list[Part]:
    """Read ``name``, ``name:7473`` (rows), ``name:0.5`` (a fraction of the rows), or several with commas between.

    >>> parse_mixture("metamathqa:40000, gsm8k:0.5")
    [Part(name='metamathqa', amount=40000), Part(name='gsm8k', amount=0.5)]
    """
    if is_there(text):
        return [Part(text)]
    parts = []
    for entry in (entry.strip() for entry in text.split(",")):
        if not entry:
            raise UserError(f"the mixture {text!r} has an empty entry; write name:rows,name:rows")
        name, colon, amount = entry.rpartition(":")
        parts.append(Part(name.strip(), _amount(entry, amount)) if colon and name else Part(entry))
    names = [part.name for part in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"the mixture names {twice} twice; give it one amount")
    return parts


def rename_sets(text: str, change: Callable[[str], str]) -> str:
    """Return a mixture as text with every set's name changed."""
    parts = ((change(part.name), part.amount) for part in parse_mixture(text))
    return ",".join(name if amount is None else f"{name}:{amount}" for name, amount in parts)


def _amount(entry: str, text: str) -> int | float:
    try:
        value = int(text.replace("_", "")) if text.strip().replace("_", "").isdigit() else float(text)
    except ValueError:
        raise UserError(
            f"{entry!r}: {text!r} is neither a number of rows (40000) nor a fraction of them (0.5)"
        ) from None
    if value <= 0 or (isinstance(value, float) and not value <= 1):
        raise UserError(f"{entry!r}: give a whole number of rows, at least 1, or a fraction in (0, 1]")
    return value


def load_examples(name: str, split: str | None = "train", **kwargs) -> Dataset:
    """Read a set, or the rows that a mixture takes, as examples (see the package's docstring).

    Args:
        name: A set or a mixture; see `parse_mixture`.
        split: Split of hub data sets; None: that of held-out data.
        **kwargs: The other fields of `Reader`.
    """
    parts = parse_mixture(name)
    reader = Reader(split=split, as_messages=len(parts) > 1, **kwargs)
    drawn = []
    for part in parts:
        examples = reader.read(part.name, part.count)
        drawn.append(examples.select(draw(examples, range(len(examples)), part.num_rows(len(examples)), reader.seed)))
    return concatenate(drawn, reader.seed)


def draw(examples: Dataset, pool: Sequence[int], num_rows: int, seed: int) -> list[int]:
    """Choose ``num_rows`` of the rows in ``pool``, in their order: those whose id has the smallest seeded hash.

    So more rows contain fewer rows, and the order of a file does not matter.
    """
    if num_rows >= len(pool):
        return list(pool)
    ids = examples["id"][:]
    return sorted(sorted(pool, key=lambda n: digest(f"{seed} {ids[n]}"))[:num_rows])


def concatenate(parts: Sequence[Dataset], seed: int) -> Dataset:
    """Put the parts of a mixture together and shuffle them; a single part is left as it is.

    Raises:
        UserError: If some parts are plain text and others are messages.
    """
    if len(parts) == 1:
        return parts[0]
    layouts = [{column for column in part.column_names if column not in ("answer", "answer_type")} for part in parts]
    if any(layout != layouts[0] for layout in layouts):
        columns = sorted(set().union(*layouts) - {"id"})
        raise UserError(
            f"the sets of a mixture must all be messages or all plain text, these have {', '.join(columns)}; "
            "set as_chat to true, or leave out what is plain text"
        )
    return concatenate_datasets(list(parts)).shuffle(seed=seed)
