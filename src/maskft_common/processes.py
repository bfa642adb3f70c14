"""The processes that train together: ranks, and values they agree on.

torch is imported where it is used: commands that only read files start without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
# In the environment of processes that a launcher started: the command it was given.
COMMAND = "MASKFT_COMMAND"


def rank() -> int:
    """Number of this process among those that a launcher started; 0 without one.

    Raises:
        UserError: The environment's RANK is no number.
    """
    # torchrun and accelerate set it, so that it is known before torch.distributed is initialised.
    text = os.environ.get("RANK", "0")
    if not text.isdecimal():
        raise UserError(f"the environment variable RANK is {text!r}; launchers set the number of a process: unset it")
    return int(text)


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def leave_group() -> None:
    """Leave the group of processes at the end of a run, if there is one.

    torch asks for it: a group that is still there when the interpreter ends has threads, which can end the process with
    an error.
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def uses_fsdp() -> bool:
    """Whether this run shards the model with FSDP."""
    # accelerate's own variable, from its configuration or from `accelerate launch --use_fsdp`.
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def num_processes() -> int:
    """Processes that train together; 1 before they have met."""
    # They cannot have met without torch, whose import takes seconds.
    if "torch" not in sys.modules:
        return 1
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def gather(value: T) -> list[T]:
    """The picklable ``value`` of every process, in order of rank, on every process."""
    if num_processes() == 1:
        return [value]
    import torch.distributed as dist

    # Filled in place, by rank.
    values: list = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def reduce_(values: Tensor, op: str = "sum") -> Tensor:
    """Sum (or ``max``) of ``values`` over the processes, in place."""
    if num_processes() > 1:
        import torch.distributed as dist

        operation = dist.ReduceOp.SUM
        if op == "max":
            operation = dist.ReduceOp.MAX
        dist.all_reduce(values, op=operation)
    return values


def decided_by_main(decide: Callable[[], T]) -> T:
    """Call ``decide`` in the main process only; its result, or its UserError, is that of every process."""
    # Errors are sent too: if the main process alone raised, the others would wait for its broadcast.
    answer: list = [None, None]  # the result, the error's message
    if is_main():
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    if num_processes() > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(answer, src=0)

    result, message = answer
    if message is not None:
        raise UserError(message)
    return result


def check_same(value: dict[str, str], what: str) -> None:
    """Raise in every process, with the same line, unless all processes hold the same ``value``.

    Args:
        value: The values to compare, by name.
        what: Plural noun for the message: ``"{what} differ ..."``.

    Raises:
        UserError: For the first name whose value differs.
    """
    # Every process has the values of all, so that all raise, and none waits for another.
    first, *others = gather(value)
    for rank, other in enumerate(others, start=1):
        # A name that only one of the two has differs as well.
        names = sorted({*first, *other})
        for name in names:
            expected = first.get(name)
            found = other.get(name)
            if found != expected:
                raise UserError(
                    f"{what} differ between processes: {name} is {expected} on rank 0 and {found} on rank {rank}; "
                    "start every process with the same model, data and arguments"
                )


def largest(*flags: Tensor) -> int:
    """Index (from 1) of the last of the 0-dimensional bool ``flags`` that is set in any process; 0 if none is."""
    import torch

    # One number for all flags, so that one collective is enough.
    indices = []
    for index, flag in enumerate(flags, start=1):
        index_or_zero = flag.to(torch.int32) * index
        indices.append(index_or_zero)
    # A flag that is not set counts as 0.
    highest = torch.stack(indices).max()
    highest = reduce_(highest, "max")
    return int(highest)
