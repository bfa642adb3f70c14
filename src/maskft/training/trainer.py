"""TRL's SFT trainer with what a mask needs: checks at every step, and processes that agree on what they save."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_model
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from maskft_base import files, runtime
from maskft_base.errors import NotFiniteError, UserError

from ..adapter.mask_set import MaskSet
from ..data.prepared import Prepared
from ..loss import HeldoutLoss, mean_nll
from ..tuner import MaskConfig, MaskProgress, set_mask_progress
from ..tuner.card import hub_name
from .arguments import TrainConfig, trainer_arguments
from .callbacks import KeepLast, Reference, StepGuard
from .checkpoints import Checkpoints, agreed_masks, lost_best, step_of, trainable_state, written_whole
from .kl import KLToBase
from .launch import let_cpu_shard
from .manifest import damage
from .masked_start import RemovedStayZero
from .method_arguments import ADAPTER
from .progress import TrainingProgress


class MaskTrainer(SFTTrainer):
    """Stops before a non-finite step, measures the one held-out loss, and logs speed, memory and what the mask did.

    Args:
        model: What to train; its adapter, if any, is :data:`ADAPTER`.
        tokenizer: Its tokenizer.
        data: Tokenised rows.
        config: The run.
        checkpoints: Those of the run.
        console: Where progress is shown.

    Attributes:
        lost_best: Why the best checkpoint could not be loaded; None: it could, or was not to be.
    """

    def __init__(
        self, model, tokenizer, data: Prepared, config: TrainConfig, checkpoints: Checkpoints, console: Console
    ):
        method, training = config.method, config.training
        self.checkpoints = checkpoints
        self.lost_best: str | None = None
        self._kl = KLToBase(model, training.kl_to_base) if training.kl_to_base else None
        self._heldout = data.heldout.select_columns(["input_ids", "labels"])
        self._window = (time.perf_counter(), 0)  # when the last line of the log was written, and tokens by then
        self.guard, self.progress = StepGuard(self), TrainingProgress(console)
        self.stay_zero = RemovedStayZero(MaskSet.from_adapter(method.keep_mask)) if method.keep_mask else None
        self.reference = Reference(self, console) if method.method == "mask" else None
        last = KeepLast(self, Path(training.output_dir) / files.LAST) if method.keep_last else None
        callbacks = (MaskProgress(), self.guard, self.stay_zero, self.progress, last, self.reference)
        super().__init__(
            model=model,
            args=trainer_arguments(training, checkpoints.resume_from is not None),
            processing_class=tokenizer,
            train_dataset=data.train.select_columns(["input_ids", "labels"]),
            eval_dataset=self._heldout,
            callbacks=[callback for callback in callbacks if callback is not None],
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, also for FSDP on CPUs."""
        let_cpu_shard()
        super().create_accelerator_and_postprocess()

    def _send_telemetry(self) -> None:
        """Send TRL's report on the machine only where the user asks for it."""
        if os.environ.get("HF_HUB_DISABLE_TELEMETRY") == "0":
            super()._send_telemetry()

    def _clip_grad_norm(self, model):
        if self.stay_zero is not None:
            self.stay_zero.clear_gradients()
        return super()._clip_grad_norm(model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss and, in training, the term that holds the model near its base."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._kl is None or not model.training:
            return result
        term = self._kl(self.accelerator.unwrap_model(model), inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            term = term * self.accelerator.num_processes  # as TRL's loss
        return (result[0] + term, result[1]) if return_outputs else result + term

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

    def measure_heldout(self) -> float:
        """Nats per token over all held-out rows, under the model as it is."""
        return mean_nll(self.heldout_loss()(self._heldout))

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Measure the held-out rows, one by one; TRL's loss would depend on which rows share a batch."""
        loss = self.measure_heldout()
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_num_tokens": int(self._total_train_tokens)}
        return EvalLoopOutput(None, None, metrics, len(self._heldout))

    def _run_epoch(self, *args, **kwargs):
        """Train nothing when resumed from the checkpoint of the last step; transformers would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from, trial):
        done = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from, trial)
        if resume_from is not None:
            self.state.best_model_checkpoint = self.checkpoints.best  # where the folder is now
            if self.checkpoints.best is None:
                self.state.best_metric = self.state.best_global_step = None
        return done

    def resume_log(self) -> None:
        """Resume the counts of the log: TRL counts tokens from zero, transformers the loss since its last line."""
        self._total_train_tokens = self.state.num_input_tokens_seen
        self._window = (time.perf_counter(), self.state.num_input_tokens_seen)
        checkpoint = self.checkpoints.resume_from
        if checkpoint is not None and (Path(checkpoint) / files.LOGGED).is_file():
            kept = files.read_json(Path(checkpoint) / files.LOGGED)
            self._tr_loss.fill_(kept["loss"])
            self._globalstep_last_logged = kept["step"]

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint whole; its manifest, which is written last, says that it is."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.checkpoints.finish()  # which deletes what is not kept, and must not see this one
        if self.args.should_save:
            (folder / files.MANIFEST).unlink(missing_ok=True)  # of one of the same step, which is written over
        with written_whole(folder, "its state", 2**20):
            super()._save_checkpoint(model, trial)
            self._save_loss_since_log(folder)
            self.checkpoints.seal(self, folder)

    def save_start(self) -> None:
        """Save a checkpoint before the first step."""
        self._save_checkpoint(self.model, trial=None)

    def _save_loss_since_log(self, folder: Path) -> None:
        """Keep what the next line of the log is the mean of: transformers would begin at the checkpoint."""
        sums = runtime.reduce_(self._tr_loss.detach().double().clone()) / runtime.num_processes()
        if runtime.is_main():
            content = {"loss": sums.item(), "step": self._globalstep_last_logged}
            files.write_text(folder / files.LOGGED, json.dumps(content) + "\n")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights or adapter; the masks of all processes must be the same, and the saved ones must be theirs."""
        is_adapter = hasattr(self.model, "peft_config")
        name = files.ADAPTER_WEIGHTS if is_adapter else "model.safetensors"
        num_bytes = _num_bytes(p for p in self.model.parameters() if p.requires_grad or not is_adapter)
        with agreed_masks(self.model), written_whole(Path(output_dir or self.args.output_dir), name, num_bytes):
            if self.is_fsdp_enabled:
                self._save(output_dir, state_dict=trainable_state(self.model))
            else:
                super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        name = "optimizer.bin" if self.is_fsdp_enabled else "optimizer.pt"
        with written_whole(Path(output_dir), name, _num_bytes(m for m in moments if torch.is_tensor(m))):
            if self.is_fsdp_enabled and not self.optimizer.state:
                # Before the first step torch would take a step of nothing to have a state to save, and count it.
                plugin = self.accelerator.state.fsdp_plugin
                save_fsdp_model(plugin, self.accelerator, self.model, output_dir, adapter_only=True)
            else:
                super()._save_optimizer_and_scheduler(output_dir)

    def _load_best_model(self) -> None:
        self.checkpoints.finish()
        self.accelerator.wait_for_everyone()  # the main process may still be writing it
        best = self.state.best_model_checkpoint
        problem = runtime.decided_by_main(lambda: damage(Path(best), weights_only=True))
        if problem is not None:
            lost = lost_best(best, self.state.best_metric, problem)
            self.lost_best = f"{lost}; the last state (step {self.state.global_step})"
            self.state.best_model_checkpoint = None
            return
        super()._load_best_model()
        step = step_of(Path(best))
        set_mask_progress(self.model, step / self.state.max_steps)  # the mask is that of the best step

    def back_to_best(self, error: NotFiniteError) -> str:
        """Load the best checkpoint after a step that could not be taken; returns why it could not, and what there is.

        Raises:
            UserError: If there is no checkpoint yet, or it is damaged.
        """
        reason = (
            f"{error} at step {self.state.global_step + 1}: stopped before the update was applied; lower learning_rate "
            "or check the data"
        )
        if self.state.best_model_checkpoint is None:
            raise UserError(f"{reason}; there was no checkpoint yet") from None
        self._load_best_model()
        if self.lost_best is not None:
            raise UserError(f"{reason}; {self.lost_best}") from None
        return f"{reason}; the best so far (step {step_of(Path(self.state.best_model_checkpoint))})"

    def create_model_card(self, *args, **kwargs) -> None:
        """Not TRL's of a mask, whose lines do not load it (maskft.tuner.card), nor of a base that is on no hub."""
        is_mask = isinstance(getattr(self.model, "peft_config", {}).get(ADAPTER), MaskConfig)
        if not is_mask and hub_name(self.model.config._name_or_path):
            super().create_model_card(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens/s, peak memory and mask metrics to what TRL logs."""
        if "loss" in logs:
            now, tokens = time.perf_counter(), int(self._total_train_tokens)
            logs["tokens_per_s"] = round((tokens - self._window[1]) / max(now - self._window[0], 1e-9), 1)
            logs["peak_memory_bytes"] = runtime.peak_memory_bytes()
            logs.update(self.guard.mask_metrics)
            self._window = (now, tokens)
        elif "eval_loss" in logs and self.lr_scheduler is not None:
            logs["learning_rate"] = self._get_learning_rate()  # of the next step: a schedule may be continued from it
        super().log(logs, start_time)


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
