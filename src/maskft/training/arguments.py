"""The configuration of a run."""

from __future__ import annotations

import copy
import math
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import ModelConfig, SFTConfig

from maskft_common.environment import bfloat16_instructions
from maskft_common.errors import UserError
from maskft_common.method_options import TAKE_NO

from ..data.arguments import DataArguments, mixture_text, option
from ..tuner.config import DATA_STARTS
from .method_arguments import MaskArguments, MethodArguments, default_start, removes_a_share

# Smallest values of options that TRL does not check.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 1,
    "seed": 0,
    "data_seed": 0,
    "dataloader_num_workers": 0,
    "dataset_num_proc": 0,
    "dataloader_prefetch_factor": 1,
}
# Numbers of steps, and the option that says whether they are counted; warmup always is.
_STEPS = {
    "eval_steps": "eval_strategy",
    "save_steps": "save_strategy",
    "logging_steps": "logging_strategy",
    "warmup_steps": "",
}
# Options that are finite numbers of 0 or more where they are given; TRL and torch take some others without a word.
_NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "neftune_noise_alpha",
    "eval_delay",
)
# Of numpy, which transformers seeds too.
_LARGEST_SEED = 2**32 - 1


def _default(name: str, value: Any) -> Any:
    """TRL's field of this name with another default."""
    return field(default=value, metadata=SFTConfig.__dataclass_fields__[name].metadata)


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's SFTConfig with defaults for masks: held-out loss from step 0 on, and the best checkpoint is kept."""

    output_dir: str | None = _default("output_dir", "runs/mask")
    learning_rate: float | None = option(
        None,
        "Peak learning rate, 0 or more; for masks, of the scores (default: 3e-4 for top-k masks whose scores start in "
        "an order (magnitude, wanda), 5e-3 for the preset deletion_tuning, 0.01 for other masks, 2e-05 for other "
        "methods)",
    )
    chat_template_path: str | None = option(
        None, "File (.jinja) of a chat template, for a model that has none; evaluations need it too."
    )
    eval_strategy: str = _default("eval_strategy", "steps")
    eval_steps: float | None = _default("eval_steps", 0.1)
    eval_on_start: bool = _default("eval_on_start", True)
    save_strategy: str = _default("save_strategy", "steps")
    save_steps: float = _default("save_steps", 0.1)
    save_total_limit: int | None = _default("save_total_limit", 2)
    load_best_model_at_end: bool = _default("load_best_model_at_end", True)
    metric_for_best_model: str | None = _default("metric_for_best_model", "eval_loss")
    logging_nan_inf_filter: bool = _default("logging_nan_inf_filter", False)
    ddp_find_unused_parameters: bool | None = _default("ddp_find_unused_parameters", False)
    log_level_replica: str = _default("log_level_replica", "error")
    project: str = _default("project", "maskft")
    # "weight decay to 0.0", "linear schedule", "warm-up ratio of 0.03" (appendix A)
    warmup_steps: float = _default("warmup_steps", 0.03)
    kl_to_base: float = option(
        0.0,
        "Coefficient, >= 0, of a KL(base || model) penalty on the completion tokens, in nats per token. The base is "
        "the model before training: without its adapter or, with full, a frozen copy.",
    )
    kl_budget: float | None = option(
        None,
        "Limit of KL(base || model), in nats per token, above 0, instead of the coefficient kl_to_base: training "
        "adapts the coefficient, and what exceeds the limit is taken back: the largest part of the change within it is "
        "kept",
    )
    kl_dataset_name: str | None = option(
        None,
        "Rows on which kl_to_base and kl_budget are computed, named like dataset_name; plain text is enough. A quarter "
        "(at most 100 rows) is held out and measured (default: the completion tokens of the task's rows)",
    )
    kl_batch_size: int = option(
        4, "With kl_dataset_name: rows of it that go with every batch of per_device_train_batch_size rows, at least 1."
    )
    resume_from_checkpoint: str | None = option(
        None, "true: from the newest complete checkpoint of output_dir; auto: the same, or from step 0 without one."
    )
    global_batch_size: int | None = option(
        None,
        "Total train batch size: sequences per optimizer step over all processes. Sets gradient_accumulation_steps; "
        "must be a multiple of per_device_train_batch_size x processes.",
    )

    def __post_init__(self):
        # Asked for by an option, or by accelerate launch, which sets the variable in its processes.
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
            raise UserError("DeepSpeed is not supported; use --accelerate_config fsdp2 for sharded training")
        self._check_numbers()
        self._choose_precision()
        # As DataArguments does with the other data.
        self.kl_dataset_name = mixture_text(self.kl_dataset_name)

        # A plain `no` of a recipe, which YAML reads as false.
        for name in TAKE_NO:
            if getattr(self, name, None) is False:
                setattr(self, name, "no")
        # eval_strategy is text, or an enum whose value is text.
        strategy = getattr(self.eval_strategy, "value", self.eval_strategy)
        if str(strategy) == "no":
            self.eval_on_start = False
            self.load_best_model_at_end = False
        # transformers accepts the name without the prefix, and looks for the one with it.
        if self.metric_for_best_model and not self.metric_for_best_model.startswith("eval_"):
            self.metric_for_best_model = f"eval_{self.metric_for_best_model}"

        with warnings.catch_warnings():
            # TRL's own default has the old name of activation_checkpointing, so users cannot avoid the warning.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
            super().__post_init__()

    def _check_numbers(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and value > _LARGEST_SEED:
                raise UserError(f"{name} is {value}; it must be at most {_LARGEST_SEED}")
        # Of a command line a text, as it may be "auto".
        multiple = str(self.pad_to_multiple_of).lower()
        if multiple not in ("none", "null", "auto") and not (multiple.isdecimal() and int(multiple) >= 1):
            raise UserError(f"pad_to_multiple_of is {multiple}; it must be a whole number of at least 1, or auto")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{name} is {value}; it must be 0 or more")
        # 0 or less turns clipping off, and with inf the norm is computed and nothing clipped. NaN would do neither.
        if self.max_grad_norm is not None and math.isnan(self.max_grad_norm):
            raise UserError(f"max_grad_norm is {self.max_grad_norm}; it must be a number, 0 for no clipping")
        # Of the target's probability, the part that goes to all other tokens.
        if not 0 <= self.label_smoothing_factor < 1:
            raise UserError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; it must be at least 0 and below 1"
            )
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise UserError("dataloader_persistent_workers needs workers: give dataloader_num_workers too")
        if not 0 < self.num_train_epochs < math.inf:
            raise UserError(f"num_train_epochs is {self.num_train_epochs}; it must be above 0")
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError(f"max_steps is {self.max_steps}; it must be at least 1, or -1 to count num_train_epochs")
        # transformers converts these with int(), whose errors for inf and NaN do not name the option.
        for name, strategy_name in _STEPS.items():
            steps = getattr(self, name)
            # A negative number turns something off where nothing is counted in steps.
            strategy = getattr(self, strategy_name) if strategy_name else "steps"
            is_counted = getattr(strategy, "value", strategy) == "steps"
            least = 0 if is_counted else -math.inf
            if steps is not None and not (least <= steps and math.isfinite(steps)):
                raise UserError(f"{name} is {steps}; it must be a number of steps, or below 1 a fraction of the run")

    def _choose_precision(self) -> None:
        """Choose float32 on a CPU that would compute slower in bfloat16, if neither is asked for."""
        # Whether float32 was chosen here because of this machine's processor.
        self.is_float32_by_machine = False
        is_on_cpu = self.use_cpu or not torch.accelerator.is_available()
        if not is_on_cpu:
            return

        # Without it, TRL's bf16=True is an error on a machine without an accelerator.
        self.use_cpu = True
        # bf16 is None if it is not given; TRL then sets it unless fp16 is.
        if self.bf16 is None and not self.fp16 and not multiplies_bfloat16():
            self.bf16 = False
            self.is_float32_by_machine = True


def multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 instructions; without, products take five times as long as in float32."""
    # The two checks of torch are of x86.
    if platform.machine().lower() not in ("x86_64", "amd64"):
        instructions = bfloat16_instructions()
        # TRL's default, bfloat16, stays where the system does not say.
        return instructions is None or bool(instructions)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def default_learning_rate(method: str, options: Mapping[str, Any]) -> float:
    """Peak learning rate if none is given.

    Args:
        method: The method.
        options: Options of the mask.
    """
    if method != "mask":
        return SFTConfig.learning_rate
    if not removes_a_share(options):
        is_deletion_tuning = options.get("mask_preset") == "deletion_tuning"
        return 5e-3 if is_deletion_tuning else 1e-2

    # Scores that start in an order are trained at a smaller rate than random ones: docs/learners.md.
    start = options.get("mask_init_scores") or default_start(options)
    is_in_order = start in ("magnitude", *DATA_STARTS)
    if is_in_order:
        return 3e-4
    return 1e-2


@dataclass(frozen=True)
class TrainConfig:
    """The whole configuration of a run."""

    method: MethodArguments
    model: ModelConfig
    data: DataArguments
    mask: MaskArguments
    training: TrainingArguments

    def __post_init__(self):
        if self.training.learning_rate is None:
            # A copy: the caller's arguments do not change.
            training = copy.copy(self.training)
            training.learning_rate = default_learning_rate(self.method.method, vars(self.mask))
            # As dataclasses do it themselves in a frozen class.
            object.__setattr__(self, "training", training)


def with_accumulation(args: TrainingArguments) -> TrainingArguments:
    """A copy with the accumulation steps that ``global_batch_size``, if given, needs on these processes.

    Raises:
        UserError: If it is not a multiple of the batch of one step, or other accumulation steps are given.
    """
    args = copy.copy(args)
    if args.global_batch_size is None:
        return args
    # Sequences of one micro-batch, over all processes.
    per_step = args.per_device_train_batch_size * args.world_size
    if args.global_batch_size < 1 or args.global_batch_size % per_step:
        raise UserError(
            f"global_batch_size is {args.global_batch_size}, not a multiple of per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x {args.world_size} processes = {per_step}"
        )
    num_steps = args.global_batch_size // per_step
    # 1 is the default, so it may not have been given.
    if args.gradient_accumulation_steps not in (1, num_steps):
        raise UserError(
            f"global_batch_size {args.global_batch_size} and gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} contradict each other: with per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x {args.world_size} processes it takes {num_steps}; give one of them"
        )
    args.gradient_accumulation_steps = num_steps
    return args


def trainer_arguments(args: TrainingArguments, is_resumed: bool) -> TrainingArguments:
    """A copy for TRL's trainer, whose rows are already tokenised and truncated."""
    args = copy.copy(args)
    # Held-out rows are measured one by one.
    args.eval_packing = False
    # With packing, TRL prepares the rows: it keeps their tokens, and packs them.
    if not args.packing:
        options = args.dataset_kwargs or {}
        args.dataset_kwargs = {**options, "skip_prepare_dataset": True}
        if args.padding_free:
            # TRL raises, because it would have to truncate rows to it.
            args.max_length = None
    if args.run_name is None:
        # Trackers continue the curve of a resumed run by this name.
        args.run_name = args.output_dir
    # The Trainer copies it into the model's configuration, which is saved, for generation. Training steps (TRL's
    # compute_loss) and measurements pass use_cache=False themselves.
    args.use_cache = True
    # Without a limit the Trainer deletes nothing. MaskTrainer deletes old checkpoints, once a new one is complete.
    args.save_total_limit = None
    if is_resumed:
        # The checkpoint has this measurement.
        args.eval_on_start = False
    return args
