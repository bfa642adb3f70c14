"""Checks made before a model is loaded, and before processes begin to wait for each other."""

from __future__ import annotations

import math
from dataclasses import fields

from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from trl import ModelConfig

from maskft_common import layout, processes
from maskft_common.errors import UserError, did_you_mean, first_line

from ..models import is_gguf
from ..tuner.config import MaskConfig
from ..tuner.selection import LEARNERS
from .arguments import TrainConfig, TrainingArguments
from .launch import check_mask_sharding
from .method_arguments import (
    FIXED_MASK_METHODS,
    INTERPOLATE,
    MASK_METHODS,
    PEFT,
    UNTRAINED_METHODS,
    MethodArguments,
    mask_config,
    selection_of,
)
from .peft_config import adapter_config

# Beginnings of options of TRL's ModelConfig.
_OF_LORA = ("lora_", "use_peft", "use_rslora", "use_dora")
# Options of MethodArguments that only some methods have.
_ONLY_WITH = {
    "peft_config": (PEFT,),
    "partial_layers": ("full",),
    "partial_target_modules": ("full",),
    "keep_mask": ("full",),
    "start_mask": ("full", PEFT),
    "match_adapter": FIXED_MASK_METHODS,
    "num_candidates": ("random_mask",),
    "before_model": (INTERPOLATE,),
    "keep_last": ("full", PEFT, "mask"),
}
# What gradient_checkpointing_kwargs may have: of torch.utils.checkpoint, of transformers and of TRL.
_OF_CHECKPOINTING = {
    "use_reentrant",
    "context_fn",
    "preserve_rng_state",
    "determinism_check",
    "debug",
    "early_stop",
    "every_n_layers",
    "offload",
    "selective",
}
# Options of TRL that have no effect, because maskft tokenises rows, loads models, measures held-out rows and handles
# signals, or whose effect the record of the run would not show; and the remedy.
_UNUSED = {
    "eos_token": "set it in the tokenizer's own files",
    "truncation_mode": "remove the option: rows always keep their beginning",
    "assistant_only_loss": "remove the option: in conversations, the loss is on the assistant's turns anyway",
    "model_init_kwargs": "write dtype, attn_implementation or model_revision",
    "shuffle_dataset": "remove the option: training rows are shuffled in every epoch anyway",
    "eval_packing": "remove the option",
    "dataset_kwargs": "remove the option",
    "eval_accumulation_steps": "remove the option",
    "eval_do_concat_batches": "remove the option",
    "eval_use_gather_object": "remove the option",
    "prediction_loss_only": "remove the option",
    "label_names": "remove the option",
    "length_column_name": "remove the option: lengths are counted",
    "batch_eval_metrics": "remove the option",
    "bf16_full_eval": "remove the option: held-out rows are measured in the dtype of training",
    "fp16_full_eval": "remove the option: held-out rows are measured in the dtype of training",
    # Its handler of SIGTERM would take the place of the one that ends a run at a second signal.
    "enable_jit_checkpoint": "remove the option: SIGTERM finishes and saves the step anyway",
    # The Trainer would begin anew with the weights and the multiplier of KL as the steps before had left them.
    "auto_find_batch_size": "remove the option; maskft estimate says which per_device_train_batch_size fits",
    "push_to_hub": "remove the option, and upload the finished folder with `hf upload` (docs/adapters.md)",
}
# Of these, what has an effect with packing: rows are packed in the order of the data set.
_USED_WITH_PACKING = {"shuffle_dataset"}
# An example for messages.
_LORA = '{"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}'


def refused_options() -> set[str]:
    """Names of TRL's options that ``check_config`` refuses with any value but their default."""
    of_lora = {name for name in ModelConfig.__dataclass_fields__ if name.startswith(_OF_LORA)}
    unused = set(_UNUSED) - _USED_WITH_PACKING
    return of_lora | unused | {"trust_remote_code", "deepspeed"}


def check_config(config: TrainConfig) -> None:
    """Check settings that TRL or torch would misread, or reject only after the model is loaded.

    Raises:
        UserError: For the first mistake.
    """
    check_options(config)
    check_trackers(config.training.report_to)
    method = config.method.method
    # Both mask the rows of a weight that an FSDP2 rank holds.
    if method == "mask" or config.method.keep_mask is not None:
        check_mask_sharding()
    _check_devices(config)
    if method == INTERPOLATE and config.method.before_model is None and not config.data.prepare_only:
        raise UserError("interpolate needs the model before fine-tuning; name it as before_model")
    if config.data.prepare_only and config.data.prepared_data_dir is None:
        raise UserError("prepare_only needs a folder for the rows; name it as prepared_data_dir")
    for name in layout.ADAPTER_OPTIONS:
        folder = getattr(config.method, name)
        if folder is not None and not layout.holds_adapter(folder):
            raise layout.no_adapter(folder)


def check_options(config: TrainConfig) -> None:
    """Make the checks of ``check_config`` that hold on any machine, and before other runs have written their folders.

    Raises:
        UserError: For the first mistake.
    """
    method = config.method.method
    training = config.training
    check_method(config.method)

    _check_mask_options(config)
    # Building the mask's configuration checks its settings.
    mask = None
    if method in MASK_METHODS:
        mask = mask_config(config.mask)
    _check_unused_options(config)

    check_kl_to_base(training, method)
    check_kl_budget(training, method)
    _check_metric(training)

    # Both would be found in the first step.
    for name in training.gradient_checkpointing_kwargs or {}:
        if name not in _OF_CHECKPOINTING:
            raise UserError(
                f"gradient_checkpointing_kwargs has {name!r}{did_you_mean(name, _OF_CHECKPOINTING)}; it takes "
                f"{', '.join(sorted(_OF_CHECKPOINTING))}"
            )
    # Without it the order of an epoch depends on the global random state, which a resumed run restores too late.
    if not training.accelerator_config.use_seedable_sampler:
        raise UserError(
            "accelerator_config has use_seedable_sampler false, with which no run is resumed exactly; drop it"
        )
    # Of a run that is resumed inside an epoch, the process that reads for all others is not told which epoch it is.
    if training.accelerator_config.dispatch_batches:
        raise UserError("accelerator_config has dispatch_batches true, with which no run is resumed exactly; drop it")
    # transformers gives its sampler no seed, and several processes that are resumed do not tell it the epoch.
    if getattr(training, "train_sampling_strategy", None) == "batch_rebalance":
        raise UserError(
            "train_sampling_strategy is batch_rebalance, with which seed has no effect on the order of rows and no run "
            "is resumed exactly; use group_by_length"
        )

    # Again when the model is loaded, which may be quantised in its files.
    if config.model.load_in_4bit or config.model.load_in_8bit:
        check_quantised(method)
        # transformers refuses it later, in words about its own parameters.
        if is_gguf(config.model.model_name_or_path):
            raise UserError(
                f"load_in_4bit and load_in_8bit quantise floats, and {config.model.model_name_or_path!r} is a GGUF "
                "file, whose weights are quantised already: leave them out"
            )
    if training.trust_remote_code:
        raise UserError("trust_remote_code: code in the folder of a model is not run; name a model that needs none")
    if mask is not None and training.fp16 and mask.price:
        raise UserError("mask_price is added to gradients that fp16 has scaled, so it would not count: use bf16")


def _check_mask_options(config: TrainConfig) -> None:
    """Raise for settings of masks that have no effect, because of the method or of the selection."""
    method = config.method.method
    if method not in MASK_METHODS:
        for spec in fields(config.mask):
            if getattr(config.mask, spec.name) != spec.default:
                raise UserError(f"{spec.name} is an option of masks and has no effect on method {method}; remove it")
        return

    # Also the default of 0.1, which MaskConfig takes for not given. An unknown selection is reported by MaskConfig.
    sparsity = config.mask.mask_sparsity
    selection = selection_of(vars(config.mask))
    if sparsity is not None and selection in LEARNERS and "sparsity" not in LEARNERS[selection].options:
        cause = f"mask_selection {selection}"
        # A preset sets the selection, which was then not given.
        if config.mask.mask_selection is None:
            cause = f"mask_preset {config.mask.mask_preset} ({cause})"
        raise UserError(
            f"mask_sparsity {sparsity} has no effect with {cause}, which removes weights by the value of their "
            "scores; leave it out, or give --mask_selection topk"
        )


def _check_unused_options(config: TrainConfig) -> None:
    """Raise for options of TRL that ``maskft train`` accepts with all others and does not use."""
    # TRL's own command makes a LoRA adapter from these, by get_peft_config, which is not called here.
    for name, spec in ModelConfig.__dataclass_fields__.items():
        if name.startswith(_OF_LORA) and getattr(config.model, name) != spec.default:
            raise UserError(f"{name} is TRL's option of LoRA; write --method peft --peft_config '{_LORA}'")

    training = config.training
    for name, instead in _UNUSED.items():
        value = getattr(training, name)
        default = TrainingArguments.__dataclass_fields__[name].default
        is_used = name in _USED_WITH_PACKING and training.packing
        if value != default and not is_used:
            raise UserError(f"{name} is {value!r}, which maskft train does not use; {instead}")


def _check_devices(config: TrainConfig) -> None:
    """Raise for devices that training does not use."""
    training = config.training
    # Fixed masks use one GPU, and preparing data none. The Trainer would use all that it sees, by DataParallel.
    is_trained = config.method.method not in UNTRAINED_METHODS and not config.data.prepare_only
    if is_trained and training.n_gpu > 1:
        raise UserError(
            f"this process sees {training.n_gpu} GPUs, and trains on one: add --accelerate_config multi_gpu "
            f"--num_processes {training.n_gpu}, or set CUDA_VISIBLE_DEVICES=0"
        )
    if is_trained and training.activation_offloading and training.device.type == "cpu":
        raise UserError(
            "activation_offloading moves tensors from a GPU to the CPU, which trains here: remove the option"
        )


def _check_metric(training: TrainingArguments) -> None:
    """Raise for another metric than the held-out loss."""
    if training.metric_for_best_model != "eval_loss" or training.greater_is_better:
        raise UserError(
            f"metric_for_best_model is {training.metric_for_best_model}, with greater_is_better "
            f"{training.greater_is_better}; the best checkpoint is that of the lowest eval_loss, all that training "
            "measures: drop both, and measure checkpoints with maskft evaluate"
        )


def check_kl_to_base(training: TrainingArguments, method: str) -> None:
    """Raise for a coefficient that is out of range, or of a method that is not trained."""
    if not 0 <= training.kl_to_base < math.inf:
        raise UserError(f"kl_to_base is {training.kl_to_base}; it must be a finite number, 0 or more")
    if training.kl_to_base and method in UNTRAINED_METHODS:
        raise UserError(f"kl_to_base is a term of the loss, and method {method} is not trained; remove the option")


def check_kl_budget(training: TrainingArguments, method: str) -> None:
    """Raise for a budget that is out of range, beside a coefficient, or of a method that is not trained."""
    budget = training.kl_budget
    if budget is not None:
        if not 0 < budget < math.inf:
            raise UserError(f"kl_budget is {budget}; it must be a finite number above 0, in nats per token")
        if training.kl_to_base:
            raise UserError(
                f"kl_budget {budget} and kl_to_base {training.kl_to_base} are both given: a budget adapts the "
                "coefficient itself; give one of them"
            )
        if method in UNTRAINED_METHODS:
            raise UserError(f"kl_budget is a term of the loss, and method {method} is not trained; remove the option")

    # Options of the rows, which do nothing without a KL term.
    has_kl = budget is not None or training.kl_to_base
    if training.kl_dataset_name is not None and not has_kl:
        raise UserError("kl_dataset_name names rows of a KL term: give kl_budget (or kl_to_base) too")
    if training.kl_batch_size < 1:
        raise UserError(f"kl_batch_size is {training.kl_batch_size}; it must be at least 1")
    default_batch_size = TrainingArguments.__dataclass_fields__["kl_batch_size"].default
    if training.kl_batch_size != default_batch_size and training.kl_dataset_name is None:
        raise UserError("kl_batch_size counts rows of kl_dataset_name, which is not given")


def check_trackers(names: list[str]) -> None:
    """Raise for a name of ``report_to`` that transformers does not know, or whose package is not installed."""
    try:
        # Creating a callback imports its package; the Trainer would do so after minutes of loading.
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"report_to: {first_line(error)}") from None


def check_quantised(method: str) -> None:
    """Raise for quantised weights where they would have to be trained, or are ranked and written as floats."""
    if method not in (PEFT, "mask"):
        raise UserError(
            f"method {method} needs weights that are floats: name the unquantised model, without load_in_4bit and "
            "load_in_8bit"
        )


def check_method(args: MethodArguments) -> None:
    """Raise for settings of one method that are given with another, and numbers out of range."""
    method = args.method
    for name, methods in _ONLY_WITH.items():
        default = MethodArguments.__dataclass_fields__[name].default
        is_given = getattr(args, name) != default
        if is_given and method not in methods:
            raise UserError(f"{name} goes with --method {' or '.join(methods)}, not with {method}; remove {name}")
    for name in ("num_candidates", "num_calibration_samples"):
        value = getattr(args, name)
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")

    if method == PEFT:
        if args.peft_config is None:
            raise UserError(f"method peft needs --peft_config, such as '{_LORA}'")
        # Building the configuration checks it.
        adapter_config(args.peft_config)
    # keep_last would save the adapter without the pruned weights below it, and merging needs whole weights.
    is_merged_at_end = method == PEFT and args.start_mask is not None
    if is_merged_at_end and (args.keep_last or processes.uses_fsdp()):
        raise UserError("an adapter after start_mask is merged at the end: drop keep_last, and use no FSDP")
    if args.partial_layers:
        first = min(args.partial_layers)
        if first < 0:
            raise UserError(f"partial_layers names layer {first}; layers are counted from 0")
    if args.keep_mask is not None and args.start_mask is not None:
        raise UserError("keep_mask and start_mask are both given; removed weights stay at zero or only start there")


def check_size(method: str, config: MaskConfig) -> None:
    """Raise for a fixed mask without a given size."""
    if config.selection != "topk":
        raise UserError(f"mask_selection is {config.selection!r}; {method} removes mask_sparsity of the weights")


def check_context(
    model,
    *sets,
    training: TrainingArguments | None = None,
) -> None:
    """Raise for tokenised rows that are longer than the model's context.

    Args:
        model: The model.
        *sets: Data sets with ``input_ids``, before packing.
        training: Options of the run, which may pack rows into longer ones.
    """
    longest = 0
    if training is not None and training.packing and training.packing_strategy == "wrapped":
        # Rows of max_length tokens, whose positions are counted on; the other strategies begin anew in each row.
        longest = training.max_length or 0
    for rows in sets:
        for ids in rows["input_ids"]:
            longest = max(longest, len(ids))

    # Checked here, because a position beyond the context is an error of the embeddings in some models, and in others
    # only a worse loss. Models without position embeddings have no limit.
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context and longest > context:
        raise UserError(f"the longest row has {longest} tokens, the model's context {context}: lower max_length")


def check_batches(num_rows: int, training: TrainingArguments) -> None:
    """Raise if no batch of training rows is left, so that a run would end after no step.

    Args:
        num_rows: Number of training rows, packed if they are.
        training: The options of the run.
    """
    per_step = training.per_device_train_batch_size * training.world_size
    if training.dataloader_drop_last and num_rows < per_step:
        raise UserError(
            f"dataloader_drop_last drops the only batch: there are {num_rows:,} training rows, and "
            f"per_device_train_batch_size {training.per_device_train_batch_size} x {training.world_size} processes = "
            f"{per_step}; leave it out, or lower per_device_train_batch_size"
        )


def check_processes(model, train_set, heldout_set) -> None:
    """Check that all processes have the same model, with all weights, and the same data, before the first collective.

    Raises:
        UserError: The same error in every process.
    """
    # Full fine-tuning has no adapter.
    configs = getattr(model, "peft_config", {}).values()
    if processes.uses_fsdp() and any(getattr(config, "modules_to_save", None) for config in configs):
        raise UserError(
            "modules_to_save does not train under FSDP; remove it, or train with --accelerate_config multi_gpu"
        )

    # The name of the first parameter without values, gathered so that every process raises.
    first_missing = None
    parameters = {}
    for name, parameter in model.named_parameters():
        parameters[name] = f"{parameter.dtype}, shape {tuple(parameter.shape)}"
        if first_missing is None and parameter.device.type == "meta":
            first_missing = name
    for rank, name in enumerate(processes.gather(first_missing)):
        if name is not None:
            raise UserError(f"{name} is still on the meta device on rank {rank}; load or initialise the weights first")
    processes.check_same(parameters, "the models")

    # A process with fewer batches would end first, and the others would wait for it in the next step.
    counts = {
        "number of training rows": f"{len(train_set):,}",
        "number of held-out rows": f"{len(heldout_set):,}",
    }
    processes.check_same(counts, "the data")
