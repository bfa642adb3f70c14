"""What a run prints: resolved numbers before it starts, the verdict when it ends."""

from __future__ import annotations

from statistics import median

from rich.console import Console

from maskft_base.errors import UserError
from maskft_base.runtime import time_text

from ..data import format_sample, supervised_token_count
from ..data.prepared import Prepared
from ..tuner import MaskConfig, adapter_layers
from ..tuner.learners import FREE
from .arguments import TrainConfig, TrainingArguments
from .method_arguments import ADAPTER, OBJECTIVES, UNTRAINED_METHODS, MethodArguments, mask_config
from .record import TrainingSummary
from .verdict import Verdict


def describe(
    model,
    tokenizer,
    data: Prepared,
    method: MethodArguments,
    training: TrainingArguments,
    console: Console,
) -> None:
    """Print the resolved numbers a person checks before a long run.

    Raises:
        UserError: If the loss would be taken on no token.
    """
    supervised = supervised_token_count(data.train)
    if supervised == 0:
        raise UserError("no token of the training data is supervised; every label is masked")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    console.print(f"method {method.method}: {trainable:,} trainable parameters")
    if training.is_float32_by_machine:
        console.print("computing in float32: this CPU has no bfloat16 instructions (--bf16 true asks for it anyway)")
    if method.method == "mask":
        targets = sum(layer.weight.numel() for layer in adapter_layers(model).values())
        console.print(mask_line(model.peft_config[ADAPTER], targets))
    console.print(
        f"data: {len(data.train):,} training rows ({supervised:,} supervised tokens), {len(data.heldout):,} held out "
        f"({supervised_token_count(data.heldout):,} supervised tokens); {batch} sequences per step"
    )
    console.print("one sample, supervised text in [[ ]]:", highlight=False)
    console.print(format_sample(data.train[0], tokenizer), markup=False, highlight=False)


def mask_line(config: MaskConfig, num_target_weights: int) -> str:
    """The line every run prints about what it removes."""
    of_weights = f"of {num_target_weights:,} target weights"
    if config.removed_value == "base":
        of_weights += f"; a removed weight takes its value in {config.removed_value_model}"
    if config.selection == "threshold":
        return f"threshold {config.threshold:g}: removes what scores below it, {of_weights}"
    if config.selection in FREE:
        return f"{config.selection}: removes what scores 0 or less, {of_weights}"
    ramp = f", reached after {config.sparsity_ramp:.0%} of training" if config.sparsity_ramp else ""
    return f"sparsity {config.sparsity:.2f}: removes {100 * config.sparsity:g} % {of_weights}{ramp}"


def report(
    summary: TrainingSummary, verdict: Verdict | None, config: TrainConfig, failure: str | None, console: Console
) -> None:
    """Print what came of the run, where it is, and what may help a mask that was still learning.

    Raises:
        UserError: If training ended with a ``failure``, a text that ends with what is saved.
    """
    folder = config.training.output_dir
    if failure is not None:
        raise UserError(f"{failure} is saved in {folder}")
    speeds = [row["tokens_per_s"] for row in summary.history if "tokens_per_s" in row]
    if summary.num_steps:
        speed = f"{median(speeds):,.0f} tokens/s; " if speeds else ""
        took = time_text(summary.train_time_s)
        console.print(f"{speed}with held-out loss it took {took}", highlight=False)
    noun = OBJECTIVES[summary.objective][0]
    start, best, step = summary.start_loss, summary.best_loss, summary.best_step
    if best is None or summary.method in UNTRAINED_METHODS:
        console.print(f"saved to {folder}")
    elif summary.method != "mask":
        where = (
            f"as the mean of {len(summary.averaged_steps)} checkpoints" if summary.averaged_steps else f"at step {step}"
        )
        console.print(
            f"{noun} {start:.4f} at the start, best {best:.4f} {where}, {summary.end_loss:.4f} at the end; the best is "
            f"saved in {folder}"
        )
    else:
        console.print(f"{noun} {start:.4f} without a mask, best {best:.4f} with it (step {step})")
        if verdict is None:
            console.print(f"saved to {folder}; too few held-out rows to say whether the mask is better than no mask")
        elif verdict.is_better:
            console.print(
                f"{verdict} (which chose the step too: whether it holds on new items, maskft evaluate and compare "
                f"tell). Saved in {folder}"
            )
        elif verdict.kept:
            console.print(f"{verdict}. Saved in {folder} all the same")
        else:
            console.print(
                f"{verdict}. Saved in {folder}: an adapter that removes nothing (--keep_worse true writes the mask)"
            )
        by_loss = config.training.metric_for_best_model in (None, "loss", "eval_loss")
        is_last = by_loss and summary.num_steps and step == summary.num_steps
        if verdict is not None and not verdict.is_better and is_last:
            console.print(f"The loss with the mask still fell at the last step: {_help_for_a_start(config)}")


def _help_for_a_start(config: TrainConfig) -> str:
    """What a mask needs that had not won back its start, which removes weights before one step is taken."""
    if mask_config(config.mask).init_scores in ("magnitude", "wanda", "first_order"):
        return "train longer, or at another rate"
    preset = f", without --mask_preset {config.mask.mask_preset}" if config.mask.mask_preset else ""
    start = f"--mask_init_scores magnitude{preset}"
    return f"train longer, or let it begin with the smallest weights ({start}) at a lower rate"
