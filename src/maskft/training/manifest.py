"""The manifest of a checkpoint: its files by size and sha256, and what decides its run's course; written last."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor

from maskft_base import files
from maskft_base.errors import UserError
from maskft_base.files import FileModel, read_json, read_model

from ..data.prepared import Prepared, data_identity
from ..models import model_identity
from .arguments import TrainConfig

# What may change when a run is resumed: where it writes and reports, how many workers serve it, on what machine. Of
# two of these something else tells: the base of its weights, the accumulation steps of the global batch size.
FREE = frozenset(
    "output_dir resume_from_checkpoint prepared_data_dir prepare_only keep_last keep_worse "
    "model_name_or_path global_batch_size save_total_limit "
    "save_on_each_node push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
    "hub_revision logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica "
    "disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataset_num_proc use_cpu local_rank ddp_backend ddp_timeout "
    "ddp_bucket_cap_mb torch_empty_cache_steps skip_memory_metrics debug do_train do_eval do_predict".split()
)
_ADAPTERS = ("keep_mask", "start_mask", "match_adapter")
_MODELS = ("mask_removed_value_model", "before_model")
# Of a checkpoint, what only resuming reads.
_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "global_step", "pytorch_model_fsdp")
_READ = (".safetensors", ".bin", ".pt", ".pth", ".json")  # endings of files that loading looks for
_ROWS = 10_000


class FileEntry(FileModel):
    """A file of a checkpoint."""

    num_bytes: int
    sha256: str


class Course(FileModel):
    """What a resumed run must have in common with the one that it resumes.

    Attributes:
        options: Every option of ``maskft train`` but those of ``FREE``; files and folders by their content.
        data: Digest of the tokens and labels of all rows, in their order.
        base: Identity of the model that the run starts from.
    """

    options: dict[str, Any]
    data: str
    base: str

    def values(self) -> dict[str, Any]:
        """Options, data and base by name."""
        return {**self.options, "data": self.data, "base": self.base}


class Manifest(FileModel):
    """Content of ``manifest.json``: a checkpoint that has one was written to its end."""

    format: Literal[1] = 1
    step: int
    num_processes: int
    course: Course
    files: dict[str, FileEntry]


# A checkpoint's files


def seal(folder: Path, step: int, num_processes: int, course: Course) -> None:
    """Bring all files of a checkpoint to the disk, then write its manifest.

    Raises:
        OSError: If the disk takes them no longer.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / files.MANIFEST)
    with ThreadPoolExecutor(8) as pool:  # the disk is waited for while the processor hashes
        synced, entries = pool.map(files.sync, paths), pool.map(_entry, paths)
        named = {str(path.relative_to(folder)): entry for path, entry in zip(paths, entries, strict=True)}
        list(synced)
    for place in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        files.sync(place)
    manifest = Manifest(step=step, num_processes=num_processes, course=course, files=named)
    files.write_text(folder / files.MANIFEST, json.dumps(manifest.model_dump(), indent=1) + "\n")
    files.sync(folder)
    files.sync(folder.parent)


def _entry(path: Path) -> FileEntry:
    return FileEntry(num_bytes=path.stat().st_size, sha256=files.digest_now(path))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        UserError: If it is not a manifest.
    """
    return read_model(Manifest, read_json(folder / files.MANIFEST), folder / files.MANIFEST)


def damage(folder: Path, weights_only: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, every byte of which is read; None if nothing is.

    Args:
        folder: The checkpoint.
        weights_only: Leave out what only resuming reads.
    """
    if not (folder / files.MANIFEST).is_file():
        return f"it has no {files.MANIFEST}, which is written last"
    try:
        entries = read_manifest(folder).files
    except (UserError, OSError, ValueError):
        return f"its {files.MANIFEST} cannot be read"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.num_bytes:
            return f"{name} has {path.stat().st_size:,} of {entry.num_bytes:,} bytes"
    known = {folder / name for name in (*entries, files.MANIFEST)}
    added = [path for path in sorted(folder.rglob("*")) if path.suffix in _READ and path not in known]
    if added and not weights_only:
        return f"{added[0].name} was added to it"
    with ThreadPoolExecutor(4) as pool:
        names = [name for name in entries if not (weights_only and name.startswith(_STATE))]
        for name, sha256 in zip(names, pool.map(files.digest_now, (folder / name for name in names)), strict=True):
            if sha256 != entries[name].sha256:
                return f"{name} is not what was written (sha256)"
    return None


# The course of a run


def course_of(config: TrainConfig, data: Prepared) -> Course:
    """What a resumed run must have in common with the one that it resumes.

    Args:
        config: The run, with the accumulation steps that are taken.
        data: The rows.
    """
    options: dict[str, Any] = {}
    for group in (config.method, config.model, config.data, config.mask, config.training):
        for spec in dataclasses.fields(group):
            if spec.init and spec.name not in FREE:
                options[spec.name] = getattr(group, spec.name)
    options = {name: _plain(_content(name, value)) for name, value in data_identity(options).items()}
    return Course(options=options, data=_data_digest(data), base=model_identity(str(config.model.model_name_or_path)))


def changes(was: Course, now: Course) -> dict[str, tuple[Any, Any]]:
    """What differs: name -> (then, now); options that this version no longer has do not count."""
    old, new = was.values(), now.values()
    return {name: (old.get(name), new[name]) for name in sorted(new) if old.get(name) != new[name]}


def check_course(checkpoint: Path, now: Course) -> None:
    """Raise if the run differs from that of a checkpoint.

    Raises:
        UserError: One message with all differences.
    """
    found = changes(read_manifest(checkpoint).course, now)
    if found:
        differences = "; ".join(f"{name}: {_shown(was)} -> {_shown(new)}" for name, (was, new) in found.items())
        raise UserError(
            f"{str(checkpoint)!r} is of a run that differs ({differences}); give the options of that run to resume it, "
            "or name another output_dir"
        )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _content(name: str, value: Any) -> Any:
    """An option that names a file or folder as what is in it: a moved one is the same, another is not."""
    if not isinstance(value, str):
        return value
    if name in _MODELS:
        return model_identity(value)
    adapter = Path(value).expanduser() / files.ADAPTER_WEIGHTS
    return f"sha256:{files.digest_file(adapter)}" if name in _ADAPTERS and adapter.is_file() else value


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def _data_digest(data: Prepared) -> str:
    return files.digest_tensors(
        (f"{name} {column}", part)
        for name, rows in (("train", data.train), ("heldout", data.heldout))
        for column in ("input_ids", "labels")
        for part in _column(rows, column)
    )


def _column(rows: Dataset, column: str) -> Iterator[Tensor]:
    """The lengths and the tokens of all rows, some thousands at a time."""
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS):
        values = table[column].combine_chunks()
        yield torch.from_numpy(values.value_lengths().to_numpy(zero_copy_only=False).astype("int64"))
        yield torch.from_numpy(values.flatten().to_numpy(zero_copy_only=False).astype("int64"))
