"""What happens around the steps of training: checks of every step, loss without the mask, the last model."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainerCallback
from trl import SFTTrainer

from maskft_common import processes
from maskft_common.errors import NotFiniteError, Stopped

from ..fsdp import is_sharded, refresh_masks
from ..loss import RowLoss, mean_nll
from ..tuner import MaskedLinear
from ..tuner.model import adapter_layers
from ..tuner.selection import current_sparsity
from .checkpoints import save_final
from .method_arguments import ADAPTER
from .stopping import StopRequest


class KeepLast(TrainerCallback):
    """Saves the model as the last step left it, before the best checkpoint replaces it."""

    def __init__(self, trainer: SFTTrainer, folder: Path):
        self.trainer = trainer
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        """Save after the last step."""
        if state.global_step >= state.max_steps:
            if processes.is_main():  # first, for the card of a mask names its tokenizer
                self.trainer.processing_class.save_pretrained(self.folder)
            save_final(self.trainer.model, self.folder, trainer=self.trainer)

    on_train_begin = on_step_end  # of a run that is resumed after its last step, and takes none


class Reference(TrainerCallback):
    """Measures held-out loss without the mask, which the mask has to beat, before the first step.

    By then the model is spread over the processes.

    Attributes:
        losses: Of the held-out rows; None where they are not measured.
    """

    def __init__(self, trainer: SFTTrainer, console: Console):
        self.trainer = trainer
        self.console = console
        self.losses: list[RowLoss] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure."""
        if args.eval_strategy == "no":
            return
        with self.trainer.accelerator.unwrap_model(self.trainer.model).disable_adapter():
            self.losses = self.trainer.measure_heldout()
        self.console.print(f"  held-out loss without the mask {mean_nll(self.losses):.4f}", highlight=False)


class StepGuard(TrainerCallback):
    """Checks every step just before and after the optimizer: is it finite, how many mask entries flipped?

    Attributes:
        mask_metrics: Of the last step that is logged.
        stop: Whether a signal asks the run to stop.
    """

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer
        self.mask_metrics: dict[str, float] = {}
        self.stop = StopRequest()
        self._loss_is_finite = torch.tensor(True)
        self._gradient_is_finite = torch.tensor(True)
        self._before: list[tuple[MaskedLinear, torch.Tensor]] = []
        self._undo = None
        self._is_stopping = False

    def see_loss(self, loss: torch.Tensor) -> None:
        """Note whether the loss of a micro-batch is finite."""
        self._loss_is_finite = torch.isfinite(loss) & self._loss_is_finite.to(loss.device)

    def see_gradient_norm(self, norm: torch.Tensor | float) -> None:
        """Note whether the norm of all gradients is finite, as it was before clipping.

        A norm of inf is none to continue with either: clipping divides by it, so all gradients would be 0.
        """
        # float16 gradients overflow now and then; the scaler skips such a step itself.
        if self.trainer.accelerator.scaler is None:
            norm = torch.as_tensor(norm).detach()
            if hasattr(norm, "full_tensor"):  # FSDP2 gives a part of it to each process
                norm = norm.full_tensor()
            self._gradient_is_finite = torch.isfinite(norm)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Resume the counts of the log; add the hook on the embeddings."""
        self.trainer.resume_counts()
        if args.gradient_checkpointing and not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            self._undo = stop_gradient_at_frozen_embeddings(self.trainer.accelerator.unwrap_model(model))

    def on_train_end(self, args, state, control, **kwargs):
        """Remove the hook on the embeddings; stop where a signal came after the last step and that step is saved."""
        if self._undo is not None:
            self._undo.remove()
        is_asked_to_stop = torch.tensor(self.stop.signal is not None, device=args.device)
        last = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if processes.largest(is_asked_to_stop) and last.is_dir() and not args.save_only_model:  # it could not resume
            self._stop(state)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Stop before a loss or gradient that is not finite is applied; ask all processes for a signal."""
        bad_loss = ~self._loss_is_finite
        bad_gradient = ~self._gradient_is_finite.to(bad_loss.device)
        self._loss_is_finite = torch.tensor(True)
        self._gradient_is_finite = torch.tensor(True)
        # The same verdict in every process, or the others would wait for the one that stopped.
        is_asked_to_stop = torch.full_like(bad_loss, self.stop.signal is not None)
        verdict = processes.largest(is_asked_to_stop, bad_gradient, bad_loss)
        if verdict > 1:
            raise NotFiniteError(f"{('gradient', 'loss')[verdict - 2]} is not finite")
        self._is_stopping = verdict == 1
        if self._is_logged(args, state):
            layers = adapter_layers(model, ADAPTER).values()
            self._before = [(layer, layer.masker.removed(ADAPTER)) for layer in layers]

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Save the start, which may stay the best."""
        # The Trainer would not take the start for the best, also when every step made it worse.
        loss = (metrics or {}).get(args.metric_for_best_model, math.nan)
        if state.global_step == 0 and args.load_best_model_at_end and math.isfinite(loss):
            state.best_metric = loss
            state.best_model_checkpoint = str(Path(args.output_dir) / "checkpoint-0")
            self.trainer.save_start()

    def on_step_end(self, args, state, control, **kwargs):
        """Keep the number of tokens where checkpoints keep it; save before stopping."""
        state.num_input_tokens_seen = int(self.trainer._total_train_tokens)
        control.should_save = control.should_save or self._is_stopping

    def on_save(self, args, state, control, **kwargs):
        """Stop after the step that a signal interrupted is saved."""
        if self._is_stopping:
            self._stop(state, args.save_only_model)

    def _stop(self, state, is_lost=False):
        self.trainer.accelerator.wait_for_everyone()  # a launcher ends the others when one has ended
        asked = self.stop.signal or signal.SIGTERM
        if is_lost:
            raise KeyboardInterrupt(asked)  # without the promise that it can be resumed
        name = signal.Signals(asked).name
        raise Stopped(asked, f"stopped by {name} after step {state.global_step} of {state.max_steps}, which is saved")

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Count flipped and removed mask entries."""
        if not self._before:
            return
        refresh_masks(model)
        flips = 0
        removed = 0
        numel = 0
        with torch.no_grad():
            for layer, before in self._before:
                after = layer.masker.removed(ADAPTER)
                flips += int(torch.count_nonzero(after ^ before))
                removed += int(after.sum())
                numel += after.numel()
        layer = self._before[0][0]
        if is_sharded(layer.weight):  # counted on this rank's rows
            counts = torch.tensor([flips, removed, numel], device=after.device)
            flips, removed, numel = processes.reduce_(counts).tolist()
        config = layer.mask_configs[ADAPTER]
        is_exact = config.selection == "topk" and not is_sharded(layer.weight)
        self.mask_metrics = {
            "mask_removed_share": current_sparsity(config) if is_exact else removed / numel,
            "mask_flips_per_step": flips,
        }
        self._before = []

    @staticmethod
    def _is_logged(args, state) -> bool:
        every = max(int(state.logging_steps or 1), 1)
        return (state.global_step + 1) % every == 0 or (args.logging_first_step and state.global_step == 0)


def stop_gradient_at_frozen_embeddings(model):
    """Undo what TRL and transformers do to a checkpointed model: let its embeddings require a gradient.

    Only reentrant checkpointing needs that, and it sends the backward pass through the frozen layers below the mask.
    Returns the handle of the hook.
    """

    def stop(module, args, output):
        return output if any(p.requires_grad for p in module.parameters()) else output.detach()

    return model.get_input_embeddings().register_forward_hook(stop)
