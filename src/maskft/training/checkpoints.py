"""The output folder and its checkpoints: who may write there, which one is resumed, which are kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from maskft_base import files, runtime
from maskft_base.errors import UserError, first_line, printable

from ..tuner import MaskConfig
from ..tuner.model import current_mask_fingerprint
from .arguments import TrainingArguments
from .manifest import Course, check_course, damage, read_manifest, seal
from .method_arguments import ADAPTER, UNTRAINED_METHODS

LOCK_WAIT_S = 10  # the workers that load data outlive a killed run by some seconds
DAMAGED = ".damaged"
TRAINER_STATE = "trainer_state.json"
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_*")  # as the Trainer and FSDP write it
# What torch says when a file cannot be written; it does not tell why.
_WRITE_ERRORS = ("iostream", "inline_container", "PytorchStreamWriter", "file write failed", "No space")


@contextmanager
def held_output(args: SFTConfig, method: str, console: Console) -> Iterator[str | None]:
    """Hold the output folder against other runs, and yield the checkpoint to resume from, if any.

    The main process looks; what it finds, or its error, is that of every process.
    """
    hold = files.held(Path(args.output_dir), files.TRAIN_LOCK, LOCK_WAIT_S, "run")
    is_ours = runtime.decided_by_main(lambda: hold.__enter__().is_left_over)
    try:
        yield runtime.decided_by_main(lambda: prepare_output_dir(args, method, bool(is_ours), console))
    finally:
        if runtime.is_main():
            hold.__exit__(None, None, None)


def prepare_output_dir(args: SFTConfig, method: str, is_ours: bool, console: Console) -> str | None:
    """Check the output folder and return the checkpoint to resume from, if any.

    Args:
        args: The arguments of training.
        method: The method.
        is_ours: Whether a run that was killed has left its lock there.
        console: Where to tell of damaged checkpoints.

    Raises:
        UserError: If the folder holds something else, or there is nothing to resume from.
    """
    folder = Path(args.output_dir)
    there = sorted(path.name for path in folder.iterdir() if path.name != files.TRAIN_LOCK)
    resume = str(args.resume_from_checkpoint or "").lower()
    if not resume:
        if there:
            raise UserError(
                f"output_dir {str(folder)!r} holds another run; name another folder, or resume it: "
                "--resume_from_checkpoint true"
            )
        return None
    if resume not in ("auto", "true", "1"):
        raise UserError(f"resume_from_checkpoint is {args.resume_from_checkpoint!r}; write true, or auto")
    if method in UNTRAINED_METHODS and resume != "auto":
        raise UserError(f"method {method} is not trained, there is nothing to resume; drop --resume_from_checkpoint")
    _check_owner(folder, there, method, is_ours)
    if method in UNTRAINED_METHODS:
        return None
    last = _last_whole_checkpoint(folder, args, console)
    if last is None and resume != "auto":
        hint = "; those of save_only_model hold no optimizer" if args.save_only_model else ""
        raise UserError(
            f"there is no checkpoint to resume from in {str(folder)!r}{hint}; drop --resume_from_checkpoint"
        )
    return last


def _check_owner(folder: Path, there: list[str], method: str, is_ours: bool) -> None:
    """Refuse to write over what no run, or one of another method, has left in the folder."""
    checkpoints = [name for name in there if name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")]
    strangers = [name for name in there if name != files.LOG]  # which a study writes before its run begins
    record = folder / files.TRAINING
    if strangers and not (is_ours or checkpoints or record.is_file()):
        raise UserError(
            f"output_dir {str(folder)!r} holds files that are not from a run ({', '.join(strangers[:3])}"
            f"{', ...' if len(strangers) > 3 else ''}); name another folder"
        )
    if checkpoints and method in UNTRAINED_METHODS:
        raise UserError(f"output_dir {str(folder)!r} holds the checkpoints of another method; name another folder")
    other = files.read_json(record)["summary"]["method"] if record.is_file() else method
    if other != method:
        raise UserError(f"output_dir {str(folder)!r} holds a run of method {other}, not {method}; name another folder")


def _last_whole_checkpoint(folder: Path, args: SFTConfig, console: Console) -> str | None:
    """The newest checkpoint that can be resumed exactly; damaged ones, as a kill leaves them, are renamed."""
    for path in reversed(checkpoints_in(folder)):
        problem = damage(path)
        if problem:
            rename_damaged(path, problem, console)
            continue
        _check_processes(path, args)
        if _has_optimizer(path):
            return str(path)
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders of checkpoints by step, the newest last; damaged ones that were renamed are left out."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def rename_damaged(checkpoint: Path, problem: str, console: Console) -> None:
    """Rename a damaged checkpoint, so that nothing takes it for a whole one, and say so."""
    target = checkpoint.with_name(checkpoint.name + DAMAGED)
    shutil.rmtree(target, ignore_errors=True)  # what was left of this step before
    checkpoint.rename(target)
    console.print(f"{checkpoint.name} is damaged ({printable(problem)}); it is {target.name} now", highlight=False)


def _has_optimizer(checkpoint: Path) -> bool:
    return any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZER_FILES)


def _check_processes(checkpoint: Path, args: SFTConfig) -> None:
    """Refuse a checkpoint of another number of processes: rows and noise would be others."""
    count = read_manifest(checkpoint).num_processes
    if count != args.world_size:
        written_by = f"{count} processes" if count > 1 else "one process"
        raise UserError(
            f"{str(checkpoint)!r} was written by {written_by}, and this run has {args.world_size}; resume with as many"
        )


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        course: What a resumed run must have in common with this one.
        limit: How many are kept besides the best one and the newest; None: all.
        resume_from: The one that the run is resumed from.
        best: The best one so far, as the resumed one names it, if it is whole.
        sealing: The one that is being sealed beside the next steps: the disk is slow, and hashing needs no model.
    """

    course: Course
    limit: int | None = None
    resume_from: str | None = None
    best: str | None = None
    sealing: Future | None = None

    @classmethod
    def begin(cls, course: Course, args: TrainingArguments, resume_from: str | None, console: Console) -> Checkpoints:
        """Those of a run that begins, or is resumed from ``resume_from``.

        Raises:
            UserError: If an option, the data or the base differs from what it began with.
        """
        if resume_from is None:
            return cls(course, args.save_total_limit)

        def look() -> str | None:
            check_course(Path(resume_from), course)
            return whole_best(Path(resume_from), console)

        return cls(course, args.save_total_limit, resume_from, runtime.decided_by_main(look))

    def tell_if_finished(self, max_steps: int, console: Console) -> None:
        """Say so where the run was resumed from its last step."""
        if self.resume_from and step_of(Path(self.resume_from)) >= max_steps:
            console.print(f"already finished: all {max_steps} steps had been trained")

    def seal(self, trainer: SFTTrainer, folder: Path) -> None:
        """Begin to make a checkpoint that was written one that is whole, and then to delete those that are not kept.

        The one before must be finished.
        """
        trainer.accelerator.wait_for_everyone()  # all processes write to it
        if not runtime.is_main():
            return
        step, best = trainer.state.global_step, trainer.state.best_model_checkpoint

        def work() -> None:
            with written_whole(folder, files.MANIFEST, 2**20):
                seal(folder, step, trainer.args.world_size, self.course)
                self._rotate(folder, best)

        pool = ThreadPoolExecutor(1)
        self.sealing = pool.submit(work)
        pool.shutdown(wait=False)
        if trainer.control.should_training_stop:  # there is no step to do it beside
            self.finish()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Wait for the newest also where training failed: nothing writes to the folder after the run let go of it."""
        with nullcontext() if error is None else suppress(UserError):
            self.finish()

    def finish(self) -> None:
        """Wait until the newest checkpoint is whole.

        Raises:
            UserError: If the disk did not take it.
        """
        sealing, self.sealing = self.sealing, None
        if sealing is not None:
            sealing.result()

    def _rotate(self, newest: Path, best: str | None) -> None:
        """Delete the oldest; never the newest, nor the best."""
        if not self.limit or self.limit < 1:
            return
        kept = {newest.name, Path(best or newest).name}
        others = [path for path in checkpoints_in(newest.parent) if path.name not in kept]
        for path in others[: max(0, len(others) + len(kept) - self.limit)]:
            shutil.rmtree(path, ignore_errors=True)


def whole_best(checkpoint: Path, console: Console) -> str | None:
    """The best checkpoint that ``checkpoint`` names, beside it; None, and a line, where it is damaged."""
    state = files.read_json(checkpoint / TRAINER_STATE)
    if not state.get("best_model_checkpoint"):
        return None
    best = checkpoint.parent / Path(state["best_model_checkpoint"]).name
    problem = damage(best) if best.is_dir() else "it is missing"
    if problem is None:
        return str(best)
    lost = lost_best(state["best_model_checkpoint"], state["best_metric"], problem)
    console.print(f"{lost}: from here on, the best of the later ones is kept", highlight=False)
    if best.is_dir():
        rename_damaged(best, problem, console)
    return None


def lost_best(checkpoint: str, metric: float | None, problem: str) -> str:
    """What to say of a best checkpoint that cannot be loaded."""
    value = "" if metric is None else f", {metric:.4f}"
    return f"the best checkpoint (step {step_of(Path(checkpoint))}{value}) is damaged: {problem}"


@contextmanager
def written_whole(folder: Path, file: str, num_bytes: int) -> Iterator[None]:
    """Write a file of the checkpoint ``folder`` inside; where the disk does not take it, the checkpoint is removed.

    Raises:
        UserError: One line with the file, the bytes that it needs and those that are free.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _WRITE_ERRORS):
            raise
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"{folder / file} cannot be written ({first_line(error)}): it needs {files.size(num_bytes)}, and "
            f"{files.size(shutil.disk_usage(folder.parent).free)} are free; make room, or raise ulimit -f, then resume "
            "with --resume_from_checkpoint true"
        ) from error


def save_final(
    model, folder: str | Path, recipe: dict[str, Any] | None = None, trainer: SFTTrainer | None = None
) -> None:
    """Write weights or adapter from the main process; all processes that train must call it.

    Args:
        model: What to save.
        folder: Where to.
        recipe: How a mask was trained, for its configuration.
        trainer: What trained ``model``; None: nothing did.
    """
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if isinstance(config, MaskConfig):
        config.recipe = recipe
    with agreed_masks(model):
        state = trainable_state(model) if trainer is not None and trainer.is_fsdp_enabled else None
        if runtime.is_main():
            model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))


@contextmanager
def agreed_masks(model):
    """Save inside: the masks of all processes must be the same, and the saved ones must be theirs."""
    agreed = agreed_mask_fingerprint(model) if runtime.num_processes() > 1 else None
    yield
    if agreed is not None and runtime.is_main():
        saved = model.peft_config[ADAPTER].mask_sha256
        if saved != agreed:
            raise RuntimeError(f"the saved masks ({saved[:12]}) are not those trained with ({agreed[:12]})")


def trainable_state(model) -> dict[str, Any]:
    """What an FSDP2 checkpoint holds, gathered into the memory of the main process; all processes must call it.

    The frozen weights of a model with an adapter are left out.
    """
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=hasattr(model, "peft_config")
    )
    return get_model_state_dict(model, options=options)


def agreed_mask_fingerprint(model) -> str | None:
    """The sha256 of the masks, equal in every process, or None without a mask; all processes must call it.

    Raises:
        UserError: In every process, if the masks differ.
    """
    if not isinstance(getattr(model, "peft_config", {}).get(ADAPTER), MaskConfig):
        return None
    fingerprint = current_mask_fingerprint(model, ADAPTER)
    runtime.check_same({"sha256": fingerprint}, "masks")
    return fingerprint
