"""TRL's SFT trainer with what a mask needs: checks at every step, and checkpoints that are whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import torch
from accelerate.utils import save_fsdp_model
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer import TRAINING_ARGS_NAME
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
from .checkpoints import best_beside, delete_oldest, save_weights, step_of, trainable_state, written_whole
from .launch import let_cpu_shard
from .manifest import check_course, course_of, seal
from .masked_start import RemovedStayZero
from .near_base import KLRows, NearBase

T = TypeVar("T")


class MaskTrainer(SFTTrainer):
    """Stops before a non-finite step, measures the one held-out loss, and logs speed, memory and what the mask did.

    Args:
        model: What to train; its adapter, if any, is :data:`ADAPTER`.
        tokenizer: Its tokenizer.
        data: Tokenised rows.
        config: The run.
        resume_from: The checkpoint that the run is resumed from; None: it begins.
        console: Where progress is shown.
        kl_rows: Rows of ``kl_dataset_name``; None: it is not given.

    Raises:
        UserError: If an option, the data or the base differs from what the resumed run began with.
    """

    def __init__(
        self,
        model,
        tokenizer,
        data: Prepared,
        config: TrainConfig,
        resume_from: str | None,
        console: Console,
        kl_rows: KLRows | None = None,
    ):
        method = config.method
        training = config.training
        self._course = course_of(config, data, kl_rows)
        self._resume_from = resume_from
        if resume_from is not None:
            processes.decided_by_main(lambda: check_course(Path(resume_from), self._course))
        self._save_total_limit = training.save_total_limit
        self.near_base = None
        if training.kl_to_base or training.kl_budget is not None:
            self.near_base = NearBase(model, data, kl_rows, config, tokenizer.pad_token_id or 0)
        self._heldout = data.heldout.select_columns(["input_ids", "labels"])
        self._window = (time.perf_counter(), 0)  # when the last line of the log was written, and tokens by then
        self.guard, self.progress = StepGuard(self), TrainingProgress(console)
        self.stay_zero = RemovedStayZero(MaskSet.from_adapter(method.keep_mask)) if method.keep_mask else None
        self.reference = Reference(self, console) if method.method == "mask" else None
        last = KeepLast(self, Path(training.output_dir) / layout.LAST) if method.keep_last else None
        callbacks = (MaskProgress(), self.near_base, self.guard, self.stay_zero, self.progress, last, self.reference)
        # Over a base in four or eight bits TRL casts what is trained to bfloat16, in which scores would tie at the cut.
        scores = {
            name: parameter.data
            for name, parameter in model.named_parameters()
            if "mask_scores" in name and parameter.requires_grad
        }
        super().__init__(
            model=model,
            args=trainer_arguments(training, resume_from is not None),
            processing_class=tokenizer,
            train_dataset=data.train.select_columns(["input_ids", "labels"]),
            eval_dataset=self._heldout,
            callbacks=[callback for callback in callbacks if callback is not None],
        )
        for name, parameter in model.named_parameters():
            if name in scores and parameter.dtype != scores[name].dtype:
                parameter.data = scores[name].to(parameter.device)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.started = time.perf_counter()

    # Each override below says which behaviour of transformers or TRL it changes, and why.

    # accelerate falls back to DDP for FSDP without an accelerator, and says nothing.
    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, also for FSDP on CPUs."""
        let_cpu_shard()
        super().create_accelerator_and_postprocess()

    # torch and transformers raise errors of several types for an optimizer or a schedule that cannot be made; users see
    # a traceback.
    def create_optimizer(self, *args, **kwargs):
        """Create the optimizer; what torch does not take is one line."""
        return _made("optimizer", super().create_optimizer, *args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        """Create the schedule of the learning rate; what transformers does not take is one line."""
        return _made("scheduler", super().create_scheduler, *args, **kwargs)

    # TRL reports each use of a trainer, unless telemetry is off by an environment variable.
    def _send_telemetry(self) -> None:
        """Nothing of TRL's report on the machine."""

    # The Trainer clips by the norm of all gradients; those of weights that stay removed are not to count in it.
    def _clip_grad_norm(self, model):
        if self.stay_zero is not None:
            self.stay_zero.clear_gradients()
        return super()._clip_grad_norm(model)

    # The Trainer logs the norm and takes the step even where it is not finite: clipping by inf makes all gradients 0.
    def _get_grad_norm(self, model, grad_norm=None):
        """The norm before clipping, which the Trainer computes for its log; the guard checks it before the step."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.see_gradient_norm(norm)
        return norm

    # TRL's loss has no term for a base model; its fused head returns no logits either.
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss and, in training, the term that holds the model near its base."""
        if self.near_base is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        whole = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            self.near_base.before_forward(whole, inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            term = self.near_base.after_forward(whole, num_items_in_batch, self.current_gradient_accumulation_steps)
        is_of_all_processes = self.args.average_tokens_across_devices and num_items_in_batch is not None
        if is_of_all_processes and self.near_base.is_divided_by_all_tokens:
            term = term * self.accelerator.num_processes  # as TRL's loss: DDP averages the gradients
        return (result[0] + term, result[1]) if return_outputs else result + term

    # The Trainer replaces a loss that is not finite in its log (logging_nan_inf_filter), or goes on with it.
    def training_step(self, *args, **kwargs):
        """One micro-batch; its loss is checked once per optimizer step, so that a GPU is not made to wait."""
        loss = super().training_step(*args, **kwargs)
        self.guard.see_loss(loss.detach())
        return loss

    def heldout_loss(self) -> HeldoutLoss:
        """What measures held-out rows, with the model and the autocast of this training."""
        whole = self.accelerator.unwrap_model(self.model)
        pad_token_id = self.processing_class.pad_token_id or 0
        size = self.args.per_device_eval_batch_size
        return HeldoutLoss(whole, size, pad_token_id, self.compute_loss_context_manager)

    def measure_heldout(self) -> list[RowLoss]:
        """Losses of all held-out rows, under the model as it is."""
        return self.heldout_loss()(self._heldout)

    def measure_kl(self) -> float:
        """Mean KL(base || model) on held-out rows, under the model as it is, in nats per token."""
        assert self.near_base is not None
        with self.compute_loss_context_manager():
            return self.near_base.measure(self.accelerator.unwrap_model(self.model))

    # The Trainer's evaluation loss is a mean over batches, so it depends on which rows share a batch, and on padding.
    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Measure the held-out rows, one by one; TRL's loss would depend on which rows share a batch."""
        loss = mean_nll(self.measure_heldout())
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_num_tokens": int(self._total_train_tokens)}
        if self.near_base is not None:
            metrics[f"{metric_key_prefix}_kl"] = self.measure_kl()
        return EvalLoopOutput(None, None, metrics, len(self._heldout))

    # The Trainer looks at max_steps after a step: a run resumed at its last step would take one more.
    def _run_epoch(self, *args, **kwargs):
        """Train nothing when resumed from the checkpoint of the last step; transformers would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # The Trainer takes an evaluation for the best even where no checkpoint is saved at its step, and loads another one
    # at the end (huggingface/transformers#39560).
    def _determine_best_metric(self, metrics, trial) -> bool:
        """Whether this evaluation is the best so far, of those whose step is saved: an unsaved one cannot be kept."""
        is_saved = self.control.should_save or self.args.save_strategy == "best"
        if not is_saved:
            return False
        if self.near_base is not None:
            prefers = self.near_base.prefers(metrics["eval_kl"], self.kl_of_best())
            if prefers is False:
                return False
            if prefers:
                self.state.best_metric = None  # transformers compares losses, and takes any for better than none
        return super()._determine_best_metric(metrics, trial)

    def kl_of_best(self) -> float | None:
        """KL of the best checkpoint so far, as it was measured; None: there is none, or nothing was measured."""
        best = self.state.best_model_checkpoint
        if best is None:
            return None
        step = step_of(Path(best))
        return next(
            (row["eval_kl"] for row in self.state.log_history if row["step"] == step and "eval_kl" in row), None
        )

    def resume_counts(self) -> None:
        """Resume what the log counts: TRL counts tokens from zero, transformers the loss since its last line."""
        self._total_train_tokens = self.state.num_input_tokens_seen
        self._window = (time.perf_counter(), self.state.num_input_tokens_seen)
        if self._resume_from is not None:
            best = best_beside(Path(self._resume_from))
            self.state.best_model_checkpoint = str(best) if best else None  # where the folder is now
            kept = files.read_json(Path(self._resume_from) / layout.LOGGED)
            self._tr_loss.fill_(kept["loss"])
            self._globalstep_last_logged = kept["step"]
            self.started -= kept["seconds"]
            if self.near_base is not None and self.near_base.budget is not None:
                self.near_base.budget.load(kept["kl_budget"])

    # The Trainer's checkpoints are not atomic (huggingface/transformers#27820), and it deletes
    # the oldest before the newest is whole.
    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint whole; its manifest, which is written last, says that it is; then delete the oldest."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / layout.MANIFEST).unlink(missing_ok=True)  # of one of the same step, which is written over
        with written_whole(folder):
            super()._save_checkpoint(model, trial)
            self._save_loss_since_log(folder)
            self.accelerator.wait_for_everyone()  # all processes write to it
            if processes.is_main():
                seal(folder, self._course)
                delete_oldest(folder, self.state.best_model_checkpoint, self._save_total_limit)

    def save_start(self) -> None:
        """Save a checkpoint before the first step."""
        self._save_checkpoint(self.model, trial=None)

    def _save_loss_since_log(self, folder: Path) -> None:
        """Keep the time so far, and what the next line of the log is the mean of, which transformers forgets."""
        sums = processes.reduce_(self._tr_loss.detach().double().clone()) / processes.num_processes()
        if processes.is_main():
            seconds = time.perf_counter() - self.started
            content = {"loss": sums.item(), "step": self._globalstep_last_logged, "seconds": seconds}
            if self.near_base is not None and self.near_base.budget is not None:
                content["kl_budget"] = self.near_base.budget.state()
            files.write_text(folder / layout.LOGGED, json.dumps(content) + "\n")

    # Under FSDP the Trainer saves the frozen weights of an adapter's base too.
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights or adapter; under FSDP without the frozen weights of an adapter's base."""
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=trainable_state(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    # PEFT asks the hub about the base's vocabulary at every save (huggingface/peft#1452), and safetensors writes files
    # that only their owner can read.
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights, tokenizer and arguments as the Trainer does, but with :func:`save_weights`."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), folder, state_dict)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    # The Trainer warns of tied weights as of missing ones (huggingface/transformers#27972).
    def _issue_warnings_after_load(self, load_result) -> None:
        """Warn of keys that a checkpoint lacks, but not of tied weights, which are saved once.

        transformers leaves out those of ``_keys_to_ignore_on_save`` only, where ``tie_weights`` no longer lists them.
        """
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(
            SimpleNamespace(missing_keys=missing, unexpected_keys=load_result.unexpected_keys)
        )

    # torch takes a dummy optimizer step under FSDP to have a state to save, and counts it.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled and not self.optimizer.state:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_model(plugin, self.accelerator, self.model, output_dir, adapter_only=True)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def back_to_best(self, error: NotFiniteError) -> str:
        """Load the best checkpoint after a step that could not be taken; returns why it could not, and what there is.

        Raises:
            UserError: If no checkpoint is the best yet.
        """
        reason = f"{error} at step {self.state.global_step + 1}: {NOT_UPDATED}; lower learning_rate or check the data"
        if self.state.best_model_checkpoint is None:
            raise UserError(f"{reason}; no checkpoint was measured yet") from None
        self._load_best_model()
        step = step_of(Path(self.state.best_model_checkpoint))
        set_mask_progress(self.model, step / self.state.max_steps)  # as MaskProgress does at an end without an error
        return f"{reason}; the best so far (step {step})"

    # TRL writes a card whose lines load no mask, and which names no base that is a local folder.
    def create_model_card(self, *args, **kwargs) -> None:
        """Not TRL's, whose lines do not load a mask, nor a base that is on no hub."""

    # TRL counts tokens from 0 in a resumed run, so its tokens/s would be wrong (as huggingface/transformers#40560).
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens/s, peak memory and mask metrics to what TRL logs."""
        if "loss" in logs:
            now = time.perf_counter()
            tokens = int(self._total_train_tokens)
            logs["tokens_per_s"] = round((tokens - self._window[1]) / max(now - self._window[0], 1e-9), 1)
            logs["peak_memory_bytes"] = memory.peak_memory_bytes()
            logs.update(self.guard.mask_metrics)
            if self.near_base is not None:
                logs.update(self.near_base.metrics())
            self._window = (now, tokens)
        elif "eval_loss" in logs and self.lr_scheduler is not None:
            logs["learning_rate"] = self._get_learning_rate()  # of the next step: a schedule may be continued from it
        super().log(logs, start_time)


def _made(what: str, make: Callable[..., T], *args, **kwargs) -> T:
    try:
        return make(*args, **kwargs)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the {what} cannot be made: {first_line(error)}") from error
