"""Out of memory, in one line: what the run needs, its biggest term, and three settings that would fit."""

from __future__ import annotations

import copy
import gc
import re
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import torch

from maskft.training.arguments import TrainConfig, with_accumulation
from maskft_base.errors import UserError, first_line
from maskft_base.runtime import resident_memory_bytes

from .estimate import EIGHT_BIT
from .planned_run import TRAINER_BYTES, PlannedRun

NUM_SETTINGS = 3
# What allocators say: torch's on the CPU, the kernel where a file is mapped, a library on a GPU without workspace.
_WORDS = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


@contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Run the training of ``config`` inside; where memory runs out, say in one line what would fit.

    Raises:
        UserError: In the place of the allocator's error.
    """
    at_start = resident_memory_bytes()  # later, it holds what the failed run has left
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = first_line(error)
        traceback.clear_frames(error.__traceback__)  # they hold the model
        gc.collect()
        raise UserError(f"out of memory ({_asked(said)}){_advice(config, at_start)}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused, on the CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def available_bytes(device: str) -> int:
    """Memory that this process could have, what it holds already included."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        share = torch.cuda.get_per_process_memory_fraction()
        return min(free + torch.cuda.memory_reserved(), int(share * total))
    mine = psutil.Process().memory_info()
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    within_limit = [] if limit == resource.RLIM_INFINITY else [limit - (mine.vms - mine.rss)]
    return min([psutil.virtual_memory().available + mine.rss, *within_limit])


def _asked(said: str) -> str:
    """The allocator's message without its place in the source."""
    found = re.search(r"[Tt]ried to allocate [\d.,]+ \w+", said)
    return found[0].lower() if found else said[:80]


def _advice(config: TrainConfig, at_start: int) -> str:
    """What the run needs and what would fit; where that cannot be told, what usually helps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        there = available_bytes(device)
        config = replace(config, training=with_accumulation(config.training))
        planned = _planned(config, {}, device, at_start)
        phases = planned.phases(config.training.per_device_train_batch_size)
        terms = max(phases.values(), key=lambda terms: sum(terms.values()))
        need, largest = sum(terms.values()), max(terms, key=lambda term: terms[term])
        fitting = settings_that_fit(config, device, min(there, int(0.95 * need)), at_start)
    except Exception as error:  # the estimate is a service; the error that it explains must be told in any case
        return f"; no estimate could be made ({first_line(error)}): lower per_device_train_batch_size or max_length"
    told = f": the run needs about {_gb(need)} GB at its peak, most of it {largest} ({_gb(terms[largest])} GB), and "
    told += f"{_gb(there)} GB are there; "
    if not fitting:
        return f"{told}no setting that was tried fits: train fewer layers, or a smaller model"
    return f"{told}these would fit: {'; '.join(f'{options} ({_gb(size)} GB)' for options, size in fitting.items())}"


def settings_that_fit(config: TrainConfig, device: str, limit: int, at_start: int) -> dict[str, int]:
    """Options that keep a run below ``limit`` bytes, those first that change least, and what it then needs.

    Args:
        config: The run.
        device: ``cpu`` or ``cuda``.
        limit: Bytes.
        at_start: Resident bytes of the process before the run.
    """
    found: dict[str, int] = {}
    for options in _candidates(config):
        size = _planned(config, options, device, at_start).peak_bytes(
            _value(config, options, "per_device_train_batch_size")
        )
        if size <= limit:
            found[" ".join(f"--{name} {str(value).lower()}" for name, value in options.items())] = size
        if len(found) == NUM_SETTINGS:
            break
    return found


def _candidates(config: TrainConfig) -> Iterator[dict]:
    """Settings to try, first one change at a time, then several."""
    training = config.training
    batch, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    smaller = [n for n in range(batch // 2, 0, -1) if batch % n == 0]
    batches = [_of_batch(training, n, steps * batch // n) for n in smaller]
    checkpointing = [] if training.gradient_checkpointing else [{"gradient_checkpointing": True}]
    dtype = [{"dtype": "bfloat16"}] if config.model.dtype == "float32" else []
    optim = [{"optim": EIGHT_BIT}] if str(getattr(training.optim, "value", training.optim)).startswith("adamw") else []
    length = [{"max_length": training.max_length // 2}]
    # The largest batch that fits is enough; the others would say the same.
    yield from batches[:1]
    yield from checkpointing
    yield from batches[1:2]
    yield from dtype
    yield from optim
    smallest = batches[-1:]
    together: dict = {}
    for change in (*smallest, *checkpointing, *dtype, *optim, *length):
        together = together | change
        yield dict(together)
    yield from length


def _of_batch(training, batch: int, steps: int) -> dict:
    """A smaller micro-batch and the same global batch."""
    if training.global_batch_size is not None:
        return {"per_device_train_batch_size": batch}
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}


def _value(config: TrainConfig, options: dict, name: str) -> int:
    return options.get(name, getattr(config.training, name))


def _planned(config: TrainConfig, options: dict, device: str, at_start: int) -> PlannedRun:
    model, training = copy.copy(config.model), copy.copy(config.training)
    for name, value in options.items():
        setattr(model if name == "dtype" else training, name, value)
    planned = PlannedRun(replace(config, model=model, training=training), device)
    if device == "cpu":
        planned.process_bytes = at_start + TRAINER_BYTES
    return planned


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.3f}"
