"""The manifest of a checkpoint: its files by size and sha256, and what decides its run's course; written last."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn

from maskft_base import files
from maskft_base.errors import UserError, did_you_mean
from maskft_base.files import FileModel, read_json, read_model

from ..data.prepared import Prepared, data_identity
from ..models import model_identity
from ..tuner import learners
from .arguments import TrainConfig

# What may change when a run is resumed: where it writes and reports, how many workers serve it, on what machine. Of
# three of these something else tells: the base of its weights, the accumulation steps of the global batch size.
FREE = frozenset(
    "output_dir resume_from_checkpoint allow_changes prepared_data_dir prepare_only keep_last keep_worse "
    "mask_prefix_cache_gb mask_sparsity_auto model_name_or_path model_revision global_batch_size save_total_limit "
    "save_on_each_node push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
    "hub_revision logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica "
    "disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataset_num_proc use_cpu local_rank ddp_backend ddp_timeout "
    "ddp_bucket_cap_mb torch_empty_cache_steps skip_memory_metrics debug do_train do_eval do_predict".split()
)
# What cannot change on the way: the state that was saved is that of other parameters.
FIXED = frozenset(
    "method base optim optim_target_modules partial_layers keep_mask start_mask dtype peft_config mask_selection "
    "mask_removed_value mask_removed_value_model mask_target_modules mask_exclude_modules mask_layers_to_transform "
    "mask_layers_pattern mask_modules_to_save".split()
)
_ADAPTERS = ("keep_mask", "start_mask", "match_adapter")
_MODELS = ("mask_removed_value_model", "before_model")
# Of a checkpoint, what only resuming reads.
_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "global_step", "pytorch_model_fsdp")
_READ = (".safetensors", ".bin", ".pt", ".pth", ".json")  # endings of files that loading looks for
_NUM_SAMPLES = 1024
_ROWS = 10_000
_PART = 2**18  # weights that are summed at a time


class FileEntry(FileModel):
    """A file of a checkpoint."""

    num_bytes: int
    sha256: str


class Course(FileModel):
    """What a resumed run must have in common with the one that it resumes.

    Attributes:
        options: Every option of ``maskft train`` but those of ``FREE``; files and folders by their content.
        data: Digest of the tokens and labels of all rows, in their order.
        base: Digest of the weights that the run starts from.
    """

    options: dict[str, Any]
    data: str
    base: str

    def values(self) -> dict[str, Any]:
        """Options, data and base, by the names that ``allow_changes`` takes."""
        return {**self.options, "data": self.data[:12], "base": self.base[:12]}


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
        UserError: If it is none.
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


def course_of(config: TrainConfig, data: Prepared, model: nn.Module) -> Course:
    """What a resumed run must have in common with the one that it resumes.

    Args:
        config: The run, with the accumulation steps that are taken.
        data: The rows.
        model: The base model as it was loaded.
    """
    options: dict[str, Any] = {}
    for group in (config.method, config.model, config.data, config.mask, config.training):
        for spec in dataclasses.fields(group):
            if spec.init and spec.name not in FREE:
                options[spec.name] = getattr(group, spec.name)
    has_free_budget = not config.mask.mask_preset and learners.is_free(config.mask.mask_selection)
    if options["mask_init_value"] is None and not has_free_budget:
        options["mask_init_value"] = 0.0  # as in checkpoints of when this was the default of all
    options = {name: _plain(_content(name, value)) for name, value in data_identity(options).items()}
    return Course(options=options, data=_data_digest(data), base=_weights_digest(model.state_dict()))


def changes(was: Course, now: Course) -> dict[str, tuple[Any, Any]]:
    """What differs: name -> (then, now); options that this version no longer has do not count."""
    old, new = was.values(), now.values()
    return {name: (old.get(name), new[name]) for name in sorted(new) if old.get(name) != new[name]}


def check_course(checkpoint: Path, now: Course, allowed: Iterable[str] | None) -> frozenset[str]:
    """Raise if the run differs from that of a checkpoint, except in what is ``allowed`` by name.

    Returns:
        The names of what has changed.

    Raises:
        UserError: One message with all differences; or for a name in ``allowed`` that is not an option.
    """
    allowed = set(allowed or ())
    for name in sorted(allowed):
        if name in FIXED or name not in now.values():
            hint = (
                "cannot change within a run" if name in FIXED else f"is not an option{did_you_mean(name, now.values())}"
            )
            raise UserError(f"allow_changes names {name}, which {hint}; drop it")
    found = changes(read_manifest(checkpoint).course, now)
    refused = [name for name in found if name not in allowed]
    if not refused:
        return frozenset(found)
    differences = "; ".join(f"{name}: {_shown(was)} -> {_shown(new)}" for name, (was, new) in found.items())
    fixed = [name for name in refused if name in FIXED]
    remedy = (
        f"{', '.join(fixed)} cannot change within a run: name another output_dir"
        if fixed
        else f"give it as it was, or allow the change: --allow_changes {' '.join(found)}"
    )
    raise UserError(f"{str(checkpoint)!r} is of a run that differs ({differences}); {remedy}")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _content(name: str, value: Any) -> Any:
    """An option that names a file or folder as what is in it: a moved one is the same, another is not."""
    if not isinstance(value, str):
        return value
    if name == "mask_prefix_cache":
        return True  # where it is kept decides nothing
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


def _weights_digest(weights: dict[str, Tensor]) -> str:
    """Digest of the sum of all bits of each tensor and of evenly spaced values; runs at the speed of memory."""
    return files.digest_tensors(_of_weights(weights))


def _of_weights(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, weight in sorted(weights.items()):
        flat = weight.detach().reshape(-1)
        if flat.is_meta or not flat.numel():
            continue
        bits = flat.view(integers[flat.element_size()]) if not flat.is_complex() else torch.view_as_real(flat)
        label = f"{name} {tuple(weight.shape)} {weight.dtype} {_sum(bits)}"
        yield label, flat[:: max(1, flat.numel() // _NUM_SAMPLES)]


def _sum(bits: Tensor) -> int:
    """Sum in int64, in parts that stay in the processor's cache: a tensor in one takes 13 to 24 times as long."""
    return int(torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_PART)]).sum())
