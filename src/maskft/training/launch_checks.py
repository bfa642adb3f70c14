"""Ways of starting a run in several processes that a mask cannot share, refused before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from ..errors import UserError
from ..runtime import uses_fsdp


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
