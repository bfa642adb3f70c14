"""TRL's trainers with what a mask needs: looks at every step, and processes that agree on what they save."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_model
from trl import SFTTrainer

from maskft_base import files, runtime
from maskft_base.errors import NotFiniteError, UserError
from maskft_base.runtime import peak_memory_bytes
from maskft_lab.evaluation.during_training import TrainingEvaluation

from ..data import IGNORED
from ..tuner import MaskConfig, MaskProgress, set_mask_progress
from ..tuner.card import hub_name
from .callbacks import StepGuard
from .checkpoints import Checkpoints, agreed_masks, lost_best, step_of, trainable_state, written_whole
from .launch import let_cpu_shard
from .manifest import damage
from .masked_start import RemovedStayZero
from .method_arguments import ADAPTER
from .stopping import StopRequest


class MaskTrainer:
    """Before one of TRL's trainers: stops before a non-finite step, logs speed, memory and what the mask did.

    Attributes:
        meter: Measures held-out rows where that is not the loss on their answers, see :mod:`.objectives`.
    """

    meter = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss_is_finite = torch.tensor(True)
        self._window = (time.perf_counter(), 0)
        self.mask_metrics: dict[str, float] = {}
        self.task_evaluation: TrainingEvaluation | None = None
        self.stay_zero: RemovedStayZero | None = None
        self.checkpoints: Checkpoints | None = None
        self.stop = StopRequest()
        self.lost_best: str | None = None
        self._eval_nll, self._eval_tokens = 0.0, 0
        self.add_callback(MaskProgress())
        self.add_callback(StepGuard(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, also for FSDP on CPUs."""
        let_cpu_shard()
        super().create_accelerator_and_postprocess()

    def _clip_grad_norm(self, model):
        if self.stay_zero is not None:
            self.stay_zero.clear_gradients()
        return super()._clip_grad_norm(model)

    def training_step(self, *args, **kwargs):
        """One micro-batch; its loss is looked at once per optimizer step, so that a GPU is not made to wait."""
        loss = super().training_step(*args, **kwargs)
        self._loss_is_finite = torch.isfinite(loss.detach()) & self._loss_is_finite.to(loss.device)
        return loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Loss of one batch, and how many tokens it is the mean of."""
        num_tokens = self._hide_repeated_rows(inputs) if "labels" in inputs else 0
        loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and num_tokens:
            self._eval_nll += float(loss) * num_tokens
            self._eval_tokens += num_tokens
        return loss, *rest

    def _hide_repeated_rows(self, inputs: dict) -> int:
        """Take the labels off rows that only fill the last batch; returns the number of tokens that count.

        Where processes share the rows, accelerate fills each one's last batch with rows from the start. Of the rows of
        that batch of all processes, in their order, the first ``remainder`` are new: what ``gather_for_metrics`` keeps.
        """
        labels_BT, state = inputs["labels"], self.accelerator.gradient_state
        if self.accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0:
            if "cu_seq_lens_q" in inputs:  # padding_free: one sequence of all rows, each counting its positions from 0
                row_BT, num_rows = (inputs["position_ids"] == 0).cumsum(-1) - 1, self.args.eval_batch_size
            else:
                row_BT, num_rows = torch.arange(len(labels_BT), device=labels_BT.device)[:, None], len(labels_BT)
            is_new_BT = row_BT + self.accelerator.process_index * num_rows < state.remainder
            if not is_new_BT.any():
                return 0  # the loss of nothing would be no number; this one is not counted
            inputs["labels"] = labels_BT = labels_BT.masked_fill(~is_new_BT, IGNORED)
        return int((labels_BT[..., 1:] != IGNORED).sum())

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Take the loss over tokens, and add the metrics of generated answers; both are logged and can choose the best.

        The mean of the batches' means, which transformers takes, depends on which rows share a batch.
        """
        self._eval_nll, self._eval_tokens = 0.0, 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        device = self.args.device if runtime.num_processes() > 1 else "cpu"
        sums = torch.tensor([self._eval_nll, self._eval_tokens], dtype=torch.float64, device=device)
        nll, num_tokens = runtime.reduce_(sums).tolist()
        if num_tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = nll / num_tokens
        return self._with_task_metrics(output, metric_key_prefix)

    def _with_task_metrics(self, output, metric_key_prefix: str):
        if self.task_evaluation and metric_key_prefix == "eval":
            with self.compute_loss_context_manager():
                values = self.task_evaluation.measure(self.accelerator.unwrap_model(self.model), self.processing_class)
            # Another batch size on another process may round another way; all must choose the same best.
            values = runtime.gather({f"eval_{name}": value for name, value in values.items()})[0]
            output.metrics.update(values)
        return output

    def _run_epoch(self, *args, **kwargs):
        """Train nothing when resumed from the checkpoint of the last step; transformers would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from, trial):
        done = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from, trial)
        if resume_from is not None and self.checkpoints is not None:
            self.state.best_model_checkpoint = self.checkpoints.best  # where the folder is now
            if self.checkpoints.best is None:
                self.state.best_metric = self.state.best_global_step = None
        return done

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint whole; its manifest, which is written last, says that it is."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.checkpoints is not None:
            self.checkpoints.finish()  # which deletes what is not kept, and must not see this one
        if self.args.should_save:
            (folder / files.MANIFEST).unlink(missing_ok=True)  # of one of the same step, which is written over
        with written_whole(folder, "its state", 2**20):
            super()._save_checkpoint(model, trial)
            self._save_loss_since_log(folder)
            if self.checkpoints is not None:
                self.checkpoints.seal(self, folder)

    def _save_loss_since_log(self, folder: Path) -> None:
        """Keep what the next line of the log is the mean of: transformers would begin at the checkpoint."""
        sums = runtime.reduce_(self._tr_loss.detach().double().clone()) / runtime.num_processes()
        if runtime.is_main():
            content = {"loss": sums.item(), "step": self._globalstep_last_logged}
            files.write_text(folder / files.LOGGED, json.dumps(content) + "\n")

    def resume_log(self) -> None:
        """Go on from what was kept of the loss since the last line of the log."""
        checkpoint = None if self.checkpoints is None else self.checkpoints.resume_from
        if checkpoint is not None and (Path(checkpoint) / files.LOGGED).is_file():
            kept = files.read_json(Path(checkpoint) / files.LOGGED)
            self._tr_loss.fill_(kept["loss"])
            self._globalstep_last_logged = kept["step"]

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
            self._write_optimizer_and_scheduler(output_dir)

    def _write_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled and not self.optimizer.state:
            # Before the first step torch would take a step of nothing to have a state to save, and count it.
            save_fsdp_model(
                self.accelerator.state.fsdp_plugin, self.accelerator, self.model, output_dir, adapter_only=True
            )
            return
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.checkpoints is None or not self.checkpoints.changed:
            return
        # The saved state holds the options of before; those that were allowed to change are to count.
        for group, asked in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(asked)
        schedule = self.lr_scheduler
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            shares = [share(schedule.last_epoch) for share in schedule.lr_lambdas]
            schedule._last_lr = [rate * share for rate, share in zip(schedule.base_lrs, shares, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate

    def _load_best_model(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.finish()
        self.accelerator.wait_for_everyone()  # the main process may still be writing it
        best = self.state.best_model_checkpoint
        problem = runtime.decided_by_main(lambda: damage(Path(best), weights_only=True))
        if problem is not None and self.checkpoints is not None:
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
            seconds = now - self._window[0]
            if tokens:  # GRPO counts answers
                logs["tokens_per_s"] = round((tokens - self._window[1]) / max(seconds, 1e-9), 1)
            logs["peak_memory_bytes"] = peak_memory_bytes()
            logs.update(self.mask_metrics)
            self._window = (now, tokens)
        elif "eval_loss" in logs and self.lr_scheduler is not None:
            logs["learning_rate"] = (
                self._get_learning_rate()
            )  # that of the next step, from which a schedule may be continued
        super().log(logs, start_time)


class MaskSFTTrainer(MaskTrainer, SFTTrainer):
    """Supervised fine-tuning."""


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
