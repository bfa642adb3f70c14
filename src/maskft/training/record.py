"""``training.json``: results of a run, its settings, its data and its machine."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from maskft_common import environment, files, layout, memory
from maskft_common.files import read_json
from maskft_common.method_options import unused_options
from maskft_common.schema import FileModel, read_model

from ..data.arguments import DATA_NAMES
from ..data.mixtures import hub_ids, rename_sets
from ..data.prepared import Prepared
from ..loss import mean_nll
from ..tuner import adapter_layers
from .arguments import TrainConfig
from .kl_budget import kl_by_step
from .manifest import FREE
from .method_arguments import ADAPTER, MASK_METHODS, UNTRAINED_METHODS
from .near_base import KLReport
from .options import option_defaults
from .trainer import MaskTrainer
from .verdict import Verdict

# The arguments of TRL, among hundreds, that decide the outcome.
_RECORDED = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "bf16",
    "kl_to_base",
    "seed",
)
# Set from other arguments.
_DERIVED = {"activation_checkpointing", "greater_is_better"}
# The Trainer sums the loss since it was started and divides by all steps, so a resumed run has another number.
_DIFFERS_WHEN_RESUMED = ("train_loss",)


class TrainingSummary(FileModel):
    """Results of a run.

    Attributes:
        method: The method.
        start_loss: Held-out loss before the first step, in nats per token; for a mask, of the model without it.
        best_loss: Held-out loss of the best checkpoint; for a mask, at the sparsity of its training.
        best_step: Step of the best checkpoint.
        end_loss: Held-out loss at the last measurement.
        num_steps: Optimizer steps.
        num_epochs: Passes over the training rows.
        num_train_tokens: Tokens of training, including those without a label.
        num_trainable: Number of trainable parameters.
        num_target_weights: Number of weights that a mask can remove; 0 for other methods.
        train_time_s: Seconds, including evaluation and, for a resumed run, the time before its checkpoint.
        peak_memory_bytes: Peak memory of this process; GPU memory if it trained on a GPU.
        history: The log, one dict per entry.
        kl: KL(base || model) of a run with ``kl_to_base`` or ``kl_budget``.
    """

    # A diverged run is recorded too.
    model_config = ConfigDict(allow_inf_nan=True)

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
        summary: Results of the run.
        recipe: Settings that decide the outcome, and every other one that the method uses and that is not a default.
        data: Numbers of rows read, kept and left out.
        environment: Versions and machine.
        verdict: For a mask: whether it is better than its parent, and whether it was written.
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
    config: TrainConfig,
    summary: TrainingSummary,
    data: Prepared,
    verdict: Verdict | None,
) -> TrainingRecord:
    """The record of a run.

    Args:
        config: The run.
        summary: Its results.
        data: Its rows.
        verdict: For a mask, the comparison with its parent.
    """
    recipe = _settings(config)

    # The outcome, for the card of an adapter.
    is_trained = config.method.method not in UNTRAINED_METHODS
    if is_trained:
        recipe["best_step"] = summary.best_step
    # Held-out rows choose among several fixed masks, and then have a loss.
    if is_trained or summary.best_loss is not None:
        recipe["best_heldout_loss"] = summary.best_loss
    if verdict is not None:
        recipe["verdict"] = str(verdict)
        if not verdict.kept:
            recipe["verdict"] += "; so this adapter removes nothing"

    plain_recipe = {name: _plain(value) for name, value in recipe.items()}
    # A mixture names several files.
    for name in DATA_NAMES:
        if name in plain_recipe:
            plain_recipe[name] = rename_sets(plain_recipe[name], files.without_folder)
    return TrainingRecord(
        summary=summary,
        recipe=plain_recipe,
        data=data.report["counts"],
        environment=environment.environment(),
        verdict=verdict,
    )


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Settings that decide the outcome, and every other one that the method uses and that is not a default."""
    settings: dict[str, Any] = {
        "method": config.method.method,
        "model_name_or_path": config.model.model_name_or_path,
    }
    # Our own options, if they were given.
    for group in (config.data, config.mask, config.method):
        for spec in dataclasses.fields(group):
            value = getattr(group, spec.name)
            is_given = value is not None and value != spec.default
            # These say where rows are kept, not which rows they are.
            if is_given and spec.name not in ("prepared_data_dir", "prepare_only"):
                settings[spec.name] = value
    # Their names on the hub, for the card of an adapter: a registered name is one of ours.
    datasets = hub_ids(config.data.dataset_name or "")
    if datasets:
        settings["datasets"] = datasets

    # Of TRL's hundreds of options those that were changed, and in any case those of _RECORDED.
    defaults = option_defaults()
    given = vars(config.model) | vars(config.training)
    not_recorded = FREE | _DERIVED
    for name in sorted(given.keys() & defaults.keys()):
        if name in not_recorded:
            continue
        value = given[name]
        # Not objects that transformers makes of an option, such as its AcceleratorConfig.
        is_plain = isinstance(value, str | int | float | list | dict)
        if value not in (None, defaults[name]) and is_plain:
            settings[name] = value
    for name in _RECORDED:
        settings[name] = getattr(config.training, name)

    # Options that the method does not use would read as if they had had an effect.
    method = config.method.method
    unused = unused_options(
        method,
        settings,
        is_trained=method not in UNTRAINED_METHODS,
        is_matched=config.method.match_adapter is not None,
    )
    return {name: value for name, value in settings.items() if name not in unused}


def summarise(trainer: MaskTrainer, method: str) -> TrainingSummary:
    """Summary of a run of ``method`` that has ended."""
    state = trainer.state
    model = trainer.model
    # Step -> held-out loss, the newest last. The log of a resumed run begins with that of its checkpoint.
    losses = {}
    for row in state.log_history:
        if "eval_loss" in row:
            losses[row["step"]] = row["eval_loss"]

    # Of a mask the loss without it, which is not in the log.
    start_loss = losses.get(0)
    if trainer.reference is not None and trainer.reference.losses:
        start_loss = mean_nll(trainer.reference.losses)

    # Without load_best_model_at_end the model of the last step is kept.
    best_step = trainer.chosen_step
    if best_step is None:
        best_step = next(reversed(losses), None)

    # Under FSDP2, too: the numel of a DTensor is that of the whole tensor.
    num_trainable = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            num_trainable += parameter.numel()
    num_target_weights = 0
    if method in MASK_METHODS:
        for layer in adapter_layers(model, ADAPTER).values():
            num_target_weights += layer.weight.numel()

    history = []
    for row in state.log_history:
        kept = {key: value for key, value in row.items() if key not in _DIFFERS_WHEN_RESUMED}
        history.append(kept)

    return TrainingSummary(
        method=method,
        start_loss=start_loss,
        best_loss=losses.get(best_step),
        best_step=best_step,
        end_loss=next(reversed(losses.values()), None),
        num_steps=state.global_step,
        num_epochs=round(state.epoch or 0.0, 4),
        num_train_tokens=int(trainer._total_train_tokens),
        num_trainable=num_trainable,
        num_target_weights=num_target_weights,
        train_time_s=round(time.perf_counter() - trainer.started, 1),
        peak_memory_bytes=memory.peak_memory_bytes(trainer.args.device.type),
        kl=_kl_report(trainer),
        history=history,
    )


def _kl_report(trainer: MaskTrainer) -> KLReport | None:
    """KL of the kept model and at the last measurement."""
    if trainer.near_base is None:
        return None
    kept = trainer.kept_kl
    assert kept is not None
    measured = kl_by_step(trainer.state.log_history)
    # The last measurement may be that of the kept model, which is not in the log.
    measured.setdefault(trainer.kept_step, kept)
    at_end = measured[max(measured)].whole
    return trainer.near_base.report(kept, at_end, trainer.chosen_step)


def _plain(value: Any) -> Any:
    """An enum as its value, and a path as its last part."""
    value = getattr(value, "value", value)
    return files.without_folder(value) if isinstance(value, str) else value
