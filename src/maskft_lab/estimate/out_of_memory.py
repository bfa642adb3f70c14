"""Out of memory, in one line: the request that failed, and the usual remedies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from maskft_common.errors import UserError, first_line

ADVICE = (
    "try, in this order, --per_device_train_batch_size 1 with more --gradient_accumulation_steps, a smaller "
    "--per_device_eval_batch_size, --gradient_checkpointing true, --dtype bfloat16 with --optim adamw_torch_8bit"
)

# Words of allocators: torch's on the CPU, the kernel's where a file is mapped, a GPU library's without workspace.
_WORDS = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
_SHOWN_LENGTH = 80  # characters of a message without a size


@contextmanager
def explained(advice: str = ADVICE) -> Iterator[None]:
    """Run a command's work inside; if memory runs out, say in one line how to need less.

    Raises:
        UserError: In place of the allocator's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Only the GPU's allocator has an error type; the others raise a RuntimeError that its text alone tells apart.
        text = str(error)
        has_words = any(words in text for words in _WORDS)
        is_out_of_memory = isinstance(error, MemoryError) or has_words
        if not is_out_of_memory:
            raise

        message = first_line(error)
        # torch's message continues with all numbers of its allocator: only the request is shown.
        request = re.search(r"[Tt]ried to allocate [\d.,]+ \w+", message)
        if request:
            shown = request[0].lower()
        else:
            shown = message[:_SHOWN_LENGTH]
        raise UserError(f"out of memory ({shown}); {advice}") from None
