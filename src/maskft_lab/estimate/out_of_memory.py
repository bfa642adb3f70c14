"""Out of memory, in one line: what the run needs, its biggest term, and what usually helps."""

from __future__ import annotations

import gc
import re
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from maskft.training.arguments import TrainConfig
from maskft_base.errors import UserError, first_line

from .estimate import estimate, needs

# What allocators say: torch's on the CPU, the kernel where a file is mapped, a library on a GPU without workspace.
_WORDS = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


@contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Run the training of ``config`` inside; where memory runs out, say in one line what helps.

    Raises:
        UserError: In the place of the allocator's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = first_line(error)
        traceback.clear_frames(error.__traceback__)  # they hold the model
        gc.collect()
        found = re.search(r"[Tt]ried to allocate [\d.,]+ \w+", said)
        raise UserError(f"out of memory ({found[0].lower() if found else said[:80]}){_advice(config)}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused, on the CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def _advice(config: TrainConfig) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return f": {needs(estimate(config, device).memory, _available_bytes(device))}"
    except Exception as error:  # the estimate is a service; the error that it explains must be told in any case
        return f"; no estimate could be made ({first_line(error)}): lower per_device_train_batch_size or max_length"


def _available_bytes(device: str) -> int:
    """Memory that this process could have, what it holds already included."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    mine = psutil.Process().memory_info()
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    within_limit = [] if limit == resource.RLIM_INFINITY else [limit - (mine.vms - mine.rss)]
    return min([psutil.virtual_memory().available + mine.rss, *within_limit])
