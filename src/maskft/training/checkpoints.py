"""The output folder: may it be used, is there a checkpoint to resume from, does the disk take it, what is written."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from trl import SFTConfig, SFTTrainer

from .. import files, runtime
from ..errors import UserError
from ..tuner import MaskConfig
from ..tuner.model import current_mask_fingerprint
from .method_arguments import ADAPTER

# As the Trainer, FSDP (whole or in shards) and DeepSpeed write it.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")


def checkpoint_to_resume(args: SFTConfig) -> str | None:
    """What the main process finds in the output folder, in every process; see :func:`prepare_output_dir`."""
    return runtime.decided_by_main(lambda: prepare_output_dir(args))


def prepare_output_dir(args: SFTConfig) -> str | None:
    """Check the output folder and return the checkpoint to resume from, if any.

    Raises:
        UserError: If the folder holds another run, or there is nothing to resume from.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {str(folder)!r} is a file; name a folder")
    resume = str(args.resume_from_checkpoint or "").lower()
    if resume not in ("", "auto", "true", "1"):
        return _named_checkpoint(Path(args.resume_from_checkpoint), args)
    if resume:
        last = _last_whole_checkpoint(folder, args)
        if last is None and resume != "auto":
            hint = "; those of save_only_model hold no optimizer" if args.save_only_model else ""
            raise UserError(
                f"there is no checkpoint to resume from in {str(folder)!r}{hint}; drop --resume_from_checkpoint"
            )
        return last
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"output_dir {str(folder)!r} holds another run; name another folder, or resume it: "
            "--resume_from_checkpoint true"
        )
    return None


def _named_checkpoint(checkpoint: Path, args: SFTConfig) -> str:
    if not checkpoint.is_dir():
        raise UserError(f"resume_from_checkpoint {str(checkpoint)!r} is not a folder")
    _check_processes(checkpoint, args)
    if not any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZER_FILES):
        raise UserError(
            f"{str(checkpoint)!r} cannot be resumed from, it has no optimizer; to start from its weights, name it as "
            "the model"
        )
    return str(checkpoint)


def _last_whole_checkpoint(folder: Path, args: SFTConfig) -> str | None:
    """The newest checkpoint that can be resumed exactly; one cut short by a kill is passed over."""
    needed = _state_files(args)
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.rpartition("-")[2])):
        _check_processes(path, args)
        weights = [*path.glob("*.safetensors")]
        whole = all((path / name).is_file() for name in needed) and _is_json(path / "trainer_state.json")
        if weights and whole and all(map(_is_readable, weights)) and _has_all_shards(path):
            return str(path)
    return None


def _check_processes(checkpoint: Path, args: SFTConfig) -> None:
    """Refuse a checkpoint of more processes, or of one where there are several: rows and noise would be others.

    Too few random states are no proof: a kill may have come before the others were written.
    """
    many, is_alone = len([*checkpoint.glob("rng_state_*.pth")]), args.world_size == 1
    of_one = (checkpoint / "rng_state.pth").is_file()
    if many > args.world_size or (many and is_alone) or (of_one and not is_alone):
        written_by = f"{many} processes" if many else "one process"
        raise UserError(
            f"{str(checkpoint)!r} was written by {written_by}, and this run has {args.world_size}; resume with as many"
        )


def _has_all_shards(folder: Path) -> bool:
    """Whether every file of a model in several is there: a kill may have come while a checkpoint was being deleted."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return True
    shards = set(json.loads(index.read_text())["weight_map"].values()) if _is_json(index) else {""}
    return all((folder / shard).is_file() for shard in shards)


def _is_json(file: Path) -> bool:
    """Whether the file is there in full; the Trainer writes its state last, so then the rest of a checkpoint is too."""
    try:
        json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return True


def _state_files(args: SFTConfig) -> list[str]:
    ranks = range(args.world_size)
    random = ["rng_state.pth"] if args.world_size == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    return ["optimizer.bin" if runtime.uses_fsdp() else "optimizer.pt", "scheduler.pt", *random]


def _is_readable(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False


def check_disk_space(model, args: SFTConfig) -> None:
    """Refuse to start when the disk cannot take the checkpoints and the result."""
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    copies = 1 if args.save_strategy == "no" else 1 + (args.save_total_limit or 2) + 1
    # Adam's two moments travel with every checkpoint unless only the model is saved.
    need = trainable * copies * (1 if args.save_only_model else 3)
    files.check_free_space(
        args.output_dir, need, "lower save_total_limit, set save_only_model, or name another output_dir"
    )


def save_weights(trainer: SFTTrainer, folder: str | Path) -> None:
    """Write weights or adapter from the main process; all processes must call it."""
    with agreed_masks(trainer.model):
        if trainer.is_fsdp_enabled:
            state = trainable_state(trainer.model)
            if runtime.is_main():
                trainer.model.save_pretrained(folder, state_dict=state)
        elif runtime.is_main():
            trainer.model.save_pretrained(folder)


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
