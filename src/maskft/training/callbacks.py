"""Callbacks of training: checks of every step, held-out loss without the mask, and the model of the last step."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import IntervalStrategy, TrainerCallback
from trl import SFTTrainer

from maskft_common import processes
from maskft_common.errors import NotFiniteError, Stopped, UserError

from ..fsdp import is_sharded, refresh_masks
from ..loss import RowLoss, mean_nll
from ..tuner import MaskedLinear
from ..tuner.model import adapter_layers
from ..tuner.selection import current_sparsity
from .checkpoints import save_final
from .method_arguments import ADAPTER
from .stopping import StopRequest


class KeepLast(TrainerCallback):
    """Saves the model of the last step, before the best checkpoint replaces it."""

    def __init__(self, trainer: SFTTrainer, folder: Path):
        self.trainer = trainer
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        """Save after the last step."""
        # Not in on_train_end: the Trainer loads the best checkpoint before that event.
        if state.global_step >= state.max_steps:
            if processes.is_main():
                # Before the mask, whose card names its tokenizer.
                self.trainer.processing_class.save_pretrained(self.folder)
            save_final(self.trainer.model, self.folder, trainer=self.trainer)

    # A run that is resumed after its last step takes no step.
    on_train_begin = on_step_end


class Reference(TrainerCallback):
    """Measures the held-out loss without the mask, which the mask has to beat, before the first step.

    The model is sharded over the processes by then.

    Attributes:
        losses: Of the held-out rows; None where they are not measured.
    """

    def __init__(self, trainer: SFTTrainer, console: Console):
        self.trainer = trainer
        self.console = console
        self.losses: list[RowLoss] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure it, unless held-out rows are not measured."""
        if args.eval_strategy == "no":
            return
        # A resumed run measures it again: checkpoints do not hold the losses of single rows.
        whole = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with whole.disable_adapter():
            self.losses = self.trainer.measure_heldout()
        loss = mean_nll(self.losses)
        self.console.print(f"  held-out loss without the mask {loss:.4f}", highlight=False)


class StepGuard(TrainerCallback):
    """Checks every step before and after the optimizer: are loss and gradient finite, how many mask entries flipped?

    Attributes:
        mask_metrics: Metrics of the last logged step.
        stop: Records a signal that asks the run to stop.
        is_stopping: Whether the run stops once the present step is saved, because of a signal.
        is_save_due: Whether the present step is saved because of ``save_strategy``, and not of a signal alone.
    """

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer
        self.mask_metrics: dict[str, float] = {}
        self.stop = StopRequest()
        # Tensors on the device, read once per optimizer step: reading one makes the host wait for a GPU.
        # None: none seen yet.
        self._loss_is_finite: torch.Tensor | None = None
        self._gradient_is_finite: torch.Tensor | None = None
        # Layers and their removed entries before a step that is logged.
        self._before: list[tuple[MaskedLinear, torch.Tensor]] = []
        # Handle of the hook on the embeddings.
        self._undo = None
        self.is_stopping = False
        self.is_save_due = False
        # What the last step of an epoch left to its end: to log, to evaluate, to save.
        self._left_to_epoch_end = (False, False, False)

    def see_loss(self, loss: torch.Tensor) -> None:
        """Note whether the loss of a micro-batch is finite."""
        is_finite = torch.isfinite(loss)
        # Not with a True from the CPU: the host would wait for the device to copy it there.
        if self._loss_is_finite is not None:
            is_finite = is_finite & self._loss_is_finite
        self._loss_is_finite = is_finite

    def see_gradient_norm(self, norm: torch.Tensor | float) -> None:
        """Note whether the norm of all gradients, before clipping, is finite.

        Training cannot continue with a norm of inf either: clipping divides by it, so all gradients would be 0.
        """
        if self.trainer.accelerator.scaler is not None:
            # float16 gradients overflow now and then, and the scaler skips such a step itself.
            return
        # Once per optimizer step: the Trainer computes it after the backward passes, before on_pre_optimizer_step.
        norm = torch.as_tensor(norm).detach()
        if hasattr(norm, "full_tensor"):
            # FSDP2 gives each process a part of the norm.
            norm = norm.full_tensor()
        self._gradient_is_finite = torch.isfinite(norm)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Check that a step will be measured; restore the counters of the log; add the hook on the embeddings."""
        _check_eval_delay(args, state, kwargs["train_dataloader"])
        # The Trainer has reset its counters just before this event, so they are restored here.
        self.trainer.resume_counts()
        is_reentrant = is_checkpointing_reentrant(args.gradient_checkpointing_kwargs)
        if args.gradient_checkpointing and not is_reentrant:
            whole = self.trainer.accelerator.unwrap_model(model)
            self._undo = stop_gradient_at_frozen_embeddings(whole)

    def on_train_end(self, args, state, control, **kwargs):
        """Remove the hook on the embeddings; stop if a signal came after the last step and that step is saved."""
        if self._undo is not None:
            self._undo.remove()

        # A signal that came after on_pre_optimizer_step of the last step, for example during the last evaluation. A
        # launcher may have sent it to some of the processes only; all must decide the same.
        is_asked_to_stop = torch.tensor(self.stop.signal is not None, device=args.device)
        is_asked_to_stop = processes.largest(is_asked_to_stop)
        last = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        can_resume = last.is_dir() and not args.save_only_model
        if is_asked_to_stop and can_resume:
            self._stop(state)

    def on_pre_optimizer_step(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        """Stop before a loss or gradient that is not finite is applied, or if a process received a signal."""
        assert self._loss_is_finite is not None
        bad_loss = ~self._loss_is_finite
        # No norm is seen without clipping, and with the scaler of float16.
        bad_gradient = torch.zeros_like(bad_loss)
        if self._gradient_is_finite is not None:
            bad_gradient = ~self._gradient_is_finite.to(bad_loss.device)
        self._loss_is_finite = None
        self._gradient_is_finite = None

        # All processes must decide the same, or the others would wait for the one that stopped. The number of the
        # last of these that holds in any process, counted from 1; 0 if none does.
        is_asked_to_stop = torch.full_like(bad_loss, self.stop.signal is not None)
        verdict = processes.largest(is_asked_to_stop, bad_gradient, bad_loss)
        if verdict == 3:
            raise NotFiniteError("loss is not finite")
        if verdict == 2:
            raise NotFiniteError("gradient is not finite")
        self.is_stopping = verdict == 1

        # Only before steps that are logged: a comparison of masks makes the host wait for a GPU.
        if self._is_logged(args, state, train_dataloader):
            self._before = []
            for layer in adapter_layers(model, ADAPTER).values():
                removed = layer.masker.removed(ADAPTER)
                self._before.append((layer, removed))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Save the model before the first step, which may remain the best."""
        # The Trainer never chooses it, even if every step made the model worse.
        metrics = metrics or {}
        loss = metrics.get(args.metric_for_best_model, math.nan)
        is_start = state.global_step == 0
        if is_start and args.load_best_model_at_end and math.isfinite(loss):
            state.best_metric = loss
            state.best_model_checkpoint = str(Path(args.output_dir) / "checkpoint-0")
            self.trainer.save_start()

    def on_step_end(self, args, state, control, **kwargs):
        """Store the number of tokens in the trainer's state, which checkpoints hold; save before stopping."""
        state.num_input_tokens_seen = int(self.trainer._total_train_tokens)
        # The model of the last step may be saved without being measured.
        if state.global_step >= state.max_steps:
            self.trainer.take_averaged_weights()
        # A checkpoint of the last step of an epoch would not have the line of the log and the measurement that are due
        # at the end of the epoch, and a run that is resumed from it begins the next epoch: all is done at that end.
        is_end_of_epoch = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        if is_end_of_epoch:
            self._left_to_epoch_end = (control.should_log, control.should_evaluate, control.should_save)
            control.should_log = False
            control.should_evaluate = False
            control.should_save = False
        else:
            self._save_before_stopping(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Do what the last step left to the end of its epoch, beside what is due at that end."""
        should_log, should_evaluate, should_save = self._left_to_epoch_end
        self._left_to_epoch_end = (False, False, False)
        control.should_log = control.should_log or should_log
        control.should_evaluate = control.should_evaluate or should_evaluate
        control.should_save = control.should_save or should_save
        # With save_strategy best no step is saved that was not measured, and a finished run would be trained again.
        is_last = state.global_step >= state.max_steps
        if args.save_strategy == "best" and is_last and not args.save_only_model:
            control.should_save = True
        self._save_before_stopping(control)

    def _save_before_stopping(self, control) -> None:
        # Beside the steps of save_strategy, which DefaultFlowCallback has chosen before.
        self.is_save_due = control.should_save
        if self.is_stopping:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        """Stop once the step during which a signal came is saved."""
        if self.is_stopping:
            self._stop(state, args.save_only_model)

    def _stop(self, state, is_lost=False):
        """End the run.

        Args:
            state: The trainer's state.
            is_lost: Whether it cannot be resumed, because its checkpoints hold the model only.
        """
        # A launcher ends all processes when one of them has ended.
        self.trainer.accelerator.wait_for_everyone()
        # Another process may have received the signal, and this one none.
        number = self.stop.signal or signal.SIGTERM
        if is_lost:
            # Stopped would print how to resume.
            raise KeyboardInterrupt(number)

        name = signal.Signals(number).name
        step = state.global_step
        raise Stopped(number, f"stopped by {name} after step {step} of {state.max_steps}, which is saved")

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Count flipped and removed mask entries."""
        if not self._before:
            return
        # Under FSDP masks are otherwise refreshed by the next forward pass.
        refresh_masks(model)

        flips = 0
        removed = 0
        numel = 0
        with torch.no_grad():
            for layer, before in self._before:
                after = layer.masker.removed(ADAPTER)
                num_flipped = torch.count_nonzero(after ^ before)
                flips += int(num_flipped)
                removed += int(after.sum())
                numel += after.numel()

        # A process that holds some rows counts these alone.
        first_layer, _ = self._before[0]
        has_all_rows = not is_sharded(first_layer.weight)
        if not has_all_rows:
            counts = torch.tensor([flips, removed, numel], device=after.device)
            counts = processes.reduce_(counts)
            flips, removed, numel = counts.tolist()

        # The share of a top-k mask is known, and among the counted entries are weights that are zero in the base.
        config = first_layer.mask_configs[ADAPTER]
        removed_share = removed / numel
        if config.selection == "topk" and has_all_rows:
            removed_share = current_sparsity(config)
        self.mask_metrics = {
            "mask_removed_share": removed_share,
            "mask_flips_per_step": flips,
        }
        self._before = []

    @staticmethod
    def _is_logged(args, state, train_dataloader) -> bool:
        """Whether the Trainer logs the step that is about to be taken."""
        # As DefaultFlowCallback decides after the step.
        next_step = state.global_step + 1
        if args.logging_first_step and next_step == 1:
            return True
        if args.logging_strategy == IntervalStrategy.NO:
            return False
        if args.logging_strategy == IntervalStrategy.EPOCH:
            return next_step % _steps_of_epoch(args, train_dataloader) == 0 or next_step >= state.max_steps
        # The state has the steps that a logging_steps below 1 means.
        every = max(int(state.logging_steps or 1), 1)
        return next_step % every == 0


def _steps_of_epoch(args, train_dataloader) -> int:
    """Optimizer steps of an epoch; the last one may have fewer batches."""
    return math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)


def _check_eval_delay(args, state, train_dataloader) -> None:
    """Raise if evaluations begin after the end: the start would be the best checkpoint, whatever was learned."""
    if not args.load_best_model_at_end:
        return
    unit = "steps"
    end = state.max_steps
    if args.eval_strategy == IntervalStrategy.EPOCH:
        unit = "epochs"
        # state.num_train_epochs is rounded up, and max_steps may end the run inside an epoch.
        end = state.max_steps / _steps_of_epoch(args, train_dataloader)
    if args.eval_delay > end:
        raise UserError(
            f"eval_delay is {args.eval_delay:g}, and the run has {end:g} {unit}: nothing that it learns would be "
            "measured, and the start would be kept; lower eval_delay, or give --load_best_model_at_end false"
        )


def is_checkpointing_reentrant(options: Mapping[str, Any] | None) -> bool:
    """Whether gradient checkpointing is reentrant with these ``gradient_checkpointing_kwargs``."""
    options = options or {}
    # TRL's selective checkpointing is never reentrant.
    if options.get("selective"):
        return False

    # transformers and TRL take these three, and torch.utils.checkpoint gets the others. If there are none, transformers
    # passes use_reentrant=False. If there are some, its default is torch's: None, which means true.
    of_torch = options.keys() - {"every_n_layers", "offload", "selective"}
    if not of_torch:
        return False
    return options.get("use_reentrant") is not False


def stop_gradient_at_frozen_embeddings(model):
    """Detach the output of frozen embeddings, which TRL and transformers let require a gradient for checkpointing.

    Only reentrant checkpointing needs that gradient, and it sends the backward pass through the frozen layers below the
    mask.

    Returns:
        The handle of the hook.
    """

    def stop(module, args, output):
        # Looked up in every pass: full fine-tuning trains them, and an adapter may.
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        if is_trained:
            return output
        return output.detach()

    embeddings = model.get_input_embeddings()
    return embeddings.register_forward_hook(stop)
