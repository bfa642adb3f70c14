"""The manifest of a checkpoint: sha256 of its files, and the settings that a resumed run must keep; written last."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from maskft_common import files, layout
from maskft_common.errors import UserError
from maskft_common.files import expand_user, read_json
from maskft_common.schema import FileModel, read_model

from ..data.prepared import Prepared, data_identity
from ..models import model_identity
from .arguments import TrainConfig
from .near_base import KLRows
from .options import option_defaults

# Options that may change when a run is resumed: folders, logging, workers, the machine. Three of them are covered by
# other entries: model_name_or_path by the identity of the base, kl_dataset_name by the digest of its rows,
# global_batch_size by the accumulation steps.
FREE = frozenset(
    "output_dir resume_from_checkpoint kl_dataset_name prepared_data_dir prepare_only keep_last keep_worse "
    "model_name_or_path global_batch_size save_total_limit "
    "save_on_each_node push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
    "hub_revision logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica "
    "disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataset_num_proc use_cpu local_rank ddp_backend ddp_timeout "
    "ddp_bucket_cap_mb torch_empty_cache_steps skip_memory_metrics debug do_train do_eval do_predict".split()
)
# Options that name a model.
_MODELS = ("mask_removed_value_model", "before_model")
# Rows in memory at a time.
_ROWS = 10_000

# The configuration and data that a resumed run must keep: every option of ``maskft train`` except FREE, with files and
# folders by their content; ``data``, a digest of the tokens and labels of all rows, in order; ``base``, the identity of
# the base model; ``num_processes``, on which the order of rows and the noise depend.
Course = dict[str, Any]


class Manifest(FileModel):
    """Content of ``manifest.json``; only a complete checkpoint has one.

    Attributes:
        format: Version of the format.
        course: Configuration and data of the run.
        files: sha256 of each file, by its path in the checkpoint.
    """

    format: Literal[2] = 2
    course: Course
    files: dict[str, str]


def seal(folder: Path, course: Course) -> None:
    """Write the manifest of a checkpoint, which marks it as complete.

    Args:
        folder: The checkpoint, with all its other files.
        course: Configuration and data of the run.
    """
    manifest_file = folder / layout.MANIFEST
    paths = []
    for path in folder.rglob("*"):
        if path.is_file() and path != manifest_file:
            paths.append(path)
    paths.sort()
    # hashlib releases the GIL, so that threads hash several files at once. map keeps the order of the paths.
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(files.digest_now, paths))

    named = {}
    for path, sha256 in zip(paths, sums, strict=True):
        name = str(path.relative_to(folder))
        named[name] = sha256
    manifest = Manifest(course=course, files=named)
    text = json.dumps(manifest.model_dump(), indent=1)
    files.write_text(manifest_file, text + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        UserError: If it is not a manifest.
    """
    manifest_file = folder / layout.MANIFEST
    return read_model(Manifest, read_json(manifest_file), manifest_file)


def damage(folder: Path) -> str | None:
    """Problem of a checkpoint's files, of which every byte is read; None if they are intact."""
    if not (folder / layout.MANIFEST).is_file():
        return f"it has no {layout.MANIFEST}, which is written last"
    try:
        entries = read_manifest(folder).files
    except (UserError, OSError, ValueError):
        return f"its {layout.MANIFEST} cannot be read"
    for name, sha256 in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        # digest_now reads the bytes, where digest_file would trust an unchanged time of the last change.
        if files.digest_now(file) != sha256:
            return f"{name} has changed since it was written (sha256)"
    return None


def course_of(
    config: TrainConfig,
    data: Prepared,
    kl_rows: KLRows | None = None,
) -> Course:
    """The configuration and data that a resumed run must keep.

    Args:
        config: The run, with its actual accumulation steps.
        data: The rows.
        kl_rows: Rows of ``kl_dataset_name``.
    """
    options: dict[str, Any] = {}
    for group in (config.method, config.model, config.data, config.mask, config.training):
        for spec in dataclasses.fields(group):
            if spec.init and spec.name not in FREE:
                options[spec.name] = getattr(group, spec.name)

    course: Course = {}
    for name, value in data_identity(options).items():
        content = _content(name, value)
        course[name] = _plain(content)
    course["data"] = _data_digest(data)
    course["kl_data"] = None
    if kl_rows is not None:
        course["kl_data"] = _data_digest(kl_rows)
    course["base"] = model_identity(str(config.model.model_name_or_path))
    course["num_processes"] = config.training.world_size
    return course


def check_course(checkpoint: Path, now: Course) -> None:
    """Raise if the run differs from the run of a checkpoint; options that no longer exist are ignored.

    Raises:
        UserError: One message with all differences.
    """
    # The checkpoint may have been written before an option existed, which then had its default.
    before = _plain(option_defaults()) | read_manifest(checkpoint).course

    # By the options of now: those of the checkpoint that no longer exist have no effect any more.
    differences = []
    for name in sorted(now):
        value_before = before.get(name)
        if value_before != now[name]:
            differences.append(f"{name}: {_shown(value_before)} -> {_shown(now[name])}")
    if differences:
        shown = "; ".join(differences)
        raise UserError(
            f"{str(checkpoint)!r} is from a run with other settings or data ({shown}); give the options of that run to "
            "resume it, or name another output_dir"
        )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    # A digest or a long list would fill the line.
    if len(text) <= 40:
        return text
    return text[:37] + "..."


def _content(name: str, value: Any) -> Any:
    """The content of a file or folder that an option names, so that moving it changes nothing; else the value."""
    if not isinstance(value, str):
        return value
    if name in _MODELS:
        return model_identity(value)
    adapter = expand_user(value) / layout.ADAPTER_WEIGHTS
    if name in layout.ADAPTER_OPTIONS and adapter.is_file():
        return f"sha256:{files.digest_file(adapter)}"
    return value


def _plain(value: Any) -> Any:
    """The value as JSON stores it."""

    def as_json(part: Any) -> Any:
        # is_dataclass also holds for the class itself.
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            return dataclasses.asdict(part)
        # The value of an enum; of other objects only their type is compared.
        return getattr(part, "value", str(type(part)))

    return json.loads(json.dumps(value, default=as_json))


def _data_digest(data: Prepared | KLRows) -> str:
    """Digest of the tokens and labels of all rows, some at a time."""
    digests = []
    for rows in (data.train, data.heldout):
        tokens = rows.select_columns(["input_ids", "labels"])
        parts = tokens.iter(batch_size=_ROWS)
        digests.append([files.digest(part) for part in parts])
    return files.digest(digests)
