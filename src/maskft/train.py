"""One training path for every method: setup -> build -> fit -> save, over TRL's SFTTrainer."""

from __future__ import annotations

import json
import math
import platform
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_model
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from . import paths, processes
from .arguments import FIXED_MASK_METHODS, MASK_METHODS, MaskArguments, MethodArguments, mask_config
from .calibration import input_norms
from .data import format_sample, supervised_token_count, tokenize_dataset
from .data.prepared import Prepared, prepare
from .data_arguments import DataArguments
from .errors import NotFiniteError, UserError, did_you_mean
from .evaluation.during_training import TASKS as EVAL_TASKS
from .evaluation.during_training import TrainingEvaluation
from .evaluation.loss import nll_per_item
from .evaluation.results import environment, write_text
from .mask_codec import encode_mask, mask_info
from .mask_set import MaskSet
from .masking import fixed_masks
from .memory import keep_freed_memory, peak_memory_bytes
from .models import check_model_source, check_tokenizer_fits, load_model, load_tokenizer
from .prefix_cache import PrefixCache
from .progress import RichProgress
from .tuner import MaskConfig, MaskLayer, adapter_layers
from .tuner.model import check_targets, current_mask_fingerprint, maskable_names, refresh_masks
from .tuner.sharded import is_sharded

_ADAPTER = "default"


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
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept beside the best one."})
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
        super().__post_init__()


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


class MaskSFTTrainer(SFTTrainer):
    """SFTTrainer that stops before a non-finite step and logs speed, memory and what the mask did."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss_is_finite = torch.tensor(True)
        self._window = (time.perf_counter(), 0)
        self.mask_metrics: dict[str, float] = {}
        self.task_evaluation: TrainingEvaluation | None = None
        self.add_callback(_StepGuard(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, also for FSDP on CPUs."""
        processes.let_cpu_shard()
        super().create_accelerator_and_postprocess()

    def training_step(self, *args, **kwargs):
        """One micro-batch; its loss is looked at once per optimizer step, so that a GPU is not made to wait."""
        loss = super().training_step(*args, **kwargs)
        self._loss_is_finite = torch.isfinite(loss.detach()) & self._loss_is_finite.to(loss.device)
        return loss

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Add the metrics of generated answers to the loss, so that they are logged and can choose the best."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.task_evaluation and metric_key_prefix == "eval":
            with self.compute_loss_context_manager():
                values = self.task_evaluation.measure(self.accelerator.unwrap_model(self.model), self.processing_class)
            # Another batch size on another process may round another way; all must choose the same best.
            values = processes.gather({f"eval_{name}": value for name, value in values.items()})[0]
            output.metrics.update(values)
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights or adapter; the masks of all processes must be the same, and the saved ones must be theirs."""
        with _agreed_masks(self.model):
            if self.is_fsdp_enabled:
                self._save(output_dir, state_dict=trainable_state(self.model))
            else:
                super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled and not self.optimizer.state:
            # Before the first step torch would take a step of nothing to have a state to save, and count it.
            save_fsdp_model(
                self.accelerator.state.fsdp_plugin, self.accelerator, self.model, output_dir, adapter_only=True
            )
            return
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_best_model(self) -> None:
        self.accelerator.wait_for_everyone()  # the main process may still be writing it
        super()._load_best_model()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens/s, peak memory and mask metrics to what TRL logs."""
        if "loss" in logs:
            now, tokens = time.perf_counter(), int(self._total_train_tokens)
            seconds = now - self._window[0]
            logs["tokens_per_s"] = round((tokens - self._window[1]) / max(seconds, 1e-9), 1)
            logs["peak_memory_bytes"] = peak_memory_bytes()
            logs.update(self.mask_metrics)
            self._window = (now, tokens)
        elif "eval_loss" in logs and self.lr_scheduler is not None:
            logs["learning_rate"] = self._get_learning_rate()  # that of the next step: where a schedule may go on from
        super().log(logs, start_time)


class _StepGuard(TrainerCallback):
    """Looks at every step just before and after the optimizer: finite? how many mask bits flipped?"""

    def __init__(self, trainer: MaskSFTTrainer):
        self.trainer = trainer
        self._before: list[tuple[MaskLayer, torch.Tensor]] = []
        self._undo = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # TRL starts to count anew when training is resumed; transformers' own count travels with the checkpoints.
        self.trainer._total_train_tokens = state.num_input_tokens_seen
        self.trainer._window = (time.perf_counter(), state.num_input_tokens_seen)
        for layer in self._layers(model):
            layer._raw_gradient.clear()  # of a run that was interrupted between two micro-batches
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "mask_scores" in name and parameter.dtype != torch.float32:
                raise UserError(f"{name} is {parameter.dtype}; scores must be float32, masks are ranked in it")
        if processes.num_processes() > 1:
            agreed_mask_fingerprint(model)

        if args.gradient_checkpointing and not _is_reentrant(args):
            self._undo = stop_gradient_at_frozen_embeddings(self.trainer.accelerator.unwrap_model(model))

    def on_train_end(self, args, state, control, **kwargs):
        if self._undo is not None:
            self._undo.remove()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        bad_loss = ~self.trainer._loss_is_finite
        self.trainer._loss_is_finite = torch.tensor(True)
        for layer in self._layers(model):
            if layer._raw_gradient:
                raise RuntimeError("an accumulated mask gradient was not handed to the optimizer")
        bad_gradient = torch.zeros_like(bad_loss)
        # float16 gradients overflow now and then; the scaler skips such a step itself.
        if self.trainer.accelerator.scaler is None:
            # One sum over all gradients, so that a GPU is asked once; NaN and inf both survive adding.
            total = sum(_local(p.grad).sum(dtype=torch.float32) for p in model.parameters() if p.grad is not None)
            bad_gradient = ~torch.isfinite(torch.as_tensor(total, device=bad_loss.device))
        # The same verdict in every process, or the others would wait for the one that stopped.
        verdict = processes.largest(bad_gradient, bad_loss)
        if verdict:
            raise NotFiniteError(f"{('gradient', 'loss')[verdict - 1]} is not finite")
        if self._is_logged(args, state):
            self._before = [(m, m._effective == 0) for m in self._layers(model) if m._effective is not None]

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        # The Trainer would not take the start for the best, also when every step made it worse.
        loss = (metrics or {}).get(args.metric_for_best_model, math.nan)
        if state.global_step == 0 and args.load_best_model_at_end and math.isfinite(loss):
            state.best_metric = loss
            state.best_model_checkpoint = str(Path(args.output_dir) / "checkpoint-0")
            self.trainer._save_checkpoint(self.trainer.model, trial=None)

    def on_step_end(self, args, state, control, **kwargs):
        state.num_input_tokens_seen = int(self.trainer._total_train_tokens)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        layers = self._layers(model)
        if self._is_logged(args, state) and layers and layers[0].sharded_weight is not None:
            self.trainer.mask_metrics = _sharded_mask_metrics(model, layers)
        if not self._before:
            return
        flips, removed, numel = 0, 0, 0
        with torch.no_grad():
            for layer, before in self._before:
                after = layer.effective_weight(layer._effective.dtype) == 0
                flips += int(torch.count_nonzero(after ^ before))
                removed += (
                    int((~layer.get_mask(_ADAPTER)).sum()) if layer.mask_configs[_ADAPTER].selection != "topk" else 0
                )
                numel += after.numel()
        config = self._before[0][0].mask_configs[_ADAPTER]
        self.trainer.mask_metrics = {
            "mask_removed_share": config.sparsity if config.selection == "topk" else removed / numel,
            "mask_flips_per_step": flips,
        }
        self._before = []

    @staticmethod
    def _is_logged(args, state) -> bool:
        every = max(int(state.logging_steps or 1), 1)
        return (state.global_step + 1) % every == 0

    @staticmethod
    def _layers(model):
        return [m for m in model.modules() if isinstance(m, MaskLayer) and _ADAPTER in m.mask_scores]


def _is_reentrant(args: SFTConfig) -> bool:
    return bool((args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))


def stop_gradient_at_frozen_embeddings(model):
    """Undo what TRL and transformers do to a checkpointed model: let its embeddings require a gradient.

    Only reentrant checkpointing needs that, and it sends the backward pass through the frozen layers below the mask.
    Returns the handle of the hook.
    """

    def stop(module, args, output):
        return output if any(p.requires_grad for p in module.parameters()) else output.detach()

    return model.get_input_embeddings().register_forward_hook(stop)


class _KeepLast(TrainerCallback):
    """Saves the model as the last step left it, before the best checkpoint replaces it."""

    def __init__(self, trainer: MaskSFTTrainer, folder: Path, tokenizer):
        self.trainer, self.folder, self.tokenizer = trainer, folder, tokenizer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            config = getattr(self.trainer.model, "peft_config", {}).get(_ADAPTER)
            if isinstance(config, MaskConfig):
                config.save_scores = False
            _save_weights(self.trainer, self.folder)
            if isinstance(config, MaskConfig):
                config.save_scores = True  # the last checkpoint follows, and training may be resumed from it
            if processes.is_main():
                self.tokenizer.save_pretrained(self.folder)


class _Reference(TrainerCallback):
    """Measures held-out loss without the mask once the model is spread over the processes, before the first step."""

    def __init__(self, trainer: MaskSFTTrainer, console: Console):
        self.trainer, self.console = trainer, console
        self.loss: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.loss = _unmasked_loss(self.trainer, self.console)


# Main path


def train(run: Run, splits: tuple | None = None, console: Console | None = None) -> TrainingSummary:
    """Train (or, for fixed masks, make) what ``run`` describes and save the best of it to its output folder.

    Args:
        run: The configuration.
        splits: Already loaded ``(train, heldout)`` datasets.
        console: Where to print; default stderr.

    Raises:
        UserError: For every mistake in the input, and when the loss stops being finite.
    """
    console = console or Console(stderr=True, quiet=not processes.is_main())
    if run.method.method == "mask":
        processes.check_mask_launch()
    set_accumulation(run.training)
    resume_from = processes.decided_by_main(lambda: prepare_output_dir(run.training))
    source = run.model.model_name_or_path
    check_model_source(source)
    tokenizer = load_tokenizer(source, run.training.chat_template_path, revision=run.model.model_revision)
    data = _prepare_data(run, tokenizer, splits, console)
    task_evaluation = _task_evaluation(run, data.train_rows, data.heldout_rows, console)
    model = load_model(source, run.model.dtype, **_model_kwargs(run.model))
    check_tokenizer_fits(model, tokenizer)
    train_set, heldout_set = data.train, data.heldout
    if run.method.method in FIXED_MASK_METHODS:
        return _make_fixed_mask(run, model, tokenizer, train_set, heldout_set, console)
    set_seed(run.training.seed)  # LoRA draws its start here, before the Trainer seeds
    model = build_model(run, model)
    _describe(run, model, tokenizer, train_set, heldout_set, console)
    check_disk_space(model, run.training)
    return fit(run, model, tokenizer, train_set, heldout_set, resume_from, console, task_evaluation)


def _prepare_data(run: Run, tokenizer, splits: tuple | None, console: Console) -> Prepared:
    how = {
        "text_field": run.training.dataset_text_field,
        "max_length": run.training.max_length,
        "completion_only_loss": run.training.completion_only_loss is not False,
    }
    if splits is not None:
        return Prepared(*splits, *(tokenize_dataset(rows, tokenizer, **how) for rows in splits), {})
    data = prepare(run.data, tokenizer, **how)
    console.print(f"data: {data.report['text']}", highlight=False)
    run.data_report = data.report["counts"]
    return data


def build_model(run: Run, model: PreTrainedModel):
    """Make trainable what the method trains: all weights, some layers, LoRA matrices, or mask scores."""
    method = run.method.method
    check_method(run.method)
    if method == "full":
        model.requires_grad_(True)
        if run.method.partial_layers is not None:
            _train_only_layers(model, run.method.partial_layers)
        return model
    if method == "lora":
        run.model.use_peft = True
        config = get_peft_config(run.model)
        if config.target_modules is None:
            config.target_modules = "all-linear"
        return get_peft_model(model, config)
    # Checkpoints carry the scores so that training can go on from them; the final adapter does not.
    return get_peft_model(model, mask_config(run.mask, save_scores=True))


def check_method(arguments: MethodArguments) -> None:
    """Refuse settings of one method that are given with another."""
    if arguments.partial_layers is not None and arguments.method != "full":
        raise UserError("partial_layers goes with --method full; for a mask use mask_layers_to_transform")


def fit(run, model, tokenizer, train_set, heldout_set, resume_from, console, task_evaluation=None) -> TrainingSummary:
    """Train with SFTTrainer and save the best."""
    args = run.training
    check_processes(model, train_set, heldout_set)
    if args.device.type == "cpu":
        keep_freed_memory()
    if not args.packing:
        # The rows are tokenised and truncated already; TRL would go over them twice more.
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    trainer = MaskSFTTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=train_set.select_columns(["input_ids", "labels"]),
        eval_dataset=heldout_set.select_columns(["input_ids", "labels"]),
    )
    trainer.task_evaluation = task_evaluation
    progress = RichProgress(console, run.method.method)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress)
    if run.method.keep_last:
        trainer.add_callback(_KeepLast(trainer, Path(args.output_dir) / paths.LAST, tokenizer))
    prefix_cache = _prefix_cache(run, trainer, console)
    reference = _Reference(trainer, console)
    if run.method.method == "mask":
        trainer.add_callback(reference)
    if resume_from is not None:
        args.eval_on_start = False  # it was measured before the first step; the checkpoint knows it
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except NotFiniteError as error:
        _save_after_failure(run, trainer, tokenizer, str(error))
    finally:
        progress.close()
        if prefix_cache is not None:
            console.print(prefix_cache.summary(), highlight=False)
            prefix_cache.remove()
    summary = _summarise(run, trainer, time.perf_counter() - started, reference.loss)
    save(run, trainer.model, tokenizer, summary, trainer)
    _report(summary, reference.loss, args.output_dir, console)
    return summary


def save(run: Run, model, tokenizer, summary: TrainingSummary, trainer: MaskSFTTrainer | None = None) -> None:
    """Write the trained model or adapter, its tokenizer and ``training.json`` into the output folder.

    Args:
        run: The configuration.
        model: What to save.
        tokenizer: Its tokenizer.
        summary: What the run did.
        trainer: What trained ``model``, if anything did; all processes must then call this.
    """
    folder = run.training.output_dir
    config = getattr(model, "peft_config", {}).get(_ADAPTER)
    if isinstance(config, MaskConfig):
        config.save_scores = False
        config.base_model_name_or_path = run.model.model_name_or_path
        config.recipe = _recipe(run, summary)
    elif isinstance(config, LoraConfig):
        config.base_model_name_or_path = run.model.model_name_or_path
    if trainer is not None:
        _save_weights(trainer, folder)
    elif processes.is_main():
        model.save_pretrained(folder)
    if not processes.is_main():
        return
    tokenizer.save_pretrained(folder)
    record = {
        "summary": asdict(summary),
        "recipe": _recipe(run, summary),
        "data": run.data_report,
        "environment": environment(),
    }
    write_text(Path(folder) / paths.TRAINING, json.dumps(record, indent=2) + "\n")


def _save_weights(trainer: MaskSFTTrainer, folder: str | Path) -> None:
    """Write weights or adapter from the main process; all processes must call it."""
    with _agreed_masks(trainer.model):
        if trainer.is_fsdp_enabled:
            state = trainable_state(trainer.model)
            if processes.is_main():
                trainer.model.save_pretrained(folder, state_dict=state)
        elif processes.is_main():
            trainer.model.save_pretrained(folder)


@contextmanager
def _agreed_masks(model):
    """Save inside: the masks of all processes must be the same, and the saved ones must be theirs."""
    agreed = agreed_mask_fingerprint(model) if processes.num_processes() > 1 else None
    yield
    if agreed is not None and processes.is_main():
        saved = model.peft_config[_ADAPTER].mask_sha256
        if saved != agreed:
            raise RuntimeError(f"the saved masks ({saved[:12]}) are not those trained with ({agreed[:12]})")


def trainable_state(model) -> dict[str, torch.Tensor]:
    """What an FSDP2 checkpoint holds, gathered into the memory of the main process; all processes must call it.

    The frozen weights of a model with an adapter are left out.
    """
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=hasattr(model, "peft_config")
    )
    return get_model_state_dict(model, options=options)


def agreed_mask_fingerprint(model) -> str | None:
    """The sha256 of the masks, equal in every process, or None without a mask; all processes must call it.

    Raises:
        UserError: In every process, if the masks differ.
    """
    if not isinstance(getattr(model, "peft_config", {}).get(_ADAPTER), MaskConfig):
        return None
    fingerprint = current_mask_fingerprint(model, _ADAPTER)
    processes.check_same({"sha256": fingerprint}, "masks")
    return fingerprint


def _sharded_mask_metrics(model, layers: list[MaskLayer]) -> dict[str, float]:
    """Metrics of masks under FSDP2, counted over all processes; all processes must call it."""
    refresh_masks(model)
    shards = [layer.sharded_weight for layer in layers]
    counts = [(shard.num_flips, int((~shard.mask).sum()), shard.mask.numel()) for shard in shards]
    device = shards[0].original.device
    flips, removed, numel = processes.reduce_(torch.tensor(counts, device=device).sum(0)).tolist()
    return {"mask_removed_share": removed / numel, "mask_flips_per_step": flips}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that may be spread over processes."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


# Steps of the main path


def check_processes(model, train_set, heldout_set) -> None:
    """Refuse weights that are not there, and processes that do not hold the same thing, before they wait for another.

    Raises:
        UserError: The same one in every process.
    """
    missing = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    for rank, name in enumerate(processes.gather(missing[0] if missing else None)):
        if name is not None:
            raise UserError(f"{name} is still on the meta device on rank {rank}; load or initialise the weights first")
    processes.check_same(
        {name: f"{parameter.dtype}, shape {tuple(parameter.shape)}" for name, parameter in model.named_parameters()},
        "the models",
    )
    counts = {"number of training rows": len(train_set), "number of held-out rows": len(heldout_set)}
    processes.check_same({name: f"{count:,}" for name, count in counts.items()}, "the data")


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


def prepare_output_dir(args: SFTConfig) -> str | None:
    """Check the output folder and return the checkpoint to resume from, if any."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {str(folder)!r} is a file; name a folder")
    resume = args.resume_from_checkpoint
    if str(resume).lower() == "auto":
        return _last_whole_checkpoint(folder, args)
    if resume and str(resume).lower() not in ("true", "1"):
        if not Path(resume).is_dir():
            raise UserError(f"resume_from_checkpoint {resume!r} is not a folder")
        return str(resume)
    used = folder.is_dir() and any(folder.iterdir())
    if resume:
        last = _last_whole_checkpoint(folder, args)
        if last is None:
            raise UserError(f"there is no checkpoint to resume from in {str(folder)!r}; drop --resume_from_checkpoint")
        return last
    if used:
        raise UserError(
            f"output_dir {str(folder)!r} holds another run; name another folder, or go on with it: "
            "--resume_from_checkpoint true"
        )
    return None


def _task_evaluation(run: Run, train_rows, heldout_rows, console) -> TrainingEvaluation | None:
    """What ``eval_tasks`` asks for, with a check that the metric that chooses the best will be measured."""
    args = run.training
    names = [name.strip() for name in (args.eval_tasks or "").split(",") if name.strip()]
    wanted = args.metric_for_best_model or "eval_loss"
    task = next((t for t in EVAL_TASKS if wanted.startswith(f"eval_{t}_")), None)
    if task and task not in names:
        raise UserError(f"metric_for_best_model is {wanted}; add --eval_tasks {task} to measure it")
    if names and processes.uses_fsdp():
        raise UserError(
            "eval_tasks generate, which takes whole models, and FSDP splits them: leave eval_tasks out, and measure "
            "with maskft evaluate"
        )
    evaluation = None
    if names:
        evaluation = TrainingEvaluation(
            names, args.eval_limit, args.eval_data_dir, train_rows, heldout_rows, console=console
        )
        run.data_report["selected_on"] = evaluation.selected_on
    known = TrainingEvaluation.metric_names(names)
    if wanted not in known:
        raise UserError(
            f"metric_for_best_model: no {wanted!r}{did_you_mean(wanted, known)}; there are {', '.join(known)}"
        )
    return evaluation


def _last_whole_checkpoint(folder: Path, args: SFTConfig) -> str | None:
    """The newest checkpoint that can be resumed exactly; one cut short by a kill is passed over."""
    needed = [] if args.save_only_model else _state_files(args)
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.rpartition("-")[2])):
        weights = [*path.glob("*.safetensors")]
        whole = all((path / name).is_file() for name in needed) and _is_json(path / "trainer_state.json")
        if weights and whole and all(map(_is_readable, weights)):
            return str(path)
    return None


def _is_json(file: Path) -> bool:
    """Whether the file is there in full; the Trainer writes its state last, so then the rest of a checkpoint is too."""
    try:
        json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return True


def _state_files(args: SFTConfig) -> list[str]:
    ranks = range(args.world_size)
    random = ["rng_state.pth"] if args.world_size == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    return ["optimizer.bin" if processes.uses_fsdp() else "optimizer.pt", "scheduler.pt", *random]


def _is_readable(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False


def check_disk_space(model, args: SFTConfig) -> None:
    """Refuse to start when the disk cannot take the checkpoints and the result."""
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    copies = 1 if args.save_strategy == "no" else 1 + (args.save_total_limit or 2) + 1
    # Adam's two moments travel with every checkpoint unless only the model is saved.
    need = trainable * copies * (1 if args.save_only_model else 3)
    paths.check_free_space(
        args.output_dir, need, "lower save_total_limit, set save_only_model, or name another output_dir"
    )


def _make_fixed_mask(run: Run, model, tokenizer, train_set, heldout_set, console) -> TrainingSummary:
    """Random, magnitude and Wanda masks: the learned mask's counts, no training."""
    method, num_candidates = run.method.method, run.method.num_candidates
    if num_candidates < 1 or (num_candidates > 1 and method != "random_mask"):
        raise UserError(f"num_candidates is {num_candidates}; with random_mask it is 1 or more, otherwise 1")
    config = mask_config(run.mask, inference_mode=True)
    model = get_peft_model(model, config).eval()
    layers = list(adapter_layers(model, _ADAPTER).values())
    counts = None
    if run.method.match_adapter is not None:
        learned = MaskSet.from_adapter(run.method.match_adapter)
        counts = [int((~learned.matching(layer.module_name)).sum()) for layer in layers]
    weights = [layer.get_base_layer().weight.detach() for layer in layers]
    norms = None
    if method == "wanda_mask":
        with model.disable_adapter():
            norms = input_norms(model, layers, train_set["input_ids"], run.method.num_calibration_samples)
    candidates = []
    for seed in range(config.mask_seed, config.mask_seed + num_candidates):
        masks = fixed_masks(method, weights, config.sparsity, config.scope, seed, counts, norms)
        coded = [encode_mask(mask) for mask in masks]
        for layer, code in zip(layers, coded, strict=True):
            layer.mask_coded[_ADAPTER] = code
        loss = _mean_nll(model, heldout_set, tokenizer, run.training) if num_candidates > 1 else None
        candidates.append((loss, seed, coded))
    loss, config.mask_seed, coded = min(candidates, key=lambda candidate: candidate[:2])
    for layer, code in zip(layers, coded, strict=True):
        layer.mask_coded[_ADAPTER] = code
    summary = TrainingSummary(
        method=method,
        start_loss=None,
        best_loss=loss,
        best_step=None,
        end_loss=None,
        num_steps=0,
        num_epochs=0.0,
        num_train_tokens=0,
        num_trainable=0,
        num_target_weights=sum(weight.numel() for weight in weights),
        train_time_s=0.0,
        peak_memory_bytes=peak_memory_bytes(),
        history=[{"mask_seed": seed, "eval_loss": loss} for loss, seed, _ in candidates if loss is not None],
    )
    removed = sum(mask_info(code)["num_removed"] for code in coded)
    console.print(f"{method}: removes {removed:,} of {summary.num_target_weights:,} target weights")
    if num_candidates > 1:
        console.print(f"best of {num_candidates} by held-out loss: seed {config.mask_seed}, {loss:.4f}")
    save(run, model, tokenizer, summary)
    return summary


def _mean_nll(model, rows, tokenizer, args) -> float:
    """Held-out loss in nats per supervised token."""
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    size = args.per_device_eval_batch_size
    pairs = nll_per_item(model, rows, batch_size=size, pad_token_id=tokenizer.pad_token_id or 0)
    return sum(nll * count for nll, count in pairs) / sum(count for _, count in pairs)


def _train_only_layers(model, layers: list[int]) -> None:
    """Freeze all but the linear layers a mask of the same decoder layers would have scores for."""
    config = MaskConfig(layers_to_transform=list(layers), target_modules="all-linear")
    config.target_modules = sorted(maskable_names(model))
    check_targets(config, model)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name and check_target_module_exists(config, name):
            module.weight.requires_grad_(True)


def _describe(run, model, tokenizer, train_set, heldout_set, console) -> None:
    """Print the resolved numbers a person checks before a long run."""
    args = run.training
    supervised = supervised_token_count(train_set)
    if supervised == 0:
        raise UserError("no token of the training data is supervised; every label is masked")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    console.print(f"method {run.method.method}: {trainable:,} trainable parameters")
    if args.is_float32_by_machine:
        console.print("computing in float32: this CPU has no bfloat16 instructions (--bf16 true asks for it anyway)")
    if run.method.method == "mask":
        targets = sum(layer.get_base_layer().weight.numel() for layer in adapter_layers(model).values())
        console.print(mask_line(run.mask, targets))
    console.print(
        f"data: {len(train_set):,} training rows ({supervised:,} supervised tokens), {len(heldout_set):,} held out "
        f"({supervised_token_count(heldout_set):,} supervised tokens); {batch} sequences per step"
    )
    console.print("one sample, supervised text in [[ ]]:", highlight=False)
    console.print(format_sample(train_set[0], tokenizer), markup=False, highlight=False)


def _prefix_cache(run, trainer, console) -> PrefixCache | None:
    args = run.training
    if run.method.mask_prefix_cache is None:
        return None
    if args.packing or args.padding_free:
        raise UserError(
            "mask_prefix_cache keeps one sequence per row: set packing and padding_free to false, or drop it"
        )
    if args.gradient_checkpointing and _is_reentrant(args):
        raise UserError(
            "mask_prefix_cache needs a prefix without gradient, and reentrant checkpointing sends one through it: set "
            "use_reentrant to false"
        )
    if trainer.is_fsdp_enabled:
        raise UserError("mask_prefix_cache needs whole layers on every process, FSDP splits them: drop one of the two")
    folder = Path(run.method.mask_prefix_cache)
    if args.world_size > 1:
        folder = folder / f"rank-{args.process_index}-of-{args.world_size}"
    compute_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    cache = PrefixCache(trainer.model, folder, run.method.mask_prefix_cache_gb * 1e9, compute_dtype)
    tokens = sum(len(ids) for rows in (trainer.train_dataset, trainer.eval_dataset) for ids in rows["input_ids"])
    console.print(
        f"prefix cache: {len(cache.layers)} frozen layers, {cache.num_bytes / 1e9:.2f} GB kept already, at most "
        f"{tokens * cache.bytes_per_token / 1e9:.2f} GB for this data (bound {run.method.mask_prefix_cache_gb:g} GB)",
        highlight=False,
    )
    return cache


def mask_line(mask: MaskArguments, num_target_weights: int) -> str:
    """The line every run prints about what it removes."""
    if mask.mask_selection == "threshold":
        return (
            f"threshold {mask.mask_threshold:g}: removes what scores below it, of {num_target_weights:,} target weights"
        )
    share = f"{100 * mask.mask_sparsity:g} %"
    return f"sparsity {mask.mask_sparsity:.2f}: removes {share} of {num_target_weights:,} target weights"


def _unmasked_loss(trainer, console: Console) -> float | None:
    """Held-out loss of the model without the mask: what the mask has to beat."""
    if trainer.eval_dataset is None or trainer.args.eval_strategy == "no":
        return None
    # Not evaluate(): its callbacks would log a metric of another model, before they are told where to log.
    with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
        output = trainer.evaluation_loop(
            trainer.get_eval_dataloader(), "unmasked", prediction_loss_only=True, metric_key_prefix="unmasked"
        )
    trainer._metrics["eval"].clear()
    loss = output.metrics["unmasked_loss"]
    console.print(f"  held-out loss without the mask {loss:.4f}", highlight=False)
    return loss


def _summarise(run, trainer, seconds: float, reference_loss: float | None) -> TrainingSummary:
    state = trainer.state
    losses = [(row["step"], row["eval_loss"]) for row in state.log_history if "eval_loss" in row]
    best_step = None
    if run.training.load_best_model_at_end and state.best_model_checkpoint:
        best_step = int(str(state.best_model_checkpoint).rpartition("-")[2])
    elif losses:
        best_step = losses[-1][0]
    best = dict(losses).get(best_step)
    model = trainer.model
    layers = adapter_layers(model, _ADAPTER) if run.method.method in MASK_METHODS else {}
    return TrainingSummary(
        method=run.method.method,
        start_loss=reference_loss if reference_loss is not None else (losses[0][1] if losses else None),
        best_loss=best,
        best_step=best_step,
        end_loss=losses[-1][1] if losses else None,
        num_steps=state.global_step,
        num_epochs=round(state.epoch or 0.0, 4),
        num_train_tokens=int(trainer._total_train_tokens),
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_target_weights=sum(layer.get_base_layer().weight.numel() for layer in layers.values()),
        train_time_s=round(seconds, 1),
        peak_memory_bytes=peak_memory_bytes(),
        history=state.log_history,
    )


def _report(summary: TrainingSummary, reference_loss: float | None, folder: str, console: Console) -> None:
    if summary.best_loss is None or (summary.method == "mask" and reference_loss is None):
        console.print(f"saved to {folder}")
        return
    if summary.method != "mask":
        console.print(
            f"held-out loss {summary.start_loss:.4f} at the start, best {summary.best_loss:.4f} at step "
            f"{summary.best_step}, {summary.end_loss:.4f} at the end; the best is saved in {folder}"
        )
        return
    better = summary.best_loss < reference_loss
    verdict = (
        f"the mask lowers held-out loss by {reference_loss - summary.best_loss:.4f}; whether that holds on new items, "
        "maskft evaluate and compare tell"
        if better
        else "no mask was found that lowers held-out loss"
    )
    console.print(
        f"held-out loss {reference_loss:.4f} without a mask, best {summary.best_loss:.4f} with it (step "
        f"{summary.best_step}): {verdict}. Saved in {folder}"
    )


def _save_after_failure(run, trainer, tokenizer, what: str) -> None:
    """Keep the best checkpoint so far as the result, then end with the reason."""
    step, best = trainer.state.global_step + 1, trainer.state.best_model_checkpoint
    message = f"{what} at step {step}: stopped before the update was applied; lower learning_rate or check the data"
    if best is None:
        raise UserError(f"{message}; there was no checkpoint yet")
    trainer._load_best_model()
    summary = _summarise(run, trainer, 0.0, None)
    save(run, trainer.model, tokenizer, summary, trainer)
    raise UserError(f"{message}; the best so far (step {summary.best_step}) is saved in {run.training.output_dir}")


# Of TRL's hundreds of arguments, those that decide what is learned.
_RECORDED = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "bf16",
    "seed",
)


def _recipe(run: Run, summary: TrainingSummary) -> dict:
    """How this was trained, for people: what decides the outcome, and every other setting that is not a default."""
    out = {"method": run.method.method, "model_name_or_path": run.model.model_name_or_path}
    for group in (run.data, run.mask, run.method):
        for name, spec in type(group).__dataclass_fields__.items():
            value = getattr(group, name)
            if value is not None and value != spec.default:
                out[name] = value
    out |= {name: getattr(run.training, name) for name in _RECORDED}
    out |= {"best_step": summary.best_step, "best_heldout_loss": summary.best_loss}
    return {name: _plain(value) for name, value in out.items()}


def _plain(value):
    """An enum as its value, and a path as its last part: a recipe is shared, folders are not."""
    value = getattr(value, "value", value)
    return Path(value).name if isinstance(value, str) and Path(value).exists() else value


def _model_kwargs(config: ModelConfig) -> dict:
    kwargs = {"revision": config.model_revision, "attn_implementation": config.attn_implementation}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if config.load_in_4bit or config.load_in_8bit:
        raise UserError("a mask needs the model's own weights: load_in_4bit and load_in_8bit are not supported")
    return kwargs
