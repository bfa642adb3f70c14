"""Data for training and evaluation, a part of a recipe. Imports neither torch nor datasets."""

# ruff: noqa: RUF009 -- an option is a dataclasses.field

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from maskft_common.errors import UserError

# The options that name data, in the order of their default splits, train and test.
DATA_NAMES = ("dataset_name", "eval_dataset_name")
# The option of training that names rows to stay near the base on.
KL_DATA = "kl_dataset_name"
# The option of TRL that names a chat template.
TEMPLATE = "chat_template_path"


def mixture_text(value):
    """Write a mapping ``name: rows`` as ``name:rows,name:rows``, and join a list; anything else stays as it is."""
    if isinstance(value, list):
        # An entry may be a mapping itself: in YAML, lines of `- name: rows`.
        entries = [str(mixture_text(entry)) for entry in value]
        return ",".join(entries)
    if not isinstance(value, dict):
        return value

    # `name:` without an amount, which YAML reads as None, takes all rows.
    entries = []
    for name, amount in value.items():
        entries.append(name if amount is None else f"{name}:{amount}")
    return ",".join(entries)


def check_sizes(args: DataArguments) -> None:
    """Raise :class:`UserError` for impossible numbers of rows, and for held-out rows that are named twice."""
    # None: all rows.
    for name in ("max_train_samples", "max_eval_samples"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"{name} is {value}; it must be at least 1")

    size = args.eval_split_size
    # Not a number of rows: 1.5 and infinity, which int() does not take.
    is_count = 1 <= size < math.inf and size == int(size)
    is_fraction = 0 < size < 1
    if not is_count and not is_fraction:
        raise UserError(
            f"eval_split_size is {size:g}; held-out rows choose the best checkpoint: give a whole number of rows, at "
            "least 1, or a fraction between 0 and 1"
        )
    # It would be ignored. The default may be meant or not.
    for name in ("eval_dataset_name", "dataset_eval_split"):
        value = getattr(args, name)
        if value and size != DataArguments.eval_split_size:
            raise UserError(
                f"eval_split_size is {size:g}, and {name} {value!r} names other held-out rows: remove one of the two"
            )


def option(
    default: Any,
    text: str,
    **more: Any,
) -> Any:
    """A field of arguments, with its help."""
    return field(default=default, metadata={"help": text, **more})


@dataclass
class DataArguments:
    """Training data and the held-out data that chooses the best model.

    ``completion_only_loss``, ``max_length``, ``dataset_text_field`` and ``data_seed`` are fields of ``trl.SFTConfig``.
    """

    dataset_name: dict | str | None = option(
        None,
        "Data to train on or, in maskft evaluate, to measure on: a local file (.jsonl, .json, .csv, .parquet, "
        ".jsonl.gz), a set of docs/datasets.md such as metamathqa, or the name of a data set on the hub. Several make "
        "a mixture, each with a number of rows or a fraction of its rows in (0, 1]: metamathqa:40000,gsm8k:0.5. In a "
        "recipe, lines of `name: rows` as well.",
    )
    data_dir: str | None = option(
        None,
        "Folder with data files named like the sets, e.g. metamathqa.jsonl.gz. A set of docs/datasets.md that is not "
        "there is an error, not a download.",
    )
    prepared_data_dir: str | None = option(
        None,
        "Folder that keeps rows as they were read, split and tokenised, for later runs on the same files, tokenizer "
        "and lengths; a hub data set in it is not looked up again (default: not kept)",
    )
    prepare_only: bool = option(
        False,
        "Fill prepared_data_dir and stop: read, check and (from the hub) download the data without loading a model.",
    )
    dataset_config: str | None = option(None, "Configuration of a hub data set, e.g. main for openai/gsm8k.")
    dataset_train_split: str = option("train", "Split of a hub data set to train on. A file is one split.")
    eval_dataset_name: dict | str | None = option(
        None, "Held-out data, named like dataset_name (default: a part of the training data)"
    )
    dataset_eval_split: str | None = option(
        None,
        "Split of the hub data set to hold out: of eval_dataset_name (default: test) or, without one, of dataset_name.",
    )
    eval_split_size: float = option(
        0.1,
        "Rows held out of the training data when there is no other held-out data: a count if >= 1, a fraction if in "
        "(0, 1). Which rows depends on the seed and on their prompts, not on their order.",
    )
    split_seed: int = option(
        0, "Seed of the held-out rows. Keep it when only the training seed changes: runs are compared on the same rows."
    )
    max_train_samples: int | None = option(
        None, "Train on the first N rows only, after the held-out rows are taken out (default: all)"
    )
    max_eval_samples: int | None = option(None, "Evaluate on the first N held-out rows only (default: all)")
    as_chat: bool | None = option(
        None,
        "Put question/answer and instruction/output rows into the chat template (true) or into plain text 'Question: "
        "... Answer: ...' (false) (default: true when the tokenizer has a chat template)",
    )

    def __post_init__(self):
        """Write a mixture as one text."""
        # Here, so that everything behind the arguments (records, digests, cards) knows one form.
        self.dataset_name = mixture_text(self.dataset_name)
        self.eval_dataset_name = mixture_text(self.eval_dataset_name)


# The names of all of them.
DATA_FIELDS = tuple(spec.name for spec in fields(DataArguments))
