"""Start ``maskft train`` in several processes through ``accelerate launch``, with the names of TRL's configurations."""

from __future__ import annotations

import importlib.resources
import logging
import os
import subprocess
from pathlib import Path

import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..errors import UserError, did_you_mean
from .launch_checks import check_fsdp, check_zero_stage, zero_stage_of

# Set in the processes that are launched, so that launch settings of a recipe do not launch again.
_LAUNCHED = "MASKFT_LAUNCHED"


def is_launched() -> bool:
    """Whether this process was started by :func:`launch`."""
    return _LAUNCHED in os.environ


def launch_options() -> set[str]:
    """Names, without dashes, of what ``accelerate launch`` takes, and ``accelerate_config``."""
    options = {option for action in launch_command_parser()._actions for option in action.option_strings}
    return {"accelerate_config", *(option.lstrip("-") for option in options if option.startswith("--"))}


def launch(launch_words: list[str], command: list[str], is_mask: bool) -> int:
    """Run ``maskft COMMAND`` in the processes that ``launch_words`` describe.

    Args:
        launch_words: Options of ``accelerate launch``, and ``--accelerate_config NAME_OR_FILE``.
        command: Words after ``maskft``.
        is_mask: Whether a mask is to be trained, which cannot be sharded in every way.

    Returns:
        The exit status of the process that failed first, or 0. It has printed why.
    """
    parser = launch_command_parser()
    parser.error = _refuse
    args = parser.parse_args([*_resolve(launch_words), "--module", "maskft.cli.main", *command])
    _check(args, is_mask)
    os.environ[_LAUNCHED] = "1"
    # The processes print their own errors; torchrun would add a page to each.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except ChildFailedError as error:
        return _status(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:  # of a single process
        return _status(error.returncode)
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _status(code: int) -> int:
    """Exit status as a shell gives it: 128 and the signal for a process that was killed."""
    return 128 - code if code < 0 else max(1, code)


def config_processes(name: str) -> int:
    """Processes that a configuration starts where nothing else is said.

    Args:
        name: A file of ``accelerate config``, or a name of TRL's configurations; everything else is refused.
    """
    words = _resolve(["--accelerate_config", name])
    config = _read_config(words[words.index("--config_file") + 1])
    return 1 if config.get("distributed_type") in (None, "NO") else config.get("num_processes") or 1


def _read_config(file: str) -> dict:
    try:
        config = yaml.safe_load(Path(file).read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"--accelerate_config {file!r} is no file that accelerate config writes")
    return config


def _refuse(message: str):
    raise UserError(f"{message}; see accelerate launch --help")


def _resolve(words: list[str]) -> list[str]:
    try:
        return resolve_accelerate_config_argument(words)
    except ValueError as error:
        if words[-1] == "--accelerate_config":
            raise UserError("--accelerate_config needs a name or a file") from error
        name = words[words.index("--accelerate_config") + 1]
        files = importlib.resources.files("trl.accelerate_configs").iterdir()
        known = sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
        raise UserError(
            f"--accelerate_config {name!r} is neither a file nor one of {', '.join(known)}{did_you_mean(name, known)}"
        ) from error


def _check(args, is_mask: bool) -> None:
    """Refuse what the launched processes would refuse, before they are started."""
    config = _read_config(args.config_file) if args.config_file else {}
    kind = config.get("distributed_type")
    ways = (args.multi_gpu, args.use_fsdp, args.use_deepspeed, args.tpu, args.use_megatron_lm)
    if (args.num_processes or 1) > 1 and kind in (None, "NO") and not any(ways) and torch.cuda.device_count() < 2:
        # accelerate would start one process and say nothing.
        raise UserError(
            f"num_processes is {args.num_processes}, but not how they share work: add --accelerate_config fsdp2, or "
            "multi_gpu (on CPUs too)"
        )
    if args.use_deepspeed or kind == "DEEPSPEED":
        deepspeed = config.get("deepspeed_config") or {}
        check_zero_stage(args.zero_stage or deepspeed.get("zero_stage"))
        check_zero_stage(zero_stage_of(args.deepspeed_config_file or deepspeed.get("deepspeed_config_file")))
    if is_mask and (args.use_fsdp or kind == "FSDP"):
        fsdp = config.get("fsdp_config") or {}
        check_fsdp(fsdp.get("fsdp_version", args.fsdp_version), fsdp.get("fsdp_state_dict_type", "FULL_STATE_DICT"))
