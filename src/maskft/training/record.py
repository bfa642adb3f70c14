"""``training.json``: what a run did, how it was made, on what data and which machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from maskft_common import environment, files, layout, memory
from maskft_common.files import read_json
from maskft_common.method_options import unused_options
from maskft_common.schema import FileModel, read_model

from ..data.mixtures import hub_ids
from ..data.prepared import Prepared
from ..loss import mean_nll
from ..tuner import adapter_layers
from .arguments import TrainConfig
from .checkpoints import step_of
from .manifest import FREE
from .method_arguments import ADAPTER, MASK_METHODS, UNTRAINED_METHODS
from .near_base import KLReport
from .options import option_defaults
from .trainer import MaskTrainer
from .verdict import Verdict

# Of TRL's hundreds of arguments, those that decide what is learned.
_RECORDED = (
    "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
    "lr_scheduler_type warmup_steps weight_decay max_grad_norm max_length bf16 kl_to_base seed"
).split()
_DERIVED = {"activation_checkpointing", "greater_is_better"}  # from others
# The Trainer's mean over the steps since it was started, divided by all steps: another number where a run was resumed.
_OF_ONE_PROCESS = ("train_loss",)


class TrainingSummary(FileModel):
    """What a run did.

    Attributes:
        method: The method.
        start_loss: Held-out loss in nats per token before the first step; of a mask: without it.
        best_loss: Held-out loss of the best checkpoint, of a mask at the sparsity it was trained with.
        best_step: The step it was saved at.
        end_loss: Held-out loss at the last measurement.
        num_steps: Optimizer steps.
        num_epochs: Passes over the training rows.
        num_train_tokens: Tokens trained on, those without a label included.
        num_trainable: Parameters that were trained.
        num_target_weights: Weights a mask could remove; 0 for other methods.
        train_time_s: Seconds, evaluation included; of a resumed run with those before its checkpoint.
        peak_memory_bytes: Of this process: of the GPU where there is one.
        history: What was logged, a dict per time.
        kl: KL(base || model) of a run with ``kl_to_base`` or ``kl_budget``.
    """

    model_config = ConfigDict(allow_inf_nan=True)  # a diverged run is recorded as well

    method: str
    start_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    end_loss: float | None = None
    num_steps: int = 0
    num_epochs: float = 0.0
    num_train_tokens: int = 0
    num_trainable: int = 0
    num_target_weights: int = 0
    train_time_s: float = 0.0
    peak_memory_bytes: int
    history: list[dict[str, Any]]
    kl: KLReport | None = None


class TrainingRecord(FileModel):
    """Content of ``training.json``.

    Attributes:
        summary: What the run did.
        recipe: How it was trained: what decides the outcome, and every other setting that is not a default.
        data: Counts of rows read, kept and left out.
        environment: Versions and machine.
        verdict: Of a mask: whether it is better than its parent, and whether it was written.
    """

    summary: TrainingSummary
    recipe: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    verdict: Verdict | None = None


def read_record(folder: str | Path) -> TrainingRecord:
    """The record of the run in ``folder``.

    Raises:
        UserError: If the file is not a record.
    """
    file = Path(folder) / layout.TRAINING
    return read_model(TrainingRecord, read_json(file), file)


def make_record(
    config: TrainConfig, summary: TrainingSummary, data: Prepared, verdict: Verdict | None
) -> TrainingRecord:
    """The record of a run."""
    recipe = {"method": config.method.method, "model_name_or_path": config.model.model_name_or_path}
    for group in (config.data, config.mask, config.method):
        for name, spec in type(group).__dataclass_fields__.items():
            value = getattr(group, name)
            if value is not None and value != spec.default and name not in ("prepared_data_dir", "prepare_only"):
                recipe[name] = value
    if datasets := hub_ids(config.data.dataset_name or ""):
        recipe["datasets"] = datasets
    defaults = option_defaults()
    given = vars(config.model) | vars(config.training)
    for name in sorted(given.keys() & defaults.keys() - FREE - _DERIVED):
        if given[name] not in (None, defaults[name]) and isinstance(given[name], str | int | float | list | dict):
            recipe[name] = given[name]
    recipe |= {name: getattr(config.training, name) for name in _RECORDED}

    method = config.method
    is_trained = method.method not in UNTRAINED_METHODS
    is_matched = method.match_adapter is not None
    unused = unused_options(method.method, recipe, is_trained=is_trained, is_matched=is_matched)
    recipe = {name: value for name, value in recipe.items() if name not in unused}
    if is_trained:
        recipe["best_step"] = summary.best_step
    if is_trained or summary.best_loss is not None:
        recipe["best_heldout_loss"] = summary.best_loss
    if verdict is not None:
        recipe["verdict"] = f"{verdict}{'' if verdict.kept else '; so this adapter removes nothing'}"
    return TrainingRecord(
        summary=summary,
        recipe={name: _plain(value) for name, value in recipe.items()},
        data=data.report["counts"],
        environment=environment.environment(),
        verdict=verdict,
    )


def summarise(trainer: MaskTrainer, method: str) -> TrainingSummary:
    """Sum up a run of ``method`` that has ended."""
    state = trainer.state
    model = trainer.model
    without_mask = trainer.reference.losses if trainer.reference else None
    losses = {row["step"]: row["eval_loss"] for row in state.log_history if "eval_loss" in row}
    best_step = next(reversed(losses), None)
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        best_step = step_of(Path(state.best_model_checkpoint))
    layers = adapter_layers(model, ADAPTER) if method in MASK_METHODS else {}
    return TrainingSummary(
        method=method,
        start_loss=mean_nll(without_mask) if without_mask else losses.get(0),
        best_loss=losses.get(best_step),
        best_step=best_step,
        end_loss=next(reversed(losses.values()), None),
        num_steps=state.global_step,
        num_epochs=round(state.epoch or 0.0, 4),
        num_train_tokens=int(trainer._total_train_tokens),
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_target_weights=sum(layer.weight.numel() for layer in layers.values()),
        train_time_s=round(time.perf_counter() - trainer.started, 1),
        peak_memory_bytes=memory.peak_memory_bytes(),
        kl=_kl_report(trainer, best_step),
        history=[{key: value for key, value in row.items() if key not in _OF_ONE_PROCESS} for row in state.log_history],
    )


def _kl_report(trainer: MaskTrainer, best_step: int | None) -> KLReport | None:
    """KL of the kept checkpoint and of the last one, as they were measured; where nothing was, measured now."""
    if trainer.near_base is None:
        return None
    measured = {row["step"]: row["eval_kl"] for row in trainer.state.log_history if "eval_kl" in row}
    if best_step not in measured:
        kl = trainer.measure_kl()
        return trainer.near_base.report(kl, kl, None)
    return trainer.near_base.report(measured[best_step], next(reversed(measured.values())), best_step)


def _plain(value: Any) -> Any:
    """An enum as its value, and a path as its last part: a recipe is shared, folders are not."""
    value = getattr(value, "value", value)
    return Path(value).name if isinstance(value, str) and files.is_there(value) else value
