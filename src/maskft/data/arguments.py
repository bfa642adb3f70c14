"""What to train and evaluate on: the data part of a recipe. Imports neither torch nor datasets."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ..errors import UserError

# The options that name data, in the order of their default splits, train and test.
DATA_NAMES = ("dataset_name", "eval_dataset_name")
TEMPLATE = "chat_template_path"  # the option of TRL that names a chat template


def mixture_text(value):
    """A mixture given as a recipe's lines ``name: rows`` as ``name:rows,name:rows``; anything else as it is."""
    if not isinstance(value, dict):
        return value
    return ",".join(name if amount is None else f"{name}:{amount}" for name, amount in value.items())


def names_text(value):
    """Names given as a list with commas between; anything else as it is."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def check_sizes(args: DataArguments) -> None:
    """Refuse numbers of rows that cannot be."""
    for name in ("max_train_samples", "max_eval_samples", "procedural_train_size", "procedural_eval_size"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"{name} is {value}; it must be at least 1")
    size = args.eval_split_size
    if not size > 0 or (size >= 1 and size != int(size)):
        raise UserError(f"eval_split_size is {size}; it must be a whole number of rows, or a fraction below 1")


@dataclass
class DataArguments:
    """Training data and the held-out data that chooses the best model.

    ``completion_only_loss``, ``max_length``, ``dataset_text_field`` and ``data_seed`` are fields of ``trl.SFTConfig``.
    """

    dataset_name: dict | str | None = field(
        default=None,
        metadata={
            "help": "Training data: a local .jsonl, .json or .parquet file (.jsonl.gz and .json.gz too), a set of "
            "docs/datasets.md such as metamathqa, the name of a data set on the hub, or reasoning-gym/TASK for "
            "generated exercises, e.g. reasoning-gym/products. Several make a mixture, each with a number of rows or a "
            "fraction of its rows in (0, 1]: metamathqa:40000,gsm8k:0.5. In a recipe, lines of `name: rows` as well."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with data files named like the sets, e.g. metamathqa.jsonl.gz, or as the hub names them. "
            "A set of docs/datasets.md that is not there is an error, not a download."
        },
    )
    prepared_data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps rows as they were read, split and tokenised, for later runs on the same files, "
            "tokenizer and lengths; a hub data set in it is not looked up again. Default: not kept."
        },
    )
    prepare_only: bool = field(
        default=False,
        metadata={
            "help": "Fill prepared_data_dir and stop: reads and checks the data, downloads it if it is on the hub, and "
            "loads no model."
        },
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": "Read only as many rows as the mixture asks for, drawn from a buffer of 10,000 rows that moves "
            "along the data, instead of whole data sets."
        },
    )
    deduplicate: bool = field(
        default=False,
        metadata={"help": "Leave out training rows that are exact copies of others, white space apart."},
    )
    contamination_sets: list | str | None = field(
        default=None,
        metadata={
            "help": "Test sets to look for in the training rows (13 words in a row), separated by commas: gsm8k_test, "
            "math_test, humaneval, ifeval, alpaca_eval, or data files. What is found is printed and recorded."
        },
    )
    drop_contaminated: bool = field(
        default=False,
        metadata={"help": "Leave out the training rows that contamination_sets are found in."},
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of a hub data set, e.g. main for openai/gsm8k. Files have none."},
    )
    dataset_train_split: str = field(
        default="train",
        metadata={"help": "Split of a hub data set to train on. A file is one split."},
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out data, named like dataset_name. Default: a part of the training data is held out."},
    )
    dataset_eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of the hub data set to hold out: of eval_dataset_name (default: test) or, without one, of "
            "dataset_name."
        },
    )
    eval_split_size: float = field(
        default=0.1,
        metadata={
            "help": "Rows held out of the training data when there is no other held-out data: a count if >= 1, a "
            "fraction if in (0, 1). Which rows depends on the seed and on their prompts, not on their order."
        },
    )
    split_seed: int = field(
        default=0,
        metadata={
            "help": "Seed of the held-out rows and of generated exercises. Keep it when only the training seed "
            "changes: runs are compared on the same held-out rows."
        },
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Train on the first N rows only (after the held-out rows are taken out). Default: all."},
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Evaluate on the first N held-out rows only. Default: all."},
    )
    as_chat: bool | None = field(
        default=None,
        metadata={
            "help": "Put question/answer and instruction/output rows into the chat template (true) or into plain text "
            "'Question: ... Answer: ...' (false). Default: true when the tokenizer has a chat template. Generated "
            "arithmetic stays plain ('12 * 34 =') unless this is true."
        },
    )
    procedural_options: dict | str | None = field(
        default=None,
        metadata={"help": 'Options of a reasoning-gym task, as JSON, e.g. \'{"min_digits": 2, "max_digits": 3}\'.'},
    )
    procedural_train_size: int = field(
        default=2000,
        metadata={"help": "Number of exercises to generate for training, before those also held out are removed."},
    )
    procedural_eval_size: int = field(
        default=500,
        metadata={"help": "Number of exercises to generate for evaluation."},
    )

    def __post_init__(self):
        """Write a mixture and the test sets as one text each, and read ``procedural_options`` given as JSON text."""
        self.dataset_name = mixture_text(self.dataset_name)
        self.contamination_sets = names_text(self.contamination_sets)
        if isinstance(self.procedural_options, str):
            try:
                self.procedural_options = json.loads(self.procedural_options)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"procedural_options is not JSON: {self.procedural_options!r} ({error}); "
                    "write an object such as '{\"min_digits\": 2}'"
                ) from None
        if self.procedural_options is not None and not isinstance(self.procedural_options, dict):
            raise UserError(
                f"procedural_options must be a JSON object such as '{{\"min_digits\": 2}}', "
                f"not {self.procedural_options!r}"
            )
