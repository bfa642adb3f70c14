"""The output folder and its checkpoints: which run may write there, which checkpoint is resumed, which are kept."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from maskft_common import files, layout, locks, processes
from maskft_common.errors import UserError, first_line, printable

from ..fsdp import refresh_masks
from ..tuner import MaskConfig
from .manifest import damage
from .method_arguments import ADAPTER, INTERPOLATE, PEFT, UNTRAINED_METHODS, MethodArguments

# Seconds to wait for the lock of the folder: data workers outlive a killed run by some seconds.
LOCK_WAIT_S = 10
DAMAGED = ".damaged"
TRAINER_STATE = "trainer_state.json"
# Of the name of a checkpoint's folder, before the step.
_PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"
# As the Trainer and FSDP write it.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_*")
# Parts of torch's messages when a file cannot be written; they do not say why.
_WRITE_ERRORS = (
    "iostream",
    "inline_container",
    "PytorchStreamWriter",
    "file write failed",
    "No space",
)


@contextmanager
def held_output(
    args: SFTConfig,
    method: str,
    console: Console,
) -> Iterator[str | None]:
    """Lock the output folder against other runs, and yield the checkpoint to resume from, if any.

    The main process searches, and every process gets its result or its error.
    """
    files.check_utf8(args.output_dir, "output_dir")
    # Not a `with` block: the main process alone enters the lock, inside of decided_by_main.
    hold = locks.held(
        Path(args.output_dir),
        layout.TRAIN_LOCK,
        LOCK_WAIT_S,
        "run",
    )
    # Whether a killed run has left its lock there, and so whether the folder is a run's.
    is_ours = processes.decided_by_main(lambda: hold.__enter__().is_left_over)

    def prepare() -> str | None:
        return prepare_output_dir(args, method, bool(is_ours), console)

    try:
        yield processes.decided_by_main(prepare)
    finally:
        if processes.is_main():
            hold.__exit__(None, None, None)


def prepare_output_dir(
    args: SFTConfig,
    method: str,
    is_ours: bool,
    console: Console,
) -> str | None:
    """Check the output folder and return the checkpoint to resume from, if any.

    Args:
        args: The arguments of training.
        method: The method.
        is_ours: Whether a killed run has left its lock there.
        console: Where damaged checkpoints are reported.

    Raises:
        UserError: If the folder holds something else, or there is nothing to resume from.
    """
    folder = Path(args.output_dir)
    there = []
    for path in folder.iterdir():
        if path.name != layout.TRAIN_LOCK:
            there.append(path.name)
    there.sort()

    # YAML gives true as a bool.
    resume = str(args.resume_from_checkpoint or "").lower()
    if resume not in ("", "auto", "true", "1"):
        raise UserError(f"resume_from_checkpoint is {args.resume_from_checkpoint!r}; write true, or auto")
    # First, because a folder that is not this run's cannot be resumed either.
    _check_owner(folder, there, method, is_ours)
    if not resume and there:
        raise UserError(
            f"output_dir {str(folder)!r} holds another run; name another folder, or resume it: "
            "--resume_from_checkpoint true"
        )

    # None in a new folder, and for methods that are not trained: these have no checkpoints, and take seconds.
    last = _last_whole_checkpoint(folder, console)
    if last is None and resume not in ("", "auto"):
        raise UserError(
            f"there is no checkpoint to resume from in {str(folder)!r}; run the command without "
            "--resume_from_checkpoint, or with auto"
        )
    return last


def _check_owner(
    folder: Path,
    there: list[str],
    method: str,
    is_ours: bool,
) -> None:
    """Raise if the folder holds files that are not from a run, or a run of another method."""
    has_checkpoints = any(name.startswith(_PREFIX) for name in there)
    record = folder / layout.TRAINING
    is_of_run = is_ours or has_checkpoints or record.is_file()
    # A study writes the log before its run begins.
    strangers = [name for name in there if name != layout.LOG]
    if strangers and not is_of_run:
        raise UserError(
            f"output_dir {str(folder)!r} holds files that are not from a run ({', '.join(strangers[:3])}); name "
            "another folder"
        )

    # A run that did not end has no record with its method. Its checkpoints hold a course, which is compared later.
    other = method
    try:
        if record.is_file():
            other = files.read_json(record)["summary"]["method"]
    except (KeyError, TypeError):
        raise UserError(
            f"{str(record)!r} is not the record of a run; name another output_dir, or remove the file"
        ) from None
    if other != method or (has_checkpoints and method in UNTRAINED_METHODS):
        raise UserError(f"output_dir {str(folder)!r} holds a run of another method, not {method}; name another folder")


def _last_whole_checkpoint(folder: Path, console: Console) -> str | None:
    """The newest checkpoint that can be resumed exactly; damaged ones, as a kill leaves them, are renamed.

    Raises:
        UserError: If no checkpoint is left because the best one is damaged. Starting over would lose the whole run, and
            the user may be able to restore it.
    """
    # Checkpoint -> problem of the best checkpoint that it names.
    without_best = {}
    found = None
    for path in reversed(checkpoints_in(folder)):
        problem = damage(path)
        if problem is not None:
            _rename_damaged(path, problem, console)
            continue

        # The end of training loads the best checkpoint, which must be whole as well.
        best = best_beside(path) or path
        problem_of_best = None
        if best != path:
            problem_of_best = damage(best)
        if problem_of_best is not None:
            without_best[path] = f"{best.name}, the best until then: {problem_of_best}"
            continue

        # A checkpoint of save_only_model has no optimizer state.
        optimizer_files: list[Path] = []
        for pattern in _OPTIMIZER_FILES:
            optimizer_files += path.glob(pattern)
        if optimizer_files:
            found = str(path)
            break

    if without_best and found is None:
        # The newest of them.
        path, problem = next(iter(without_best.items()))
        raise UserError(f"{path} cannot be resumed: {problem}; restore it, or remove {folder} to start over")
    # An older checkpoint can be resumed. These are newer, and a later run must not find them again.
    for path, problem in without_best.items():
        _rename_damaged(path, problem, console)
    return found


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders of checkpoints by step, the newest last, without renamed damaged ones."""
    found = []
    for path in folder.glob(f"{_PREFIX}*"):
        # Not what follows the last hyphen: checkpoint-old-5 is somebody's copy.
        step = path.name.removeprefix(_PREFIX)
        if step.isdecimal():
            found.append(path)
    # By number: as text, checkpoint-10 would come before checkpoint-9.
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _rename_damaged(
    checkpoint: Path,
    problem: str,
    console: Console,
) -> None:
    """Rename a damaged checkpoint, so that it is not used again, and report it."""
    target = checkpoint.with_name(checkpoint.name + DAMAGED)
    # An earlier damaged checkpoint of the same step.
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)
    console.print(f"{checkpoint.name} is damaged ({printable(problem)}); it is {target.name} now", highlight=False)


def delete_oldest(
    newest: Path,
    best: str | None,
    limit: int | None,
) -> None:
    """Delete the oldest checkpoints until at most ``limit`` are left; the newest and the best are always kept.

    Args:
        newest: The checkpoint that was just written.
        best: The best checkpoint so far; None without one.
        limit: Number of checkpoints to keep; None, 0 or less keeps all.
    """
    if limit is None or limit <= 0:
        return

    # One entry if the newest is the best.
    kept = {newest.name, Path(best or newest).name}
    others = [path for path in checkpoints_in(newest.parent) if path.name not in kept]
    num_checkpoints = len(others) + len(kept)
    num_excess = max(0, num_checkpoints - limit)
    if num_excess == 0:
        return

    # Flush the newest to disk before an older one is deleted, so that a power cut leaves at least one complete.
    for path in newest.rglob("*"):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    # checkpoints_in has the oldest first.
    for path in others[:num_excess]:
        shutil.rmtree(path, ignore_errors=True)


def best_beside(checkpoint: Path) -> Path | None:
    """The best checkpoint that the state of ``checkpoint`` names, in the present folder of both.

    Raises:
        UserError: If the file is not the state of a run.
    """
    state = files.read_json(checkpoint / TRAINER_STATE)
    is_state = isinstance(state, dict) and isinstance(state.get("best_model_checkpoint"), str | None)
    if not is_state:
        raise UserError(f"{checkpoint / TRAINER_STATE} is not the state of a run; remove {checkpoint}")
    name = state.get("best_model_checkpoint")
    if not name:
        return None
    # The folder of both may have been moved since.
    return checkpoint.parent / Path(name).name


@dataclass(frozen=True)
class DiskNeeds:
    """What a run writes, in bytes. Small files (tokenizer, logs) are not counted.

    Attributes:
        checkpoint: One checkpoint; 0 if there are none.
        model: The trained weights, adapter or mask at the end, and with ``keep_last`` those of the last step.
    """

    checkpoint: int
    model: int


def disk_needs(
    weight_bytes: int,
    trained_bytes: int,
    score_bytes: int,
    method: MethodArguments,
    args: SFTConfig,
) -> DiskNeeds:
    """What a run writes to disk, from the sizes of its model.

    Args:
        weight_bytes: All weights of the model, tied ones once.
        trained_bytes: The trained parameters, with scores.
        score_bytes: The scores of a mask, in float32; of a mask that is not trained, those it would have.
        method: The method and its settings.
        args: The arguments of training.
    """
    # Of a model without an adapter, all weights are saved.
    is_whole = method.method in ("full", INTERPOLATE)
    # An adapter over pruned weights is merged at the end, and its checkpoints hold the adapter.
    is_merged = method.method == PEFT and method.start_mask is not None
    if is_whole or is_merged:
        model_bytes = weight_bytes
    else:
        # A saved mask has a bit for each score of 32, or less.
        model_bytes = trained_bytes - score_bytes + score_bytes // 32
    if method.keep_last:
        model_bytes *= 2
    if method.method in UNTRAINED_METHODS or args.save_strategy == "no":
        return DiskNeeds(0, model_bytes)

    checkpoint_bytes = weight_bytes if is_whole else trained_bytes
    # The two moments of AdamW, in the dtype of the weights. Other optimizers may have fewer, or smaller ones.
    is_adamw = args.optim in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
    if is_adamw and not args.save_only_model:
        checkpoint_bytes += 2 * trained_bytes
    return DiskNeeds(checkpoint_bytes, model_bytes)


def most_checkpoints(args: SFTConfig, num_steps: int | None = None) -> int | None:
    """Number of checkpoints that a run has at one time, at most; None if it keeps all of an unknown number.

    Args:
        args: The arguments of training.
        num_steps: Optimizer steps of the run; None if that is not known, as without its rows.
    """
    if args.save_strategy == "no":
        return 0
    num_saved = _num_saved(args, num_steps)
    limit = args.save_total_limit
    if limit is None or limit <= 0:
        return num_saved
    # The newest and the best are kept whatever the limit is, and the oldest is deleted once the newest is written.
    most = max(limit, 2) + 1
    if num_saved is None:
        return most
    return min(most, num_saved)


def _num_saved(args: SFTConfig, num_steps: int | None) -> int | None:
    """Number of checkpoints that a run writes, at most, with those before its first and after its last step."""
    if args.max_steps > 0:
        num_steps = args.max_steps
    elif args.save_strategy == "epoch":
        return math.ceil(args.num_train_epochs) + 2

    interval = args.save_steps
    if args.save_strategy == "best":
        # After an evaluation.
        interval = args.eval_steps
    elif args.save_strategy == "epoch":
        # Of how many steps an epoch is, the rows decide.
        interval = None
    if interval and interval < 1:
        # A share of the run, which transformers rounds up to whole steps.
        return math.ceil(1 / interval) + 2
    if not interval or num_steps is None:
        return None
    return math.ceil(num_steps / interval) + 2


def check_room(model, method: MethodArguments, args: SFTConfig) -> None:
    """Raise if the disk has no room for a checkpoint and the trained weights, before a run of hours fails at them.

    The need is a lower bound: one checkpoint, although two are there while the older one is deleted.

    Args:
        model: The model with its trainable parameters, not sharded yet.
        method: The method and its settings.
        args: The arguments of training.

    Raises:
        UserError: With the bytes needed and those free.
    """
    weight_bytes = 0
    trained_bytes = 0
    score_bytes = 0
    # named_parameters() has tied weights once.
    for name, parameter in model.named_parameters():
        weight_bytes += parameter.nbytes
        if parameter.requires_grad:
            trained_bytes += parameter.nbytes
            if "mask_scores" in name:
                score_bytes += parameter.nbytes

    needs = disk_needs(weight_bytes, trained_bytes, score_bytes, method, args)
    needed = needs.checkpoint + needs.model
    free = shutil.disk_usage(args.output_dir).free
    if free < needed:
        raise UserError(
            f"a checkpoint and the trained weights take {files.size(needed)}, and {files.size(free)} are free for "
            f"output_dir {str(args.output_dir)!r}: make room, or name a folder on another disk"
        )


@contextmanager
def written_whole(checkpoint: Path, args: SFTConfig) -> Iterator[None]:
    """Context in which a checkpoint is written; if the disk is full, the incomplete checkpoint is removed.

    Args:
        checkpoint: Its folder.
        args: The arguments of training.

    Raises:
        UserError: With the number of free bytes.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch raises RuntimeError for a file that it cannot write, and for much else.
        is_of_disk = any(words in str(error) for words in _WRITE_ERRORS)
        if isinstance(error, RuntimeError) and not is_of_disk:
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        free = files.size(shutil.disk_usage(checkpoint.parent).free)
        # The runs of a study resume by themselves, and it takes no such option.
        is_resumed_by_repeating = str(args.resume_from_checkpoint).lower() == "auto"
        how = "run the same command again" if is_resumed_by_repeating else "resume with --resume_from_checkpoint true"
        raise UserError(
            f"{checkpoint} cannot be written ({first_line(error)}): {free} are free; make room, or raise ulimit -f, "
            f"then {how}"
        ) from error


def save_final(
    model,
    folder: str | Path,
    recipe: dict[str, Any] | None = None,
    trainer: SFTTrainer | None = None,
) -> None:
    """Write weights or adapter from the main process; all training processes must call it.

    Args:
        model: The model.
        folder: Folder to write to.
        recipe: How a mask was trained, for its configuration.
        trainer: The trainer of ``model``; None if it was not trained.
    """
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if isinstance(config, MaskConfig):
        config.recipe = recipe
        # A run that is resumed at its end has made no forward pass yet.
        refresh_masks(model)

    # A collective: all processes gather, and the main one writes.
    state = None
    if trainer is not None and trainer.is_fsdp_enabled:
        state = trainable_state(model)
    if processes.is_main():
        save_weights(model, folder, state)


def save_weights(
    model,
    folder: str | Path,
    state: dict[str, Any] | None = None,
) -> None:
    """Write weights or adapter, with the file mode of the other files in the folder.

    Args:
        model: The model.
        folder: Folder to write to.
        state: Its state dict, if it is gathered already.
    """
    given: dict[str, Any] = {}
    if state is not None:
        given["state_dict"] = state
    if isinstance(model, PeftModel):
        # "auto" would ask the hub about the base's vocabulary at every save, and warn when it cannot.
        given["save_embedding_layers"] = False
    model.save_pretrained(folder, **given)
    # safetensors writes files that only their owner can read.
    files.use_default_modes(folder)


def trainable_state(model) -> dict[str, Any]:
    """State dict of an FSDP2 model, gathered into the memory of the main process; all processes must call it.

    It has no frozen weights if the model has an adapter.
    """
    # accelerate's get_state_dict would gather frozen weights as well. With full_state_dict and cpu_offload, torch gives
    # all processes but the main one an empty state dict.
    options = StateDictOptions(
        full_state_dict=True,
        cpu_offload=True,
        ignore_frozen_params=hasattr(model, "peft_config"),
    )
    return get_model_state_dict(model, options=options)
