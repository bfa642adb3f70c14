"""TRL's SFTTrainer with what a mask needs: looks at every step, and processes that agree on what they save."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_model
from rich.console import Console
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from .. import runtime
from ..data import IGNORED
from ..errors import NotFiniteError, UserError
from ..evaluation.during_training import TrainingEvaluation
from ..runtime import peak_memory_bytes
from ..tuner import MaskConfig, MaskLayer
from ..tuner.model import current_mask_fingerprint, refresh_masks
from ..tuner.sharded import is_sharded
from . import launch_checks

ADAPTER = "default"


class MaskSFTTrainer(SFTTrainer):
    """SFTTrainer that stops before a non-finite step and logs speed, memory and what the mask did."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss_is_finite = torch.tensor(True)
        self._window = (time.perf_counter(), 0)
        self.mask_metrics: dict[str, float] = {}
        self.task_evaluation: TrainingEvaluation | None = None
        self._eval_nll, self._eval_tokens = 0.0, 0
        self.add_callback(_StepGuard(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, also for FSDP on CPUs."""
        launch_checks.let_cpu_shard()
        super().create_accelerator_and_postprocess()

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

        Where processes share the rows, accelerate gives each a whole last batch and begins anew for it. Of the rows of
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
        if self.task_evaluation and metric_key_prefix == "eval":
            with self.compute_loss_context_manager():
                values = self.task_evaluation.measure(self.accelerator.unwrap_model(self.model), self.processing_class)
            # Another batch size on another process may round another way; all must choose the same best.
            values = runtime.gather({f"eval_{name}": value for name, value in values.items()})[0]
            output.metrics.update(values)
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights or adapter; the masks of all processes must be the same, and the saved ones must be theirs."""
        with _agreed_masks(self.model):
            if self.is_fsdp_enabled:
                self._save(output_dir, state_dict=trainable_state(self.model))
            else:
                super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled and not self.optimizer.state:
            # Before the first step torch would take a step of nothing to have a state to save, and count it.
            save_fsdp_model(
                self.accelerator.state.fsdp_plugin, self.accelerator, self.model, output_dir, adapter_only=True
            )
            return
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_best_model(self) -> None:
        self.accelerator.wait_for_everyone()  # the main process may still be writing it
        super()._load_best_model()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens/s, peak memory and mask metrics to what TRL logs."""
        if "loss" in logs:
            now, tokens = time.perf_counter(), int(self._total_train_tokens)
            seconds = now - self._window[0]
            logs["tokens_per_s"] = round((tokens - self._window[1]) / max(seconds, 1e-9), 1)
            logs["peak_memory_bytes"] = peak_memory_bytes()
            logs.update(self.mask_metrics)
            self._window = (now, tokens)
        elif "eval_loss" in logs and self.lr_scheduler is not None:
            logs["learning_rate"] = self._get_learning_rate()  # that of the next step: where a schedule may go on from
        super().log(logs, start_time)


class _StepGuard(TrainerCallback):
    """Looks at every step just before and after the optimizer: finite? how many mask bits flipped?"""

    def __init__(self, trainer: MaskSFTTrainer):
        self.trainer = trainer
        self._before: list[tuple[MaskLayer, torch.Tensor]] = []
        self._undo = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # TRL starts to count anew when training is resumed; transformers' own count travels with the checkpoints.
        self.trainer._total_train_tokens = state.num_input_tokens_seen
        self.trainer._window = (time.perf_counter(), state.num_input_tokens_seen)
        for layer in self._layers(model):
            layer._raw_gradient.clear()  # of a run that was interrupted between two micro-batches
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "mask_scores" in name and parameter.dtype != torch.float32:
                raise UserError(f"{name} is {parameter.dtype}; scores must be float32, masks are ranked in it")
        if runtime.num_processes() > 1:
            agreed_mask_fingerprint(model)

        if args.gradient_checkpointing and not is_reentrant(args):
            self._undo = stop_gradient_at_frozen_embeddings(self.trainer.accelerator.unwrap_model(model))

    def on_train_end(self, args, state, control, **kwargs):
        if self._undo is not None:
            self._undo.remove()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        bad_loss = ~self.trainer._loss_is_finite
        self.trainer._loss_is_finite = torch.tensor(True)
        for layer in self._layers(model):
            if layer._raw_gradient:
                raise RuntimeError("an accumulated mask gradient was not handed to the optimizer")
        bad_gradient = torch.zeros_like(bad_loss)
        # float16 gradients overflow now and then; the scaler skips such a step itself.
        if self.trainer.accelerator.scaler is None:
            # One sum over all gradients, so that a GPU is asked once; NaN and inf both survive adding.
            total = sum(_local(p.grad).sum(dtype=torch.float32) for p in model.parameters() if p.grad is not None)
            bad_gradient = ~torch.isfinite(torch.as_tensor(total, device=bad_loss.device))
        # The same verdict in every process, or the others would wait for the one that stopped.
        verdict = runtime.largest(bad_gradient, bad_loss)
        if verdict:
            raise NotFiniteError(f"{('gradient', 'loss')[verdict - 1]} is not finite")
        if self._is_logged(args, state):
            self._before = [(m, m._effective == 0) for m in self._layers(model) if m._effective is not None]

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        # The Trainer would not take the start for the best, also when every step made it worse.
        loss = (metrics or {}).get(args.metric_for_best_model, math.nan)
        if state.global_step == 0 and args.load_best_model_at_end and math.isfinite(loss):
            state.best_metric = loss
            state.best_model_checkpoint = str(Path(args.output_dir) / "checkpoint-0")
            self.trainer._save_checkpoint(self.trainer.model, trial=None)

    def on_step_end(self, args, state, control, **kwargs):
        state.num_input_tokens_seen = int(self.trainer._total_train_tokens)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        layers = self._layers(model)
        if self._is_logged(args, state) and layers and layers[0].sharded_weight is not None:
            self.trainer.mask_metrics = _sharded_mask_metrics(model, layers)
        if not self._before:
            return
        flips, removed, numel = 0, 0, 0
        with torch.no_grad():
            for layer, before in self._before:
                after = layer.effective_weight(layer._effective.dtype) == 0
                flips += int(torch.count_nonzero(after ^ before))
                removed += (
                    int((~layer.get_mask(ADAPTER)).sum()) if layer.mask_configs[ADAPTER].selection != "topk" else 0
                )
                numel += after.numel()
        config = self._before[0][0].mask_configs[ADAPTER]
        self.trainer.mask_metrics = {
            "mask_removed_share": config.sparsity if config.selection == "topk" else removed / numel,
            "mask_flips_per_step": flips,
        }
        self._before = []

    @staticmethod
    def _is_logged(args, state) -> bool:
        every = max(int(state.logging_steps or 1), 1)
        return (state.global_step + 1) % every == 0

    @staticmethod
    def _layers(model):
        return [m for m in model.modules() if isinstance(m, MaskLayer) and ADAPTER in m.mask_scores]


def is_reentrant(args: SFTConfig) -> bool:
    """Whether gradient checkpointing is the older kind, which needs inputs that require a gradient."""
    return bool((args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))


def stop_gradient_at_frozen_embeddings(model):
    """Undo what TRL and transformers do to a checkpointed model: let its embeddings require a gradient.

    Only reentrant checkpointing needs that, and it sends the backward pass through the frozen layers below the mask.
    Returns the handle of the hook.
    """

    def stop(module, args, output):
        return output if any(p.requires_grad for p in module.parameters()) else output.detach()

    return model.get_input_embeddings().register_forward_hook(stop)


class KeepLast(TrainerCallback):
    """Saves the model as the last step left it, before the best checkpoint replaces it."""

    def __init__(self, trainer: MaskSFTTrainer, folder: Path, tokenizer):
        self.trainer, self.folder, self.tokenizer = trainer, folder, tokenizer

    def on_step_end(self, args, state, control, **kwargs):
        """Save after the last step."""
        if state.global_step >= state.max_steps:
            config = getattr(self.trainer.model, "peft_config", {}).get(ADAPTER)
            if isinstance(config, MaskConfig):
                config.save_scores = False
            save_weights(self.trainer, self.folder)
            if isinstance(config, MaskConfig):
                config.save_scores = True  # the last checkpoint follows, and training may be resumed from it
            if runtime.is_main():
                self.tokenizer.save_pretrained(self.folder)


class Reference(TrainerCallback):
    """Measures held-out loss without the mask once the model is spread over the processes, before the first step."""

    def __init__(self, trainer: MaskSFTTrainer, console: Console):
        self.trainer, self.console = trainer, console
        self.loss: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure."""
        self.loss = _unmasked_loss(self.trainer, self.console)


def _unmasked_loss(trainer, console: Console) -> float | None:
    """Held-out loss of the model without the mask: what the mask has to beat."""
    if trainer.eval_dataset is None or trainer.args.eval_strategy == "no":
        return None
    # Not evaluate(): its callbacks would log a metric of another model, before they are told where to log.
    with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
        output = trainer.evaluation_loop(
            trainer.get_eval_dataloader(), "unmasked", prediction_loss_only=True, metric_key_prefix="unmasked"
        )
    trainer._metrics["eval"].clear()
    loss = output.metrics["unmasked_loss"]
    console.print(f"  held-out loss without the mask {loss:.4f}", highlight=False)
    return loss


def save_weights(trainer: MaskSFTTrainer, folder: str | Path) -> None:
    """Write weights or adapter from the main process; all processes must call it."""
    with _agreed_masks(trainer.model):
        if trainer.is_fsdp_enabled:
            state = trainable_state(trainer.model)
            if runtime.is_main():
                trainer.model.save_pretrained(folder, state_dict=state)
        elif runtime.is_main():
            trainer.model.save_pretrained(folder)


@contextmanager
def _agreed_masks(model):
    """Save inside: the masks of all processes must be the same, and the saved ones must be theirs."""
    agreed = agreed_mask_fingerprint(model) if runtime.num_processes() > 1 else None
    yield
    if agreed is not None and runtime.is_main():
        saved = model.peft_config[ADAPTER].mask_sha256
        if saved != agreed:
            raise RuntimeError(f"the saved masks ({saved[:12]}) are not those trained with ({agreed[:12]})")


def trainable_state(model) -> dict[str, torch.Tensor]:
    """What an FSDP2 checkpoint holds, gathered into the memory of the main process; all processes must call it.

    The frozen weights of a model with an adapter are left out.
    """
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=hasattr(model, "peft_config")
    )
    return get_model_state_dict(model, options=options)


def agreed_mask_fingerprint(model) -> str | None:
    """The sha256 of the masks, equal in every process, or None without a mask; all processes must call it.

    Raises:
        UserError: In every process, if the masks differ.
    """
    if not isinstance(getattr(model, "peft_config", {}).get(ADAPTER), MaskConfig):
        return None
    fingerprint = current_mask_fingerprint(model, ADAPTER)
    runtime.check_same({"sha256": fingerprint}, "masks")
    return fingerprint


def _sharded_mask_metrics(model, layers: list[MaskLayer]) -> dict[str, float]:
    """Metrics of masks under FSDP2, counted over all processes; all processes must call it."""
    refresh_masks(model)
    shards = [layer.sharded_weight for layer in layers]
    counts = [(shard.num_flips, int((~shard.mask).sum()), shard.mask.numel()) for shard in shards]
    device = shards[0].original.device
    flips, removed, numel = runtime.reduce_(torch.tensor(counts, device=device).sum(0)).tolist()
    return {"mask_removed_share": removed / numel, "mask_flips_per_step": flips}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that may be spread over processes."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()
