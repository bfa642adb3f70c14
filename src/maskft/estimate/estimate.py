"""What a run will need, before it is started: parameters, memory, FLOPs, tokens, bytes on disk.

Nothing is loaded but the model's configuration. Weights, optimizer state and scores are counted; activations are seen
on fake tensors (``planned_run.py``).
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ..data import load_splits
from ..errors import UserError
from ..training.arguments import TrainConfig, with_accumulation
from ..training.checks import check_method
from .planned_run import PlannedRun

_EIGHT_BIT = "adamw_torch_8bit"

# No larger micro-batch is tried; the answer then means this or more.
_MAX_MICRO_BATCH = 1024


@dataclass
class Setting:
    """One row of the table of settings that may fit a device."""

    dtype: str
    optim: str
    gradient_checkpointing: bool
    bytes_at_batch_1: int
    largest_micro_batch: int


@dataclass
class Estimate:
    """What a run needs. ``memory`` is one process at its height, in bytes per term; ``peak_bytes`` is their sum.

    Attributes:
        method: The method.
        model: Name or file the configuration came from.
        device: ``cpu`` or ``cuda``.
        num_parameters: Parameters of the base model; tied ones count once.
        num_trainable: Parameters that are trained.
        num_masked: Weights a mask covers, 0 for other methods.
        memory: Bytes per term at the height; ``process`` is Python and its libraries.
        height: The phase in which the height falls.
        phases: Bytes in all, per phase.
        peak_bytes: Sum of ``memory``.
        layer_passes: Cost of the decoder layers in forward passes of one layer: counted floor, and full fine-tuning.
        flops_per_step: FLOPs of one optimizer step: forward, backward, total.
        tokens_per_step: Tokens of one optimizer step if every row has ``sequence_length`` tokens.
        num_steps: Optimizer steps of the run; None when the number of rows is not known.
        flops_per_run: FLOPs of the run, evaluation not counted.
        tokens_per_run: Tokens of the run, at most.
        time_s: ``flops_per_run`` over the given speed.
        adapter_bytes: Result on disk (adapter, or whole model).
        bits_per_weight: Measured size of a coded mask and its lower bound.
        checkpoint_bytes: One training checkpoint on disk.
        largest_micro_batch: Largest ``per_device_train_batch_size`` for the device, at most 1024; None when no device
            was given.
        settings: The table of settings, when asked for.
    """

    method: str
    model: str
    device: str
    dtype: str
    optim: str
    gradient_checkpointing: bool
    micro_batch: int
    accumulation: int
    sequence_length: int
    num_parameters: int
    num_trainable: int
    num_masked: int
    memory: dict[str, int]
    height: str
    phases: dict[str, int]
    peak_bytes: int
    layer_passes: dict[str, int] | None
    flops_per_step: dict[str, int]
    tokens_per_step: int
    num_steps: int | None
    flops_per_run: int | None
    tokens_per_run: int | None
    time_s: float | None
    adapter_bytes: int
    bits_per_weight: dict[str, float] | None
    checkpoint_bytes: int
    device_memory_bytes: int | None = None
    largest_micro_batch: int | None = None
    settings: list[Setting] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def estimate(
    run: TrainConfig,
    *,
    sequence_length: int | None = None,
    num_train_rows: int | None = None,
    device: str | None = None,
    device_memory_gb: float | None = None,
    reserve_gb: float = 1.0,
    flops_per_s: float | None = None,
    compare_settings: bool = False,
) -> Estimate:
    """Estimate what ``run`` needs, from the configuration of its model.

    Args:
        run: The run as ``maskft train`` would start it; ``model_name_or_path`` may also be a ``config.json``.
        sequence_length: Tokens of every row; default ``max_length``. Shorter rows need less.
        num_train_rows: Training rows, to count steps; default ``max_train_samples``, or the rows of a local file.
        device: ``cpu`` or ``cuda``; default: what this machine has.
        device_memory_gb: Memory of the device as it is sold, for the largest micro-batch: 24 means 24 * 2**30 bytes.
        reserve_gb: Part of it (same unit) left for the driver's context and fragmentation of a GPU; not used on a CPU.
        flops_per_s: Speed the run is expected to reach, for its time.
        compare_settings: Also tell which weight dtypes, optimizers and checkpointing fit ``device_memory_gb``.

    Raises:
        UserError: For an unknown model, layers out of range, or a device too small for micro-batch 1.
    """
    check_method(run.method)
    training = with_accumulation(run.training)
    if device == "cuda" and training.is_float32_by_machine:
        training.bf16 = True  # the default of the machine that is asked about
    run = replace(run, training=training)
    _check_positive(
        sequence_length=sequence_length,
        num_train_rows=num_train_rows,
        device_memory_gb=device_memory_gb,
        flops_per_s=flops_per_s,
    )
    if compare_settings and device_memory_gb is None:
        raise UserError("compare_settings needs device_memory_gb: which settings fit what?")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    length = sequence_length or run.training.max_length
    if length is None:
        raise UserError("max_length is not set, so rows have any length; give sequence_length")
    planned = PlannedRun(run, length, device)
    batch = run.training.per_device_train_batch_size
    phases = planned.phases(batch)
    height = max(phases, key=lambda name: sum(phases[name].values()))
    limit = largest = None
    settings = []
    if device_memory_gb is not None:
        limit = int((device_memory_gb - (reserve_gb if device == "cuda" else 0)) * 2**30)
        largest = _largest_micro_batch(planned, limit)
        if largest == 0 and not compare_settings:
            raise UserError(_why_nothing_fits(planned, limit))
        settings = _compare(run, length, device, limit) if compare_settings else []
    step = planned.flops(batch)
    accumulation = run.training.gradient_accumulation_steps
    tokens = batch * accumulation * length * run.training.world_size
    num_steps = _num_steps(run, num_train_rows) if planned.is_trained else 0
    flops = None if num_steps is None else num_steps * step["total"]
    return Estimate(
        method=run.method.method,
        model=str(run.model.model_name_or_path),
        device=device,
        dtype=str(planned.dtype).removeprefix("torch."),
        optim=planned.optim,
        gradient_checkpointing=bool(run.training.gradient_checkpointing),
        micro_batch=batch,
        accumulation=accumulation,
        sequence_length=length,
        num_parameters=planned.num_parameters,
        num_trainable=planned.num_trainable,
        num_masked=planned.num_masked,
        memory=phases[height],
        height=height,
        phases={name: sum(terms.values()) for name, terms in phases.items()},
        peak_bytes=sum(phases[height].values()),
        layer_passes=planned.layer_passes,
        flops_per_step=step,
        tokens_per_step=tokens if planned.is_trained else 0,
        num_steps=num_steps,
        flops_per_run=flops,
        tokens_per_run=None if num_steps is None else num_steps * tokens,
        time_s=flops / flops_per_s if flops_per_s and flops is not None else None,
        adapter_bytes=planned.adapter_bytes,
        bits_per_weight=planned.bits_per_weight,
        checkpoint_bytes=planned.checkpoint_bytes,
        device_memory_bytes=None if device_memory_gb is None else int(device_memory_gb * 2**30),
        largest_micro_batch=largest,
        settings=settings,
    )


def _num_steps(run: TrainConfig, num_train_rows: int | None) -> int | None:
    """Optimizer steps, counted as transformers' Trainer counts them."""
    training = run.training
    if training.max_steps > 0:
        return training.max_steps
    rows = num_train_rows
    if rows is None and Path(run.data.dataset_name or "").is_file():
        rows = len(load_splits(run.data, run.data.split_seed, None, training.dataset_text_field)[0])
    rows = rows or run.data.max_train_samples
    if rows is None:
        return None
    micro_batches = math.ceil(rows / (training.per_device_train_batch_size * training.world_size))
    return math.ceil(training.num_train_epochs * math.ceil(micro_batches / training.gradient_accumulation_steps))


def _largest_micro_batch(planned: PlannedRun, limit: int) -> int:
    """Largest number of rows whose height is at most ``limit`` bytes; 0 when not even one fits."""
    low, high = 0, 1
    while planned.peak_bytes(high) <= limit:
        low, high = high, 2 * high
        if not planned.is_trained or high > _MAX_MICRO_BATCH:
            return low
    while low and high - low > 1:
        at_low, at_high = planned.peak_bytes(low), planned.peak_bytes(high)
        # Memory is almost a straight line in the rows, so this finds the place in few steps.
        guess = low + int((limit - at_low) * (high - low) / (at_high - at_low))
        guess = min(max(guess, low + 1), high - 1)
        if planned.peak_bytes(guess) <= limit:
            low = guess
            if low + 1 < high and planned.peak_bytes(low + 1) > limit:
                high = low + 1
        else:
            high = guess
    return low


def _why_nothing_fits(planned: PlannedRun, limit: int) -> str:
    phases = planned.phases(1)
    height = max(phases, key=lambda name: sum(phases[name].values()))
    terms = phases[height]
    largest = max(terms, key=terms.get)
    remedies = _remedies(planned, height)
    remedy = next((remedies[term] for term in sorted(terms, key=terms.get, reverse=True) if term in remedies), "")
    return (
        f"device memory is too small for micro-batch 1: {sum(terms.values()) / 1e9:.1f} GB are needed and "
        f"{limit / 1e9:.1f} GB are there; most of it is {largest} ({terms[largest] / 1e9:.1f} GB); "
        f"{remedy or 'take a smaller model or a larger device'}"
    )


def _remedies(planned: PlannedRun, height: str) -> dict[str, str]:
    """What would make a term smaller, for the terms where something is left to do."""
    fewer = "train fewer layers" if planned.method == "full" else "mask fewer layers (mask_layers_to_transform)"
    remedies = {}
    if planned.dtype == torch.float32:
        remedies["weights"] = "load the base in bfloat16 (dtype: bfloat16)"
    if planned.optim != _EIGHT_BIT:
        remedies["optimizer"] = f"keep the moments in 8 bits (optim: {_EIGHT_BIT})"
    if height == "evaluation" or (height == "measuring" and planned.method == "random_mask"):
        remedies["activations"] = "lower per_device_eval_batch_size"
    elif height == "measuring":
        remedies["activations"] = "set a smaller max_length"
    elif not planned.run.training.gradient_checkpointing:
        remedies["activations"] = "set gradient_checkpointing: true"
    elif planned.length > 256:
        remedies["activations"] = "set a smaller max_length"
    if planned.method == "full" and planned.run.method.partial_layers is None:
        remedies["gradients"] = "train a mask or lora instead of all weights"
    elif planned.method != "lora":
        remedies |= dict.fromkeys(("gradients", "scores", "effective weights"), fewer)
    if planned.run.mask.mask_scope == "global":
        remedies["refresh"] = "set mask_scope: matrix"
    return remedies


def _compare(run: TrainConfig, length: int, device: str, limit: int) -> list[Setting]:
    """What fits with the weights in float32 or bfloat16, 32-bit or 8-bit moments, with and without checkpointing."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for checkpointing in (False, True):
            variant = replace(run, model=copy.copy(run.model), training=copy.copy(run.training))
            variant.model.dtype, variant.training.gradient_checkpointing = dtype, checkpointing
            planned = PlannedRun(variant, length, device)
            for optim in ("adamw_torch_fused", _EIGHT_BIT):
                planned.optim = optim
                rows.append(
                    Setting(dtype, optim, checkpointing, planned.peak_bytes(1), _largest_micro_batch(planned, limit))
                )
    return rows


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value}; it must be above 0")
