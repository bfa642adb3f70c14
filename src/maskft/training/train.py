"""One training path for every method: setup -> build -> fit -> save, over TRL's trainers."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path

from rich.console import Console

from .. import files, runtime
from ..data import tokenize_dataset
from ..data.arguments import DataArguments
from ..data.prepared import Prepared, prepare
from ..errors import NotFiniteError
from ..evaluation.during_training import TrainingEvaluation
from ..tuner import MaskConfig
from .arguments import TrainConfig, TrainingArguments, with_accumulation
from .build import build_model, load_base, load_tokenizer_of, task_evaluation
from .calibration import start_on_data
from .callbacks import add_callbacks
from .checkpoints import check_disk_space, checkpoint_to_resume, save_weights
from .checks import check_config, check_processes
from .combined import combine
from .describe import describe, report
from .fixed_masks import make_fixed_mask
from .method_arguments import ADAPTER, COMBINED_METHODS, FIXED_MASK_METHODS, MethodArguments
from .objectives import make_trainer
from .prefix_cache import cached_prefix
from .record import TrainingRecord, TrainingSummary, make_record, summarise
from .trainer import MaskTrainer
from .verdict import HeldoutLosses, check_rows, never_worse


def train(config: TrainConfig, splits: tuple | None = None, console: Console | None = None) -> TrainingSummary | None:
    """Train (or, for fixed masks, make) what ``config`` describes and save the best of it to its output folder.

    Args:
        config: What to train, on what, and how.
        splits: Already loaded ``(train, heldout)`` datasets.
        console: Where to print; default stderr.

    Returns:
        What was done; None where only data was to be prepared.

    Raises:
        UserError: For every mistake in the input, and when the loss stops being finite.
    """
    console = console or Console(stderr=True, quiet=not runtime.is_main())
    # setup
    check_config(config)
    method, source, training = config.method, config.model, with_accumulation(config.training)
    resume_from = None if config.data.prepare_only else checkpoint_to_resume(training)
    tokenizer = load_tokenizer_of(source, training)
    data = load_data(config.data, training, tokenizer, splits, console)
    if config.data.prepare_only:
        return None
    check_rows(method, data.heldout)
    evaluation = task_evaluation(training, data, console)
    model = load_base(source, tokenizer)
    # build and fit
    trainer = failure = None
    if method.method in FIXED_MASK_METHODS:
        model, summary = make_fixed_mask(model, data, method, config.mask, source, training, tokenizer, console)
    elif method.method in COMBINED_METHODS:
        model, summary = combine(model, data, method, training, tokenizer, console)
    else:
        model = build_model(model, method, source, config.mask, training.seed)
        if method.method == "mask" and resume_from is None:
            start_on_data(model, data.train, method.num_calibration_samples, training.device)
        describe(model, tokenizer, data, method, training, console)
        check_disk_space(model, training)
        trainer, summary, failure = fit(model, tokenizer, data, method, training, resume_from, evaluation, console)
    # judge and save
    losses, verdict = never_worse(model, tokenizer, data, config, training, trainer)
    record = make_record(config, training, summary, data, evaluation, losses, verdict)
    save(model, tokenizer, record, losses, training.output_dir, trainer)
    report(summary, verdict, training.output_dir, failure, console)
    return summary


def load_data(
    args: DataArguments, training: TrainingArguments, tokenizer, splits: tuple | None, console: Console
) -> Prepared:
    """Rows as text and as tokens, read from where ``args`` says or made of the given ``splits``."""
    how = {
        "text_field": training.dataset_text_field,
        "max_length": training.max_length,
        "completion_only_loss": training.completion_only_loss is not False,
        "num_proc": training.dataset_num_proc,
    }
    if splits is not None:
        tokenized = (tokenize_dataset(rows, tokenizer, **how) for rows in splits)
        return Prepared(*splits, *tokenized, report={"counts": {}})
    data = prepare(args, tokenizer, **how)
    console.print(f"data: {data.report['text']}", highlight=False)
    return data


def fit(
    model,
    tokenizer,
    data: Prepared,
    method: MethodArguments,
    training: TrainingArguments,
    resume_from: str | None,
    evaluation: TrainingEvaluation | None,
    console: Console,
) -> tuple[MaskTrainer, TrainingSummary, str | None]:
    """Train what requires a gradient of ``model``, from the checkpoint ``resume_from`` if given, and keep the best.

    Returns:
        The trainer, what was done, and why training stopped too early, if it did.

    Raises:
        UserError: If processes hold different things, or the loss is not finite before there is a checkpoint.
    """
    check_processes(model, data.train, data.heldout)
    if training.device.type == "cpu":
        runtime.keep_freed_memory()
    trainer = make_trainer(model, tokenizer, data, method, training, is_resumed=resume_from is not None)
    trainer.task_evaluation = evaluation
    progress, reference = add_callbacks(trainer, method, tokenizer, console)
    started, failure = time.perf_counter(), None
    try:
        with closing(progress), cached_prefix(trainer, method, console):
            trainer.train(resume_from_checkpoint=resume_from)
    except NotFiniteError as error:
        failure = trainer.back_to_best(error)
    return trainer, summarise(trainer, method.method, time.perf_counter() - started, reference.loss), failure


def save(
    model,
    tokenizer,
    record: TrainingRecord,
    losses: HeldoutLosses | None,
    folder: str,
    trainer: MaskTrainer | None = None,
) -> None:
    """Write the trained model or adapter, its tokenizer, ``training.json`` and ``heldout.json``.

    Args:
        model: What to save.
        tokenizer: Its tokenizer.
        record: What ``training.json`` will hold.
        losses: What ``heldout.json`` will hold; None: it is not written.
        folder: Where to.
        trainer: What trained ``model``, if anything did; all processes must then call this.
    """
    adapter = getattr(model, "peft_config", {}).get(ADAPTER)
    if isinstance(adapter, MaskConfig):
        adapter.save_scores = False
        adapter.recipe = record.recipe
    if trainer is not None:
        save_weights(trainer, folder)
    elif runtime.is_main():
        model.save_pretrained(folder)
    if runtime.is_main():
        tokenizer.save_pretrained(folder)
        if losses is not None:
            files.write_text(Path(folder) / files.HELDOUT, json.dumps(losses.model_dump()) + "\n")
        files.write_text(Path(folder) / files.TRAINING, json.dumps(record.model_dump(), indent=2) + "\n")
