"""Training rows and held-out rows that share no prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset

from ..data_arguments import DataArguments
from ..errors import UserError
from .loading import load_examples
from .procedural import PROCEDURAL_PREFIX, procedural_seed
from .sources import is_hub_name

Row = Mapping[str, Any]


@dataclass(frozen=True)
class SplitReport:
    """How many rows were read and what became of them."""

    read: int
    dropped_overlap: int
    train: int
    heldout: int

    def __str__(self) -> str:
        return (
            f"read {self.read:,} rows: {self.train:,} to train on, {self.heldout:,} held out; "
            f"{self.dropped_overlap:,} left out of training because their prompt is held out"
        )


class Splits(NamedTuple):
    """What ``load_splits`` returns."""

    train: Dataset
    heldout: Dataset
    report: SplitReport


def load_splits(args: DataArguments, seed: int, tokenizer=None, text_field: str = "text") -> Splits:
    """Read the training data and the held-out data, and remove from training what is held out.

    The held-out rows are never reduced by the removal. The same arguments and seed give the same rows; runs that are to
    be compared item by item need the same seed here, whatever seed they train with.

    Args:
        args: The data part of the recipe.
        seed: Chooses the rows held out of the training data, and the exercises of a procedural task.
        tokenizer: Decides about chat or plain text where ``args.as_chat`` does not. None counts as having a template.
        text_field: Name of the column that holds plain text.

    Raises:
        UserError: If a name, a file, a row or a number in ``args`` cannot be used.
    """
    for name in ("max_train_samples", "max_eval_samples", "procedural_train_size", "procedural_eval_size"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if not args.dataset_name:
        raise UserError("dataset_name is missing; give a data file, a hub name or reasoning-gym/TASK")

    common = {
        "as_chat": args.as_chat,
        "tokenizer": tokenizer,
        "text_field": text_field,
        "options": args.procedural_options,
    }
    train = load_examples(
        args.dataset_name,
        args.dataset_train_split,
        config=args.dataset_config,
        size=args.procedural_train_size,
        seed=procedural_seed(seed, "train"),
        **common,
    )
    heldout_name = args.eval_dataset_name
    if not heldout_name and (args.dataset_eval_split or args.dataset_name.startswith(PROCEDURAL_PREFIX)):
        heldout_name = args.dataset_name
    if heldout_name:
        if args.dataset_eval_split and not is_hub_name(heldout_name):
            raise UserError(
                f"dataset_eval_split is {args.dataset_eval_split!r}, but {heldout_name} has no splits; "
                "name the held-out data with eval_dataset_name, or hold out a part with eval_split_size"
            )
        heldout = load_examples(
            heldout_name,
            args.dataset_eval_split or "test",
            config=args.dataset_config if heldout_name == args.dataset_name else None,
            size=args.procedural_eval_size,
            seed=procedural_seed(seed, "heldout"),
            **common,
        )
        read = len(train) + len(heldout)
    else:
        read = len(train)
        train, heldout = _hold_out(train, args.eval_split_size, seed, args.dataset_name)

    held_prompts = {prompt_digest(example) for example in heldout}
    kept = [index for index, example in enumerate(train) if prompt_digest(example) not in held_prompts]
    dropped = len(train) - len(kept)
    if not kept:
        raise UserError(
            f"all {len(train):,} training rows of {args.dataset_name} have a prompt that is also held out; "
            "give other held-out data, or a smaller eval_split_size or procedural_eval_size"
        )
    train = train.select(kept[: args.max_train_samples])
    heldout = heldout.select(range(min(len(heldout), args.max_eval_samples or len(heldout))))
    return Splits(train, heldout, SplitReport(read, dropped, len(train), len(heldout)))


def _hold_out(examples: Dataset, size: float, seed: int, name: str) -> tuple[Dataset, Dataset]:
    """Split off ``size`` rows: those whose prompt has the smallest seeded hash, so that their order does not matter."""
    if size <= 0 or (size >= 1 and size != int(size)):
        raise UserError(f"eval_split_size is {size}; it must be a whole number of rows, or a fraction below 1")
    count = int(size) if size >= 1 else max(1, round(size * len(examples)))
    if count >= len(examples):
        raise UserError(
            f"eval_split_size {size:g} holds out {count:,} of the {len(examples):,} rows of {name}, "
            "which leaves none to train on; make it smaller"
        )

    def rank(index: int) -> tuple[bytes, str]:
        example = examples[index]
        return hashlib.sha256(f"{seed}".encode() + prompt_digest(example)).digest(), example["id"]

    ranked = sorted(range(len(examples)), key=rank)
    return examples.select(sorted(ranked[count:])), examples.select(sorted(ranked[:count]))


def prompt_digest(example: Row) -> bytes:
    """Hash the words before the first answer, without system messages: two examples are the same if these agree."""
    if "messages" in example or not isinstance(example.get("prompt", ""), str):
        messages = example.get("messages") or example["prompt"]
        opening = []
        for message in messages:
            if message["role"] == "assistant":
                break
            if message["role"] != "system":
                opening.append(message["content"])
        text = "\n".join(opening)
    elif "prompt" in example:
        text = example["prompt"]
    else:
        text = next(value for column, value in example.items() if column not in ("id", "answer", "answer_type"))
    return hashlib.sha256(" ".join(text.split()).encode()).digest()
