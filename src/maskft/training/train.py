"""One training path for every method: setup -> build -> fit -> save, over TRL's SFTTrainer."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, set_seed
from trl import ModelConfig, get_peft_config

from .. import files, runtime
from ..adapter.wrap import add_adapter
from ..data import format_sample, supervised_token_count, tokenize_dataset
from ..data.prepared import Prepared, prepare
from ..errors import NotFiniteError, UserError, did_you_mean
from ..evaluation.during_training import TASKS as EVAL_TASKS
from ..evaluation.during_training import TrainingEvaluation
from ..files import write_text
from ..models import check_model_source, check_tokenizer_fits, load_model, load_tokenizer
from ..runtime import environment, keep_freed_memory, peak_memory_bytes
from ..tuner import MaskConfig, adapter_layers
from ..tuner.targets import resolve_targets
from . import launch_checks
from .arguments import Run, TrainingSummary, named_revision, set_accumulation
from .callbacks import KeepLast, Reference, RichProgress
from .checkpoints import check_disk_space, prepare_output_dir, save_weights
from .fixed_masks import make_fixed_mask
from .method_arguments import ADAPTER, FIXED_MASK_METHODS, MASK_METHODS, MaskArguments, check_method, mask_config
from .prefix_cache import PrefixCache
from .trainer import MaskSFTTrainer

# Main path


def train(run: Run, splits: tuple | None = None, console: Console | None = None) -> TrainingSummary | None:
    """Train (or, for fixed masks, make) what ``run`` describes and save the best of it to its output folder.

    Args:
        run: The configuration.
        splits: Already loaded ``(train, heldout)`` datasets.
        console: Where to print; default stderr.

    Returns:
        What was done; None where only data was to be prepared.

    Raises:
        UserError: For every mistake in the input, and when the loss stops being finite.
    """
    console = console or Console(stderr=True, quiet=not runtime.is_main())
    check_method(run.method)
    if run.method.method == "mask":
        launch_checks.check_mask_launch()
    _check_training(run)
    set_accumulation(run.training)
    resume_from = None  # where only data is prepared, the folder of the run to come is its own business
    if not run.data.prepare_only:
        resume_from = runtime.decided_by_main(lambda: prepare_output_dir(run.training))
    source = run.model.model_name_or_path
    check_model_source(source)
    tokenizer = load_tokenizer(source, run.training.chat_template_path, revision=run.model.model_revision)
    data = _prepare_data(run, tokenizer, splits, console)
    if run.data.prepare_only:
        return None
    task_evaluation = _task_evaluation(run, data.train_rows, data.heldout_rows, console)
    model = load_model(source, run.model.dtype, **_model_kwargs(run.model))
    check_tokenizer_fits(model, tokenizer)
    train_set, heldout_set = data.train, data.heldout
    if run.method.method in FIXED_MASK_METHODS:
        model, summary = make_fixed_mask(run, model, tokenizer, train_set, heldout_set, console)
        save(run, model, tokenizer, summary)
        return summary
    set_seed(run.training.seed)  # LoRA draws its start here, before the Trainer seeds
    model = build_model(run, model)
    _describe(run, model, tokenizer, train_set, heldout_set, console)
    check_disk_space(model, run.training)
    return fit(run, model, tokenizer, train_set, heldout_set, resume_from, console, task_evaluation)


def _check_training(run: Run) -> None:
    """Refuse what TRL or torch would do otherwise than is meant, or refuse after the model is loaded."""
    args = run.training
    launch_checks.check_zero_stage(launch_checks.zero_stage_of(args.deepspeed))
    # Fixed masks run on one of them, and preparing data on none.
    if run.method.method == "mask" and not run.data.prepare_only and args.n_gpu > 1:
        raise UserError(
            f"this process sees {args.n_gpu} GPUs, which a mask does not share: add --accelerate_config multi_gpu, or "
            "set CUDA_VISIBLE_DEVICES=0"
        )
    if args.eval_packing and runtime.num_processes() > 1:
        raise UserError("eval_packing with several processes would count held-out rows twice; set it to false")


def _prepare_data(run: Run, tokenizer, splits: tuple | None, console: Console) -> Prepared:
    how = {
        "text_field": run.training.dataset_text_field,
        "max_length": run.training.max_length,
        "completion_only_loss": run.training.completion_only_loss is not False,
        "num_proc": run.training.dataset_num_proc,
    }
    if run.data.prepare_only and run.data.prepared_data_dir is None:
        raise UserError("prepare_only has nowhere to put the rows; name a prepared_data_dir")
    if splits is not None:
        return Prepared(*splits, *(tokenize_dataset(rows, tokenizer, **how) for rows in splits), {})
    data = prepare(run.data, tokenizer, **how)
    console.print(f"data: {data.report['text']}", highlight=False)
    run.data_report = data.report["counts"]
    return data


def build_model(run: Run, model: PreTrainedModel):
    """Make trainable what the method trains: all weights, some layers, LoRA matrices, or mask scores."""
    method = run.method.method
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
        return add_adapter(model, config, revision=named_revision(run))
    # Checkpoints carry the scores so that training can go on from them; the final adapter does not.
    return add_adapter(model, mask_config(run.mask, save_scores=True), revision=named_revision(run))


def fit(run, model, tokenizer, train_set, heldout_set, resume_from, console, task_evaluation=None) -> TrainingSummary:
    """Train with SFTTrainer and save the best."""
    args = run.training
    check_processes(model, train_set, heldout_set)
    if args.device.type == "cpu":
        keep_freed_memory()
    if args.packing and args.eval_packing is None:
        args.eval_packing = False  # held-out loss does not depend on how rows are put together
    if not args.packing:
        # The rows are tokenised and truncated already; TRL would go over them twice more.
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    max_length = args.max_length
    if args.padding_free and not args.packing:
        args.max_length = None  # TRL would have to cut rows to it, and refuses; they are cut already
    trainer = MaskSFTTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=train_set.select_columns(["input_ids", "labels"]),
        eval_dataset=heldout_set.select_columns(["input_ids", "labels"]),
    )
    args.max_length = max_length
    trainer.task_evaluation = task_evaluation
    progress = RichProgress(console, run.method.method)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress)
    if run.method.keep_last:
        trainer.add_callback(KeepLast(trainer, Path(args.output_dir) / files.LAST, tokenizer))
    prefix_cache = _prefix_cache(run, trainer, console)
    reference = Reference(trainer, console)
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
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if isinstance(config, MaskConfig | LoraConfig):
        config.base_model_name_or_path = run.model.model_name_or_path
    if isinstance(config, MaskConfig):
        config.save_scores = False
        config.recipe = _recipe(run, summary)
    if trainer is not None:
        save_weights(trainer, folder)
    elif runtime.is_main():
        model.save_pretrained(folder)
    if not runtime.is_main():
        return
    tokenizer.save_pretrained(folder)
    record = {
        "summary": asdict(summary),
        "recipe": _recipe(run, summary),
        "data": run.data_report,
        "environment": environment(),
    }
    write_text(Path(folder) / files.TRAINING, json.dumps(record, indent=2) + "\n")


# Steps of the main path


def check_processes(model, train_set, heldout_set) -> None:
    """Refuse weights that are not there, and processes that do not hold the same thing, before they wait for another.

    Raises:
        UserError: The same one in every process.
    """
    missing = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    for rank, name in enumerate(runtime.gather(missing[0] if missing else None)):
        if name is not None:
            raise UserError(f"{name} is still on the meta device on rank {rank}; load or initialise the weights first")
    runtime.check_same(
        {name: f"{parameter.dtype}, shape {tuple(parameter.shape)}" for name, parameter in model.named_parameters()},
        "the models",
    )
    counts = {"number of training rows": len(train_set), "number of held-out rows": len(heldout_set)}
    runtime.check_same({name: f"{count:,}" for name, count in counts.items()}, "the data")


def _task_evaluation(run: Run, train_rows, heldout_rows, console) -> TrainingEvaluation | None:
    """What ``eval_tasks`` asks for, with a check that the metric that chooses the best will be measured."""
    args = run.training
    names = [name.strip() for name in (args.eval_tasks or "").split(",") if name.strip()]
    wanted = args.metric_for_best_model or "eval_loss"
    task = next((t for t in EVAL_TASKS if wanted.startswith(f"eval_{t}_")), None)
    if task and task not in names:
        raise UserError(f"metric_for_best_model is {wanted}; add --eval_tasks {task} to measure it")
    if names and runtime.uses_fsdp():
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


def _train_only_layers(model, layers: list[int]) -> None:
    """Freeze all but the linear layers a mask of the same decoder layers would have scores for."""
    config = MaskConfig(layers_to_transform=list(layers), target_modules="all-linear")
    resolve_targets(config, model)
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
    if args.gradient_checkpointing and args.is_reentrant:
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
    layers = adapter_layers(model, ADAPTER) if run.method.method in MASK_METHODS else {}
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
            if value is not None and value != spec.default and name not in ("prepared_data_dir", "prepare_only"):
                out[name] = value
    out |= {name: getattr(run.training, name) for name in _RECORDED}
    out |= {"best_step": summary.best_step, "best_heldout_loss": summary.best_loss}
    return {name: _plain(value) for name, value in out.items()}


def _plain(value):
    """An enum as its value, and a path as its last part: a recipe is shared, folders are not."""
    value = getattr(value, "value", value)
    return Path(value).name if isinstance(value, str) and files.is_there(value) else value


def _model_kwargs(config: ModelConfig) -> dict:
    kwargs = {"revision": config.model_revision, "attn_implementation": config.attn_implementation}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if config.load_in_4bit or config.load_in_8bit:
        raise UserError("a mask needs the model's own weights: load_in_4bit and load_in_8bit are not supported")
    return kwargs
