"""What a run will need, before it is started: parameters, memory, FLOPs, tokens, bytes on disk.

Nothing is loaded but the model's configuration. Weights, optimizer state and scores are counted (``ledger.py``);
activations are seen on fake tensors (``planned_run.py``).
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field, replace

import torch

from maskft.training.arguments import TrainConfig, with_accumulation
from maskft.training.checks import check_method
from maskft_base.errors import UserError

from .ledger import num_train_rows
from .planned_run import PlannedRun

EIGHT_BIT = "adamw_torch_8bit"

# No larger micro-batch is tried; the answer then means this or more.
MAX_MICRO_BATCH = 1024


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
    """What a run needs; the memory is that of one process, in bytes.

    Attributes:
        model: Name or file the configuration came from.
        num_parameters: Parameters of the base model; tied ones count once.
        num_masked: Weights a mask covers, 0 for other methods.
        phases: Memory per phase of the run; ``peak`` is the phase that needs most.
        memory: Memory per term at the peak; ``process`` is Python and its libraries.
        layer_passes: Cost of the decoder layers in forward passes of one layer: counted floor, and full fine-tuning.
        flops_per_step: FLOPs of one optimizer step: forward, backward, total.
        tokens_per_step: Tokens of one optimizer step if every row has ``sequence_length`` tokens.
        num_steps: Optimizer steps of the run; None when the number of rows is not known.
        flops_per_run: FLOPs of the run, evaluation not counted.
        time_s: ``flops_per_run`` over the given speed.
        adapter_bytes: Result on disk (adapter, or whole model).
        bits_per_weight: Measured size of a coded mask and its lower bound.
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
    phases: dict[str, int]
    peak: str
    memory: dict[str, int]
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
    largest_micro_batch: int | None = None
    settings: list[Setting] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def estimate(
    run: TrainConfig,
    *,
    device: str | None = None,
    device_memory_gb: float | None = None,
    reserve_gb: float = 1.0,
    flops_per_s: float | None = None,
    compare_settings: bool = False,
) -> Estimate:
    """Estimate what ``run`` needs, from the configuration of its model.

    Args:
        run: The run as ``maskft train`` would start it; ``model_name_or_path`` may also be a ``config.json``. Rows are
            taken to have ``max_length`` tokens; how many there are, ``max_train_samples`` or a local file says.
        device: ``cpu`` or ``cuda``; default: what this machine has.
        device_memory_gb: Memory of the device as it is sold, for the largest micro-batch: 24 means 24 * 2**30 bytes.
        reserve_gb: Part of it (same unit) left for the driver's context and fragmentation of a GPU; not used on a CPU.
        flops_per_s: Speed the run is expected to reach, for its time.
        compare_settings: Also tell which weight dtypes, optimizers and checkpointing fit ``device_memory_gb``.

    Raises:
        UserError: For an unknown model, layers out of range, or a device too small for micro-batch 1.
    """
    check_method(run.method)
    for name, value in (("device_memory_gb", device_memory_gb), ("flops_per_s", flops_per_s)):
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value}; it must be above 0")
    if compare_settings and device_memory_gb is None:
        raise UserError("compare_settings needs device_memory_gb: which settings fit what?")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if run.training.max_length is None:
        raise UserError("max_length is not set, so rows have any length; give that of the longest")
    run = replace(run, training=with_accumulation(run.training))
    planned = PlannedRun(run, device)
    result = _estimate(planned, flops_per_s)
    if device_memory_gb is not None:
        limit = int((device_memory_gb - (reserve_gb if device == "cuda" else 0)) * 2**30)
        result.largest_micro_batch = _largest_micro_batch(planned, limit)
        if compare_settings:
            result.settings = _compare(run, device, limit)
        elif not result.largest_micro_batch:
            raise UserError(_why_nothing_fits(planned, limit))
    return result


def _estimate(planned: PlannedRun, flops_per_s: float | None) -> Estimate:
    training = planned.run.training
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    phases = planned.phases(batch)
    sizes = {name: sum(terms.values()) for name, terms in phases.items()}
    peak = max(sizes, key=lambda name: sizes[name])
    flops, tokens, num_steps = {"forward": 0, "backward": 0}, 0, 0
    if planned.is_trained:
        micro = planned.micro_batch(batch)
        flops = {"forward": accumulation * micro.forward_flops, "backward": accumulation * micro.backward_flops}
        tokens = batch * accumulation * planned.length * training.world_size
        num_steps = _num_steps(planned.run)
    flops["total"] = sum(flops.values())
    flops_per_run = None if num_steps is None else num_steps * flops["total"]
    adapter_bytes, checkpoint_bytes = planned.file_bytes
    return Estimate(
        method=planned.method,
        model=str(planned.run.model.model_name_or_path),
        device=planned.device,
        dtype=str(planned.dtype).removeprefix("torch."),
        optim=planned.optim,
        gradient_checkpointing=bool(training.gradient_checkpointing),
        micro_batch=batch,
        accumulation=accumulation,
        sequence_length=planned.length,
        num_parameters=planned.num_parameters,
        num_trainable=planned.num_trainable,
        num_masked=planned.num_masked,
        phases=sizes,
        peak=peak,
        memory=phases[peak],
        peak_bytes=sizes[peak],
        layer_passes=planned.layer_passes,
        flops_per_step=flops,
        tokens_per_step=tokens,
        num_steps=num_steps,
        flops_per_run=flops_per_run,
        tokens_per_run=None if num_steps is None else num_steps * tokens,
        time_s=flops_per_run / flops_per_s if flops_per_s and flops_per_run is not None else None,
        adapter_bytes=adapter_bytes,
        bits_per_weight=planned.bits_per_weight,
        checkpoint_bytes=checkpoint_bytes,
    )


def _num_steps(run: TrainConfig) -> int | None:
    """Optimizer steps, counted as transformers' Trainer counts them."""
    training, data = run.training, run.data
    if training.max_steps > 0:
        return training.max_steps
    held_out = 0 if data.eval_dataset_name else data.eval_split_size
    rows = num_train_rows(data.dataset_name, data.max_train_samples, held_out)
    if rows is None:
        return None
    micro_batches = math.ceil(rows / (training.per_device_train_batch_size * training.world_size))
    return math.ceil(training.num_train_epochs * math.ceil(micro_batches / training.gradient_accumulation_steps))


def _largest_micro_batch(planned: PlannedRun, limit: int) -> int:
    """Largest number of rows whose peak is at most ``limit`` bytes; 0 when not even one fits."""
    fits, more = 0, 1
    while planned.peak_bytes(more) <= limit:
        fits, more = more, 2 * more
        if not planned.is_trained or more > MAX_MICRO_BATCH:
            return fits
    while fits and more - fits > 1:
        at_fits, at_more = planned.peak_bytes(fits), planned.peak_bytes(more)
        # Memory is almost a straight line in the rows, so this finds the place in few steps.
        guess = fits + int((limit - at_fits) * (more - fits) / (at_more - at_fits))
        guess = min(max(guess, fits + 1), more - 1)
        fits, more = (guess, more) if planned.peak_bytes(guess) <= limit else (fits, guess)
    return fits


def _why_nothing_fits(planned: PlannedRun, limit: int) -> str:
    terms = max(planned.phases(1).values(), key=lambda terms: sum(terms.values()))
    largest = max(terms, key=lambda term: terms[term])
    return (
        f"device memory is too small for micro-batch 1: {sum(terms.values()) / 1e9:.1f} GB are needed and "
        f"{limit / 1e9:.1f} GB are there; most of it is {largest} ({terms[largest] / 1e9:.1f} GB); see which dtype, "
        "optim and gradient_checkpointing fit (--compare_settings), or train fewer layers"
    )


def _compare(run: TrainConfig, device: str, limit: int) -> list[Setting]:
    """What fits with the weights in float32 or bfloat16, 32-bit or 8-bit moments, with and without checkpointing."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for checkpointing in (False, True):
            model, training = copy.copy(run.model), copy.copy(run.training)
            model.dtype, training.gradient_checkpointing = dtype, checkpointing
            planned = PlannedRun(replace(run, model=model, training=training), device)
            for planned.optim in ("adamw_torch_fused", EIGHT_BIT):
                largest = _largest_micro_batch(planned, limit)
                rows.append(Setting(dtype, planned.optim, checkpointing, planned.peak_bytes(1), largest))
    return rows
