"""Output of a run: resolved settings before it starts, the verdict when it ends."""

from __future__ import annotations

import shlex
from pathlib import Path
from statistics import median

from rich.console import Console

from maskft_common import layout
from maskft_common.errors import UserError
from maskft_common.progress_bar import time_text

from ..data.prepared import Prepared
from ..data.tokenizing import format_sample, supervised_token_count
from ..tuner import MaskConfig, adapter_layers
from ..tuner.selection import is_free
from .arguments import TrainConfig
from .method_arguments import ADAPTER, UNTRAINED_METHODS, mask_config
from .padding import padding_advice
from .record import TrainingSummary
from .verdict import Verdict


def describe(
    model,
    tokenizer,
    data: Prepared,
    config: TrainConfig,
    console: Console,
) -> None:
    """Print the resolved settings, data and one row, to be checked before a long run."""
    method = config.method
    training = config.training

    num_trainable = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            num_trainable += parameter.numel()
    console.print(f"method {method.method}: {num_trainable:,} trainable parameters")
    if training.is_float32_by_machine:
        console.print("computing in float32: this CPU has no bfloat16 instructions (--bf16 true asks for it anyway)")
    if method.method == "mask":
        # By the sizes of the layers: weights in four bits are stored as vectors of bytes.
        num_targets = 0
        for layer in adapter_layers(model).values():
            num_targets += layer.in_features * layer.out_features
        mask = model.peft_config[ADAPTER]
        console.print(mask_line(mask, num_targets))
        if mask.beside_preset:
            console.print(f"preset {mask.preset}, but {mask.beside_preset}", markup=False, highlight=False)

    num_supervised = supervised_token_count(data.train)
    num_supervised_heldout = supervised_token_count(data.heldout)
    # Sequences of an optimizer step, over all processes.
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    console.print(
        f"data: {len(data.train):,} training rows ({num_supervised:,} supervised tokens), {len(data.heldout):,} held "
        f"out ({num_supervised_heldout:,} supervised tokens); {batch} sequences per step"
    )
    advice = padding_advice(model, data.train, training)
    if advice is not None:
        console.print(advice, soft_wrap=True, highlight=False)
    console.print("one sample, supervised text in [[ ]]:", highlight=False)
    # Without markup, whatever the console's default is: rich would take brackets in a row's text for its own.
    console.print(format_sample(data.train[0], tokenizer), markup=False, highlight=False)


def mask_line(config: MaskConfig, num_target_weights: int) -> str:
    """The line that every run prints about removed weights."""
    of_weights = f"of {num_target_weights:,} target weights"
    if config.removed_value == "base":
        of_weights += f"; a removed weight takes its value in {config.removed_value_model}"
    # The number of removed weights is known for top-k masks alone; the others say which scores are removed.
    if config.selection == "threshold":
        return f"threshold {config.threshold:g}: removes weights with a lower score, {of_weights}"
    if is_free(config.selection):
        return f"{config.selection}: removes weights with a score of 0 or less, {of_weights}"
    text = f"sparsity {config.sparsity:g}: removes {100 * config.sparsity:g} % {of_weights}"
    if config.sparsity_ramp:
        text += f", reached after {config.sparsity_ramp:.0%} of training"
    return text


def report(
    summary: TrainingSummary,
    verdict: Verdict | None,
    config: TrainConfig,
    failure: str | None,
    console: Console,
) -> None:
    """Print the outcome of the run, the folder, and the next command.

    Args:
        summary: Results of the run.
        verdict: Verdict on a mask.
        config: The run.
        failure: Why training stopped early, followed by the name of the checkpoint that is kept; None without failure.
        console: Where to print.

    Raises:
        UserError: If there is a ``failure``.
    """
    folder = config.training.output_dir
    if failure is not None:
        # The best checkpoint so far was compared as after a whole run, and may have lost.
        is_replaced = verdict is not None and not verdict.kept and not verdict.is_better
        if is_replaced:
            raise UserError(f"{failure}: {verdict}. Saved in {folder}: an adapter that removes nothing")
        raise UserError(f"{failure} is saved in {folder}")

    if summary.num_steps:
        # The median, because the first lines of the log include warming up.
        speeds = [row["tokens_per_s"] for row in summary.history if "tokens_per_s" in row]
        speed = f"{median(speeds):,.0f} tokens/s; " if speeds else ""
        took = time_text(summary.train_time_s)
        console.print(f"{speed}{took} in total, held-out evaluation included", highlight=False)

    start = summary.start_loss
    best = summary.best_loss
    step = summary.best_step
    if best is None or summary.method in UNTRAINED_METHODS:
        console.print(f"saved to {folder}")
    elif summary.method != "mask":
        of_start = "" if start is None else f"{start:.4f} at the start, "
        end = f"{summary.end_loss:.4f} at the end; the best is saved in {folder}"
        console.print(f"held-out loss {of_start}best {best:.4f} (step {step}), {end}")
    else:
        # Measured by Reference whenever held-out rows are, so it is not None here.
        console.print(f"held-out loss {start:.4f} without a mask, best {best:.4f} with it (step {step})")
        _report_verdict(summary, verdict, config, console)

    # Not for an adapter that removes nothing: it is the base.
    if verdict is None or verdict.is_better or verdict.kept:
        if summary.kl is not None:
            console.print(str(summary.kl), soft_wrap=True, markup=False, highlight=False)
        option = "--adapter" if layout.holds_adapter(folder) else "--model_name_or_path"
        # A command to paste: quoted for a shell, and not wrapped.
        quoted = shlex.quote(str(folder))
        advice = f"next: maskft evaluate {option} {quoted} --dataset_name TEST.jsonl --output_dir results/NAME"
        console.print(advice, soft_wrap=True)


def _report_verdict(
    summary: TrainingSummary,
    verdict: Verdict | None,
    config: TrainConfig,
    console: Console,
) -> None:
    """Print the verdict on a mask, the folder, and the way to the mask if another adapter was saved."""
    folder = config.training.output_dir
    if verdict is None:
        console.print(f"saved to {folder}; too few held-out rows to compare the mask with no mask")
        return
    if verdict.is_better:
        console.print(
            f"{verdict}. The same rows chose the checkpoint: use maskft evaluate and compare on new ones. "
            f"Saved in {folder}"
        )
        return
    how = " anyway" if verdict.kept else ": an adapter that removes nothing."
    console.print(f"{verdict}. Saved in {folder}{how}")

    # checkpoint-0 is saved before the first step.
    if summary.best_step == 0:
        console.print("No checkpoint beat the starting mask.")
        # Also with keep_worse, as in a study: the mask that was kept may remove nothing.
        hint = too_few_steps(summary, config)
        if hint is not None:
            console.print(hint, soft_wrap=True, highlight=False)
        return

    # Nothing can be resumed from a checkpoint of the model alone.
    checkpoint = Path(folder) / f"checkpoint-{summary.best_step}"
    if not verdict.kept and checkpoint.is_dir() and not config.training.save_only_model:
        # With a budget of KL a part of it was compared.
        is_whole = summary.kl is None or summary.kl.part == 1
        place = f"The mask is in {checkpoint}. " if is_whole else ""
        console.print(
            f"{place}To save it anyway, repeat the command with --resume_from_checkpoint true --keep_worse true: "
            "nothing is trained again"
        )


def too_few_steps(summary: TrainingSummary, config: TrainConfig) -> str | None:
    """A hint if hardly any score can have reached 0, below which its weight is removed; else None.

    Adam moves a score by about the learning rate in a step, and a linear schedule halves that on average.
    """
    mask = mask_config(config.mask)
    # Only these selections cut scores at 0.
    if not is_free(mask.selection):
        return None

    learning_rate = config.training.learning_rate
    travel = summary.num_steps * learning_rate / 2
    if travel >= mask.start_value:
        return None
    return (
        f"Too few steps: scores start around mask_init_value {mask.start_value:g} and remove weights at 0, and "
        f"{summary.num_steps} steps at learning_rate {learning_rate:g} move them by about "
        f"{travel:.2g} (steps * rate / 2): take more steps, or a higher rate."
    )
