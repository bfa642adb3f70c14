"""One training path for every method: setup -> build -> fit -> save, over TRL's SFT trainer."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from rich.console import Console

from maskft_common import files, layout, memory, processes
from maskft_common.errors import NotFiniteError, UserError, first_line

from ..data.prepared import Prepared
from .arguments import TrainConfig, with_accumulation
from .build import (
    build_model,
    heldout_loss,
    load_base,
    load_data,
    load_tokenizer_of,
    start_on_data,
)
from .checkpoints import check_room, held_output, save_final, step_of
from .checks import check_batches, check_config, check_context, check_processes
from .describe import describe, report
from .fixed_masks import make_fixed_mask
from .interpolation import interpolate
from .manifest import Course, check_course, course_of
from .method_arguments import FIXED_MASK_METHODS, INTERPOLATE, PEFT
from .near_base import KLRows, load_kl_rows
from .padding import rows_kept_apart
from .record import TrainingRecord, TrainingSummary, make_record, summarise
from .trainer import MaskTrainer
from .verdict import HeldoutLosses, never_worse


def train(config: TrainConfig, console: Console | None = None) -> TrainingSummary | None:
    """Train the model of ``config`` (or make a fixed mask) and save the best checkpoint to its output folder.

    Args:
        config: Method, model, data and settings.
        console: Where to print; default stderr.

    Returns:
        Results of the run; None with ``prepare_only``.

    Raises:
        UserError: For every mistake in the input, and if the loss becomes non-finite.
    """
    if console is None:
        # Without markup and emoji codes, for which rich would take brackets and colons in the name of a folder.
        console = Console(
            stderr=True,
            quiet=not processes.is_main(),
            markup=False,
            emoji=False,
        )
    check_config(config)

    # Read the data without loading a model, and without an output folder.
    if config.data.prepare_only:
        tokenizer = load_tokenizer_of(config.model, config.training)
        load_data(config.data, config.training, tokenizer, console)
        # These are not kept: they are few. A mistake in them is found now.
        load_kl_rows(config, tokenizer)
        return None

    # Locked for the whole run: two runs would overwrite each other's checkpoints.
    with held_output(config.training, config.method.method, console) as resume_from:
        # The manifest of a checkpoint compares the actual accumulation steps.
        training = with_accumulation(config.training)
        config = dataclasses.replace(config, training=training)
        return run(config, resume_from, console)


def run(
    config: TrainConfig,
    resume_from: str | None,
    console: Console,
) -> TrainingSummary:
    """Train in an output folder that is locked against other runs; see :func:`train`.

    Args:
        config: The run, with its actual accumulation steps.
        resume_from: The checkpoint to resume from; None starts from step 0.
        console: Where to print.
    """
    # setup
    method = config.method
    training = config.training
    tokenizer = load_tokenizer_of(config.model, training)
    data = load_data(config.data, training, tokenizer, console)
    # Before the model, which may take minutes to load.
    kl_rows = load_kl_rows(config, tokenizer)
    course = course_of(config, data, kl_rows)
    # Also before the model. Only the main process reads the checkpoint.
    if resume_from is not None:
        processes.decided_by_main(lambda: check_course(Path(resume_from), course))
    model = load_base(config.model, tokenizer, method.method)
    check_context(model, data.train, data.heldout, training=training)
    if kl_rows is not None:
        check_context(model, kl_rows.train, kl_rows.heldout)

    # build and fit; only methods that are trained have a trainer, and may fail after their first checkpoint
    trainer = None
    failure = None
    if method.method in FIXED_MASK_METHODS:
        model, summary = make_fixed_mask(model, data, config, tokenizer, console)
    elif method.method == INTERPOLATE:
        model = model.to(training.device)
        measure = heldout_loss(model, tokenizer, training)
        summary = interpolate(
            model,
            str(method.before_model),
            data,
            measure,
            console,
        )
    else:
        model = build_model(
            model,
            method,
            config.model,
            config.mask,
            training.seed,
        )
        # A resumed run has checkpoints, which it replaces.
        if resume_from is None:
            processes.decided_by_main(lambda: check_room(model, method, training))
        # A resumed run loads its scores from the checkpoint. With a budget of KL it needs those of the start as well,
        # because it may go back towards them.
        needs_start = resume_from is None or training.kl_budget is not None
        if method.method == "mask" and needs_start:
            start_on_data(
                model,
                data.train,
                method.num_calibration_samples,
                training.device,
            )
        describe(model, tokenizer, data, config, console)
        trainer, summary, failure = fit(
            model,
            tokenizer,
            data,
            config,
            resume_from,
            console,
            course,
            kl_rows,
        )

    # compare with the parent
    parent = None
    if trainer is None:
        measure = heldout_loss(model, tokenizer, training)
    else:
        measure = trainer.heldout_loss()
        # The trainer has measured the rows without the mask before its first step.
        if trainer.reference is not None:
            parent = trainer.reference.losses
    losses, verdict = never_worse(model, data, config, measure, parent)

    # save
    if method.method == PEFT and method.start_mask is not None:
        # The adapter was trained over pruned weights, so over the base it would be another model.
        model = model.merge_and_unload()
    record = make_record(config, summary, data, verdict)
    save(model, tokenizer, record, losses, training.output_dir, trainer)
    report(summary, verdict, config, failure, console)
    return summary


def fit(
    model,
    tokenizer,
    data: Prepared,
    config: TrainConfig,
    resume_from: str | None,
    console: Console,
    course: Course,
    kl_rows: KLRows | None = None,
) -> tuple[MaskTrainer, TrainingSummary, str | None]:
    """Train the trainable parameters of ``model`` and load the best checkpoint.

    Args:
        model: The model, with its trainable parameters.
        tokenizer: Its tokenizer.
        data: The rows.
        config: The run.
        resume_from: The checkpoint to resume from; None starts from step 0.
        console: Where to print.
        course: What a resumed run must keep.
        kl_rows: Rows of ``kl_dataset_name``; None if it is not given.

    Returns:
        The trainer, the results, and why training stopped early, or None.

    Raises:
        UserError: If processes have different models or data, or the loss is not finite before there is a checkpoint.
    """
    # Before accelerate wraps the model: DDP would copy rank 0's weights to the others without a word.
    check_processes(model, data.train, data.heldout)
    # Every step would else ask the kernel for the same memory again.
    if config.training.device.type == "cpu":
        memory.keep_freed_memory()
    with rows_kept_apart(model, data.train[:2]["input_ids"], config.training):
        try:
            trainer = MaskTrainer(
                model,
                tokenizer,
                data,
                config,
                resume_from,
                console,
                course,
                kl_rows,
            )
        except ValueError as error:
            # Settings that TRL, transformers or torch rejects.
            raise UserError(first_line(error)) from None
        # Of the trainer, which may have packed them.
        check_batches(len(trainer.train_dataset), config.training)

        failure = None
        try:
            # Signals are recorded in here only: before and after training there is no step to finish. From the
            # checkpoint, the Trainer restores weights, optimizer, schedule, random states and the place in the data,
            # and MaskTrainer.resume_counts the counters of the log.
            with closing(trainer.progress), trainer.guard.stop, _readable(resume_from):
                trainer.train(resume_from_checkpoint=resume_from)
            # Of the state, where num_train_epochs is counted in steps.
            num_steps = trainer.state.max_steps
            if resume_from is not None and step_of(Path(resume_from)) >= num_steps:
                console.print(f"already finished: all {num_steps} steps had been trained")
        except NotFiniteError as error:
            # The mask or model of the best checkpoint is still good; it is saved before the error is reported.
            failure = trainer.back_to_best(error)
        trainer.keep_within_budget()
    summary = summarise(trainer, config.method.method)
    return trainer, summary, failure


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Turn errors of a checkpoint with foreign pickles into one line; torch does not run code in it.

    Raises:
        UserError: With the name of the checkpoint.
    """
    try:
        yield
    except (pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{checkpoint} cannot be read ({first_line(error)}); remove it and resume again") from None


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
        model: The model.
        tokenizer: Its tokenizer.
        record: Content of ``training.json``.
        losses: Content of ``heldout.json``; None if it is not written.
        folder: Folder to write to.
        trainer: The trainer of ``model``, if it was trained; all processes must then call this function.
    """
    if processes.is_main():
        # Before the mask, whose card names its tokenizer.
        tokenizer.save_pretrained(folder)
    save_final(model, folder, record.recipe, trainer)

    if not processes.is_main():
        return
    if losses is not None:
        text = json.dumps(losses.model_dump())
        files.write_text(Path(folder) / layout.HELDOUT, text + "\n")
    # The record last: a folder that has it is a finished run.
    text = json.dumps(record.model_dump(), indent=2)
    files.write_text(Path(folder) / layout.TRAINING, text + "\n")
