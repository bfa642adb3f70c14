"""What one run is configured by, and what is known of it afterwards."""

from __future__ import annotations

import math
import platform
import warnings
from dataclasses import dataclass, field

import torch
from trl import ModelConfig, SFTConfig

from ..data.arguments import DataArguments
from ..errors import UserError
from .method_arguments import MaskArguments, MethodArguments


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's SFTConfig with the defaults that Mask Fine-Tuning needs: held-out loss from step 0 on, best one kept."""

    output_dir: str | None = field(default="runs/mask", metadata={"help": "Folder of this run; must not hold another."})
    eval_strategy: str = field(
        default="steps", metadata={"help": "When held-out loss is measured: steps, epoch or no."}
    )
    eval_steps: float | None = field(
        default=0.1, metadata={"help": "Steps between measurements; below 1: a fraction of all training steps."}
    )
    eval_on_start: bool = field(default=True, metadata={"help": "Measure held-out loss before the first step."})
    save_strategy: str = field(
        default="steps", metadata={"help": "When a checkpoint is written: steps, epoch, best or no."}
    )
    save_steps: float = field(
        default=0.1, metadata={"help": "Steps between checkpoints; below 1: a fraction of all training steps."}
    )
    save_total_limit: int | None = field(
        default=2,
        metadata={
            "help": "Checkpoints kept, the best and the newest among them. With 1 the Trainer deletes the newest at "
            "the end, and a run that is killed while it saves its result goes on from the best one."
        },
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Keep the best on held-out data, not the last."}
    )
    metric_for_best_model: str | None = field(
        default="eval_loss", metadata={"help": "What 'best' means: eval_loss, or eval_TASK_METRIC of eval_tasks."}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Whether a higher value is better. Default: unless it is a loss."}
    )
    eval_tasks: str | None = field(
        default=None,
        metadata={
            "help": "Also generate and score answers at each measurement: gsm8k, minerva_math (items of their training "
            "split that the training data does not contain), heldout; comma-separated. They are logged as "
            "eval_TASK_METRIC, e.g. eval_gsm8k_accuracy."
        },
    )
    eval_limit: int = field(default=100, metadata={"help": "Items of each of eval_tasks, at least 1."})
    eval_data_dir: str | None = field(
        default=None, metadata={"help": "Folder with the published files of eval_tasks. Default: the hub."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN losses in the log. Off: a NaN stops training."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences per optimizer step over all processes; sets gradient_accumulation_steps, so it must be "
            "a multiple of per_device_train_batch_size x processes."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for parameters without a gradient. All have one here."}
    )
    log_level_replica: str = field(
        default="error", metadata={"help": "Log level of processes other than the main one."}
    )
    # "weight decay to 0.0", "linear schedule", "warm-up ratio of 0.03" (appendix A)
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps; below 1: a fraction of all steps."})

    def __post_init__(self):
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.learning_rate < math.inf:
            raise UserError(f"learning_rate is {self.learning_rate}; it must be 0 or more")
        if not 0 < self.num_train_epochs < math.inf:
            raise UserError(f"num_train_epochs is {self.num_train_epochs}; it must be above 0")
        # Whether float32 was chosen here because of this machine's processor.
        self.is_float32_by_machine = False
        if not torch.accelerator.is_available():
            # TRL's bf16=True is an error on a machine without an accelerator unless this is said.
            self.use_cpu = True
            if self.bf16 is None and not self.fp16 and not multiplies_bfloat16():
                self.bf16, self.is_float32_by_machine = False, True
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            self.eval_on_start = self.load_best_model_at_end = False
        if self.metric_for_best_model and not self.metric_for_best_model.startswith("eval_"):
            self.metric_for_best_model = f"eval_{self.metric_for_best_model}"
        with warnings.catch_warnings():
            # TRL's own default has the old name of activation_checkpointing: a warning nobody could act on.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
            super().__post_init__()

    @property
    def is_reentrant(self) -> bool:
        """Whether gradient checkpointing is the older kind, which needs inputs that require a gradient."""
        return bool((self.gradient_checkpointing_kwargs or {}).get("use_reentrant"))


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16 products; without, they take five times those of float32."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass
class Run:
    """Everything one run is configured by."""

    method: MethodArguments
    model: ModelConfig
    data: DataArguments
    mask: MaskArguments
    training: TrainingArguments
    data_report: dict = field(default_factory=dict)


@dataclass
class TrainingSummary:
    """What a run did; written to ``training.json``."""

    method: str
    start_loss: float | None
    best_loss: float | None
    best_step: int | None
    end_loss: float | None
    num_steps: int
    num_epochs: float
    num_train_tokens: int
    num_trainable: int
    num_target_weights: int
    train_time_s: float
    peak_memory_bytes: int
    history: list[dict]


def named_revision(run: Run) -> str | None:
    """The revision of the base model that was asked for; None for the newest."""
    return None if run.model.model_revision == "main" else run.model.model_revision


def set_accumulation(args: TrainingArguments) -> None:
    """Turn ``global_batch_size``, if given, into the accumulation steps that give it on this many processes."""
    if args.global_batch_size is None:
        return
    per_step = args.per_device_train_batch_size * args.world_size
    if args.global_batch_size < 1 or args.global_batch_size % per_step:
        raise UserError(
            f"global_batch_size is {args.global_batch_size}, not a multiple of per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x {args.world_size} processes = {per_step}"
        )
    args.gradient_accumulation_steps = args.global_batch_size // per_step
