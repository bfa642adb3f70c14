"""Training rows and held-out rows that share no prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from datasets import Dataset

from maskft_common.errors import UserError, printable
from maskft_common.files import digest

from .arguments import DataArguments, check_sizes, mixture_text
from .formats import Row, question_in
from .mixtures import Reader, ReadSet, load_examples, mix, parse_mixture
from .sources import has_configurations, is_hub_name

_BATCH_ROWS = 10_000


@dataclass(frozen=True)
class SplitReport:
    """How many rows were read, kept and left out.

    Attributes:
        read: Rows read, or taken of each set of a mixture; with those of separate held-out data.
        dropped_overlap: Training rows left out because their prompt is held out.
        train: Rows to train on.
        heldout: Rows held out.
        taken: Rows taken of each set of the training data, those held out included.
        empty: Training rows whose answer has no words, such as a blank cell of a CSV file.
        repeated: Rows that two sets of a mixture hold out, each left in once.
    """

    read: int
    dropped_overlap: int
    train: int
    heldout: int
    taken: dict[str, int]
    empty: int = 0
    repeated: int = 0

    def __str__(self) -> str:
        mixture = ""
        if len(self.taken) > 1:
            parts = []
            for name, count in self.taken.items():
                # A name from a recipe may hold control characters.
                parts.append(f"{count:,} of {printable(name)}")
            mixture = f" ({', '.join(parts)})"
        text = f"read {self.read:,} rows{mixture}: {self.train:,} to train on, {self.heldout:,} held out"
        if self.dropped_overlap:
            text += f"; {self.dropped_overlap:,} left out of training because their prompt is held out"
        if self.repeated:
            text += f"; {self.repeated:,} that two sets hold out are counted once"
        if self.empty:
            text += f"; {self.empty:,} to train on have an empty answer, and teach to say nothing"
        return text


class Splits(NamedTuple):
    """Training rows and held-out rows as examples, and their counts."""

    train: Dataset
    heldout: Dataset
    report: SplitReport


def load_splits(
    args: DataArguments,
    seed: int,
    tokenizer=None,
    text_field: str = "text",
) -> Splits:
    """Read the training data and the held-out data, and remove the held-out rows from training.

    The held-out rows are chosen first and never reduced. The same arguments and seed give the same rows: runs that are
    compared item by item need the same seed here, whatever seed they train with.

    Args:
        args: The data part of the recipe.
        seed: Of the rows held out and those a mixture takes.
        tokenizer: Decides about chat or plain text where ``args.as_chat`` does not; None counts as having a template.
        text_field: Name of the column that holds plain text.

    Raises:
        UserError: If data cannot be read, the arguments contradict each other, or no training row is left.
    """
    check_sizes(args)
    if not args.dataset_name:
        raise UserError("dataset_name is missing; give a data file or a hub name")
    check_hub_options(args)
    heldout_name = _heldout_name(args)
    common = _common(args, tokenizer, text_field)
    # Read whole, and drawn from below: rows are held out before a mixture takes its amounts.
    reader = Reader(
        split=args.dataset_train_split,
        config=args.dataset_config,
        **common,
    )
    sets = reader.read(args.dataset_name)
    taken = {each.name: each.count for each in sets}
    num_read = sum(taken.values())

    if heldout_name:
        heldout = _read_heldout(args, heldout_name, seed, common)
        drawn = [each.draw(seed) for each in sets]
        train = mix(drawn, seed)
        num_read += len(heldout)
    else:
        # No other data: a part of the training data.
        train, heldout = _hold_out(sets, args.eval_split_size, seed)

    # The overlap is removed before rows are counted, so that max_train_samples rows are left.
    train, num_dropped = _without_heldout(train, heldout, args.dataset_name)
    train = _first_rows(train, args.max_train_samples)
    heldout, num_repeated = _without_repeated(heldout)
    heldout = _first_rows(heldout, args.max_eval_samples)
    report = SplitReport(
        read=num_read,
        dropped_overlap=num_dropped,
        train=len(train),
        heldout=len(heldout),
        taken=taken,
        empty=_num_without_answer(train),
        repeated=num_repeated,
    )
    return Splits(train, heldout, report)


def load_heldout(
    args: DataArguments,
    seed: int,
    tokenizer=None,
    text_field: str = "text",
) -> Dataset:
    """Read ``eval_dataset_name`` alone: the rows that `load_splits` holds out beside training data.

    Args:
        args: The data part of the recipe, in which ``dataset_name`` may be missing.
        seed: Of the rows that a mixture takes.
        tokenizer: See `load_splits`.
        text_field: Name of the column that holds plain text.

    Raises:
        UserError: If data cannot be read, or the arguments contradict each other.
    """
    check_sizes(args)
    heldout_name = _heldout_name(args)
    if heldout_name is None:
        raise UserError("eval_dataset_name is missing; give a data file or a hub name")
    check_hub_options(args)
    common = _common(args, tokenizer, text_field)
    heldout = _read_heldout(args, heldout_name, seed, common)
    heldout, _ = _without_repeated(heldout)
    return _first_rows(heldout, args.max_eval_samples)


def check_hub_options(args: DataArguments) -> None:
    """Raise for a configuration or a split that no set of the data would take: a file has none."""
    names = _names(args.dataset_name)
    # The configuration is of the training data, if there is any.
    of_config = names or _names(mixture_text(args.eval_dataset_name))
    if args.dataset_config and not any(has_configurations(name, len(of_config) > 1) for name in of_config):
        raise UserError(
            f"dataset_config is {args.dataset_config!r}, but there is none to choose for {', '.join(of_config)}; "
            "leave it out"
        )
    is_of_files = names and not any(is_hub_name(name) for name in names)
    if args.dataset_train_split != "train" and is_of_files:
        raise UserError(
            f"dataset_train_split is {args.dataset_train_split!r}, but a file has no splits: {', '.join(names)}; "
            "leave it out, and name the file of the rows that are meant"
        )


def _without_repeated(rows: Dataset) -> tuple[Dataset, int]:
    """The rows without later copies of an id, and how many these are: results have one value for an id.

    An id is the hash of a row, and equal rows of one file are numbered, so these are of two sets of a mixture.
    """
    seen: set[str] = set()
    kept = []
    for index, identity in enumerate(rows["id"]):
        if identity not in seen:
            kept.append(index)
        seen.add(identity)
    num_repeated = len(rows) - len(kept)
    return (rows.select(kept) if num_repeated else rows), num_repeated


def _common(
    args: DataArguments,
    tokenizer,
    text_field: str,
) -> dict[str, Any]:
    """The fields of `Reader` that are the same for training data and held-out data."""
    return {
        "as_chat": args.as_chat,
        "tokenizer": tokenizer,
        "text_field": text_field,
        "data_dir": args.data_dir,
    }


def _read_heldout(
    args: DataArguments,
    name: str,
    seed: int,
    common: dict[str, Any],
) -> Dataset:
    """The rows of held-out data that has a name of its own."""
    # dataset_config is of the training data, if there is any; held-out data may be another split of the same sets.
    training_sets = set(_names(args.dataset_name))
    is_of_same_sets = set(_names(name)) <= training_sets
    config = args.dataset_config if is_of_same_sets or not training_sets else None
    # Another seed than that of the training rows, so that the two draws are independent.
    heldout_seed = Random(f"heldout-{seed}").randrange(2**31)
    return load_examples(
        name,
        args.dataset_eval_split,
        config=config,
        seed=heldout_seed,
        **common,
    )


def _heldout_name(args: DataArguments) -> str | None:
    """Return the set of the held-out data; None: a part of the training data is held out."""
    name = mixture_text(args.eval_dataset_name)
    if not name and args.dataset_eval_split:
        # Another split of the training sets, whole: the amounts of a mixture are for training.
        name = ",".join(_names(args.dataset_name))

    # A file is one split.
    files = [part for part in _names(name) if not is_hub_name(part)]
    if files and args.dataset_eval_split:
        raise UserError(
            f"dataset_eval_split is {args.dataset_eval_split!r}, but {files[0]} has no splits; "
            "name the held-out data with eval_dataset_name, or hold out a part with eval_split_size"
        )
    return name or None


def _names(mixture: str | None) -> list[str]:
    if not mixture:
        return []
    return [part.name for part in parse_mixture(mixture)]


def _first_rows(rows: Dataset, limit: int | None) -> Dataset:
    """The first ``limit`` rows; None: all."""
    count = len(rows)
    if limit:
        count = min(count, limit)
    return rows.select(range(count))


def _without_heldout(
    train: Dataset,
    heldout: Dataset,
    name: str,
) -> tuple[Dataset, int]:
    """Return the training rows whose prompt is not held out, and how many are left out."""
    # By prompt and not by row: a question whose answer is worded otherwise would leak.
    held_prompts = {prompt_digest(example) for example in heldout}
    # Indices: select() makes a view of the table, where a filter would copy it.
    kept = []
    for index, example in enumerate(train):
        if prompt_digest(example) not in held_prompts:
            kept.append(index)
    if not kept:
        raise UserError(
            f"all {len(train):,} training rows of {name} have a prompt that is also held out; "
            "give other held-out data, or a smaller eval_split_size"
        )
    return train.select(kept), len(train) - len(kept)


def _hold_out(
    sets: Sequence[ReadSet],
    size: float,
    seed: int,
) -> tuple[Dataset, Dataset]:
    """Split off ``size`` of the rows taken, from each set those whose prompt has the smallest seeded hash.

    With a fraction, that fraction of each set is never trained on, however few of its rows a mixture takes: rows that
    one recipe holds out are not trained on by any other recipe with the same fraction and seed. A count is shared among
    the sets in proportion to the rows taken.
    """
    # held: how many rows of each set are held out. reserved: how many are kept out of training; with a fraction, that
    # of all rows of the set, though the mixture takes fewer.
    counts = [each.count for each in sets]
    if size < 1:
        held = [max(1, round(size * count)) for count in counts]
        sizes = [len(each.examples) for each in sets]
        reserved = [max(1, round(size * num_rows)) for num_rows in sizes]
    else:
        held = _shares(int(size), counts)
        reserved = held

    trains = []
    heldouts = []
    for each, num_held, num_reserved in zip(sets, held, reserved, strict=True):
        if num_held >= each.count:
            raise UserError(
                f"eval_split_size {size:g} holds out {num_held:,} of the {each.count:,} rows of {each.name}, "
                "which leaves none to train on; make it smaller"
            )

        # Rows by the seeded hash of their prompt: the order of the file does not matter, rows of one prompt stay
        # together, and a larger share contains a smaller one.
        prompts = [prompt_digest(example) for example in each.examples]
        ids = each.examples["id"][:]
        keys = []
        for prompt, row_id in zip(prompts, ids, strict=True):
            # The id breaks ties among rows of one prompt.
            seeded = str(seed).encode() + bytes.fromhex(prompt)
            keys.append((digest(seeded), row_id))
        ranked = sorted(range(len(prompts)), key=lambda index: keys[index])

        # Rows to train on are drawn from this pool, rows held out are the first; both in the order of the file.
        pool = sorted(ranked[num_reserved:])
        if each.count < len(prompts):
            # The last reserved prompt may have more rows behind the limit, which another recipe could hold out.
            reserved_prompts = {prompts[index] for index in ranked[:num_reserved]}
            pool = [index for index in pool if prompts[index] not in reserved_prompts]
        train = each.draw(seed, pool, each.count - num_held)
        trains.append(train)
        held_indices = sorted(ranked[:num_held])
        heldouts.append(each.examples.select(held_indices))
    return mix(trains, seed), mix(heldouts, seed)


def _shares(count: int, sizes: Sequence[int]) -> list[int]:
    """Divide ``count`` in proportion to ``sizes``, the largest remainders rounded up; at least 1 each."""
    # The largest-remainder method: everything is rounded down first.
    total = sum(sizes)
    exact = [count * size / total for size in sizes]
    shares = [int(share) for share in exact]

    # The largest remainder first: the difference is the remainder, negative.
    by_remainder = sorted(range(len(sizes)), key=lambda index: shares[index] - exact[index])
    num_missing = count - sum(shares)
    for index in by_remainder[:num_missing]:
        shares[index] += 1
    # So with a count below the number of sets, more rows are held out than were asked for.
    return [max(1, share) for share in shares]


def _num_without_answer(rows: Dataset) -> int:
    """Number of rows whose completion has no words.

    A conversation without an answer has no label, which the tokenising sees.
    """
    if "completion" not in rows.column_names:
        return 0
    count = 0
    # Some thousand rows at a time: the column itself would decode one at a time.
    for batch in rows.select_columns(["completion"]).iter(_BATCH_ROWS):
        for completion in batch["completion"]:
            texts = [completion]
            if not isinstance(completion, str):
                texts = [message["content"] for message in completion]
            if not any(text.strip() for text in texts):
                count += 1
    return count


def clusters_of(rows: Iterable[Row]) -> list[str | None]:
    """Return the cluster of each row to be measured: its ``cluster_id``, or else the id of the first row of its prompt.

    Answers to one prompt depend on each other, and equal rows are one: intervals that took them for independent would
    be too narrow.

    Args:
        rows: Rows of ``load_examples``.

    Returns:
        A label each; all None where no two rows share a prompt.
    """
    given: list[str | None] = []
    first_ids: dict[str, str] = {}
    of_prompts: list[str | None] = []
    for row in rows:
        given.append(row.get("cluster_id"))
        prompt = prompt_digest(row)
        first_ids.setdefault(prompt, str(row["id"]))
        of_prompts.append(first_ids[prompt])

    # Also where only some rows have a label, which those who read them refuse.
    if any(label is not None for label in given):
        return given
    # Rows that all have one prompt, such as an empty one, tell nothing about other prompts; they are compared as texts.
    if len(first_ids) in (1, len(given)):
        return given
    return of_prompts


def question_digest(example: Row) -> str:
    """Like ``prompt_digest``, and the same for a question as messages and as plain text (``as_chat``).

    Splits are made by ``prompt_digest``: they stay as they were.
    """
    prompt = example.get("prompt")
    if isinstance(prompt, str):
        question = question_in(prompt)
        if question is not None:
            example = {"prompt": question}
    return prompt_digest(example)


def prompt_digest(example: Row) -> str:
    """Hash the words before the first answer, without system messages: two examples are the same if these agree.

    Where there are none, as in a conversation that the assistant begins or with an empty prompt, all words of the
    example count: else all such rows would be one prompt, which is held out or trained as a whole.

    Args:
        example: A row of ``load_examples``: messages, prompt and completion, or plain text.
    """
    # A conversation, or a prompt that is messages.
    is_chat = "messages" in example or not isinstance(example.get("prompt", ""), str)
    if is_chat:
        messages = example.get("messages") or example["prompt"]
        opening = []
        for message in messages:
            if message["role"] == "assistant":
                break
            # A system message is often the same for all rows, and the same question under another one would leak.
            if message["role"] != "system":
                opening.append(message["content"])
        text = "\n".join(opening)
    elif "prompt" in example:
        text = example["prompt"]
    else:
        text = example["text"]

    # Words, so that white space makes no other prompt.
    words = text.split()
    if not words:
        words = _all_text(example).split()
    return digest(" ".join(words))


def _all_text(example: Row) -> str:
    """The texts of an example one below the other, those of messages with their roles."""
    texts = []
    for column in ("messages", "prompt", "completion", "text"):
        value = example.get(column) or ""
        if isinstance(value, str):
            texts.append(value)
            continue
        for message in value:
            texts.append(f"{message['role']}: {message['content']}")
    return "\n".join(texts)
