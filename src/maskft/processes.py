"""What a run in several processes needs beside the training: checks that all of them share, and one that speaks."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import datasets
import torch
import torch.distributed as dist
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor

from .errors import UserError

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def uses_fsdp() -> bool:
    """Whether this run shards the model with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def silence() -> None:
    """Leave warnings and progress bars to the main process."""
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def num_processes() -> int:
    """Processes that train together; 1 before they have met."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """The picklable ``value`` of every process, in order of rank, on every process."""
    if num_processes() == 1:
        return [value]
    values: list = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def reduce_(values: Tensor, op: str = "sum") -> Tensor:
    """Sum (or ``max``) of ``values`` over the processes, in place."""
    if num_processes() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return values


def decided_by_main(decide: Callable[[], T]) -> T:
    """Call ``decide`` in the main process only; its result, or its UserError, is that of every process."""
    answer: list = [None, None]
    if is_main():
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    if num_processes() > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def check_same(value: dict[str, str], what: str) -> None:
    """Refuse, in every process with the same line, when the processes do not hold the same ``value``.

    Args:
        value: What must be equal everywhere, by name.
        what: Plural noun for the message, with what to do: ``"{what} differ ..."``.
    """
    first, *others = gather(value)
    for rank, other in enumerate(others, start=1):
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                raise UserError(
                    f"{what} differ between processes: {name} is {first.get(name)} on rank 0 and {other.get(name)} on "
                    f"rank {rank}; start every process with the same model, data and arguments"
                )


def check_launch() -> None:
    """Refuse ZeRO-3 from what the launcher put into the environment, before anything asks for DeepSpeed itself."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        check_zero_stage(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"))
        check_zero_stage(zero_stage_of(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")))


def zero_stage_of(config: str | dict | None) -> int | str | None:
    """The ZeRO stage in a configuration of DeepSpeed, given as such or as its JSON file; None where it says none."""
    if isinstance(config, str) and config not in ("", "none"):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"the DeepSpeed configuration {config!r} cannot be read: {error}") from None
    stage = config.get("zero_optimization", {}) if isinstance(config, dict) else {}
    return stage.get("stage") if isinstance(stage, dict) else None


def check_mask_launch() -> None:
    """Refuse ways of sharding that other methods may use and a mask may not."""
    if uses_fsdp():
        check_fsdp(os.environ.get("FSDP_VERSION", "1"), os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT"))


def check_zero_stage(stage: int | str | None) -> None:
    """Refuse DeepSpeed ZeRO-3."""
    if str(stage) == "3":
        raise UserError(
            "ZeRO-3 is not supported: it gathers a parameter only for the module that owns it, and the scores of a "
            "mask are read by their parent; use --accelerate_config fsdp2, which shards as much"
        )


def check_fsdp(version: int | str, state_dict_type: str) -> None:
    """Refuse FSDP1, and checkpoints in shards."""
    if str(version) == "1":
        raise UserError(
            "FSDP1 is not supported for masks: it flattens scores and weights into one vector; use --accelerate_config "
            "fsdp2"
        )
    if state_dict_type.upper() != "FULL_STATE_DICT":
        raise UserError(
            f"fsdp_state_dict_type is {state_dict_type}; an adapter is written from gathered scores, so it must be "
            "FULL_STATE_DICT"
        )


def let_cpu_shard() -> None:
    """Let accelerate use FSDP2 where there is no accelerator; by itself it would fall back to DDP without a word."""
    state = PartialState._shared_state
    if uses_fsdp() and state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU


def largest(*flags: Tensor) -> int:
    """Index (from 1) of the last of the 0-dimensional bool ``flags`` that is set in any process; 0 if none is."""
    weighted = torch.stack([flag.to(torch.int32) * index for index, flag in enumerate(flags, start=1)])
    return int(reduce_(weighted.max(), "max"))
