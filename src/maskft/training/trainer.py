"""TRL's SFT trainer with checks at every step, atomic checkpoints, and one held-out loss for all methods."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import torch
from accelerate.utils import save_fsdp_model
from peft import PeftModel
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from maskft_common import files, layout, memory, processes
from maskft_common.errors import NOT_UPDATED, NotFiniteError, UserError, first_line

from ..data.prepared import Prepared
from ..loss import HeldoutLoss, RowLoss, mean_nll
from ..masks.mask_set import MaskSet
from ..tuner import MaskProgress, set_mask_progress
from .arguments import TrainConfig, trainer_arguments
from .bar import TrainingProgress
from .callbacks import KeepLast, Reference, StepGuard
from .checkpoints import (
    best_beside,
    delete_oldest,
    save_weights,
    step_of,
    trainable_state,
    written_whole,
)
from .kl_budget import MeasuredKL, kl_by_step
from .launch import let_cpu_shard
from .manifest import Course, seal
from .masked_start import RemovedStayZero
from .near_base import KLRows, NearBase

T = TypeVar("T")


class MaskTrainer(SFTTrainer):
    """Stops before a non-finite step, measures the held-out loss, and logs speed, memory and changes of the mask.

    Args:
        model: The model to train; its adapter, if any, is :data:`ADAPTER`.
        tokenizer: Its tokenizer.
        data: Tokenised rows.
        config: The run.
        resume_from: The checkpoint to resume from; None starts from step 0.
        console: Where progress is shown.
        course: What a resumed run must keep, for the manifests of checkpoints.
        kl_rows: Rows of ``kl_dataset_name``; None if it is not given.
    """

    def __init__(
        self,
        model,
        tokenizer,
        data: Prepared,
        config: TrainConfig,
        resume_from: str | None,
        console: Console,
        course: Course,
        kl_rows: KLRows | None = None,
    ):
        self._course = course
        self._resume_from = resume_from
        # For delete_oldest; the Trainer itself gets no limit, see trainer_arguments.
        self._save_total_limit = config.training.save_total_limit
        # Time and number of tokens at the last line of the log, for tokens/s.
        self._window = (time.perf_counter(), 0)
        # TRL and the collator need no other columns; ids of rows are text, which is not made into tensors.
        columns = ["input_ids", "labels"]
        train_rows = data.train.select_columns(columns)
        self._heldout = data.heldout.select_columns(columns)

        # The KL term of the loss. It hooks into the model before accelerate wraps it.
        self.near_base: NearBase | None = None
        # The sampler of group_by_length.
        self._grouped: GroupedByLength | None = None
        # Step of the checkpoint that was loaded after a step with a loss that is not finite.
        self._step_back_to: int | None = None
        # KL of the kept model, from the end of training on.
        self.kept_kl: MeasuredKL | None = None
        if config.training.kl_to_base or config.training.kl_budget is not None:
            # Padding has no label and is masked, so any token will do.
            pad_token_id = tokenizer.pad_token_id or 0
            self.near_base = NearBase(
                model,
                data,
                kl_rows,
                config,
                pad_token_id,
            )

        # The float32 values, which TRL's __init__ replaces in some models, see below.
        scores = {}
        for name, parameter in model.named_parameters():
            if "mask_scores" in name and parameter.requires_grad:
                scores[name] = parameter.data
        super().__init__(
            model=model,
            args=trainer_arguments(config.training, resume_from is not None),
            processing_class=tokenizer,
            train_dataset=train_rows,
            eval_dataset=self._heldout,
            callbacks=self._make_callbacks(config, console),
        )

        # TRL casts trainable parameters to bfloat16 over a base in four or eight bits. Scores stay in float32: rounded,
        # many would tie at the threshold.
        for name, parameter in model.named_parameters():
            is_cast = name in scores and parameter.dtype != scores[name].dtype
            if is_cast:
                parameter.data = scores[name].to(parameter.device)

        # TrainingProgress takes their place.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # For the time of the run; resume_counts sets it back by the time before the checkpoint.
        self.started = time.perf_counter()

    def _make_callbacks(self, config: TrainConfig, console: Console) -> list[TrainerCallback]:
        """The callbacks, in the order in which they run."""
        # Called before the Trainer's own __init__: the callbacks keep this trainer, and use it when training has begun.
        # Those of the Trainer, such as DefaultFlowCallback, run before them.
        method = config.method
        self.guard = StepGuard(self)
        has_budget = config.training.kl_budget is not None
        self.progress = TrainingProgress(console, has_budget)

        self.stay_zero = None
        if method.keep_mask:
            masks = MaskSet.from_adapter(method.keep_mask)
            self.stay_zero = RemovedStayZero(masks)

        self.reference = None
        if method.method == "mask":
            self.reference = Reference(self, console)

        last = None
        if method.keep_last:
            folder = Path(config.training.output_dir) / layout.LAST
            last = KeepLast(self, folder)

        # MaskProgress comes first: the others measure the mask at the progress that it sets.
        callbacks = [
            MaskProgress(),
            self.near_base,
            self.guard,
            self.stay_zero,
            self.progress,
            last,
            self.reference,
        ]
        return [callback for callback in callbacks if callback is not None]

    # Each override below says which behaviour of transformers or TRL it changes, and why.

    # accelerate silently falls back to DDP when FSDP runs without an accelerator.
    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, also for FSDP on CPUs."""
        let_cpu_shard()
        super().create_accelerator_and_postprocess()

    # torch and transformers raise errors of several types for an optimizer or a schedule that they cannot create, and
    # users would see a traceback.
    def create_optimizer(self, *args, **kwargs):
        """Create the optimizer; settings that torch rejects are one line."""
        return _one_line_errors("optimizer", super().create_optimizer, *args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        """Create the learning rate schedule; settings that transformers rejects are one line."""
        return _one_line_errors("scheduler", super().create_scheduler, *args, **kwargs)

    # TRL reports each use of a trainer, unless telemetry is off by an environment variable.
    def _send_telemetry(self) -> None:
        """Send nothing."""

    # The Trainer clips by the norm of all gradients. Those of weights that stay removed must not count.
    def _clip_grad_norm(self, model):
        if self.stay_zero is not None:
            self.stay_zero.clear_gradients()
        return super()._clip_grad_norm(model)

    # The Trainer logs the norm and takes the step even where it is not finite: clipping by inf makes all gradients 0.
    def _get_grad_norm(self, model, grad_norm=None):
        """Norm of the gradients before clipping, which the Trainer computes for its log; checked before the step."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.see_gradient_norm(norm)
        return norm

    # TRL's loss has no term for a base model; its fused head returns no logits either.
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss and, in training, the term that holds the model near its base."""
        if self.near_base is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        # The base's pass comes first; the model's own pass is TRL's, and the term is computed from both. Autocast is
        # entered here because accelerate wraps only the model's forward in it, not that of a frozen copy.
        whole = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            self.near_base.before_forward(whole, inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            term = self.near_base.after_forward(
                whole,
                num_items_in_batch,
                self.current_gradient_accumulation_steps,
            )

        counts_all_processes = self.args.average_tokens_across_devices and num_items_in_batch is not None
        if counts_all_processes and self.near_base.is_divided_by_all_tokens:
            # As TRL does with its own loss: DDP averages the gradients over processes.
            term = term * self.accelerator.num_processes

        if return_outputs:
            loss, outputs = result
            return loss + term, outputs
        return result + term

    # The Trainer hides a non-finite loss in its log (logging_nan_inf_filter), and continues with it.
    def training_step(self, *args, **kwargs):
        """One micro-batch; its loss is checked once per optimizer step, so that a GPU is not made to wait."""
        loss = super().training_step(*args, **kwargs)
        self.guard.see_loss(loss.detach())
        return loss

    def heldout_loss(self) -> HeldoutLoss:
        """Measures held-out rows, with the model and the autocast of this training."""
        return HeldoutLoss(
            model=self.accelerator.unwrap_model(self.model),
            batch_size=self.args.per_device_eval_batch_size,
            pad_token_id=self.processing_class.pad_token_id or 0,
            context=self.compute_loss_context_manager,
        )

    def measure_heldout(self) -> list[RowLoss]:
        """Losses of all held-out rows, under the model as it is."""
        measure = self.heldout_loss()
        return measure(self._heldout)

    @contextmanager
    def _within_budget(self) -> Iterator[MeasuredKL | None]:
        """Measures KL on held-out rows, see :meth:`NearBase.within_budget`; None without a KL term."""
        if self.near_base is None:
            yield None
            return
        with self.near_base.within_budget(self._measure_kl) as measured:
            yield measured

    def _measure_kl(self) -> float:
        """Mean KL(base || model) on held-out rows, under the model as it is, in nats per token."""
        assert self.near_base is not None
        whole = self.accelerator.unwrap_model(self.model)
        # As in compute_loss: a frozen copy has no autocast of its own, and would differ from the model by rounding.
        with self.accelerator.autocast():
            return self.near_base.measure(whole)

    def keep_within_budget(self) -> None:
        """At the end of training: keep the part of the change that was measured, and say in ``kept_kl`` what it is."""
        if self.near_base is None:
            return
        self.kept_kl = kl_by_step(self.state.log_history).get(self.kept_step)
        if self.kept_kl is None:
            with self._within_budget() as self.kept_kl:
                pass
        self.near_base.keep_part(self.kept_kl.part)

    @property
    def chosen_step(self) -> int | None:
        """Step of the checkpoint that evaluations chose; None if none was chosen, and the last step is kept."""
        if self._step_back_to is not None:
            return self._step_back_to
        best = self.state.best_model_checkpoint
        if not self.args.load_best_model_at_end or best is None:
            return None
        return step_of(Path(best))

    @property
    def kept_step(self) -> int:
        """Step of the model that is kept."""
        if self.chosen_step is None:
            return self.state.global_step
        return self.chosen_step

    # The Trainer's evaluation loss is a mean over batches, so it depends on which rows share a batch, and on padding.
    def evaluation_loop(
        self,
        *args,
        metric_key_prefix: str = "eval",
        **kwargs,
    ) -> EvalLoopOutput:
        """Measure the held-out rows, one by one; TRL's loss would depend on which rows share a batch."""
        self.take_averaged_weights()
        # Beyond a budget of KL, what counts is the part of the change that is within it.
        with self._within_budget() as measured:
            loss = mean_nll(self.measure_heldout())
        # TRL's log has num_tokens of its own evaluation, which does not run.
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_num_tokens": int(self._total_train_tokens),
        }
        if measured is not None:
            metrics[f"{metric_key_prefix}_kl"] = measured.kl
            if self.near_base.budget is not None:
                metrics[f"{metric_key_prefix}_part"] = measured.part
                metrics[f"{metric_key_prefix}_kl_whole"] = measured.whole
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=metrics,
            num_samples=len(self._heldout),
        )

    def take_averaged_weights(self) -> None:
        """Let an optimizer without a schedule (schedule_free_adamw) put its result in the place of what it trains."""
        # The Trainer goes back to those before the next step.
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    # The Trainer compares with max_steps after a step, so a run resumed at its last step would take one more. And of
    # several processes that resume inside an epoch, it does not tell our sampler which epoch it is.
    def _run_epoch(self, *args, **kwargs):
        """Train an epoch; nothing if the run was resumed from the checkpoint of its last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._grouped is not None:
            self._grouped.epoch = kwargs["epoch"]
        super()._run_epoch(*args, **kwargs)

    # The Trainer accepts an evaluation as the best even if no checkpoint is saved at its step, and loads another one at
    # the end (huggingface/transformers#39560).
    def _determine_best_metric(self, metrics, trial) -> bool:
        """Whether this evaluation is the best so far, among those whose step is saved."""
        is_best = self._is_best(metrics, trial)
        # With save_strategy best, transformers saves if this is true. A step during which a signal came, and the last
        # one, from which a finished run is resumed, are saved whatever their loss is.
        is_last = self.state.global_step >= self.state.max_steps and not self.args.save_only_model
        saves_anyway = self.args.save_strategy == "best" and (self.guard.is_stopping or is_last)
        return is_best or saves_anyway

    def _is_best(self, metrics, trial) -> bool:
        # A step that is saved because of a signal alone does not count: an undisturbed run would not have it.
        is_saved = self.guard.is_save_due or self.args.save_strategy == "best"
        if not is_saved:
            return False
        # The budget of KL comes before the loss.
        kl_of_best = self.kl_of_best()
        if self.near_base is not None and kl_of_best is not None:
            excess = self.near_base.excess(metrics["eval_kl"])
            excess_of_best = self.near_base.excess(kl_of_best)
            if excess > excess_of_best:
                return False
            if excess < excess_of_best:
                # A loss that is not finite is never the best, whatever its KL is.
                if not math.isfinite(metrics["eval_loss"]):
                    return False
                # transformers compares losses, and without a best one any loss is better.
                self.state.best_metric = None
        return super()._determine_best_metric(metrics, trial)

    def kl_of_best(self) -> float | None:
        """KL of the best checkpoint so far; None without one, or if its KL was not measured."""
        best = self.state.best_model_checkpoint
        if best is None:
            return None
        measured = kl_by_step(self.state.log_history).get(step_of(Path(best)))
        return None if measured is None else measured.kl

    def resume_counts(self) -> None:
        """Restore the counters of the log: TRL counts tokens from 0, transformers sums the loss since its last line."""
        # StepGuard has stored TRL's count in the state; in a new run it is 0.
        self._total_train_tokens = self.state.num_input_tokens_seen
        self._window = (time.perf_counter(), self.state.num_input_tokens_seen)
        if self._resume_from is None:
            return

        # The output folder may have been moved since.
        checkpoint = Path(self._resume_from)
        best = best_beside(checkpoint)
        self.state.best_model_checkpoint = None
        if best is not None:
            self.state.best_model_checkpoint = str(best)

        # The state is the checkpoint's, and logging_steps may differ.
        self.state.compute_steps(self.args, self.state.max_steps)

        # In place of the zeros with which the Trainer begins a run, so that the next line of the log is that of an
        # uninterrupted run.
        kept = files.read_json(checkpoint / layout.LOGGED)
        loss = kept["loss"]
        # Of each process its own; a checkpoint of an earlier version has the mean.
        if isinstance(loss, list):
            loss = loss[processes.rank()]
        self._tr_loss.fill_(loss)
        self._globalstep_last_logged = kept["step"]
        # As if the run had started earlier by the time before its checkpoint.
        self.started -= kept["seconds"]
        if self.near_base is not None and self.near_base.budget is not None:
            self.near_base.budget.load(kept["kl_budget"])

    # The Trainer's checkpoints are not atomic (huggingface/transformers#27820), and it deletes
    # the oldest before the newest is whole.
    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint and then its manifest, which marks it as complete; then delete the oldest."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # A checkpoint of the same step is overwritten, and not complete meanwhile.
            (folder / layout.MANIFEST).unlink(missing_ok=True)
        # Weights, optimizer, schedule, random states and the Trainer's state, by the Trainer; the rest is ours.
        with written_whole(folder, self.args):
            super()._save_checkpoint(model, trial)
            self._save_log_state(folder)
            # Every process writes some of the files.
            self.accelerator.wait_for_everyone()
            if processes.is_main():
                seal(folder, self._course)
                delete_oldest(
                    folder,
                    self.state.best_model_checkpoint,
                    self._save_total_limit,
                )

    def save_start(self) -> None:
        """Save a checkpoint before the first step."""
        self._save_checkpoint(self.model, trial=None)

    def _save_log_state(self, folder: Path) -> None:
        """Save the time so far and the loss since the last line of the log, which transformers does not save."""
        # Each process has summed the loss of its own batches. Their mean would not do: sums that go on from it are
        # rounded in another order than those of an undisturbed run.
        losses = processes.gather(self._tr_loss.item())
        if not processes.is_main():
            return

        content = {
            "loss": losses,
            "step": self._globalstep_last_logged,
            "seconds": time.perf_counter() - self.started,
        }
        if self.near_base is not None and self.near_base.budget is not None:
            content["kl_budget"] = self.near_base.budget.state()
        text = json.dumps(content)
        files.write_text(folder / layout.LOGGED, text + "\n")

    # Under FSDP, the Trainer also saves the frozen weights of an adapter's base.
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights or adapter; under FSDP without the frozen weights of an adapter's base."""
        if self.is_fsdp_enabled:
            # Gathered by all processes; _save returns in all but the main one.
            state = trainable_state(self.model)
            self._save(output_dir, state_dict=state)
        else:
            super().save_model(output_dir, _internal_call)

    # transformers takes the order of group_by_length from the global random state, which a resumed run restores only
    # after the order was drawn: some rows of that epoch would come twice, and others never.
    def _get_train_sampler(self, train_dataset=None):
        """The sampler of training rows; the order of each epoch depends on the seed and the epoch alone."""
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._grouped = GroupedByLength(sampler.batch_size, sampler.lengths, seed)
        return self._grouped

    # PEFT asks the hub about the base's vocabulary at every save (huggingface/peft#1452), and safetensors writes files
    # that only their owner can read.
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights, tokenizer and arguments as the Trainer does, but with :func:`save_weights`."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        whole = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save_weights(whole, folder, state_dict)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    # The Trainer reports tied weights as missing (huggingface/transformers#27972): it leaves out the names in
    # `_keys_to_ignore_on_save`, where `tie_weights` no longer lists them.
    def _issue_warnings_after_load(self, load_result) -> None:
        """Warn of keys that a checkpoint lacks, except tied weights, which are saved once."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        without_tied = SimpleNamespace(
            missing_keys=missing,
            unexpected_keys=load_result.unexpected_keys,
        )
        super()._issue_warnings_after_load(without_tied)

    # Under FSDP, torch runs a dummy optimizer step to create the state that it saves, and counts it.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled and not self.optimizer.state:
            # Before the first step. The Trainer would save the model here as well, beside the optimizer.
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_model(
                plugin,
                self.accelerator,
                self.model,
                output_dir,
                adapter_only=True,
            )
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    # PEFT reads the file of an adapter onto the first GPU: in every process, all scores beside those that train.
    def _load_from_checkpoint(self, *args, **kwargs) -> None:
        with _adapters_by_cpu(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with _adapters_by_cpu(self.model):
            super()._load_best_model()

    def back_to_best(self, error: NotFiniteError) -> str:
        """Load the best checkpoint after a step with a non-finite loss or gradient.

        Returns:
            The reason, and the step of that checkpoint.

        Raises:
            UserError: If no checkpoint was measured yet.
        """
        reason = f"{error} at step {self.state.global_step + 1}: {NOT_UPDATED}; lower learning_rate or check the data"
        if self.state.best_model_checkpoint is None:
            raise UserError(f"{reason}; no checkpoint was measured yet") from None

        # The error has left train(), at whose end the Trainer would have loaded it.
        self._load_best_model()
        step = step_of(Path(self.state.best_model_checkpoint))
        # MaskProgress does this when training ends without an error.
        set_mask_progress(self.model, step / self.state.max_steps)
        self._step_back_to = step
        return f"{reason}; the best so far (step {step})"

    # TRL's card has lines that do not load a mask, and does not name a base in a local folder.
    def create_model_card(self, *args, **kwargs) -> None:
        """Write no card; saving an adapter writes its own."""

    # TRL counts tokens from 0 in a resumed run, so its tokens/s would be wrong (as huggingface/transformers#40560).
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens/s, peak memory and mask metrics to TRL's log."""
        if "loss" in logs:
            # Tokens since the last line of the log.
            now = time.perf_counter()
            tokens = int(self._total_train_tokens)
            last_time, last_tokens = self._window
            seconds = max(now - last_time, 1e-9)
            tokens_per_s = (tokens - last_tokens) / seconds
            logs["tokens_per_s"] = round(tokens_per_s, 1)
            logs["peak_memory_bytes"] = memory.peak_memory_bytes(self.args.device.type)
            logs.update(self.guard.mask_metrics)
            if self.near_base is not None:
                logs.update(self.near_base.metrics())
            self._window = (now, tokens)
        elif "eval_loss" in logs and self.lr_scheduler is not None:
            # The rate of the next step, from which a study may continue the schedule.
            logs["learning_rate"] = self._get_learning_rate()
        super().log(logs, start_time)


class GroupedByLength(LengthGroupedSampler):
    """transformers' order of rows of similar length, drawn from the seed and the epoch.

    Args:
        batch_size: Rows of a step.
        lengths: Of all rows, in tokens.
        seed: Of the run.

    Attributes:
        epoch: The epoch whose order comes next.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


@contextmanager
def _adapters_by_cpu(model) -> Iterator[None]:
    """Let the files of adapters be read into the memory of the CPU, from where they are copied into the model."""
    if not isinstance(model, PeftModel):
        yield
        return
    # An attribute of this object, over the method of its class.
    model.load_adapter = partial(model.load_adapter, torch_device="cpu")
    try:
        yield
    finally:
        del model.load_adapter


def _one_line_errors(
    name: str,
    create: Callable[..., T],
    *args,
    **kwargs,
) -> T:
    """Call ``create``; its errors become one line about ``name``."""
    try:
        return create(*args, **kwargs)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the {name} cannot be made: {first_line(error)}") from error
