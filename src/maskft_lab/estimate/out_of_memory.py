"""Out of memory, in one line: what was asked for, and what usually helps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from maskft_common.errors import UserError, first_line

ADVICE = (
    "try, in this order, --per_device_train_batch_size 1 with more --gradient_accumulation_steps, a smaller "
    "--per_device_eval_batch_size, --gradient_checkpointing true, --dtype bfloat16 with --optim adamw_torch_8bit"
)
# What allocators say: torch's on the CPU, the kernel where a file is mapped, a library on a GPU without workspace.
_WORDS = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


@contextmanager
def explained(advice: str = ADVICE) -> Iterator[None]:
    """Run a command's work inside; where memory runs out, say in one line what helps.

    Raises:
        UserError: In the place of the allocator's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _WORDS):
            raise
        said = first_line(error)
        found = re.search(r"[Tt]ried to allocate [\d.,]+ \w+", said)
        raise UserError(f"out of memory ({found[0].lower() if found else said[:80]}); {advice}") from None
