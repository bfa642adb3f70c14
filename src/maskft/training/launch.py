"""Several processes: ``accelerate launch`` with TRL's named configurations, and settings that masks do not support."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from maskft_common.errors import UserError
from maskft_common.method_options import TAKE_NO
from maskft_common.processes import COMMAND, uses_fsdp
from maskft_common.yaml_file import read_yaml

# Set in launched processes, so that launch settings of a recipe do not launch again.
_LAUNCHED = "MASKFT_LAUNCHED"


def is_launched() -> bool:
    """Whether this process was started by :func:`launch`."""
    return _LAUNCHED in os.environ


@functools.cache
def launch_options() -> frozenset[str]:
    """Options of ``accelerate launch``, without dashes, and ``accelerate_config``."""
    names = {"accelerate_config"}
    for action in launch_command_parser()._actions:
        for option in action.option_strings:
            if option.startswith("--"):
                names.add(option.lstrip("-"))
    return frozenset(names)


@functools.cache
def _switches() -> frozenset[str]:
    """Options of ``accelerate launch`` that take no value, with their dashes."""
    switches: set[str] = set()
    for action in launch_command_parser()._actions:
        if action.nargs == 0:
            switches.update(action.option_strings)
    return frozenset(switches)


def words_of_recipe(of_recipe: Sequence[str]) -> list[str]:
    """Words for ``accelerate launch``, from the names and values of a recipe in turn.

    TRL's parser returns a value after every name. A switch such as ``--multi_gpu`` takes none: accelerate would run the
    word after it, ``True``, as the script.
    """
    switches = _switches()
    words = []
    for name, value in zip(of_recipe[::2], of_recipe[1::2], strict=True):
        # In text, as TRL writes the booleans of YAML.
        text = value.lower()
        if text == "false" and name.removeprefix("--") in TAKE_NO:
            words += [name, "no"]  # as it was written: YAML reads a plain `no` as false
        elif name not in switches:
            words += [name, value]
        elif text == "true":
            words.append(name)
        elif text != "false":
            raise UserError(f"{name.removeprefix('--')} is {value!r} in the recipe; it must be true or false")
    return words


def launch(
    launch_words: Sequence[str],
    module: str,
    command: Sequence[str],
) -> int:
    """Run ``maskft COMMAND`` in the processes that ``launch_words`` describe.

    Args:
        launch_words: Options of ``accelerate launch``, and ``--accelerate_config NAME_OR_FILE``.
        module: Module of the ``maskft`` command, for ``python -m``.
        command: Words after ``maskft``.

    Returns:
        The exit status of the process that failed first, which has printed its error, or 0.

    Raises:
        UserError: If accelerate rejects the options.
    """
    words = _resolve(launch_words)
    parser = launch_command_parser()
    # argparse would print accelerate's usage and exit.
    parser.error = _refused
    # As python -m. accelerate passes on all words after the module, also those that look like its own options.
    args = parser.parse_args([*words, "--module", module, *command])

    kind = None
    if args.config_file:
        kind = _read_config(args.config_file).get("distributed_type")
    has_strategy = (
        # Of the file.
        kind not in (None, "NO")
        or args.multi_gpu
        or args.use_fsdp
        # accelerate chooses multi_gpu.
        or torch.cuda.device_count() > 1
    )
    wants_several = (args.num_processes or 1) > 1
    if wants_several and not has_strategy:
        # accelerate would silently start one process.
        raise UserError(
            f"num_processes is {args.num_processes}, but no strategy for them: add --accelerate_config fsdp2, or "
            "multi_gpu (on CPUs too)"
        )

    before = dict(os.environ)
    os.environ[_LAUNCHED] = "1"
    # For errors that say how to resume: the processes themselves know only the command without the launch options.
    os.environ[COMMAND] = shlex.join(["maskft", *command, *launch_words])
    # The processes print their own errors; torchrun would add a page to each.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except (ChildFailedError, SignalException, subprocess.CalledProcessError) as error:
        return _status(error)
    except ValueError as error:
        raise UserError(str(error)) from error
    finally:
        # accelerate sets more variables, and a later run in this process is not a launched one.
        os.environ.clear()
        os.environ.update(before)
    return 0


def config_processes(name: str) -> int:
    """Default number of processes of an accelerate configuration, a file or one of TRL's names."""
    # Two words come back: --config_file and its path.
    _, file = _resolve(["--accelerate_config", name])
    config = _read_config(file)
    if config.get("distributed_type") in (None, "NO"):
        return 1
    return config.get("num_processes") or 1


def _status(error: ChildFailedError | SignalException | subprocess.CalledProcessError) -> int:
    """Exit status as in a shell: 128 plus the signal for a killed process."""
    if isinstance(error, ChildFailedError):
        _, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:
            # A killed process has printed no error.
            print(f"maskft: error: rank {failure.local_rank} was ended by {failure.signal_name()}", file=sys.stderr)
    elif isinstance(error, SignalException):
        code = -error.sigval
    else:
        code = error.returncode

    # Python has -N for a process that was killed by signal N.
    if code < 0:
        return 128 - code
    return max(1, code)


def _refused(message: str) -> None:
    raise UserError(f"{message}; see accelerate launch --help")


def _resolve(words: Sequence[str]) -> list[str]:
    try:
        return resolve_accelerate_config_argument(list(words))
    except ValueError as error:
        raise UserError(f"{error} TRL's are fsdp2, multi_gpu and single_gpu") from error


def _read_config(file: str) -> dict:
    config = read_yaml(file)
    if not isinstance(config, dict):
        raise UserError(f"--accelerate_config {file!r} is not a file that accelerate config writes")
    return config


def check_mask_sharding() -> None:
    """Raise for settings that masks do not support: FSDP1, FSDP's activation checkpointing, sharded state dicts."""
    if not uses_fsdp():
        return
    # accelerate launch hands its settings on in the environment.
    if os.environ.get("FSDP_VERSION", "1") == "1":
        raise UserError("FSDP1 flattens scores and weights into one vector; use --accelerate_config fsdp2")
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        raise UserError("fsdp_activation_checkpointing does not go with masks; use --gradient_checkpointing true")
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    if kind.upper() != "FULL_STATE_DICT":
        raise UserError(f"fsdp_state_dict_type is {kind}; an adapter is written whole, so it must be FULL_STATE_DICT")


def let_cpu_shard() -> None:
    """Let accelerate use FSDP2 on CPUs, where it would silently fall back to DDP."""
    # AcceleratorState considers FSDP only for some types of accelerators, MULTI_GPU among them. It reads the type from
    # this dict, which is filled as soon as the training arguments have set up their device.
    state = PartialState._shared_state
    if uses_fsdp() and state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU
