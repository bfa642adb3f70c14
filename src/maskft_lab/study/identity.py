"""What names a run, its data and its evaluations: hashes of all that decides their outcome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskft.data.arguments import mixture_text
from maskft.data.prepared import data_identity
from maskft_common.files import digest, digest_file

_HASH_LENGTH = 10


def evaluation_identity(evaluation: dict, before: dict[str, dict] | None = None) -> dict:
    """Options of ``maskft evaluate``, and of sets of earlier abilities, with data and benchmarks by their content."""
    if before:
        sets = {name: evaluation_identity(options) for name, options in before.items()}
        return evaluation_identity(evaluation) | {"before": sets}
    out, folder = options_identity(evaluation), evaluation.get("data_dir")
    if folder is not None:
        digests = _benchmark_digests(mixture_text(evaluation.get("tasks")) or "", folder)
        out |= {f"files of {task}": found for task, found in digests.items()}
    return out


def short_digest(settings: dict) -> str:
    """Digest of settings, as it stands in a folder's name."""
    return digest(json.dumps(settings, sort_keys=True, ensure_ascii=False))[:_HASH_LENGTH]


def options_identity(options: dict) -> dict:
    """The options as a run's hash takes them: data by its content."""
    return data_identity({key: plain(value) for key, value in options.items()})


def _benchmark_digests(tasks: str, folder: str) -> dict[str, str]:
    """Task -> hash of its files in a folder, for those that have some there."""
    from ..evaluation.benchmarks import benchmark_files

    named = filter(None, (task.strip() for task in tasks.split(",")))
    files = {task: benchmark_files(task, Path(folder).expanduser()) for task in named}
    return {task: short_digest({"files": [*map(digest_file, found)]}) for task, found in files.items() if found}


def written_out(method: str, options: dict) -> dict:
    """The options of a method, with those that ``mask_preset`` stands for and with defaults that the method decides."""
    from maskft.training.arguments import default_learning_rate
    from maskft.training.method_arguments import MASK_METHODS, UNTRAINED_METHODS, default_start, selection_of
    from maskft.tuner.presets import PRESETS
    from maskft.tuner.selection import is_free

    preset = PRESETS.get(str(options.get("mask_preset") or ("recommended" if method in MASK_METHODS else "")), {})
    stands_for = {f"mask_{key}": value for key, value in preset.items()}
    if method in MASK_METHODS:
        stands_for["mask_init_scores"] = default_start(options)
    if method == "mask" and is_free(selection_of(options)) and "mask_init_value" not in stands_for:
        stands_for["mask_init_value"] = "nearly all kept"  # not 0, as it was once
    if method not in UNTRAINED_METHODS:
        stands_for["learning_rate"] = default_learning_rate(method, options)
    return stands_for | {key: value for key, value in options.items() if key != "mask_preset" or not preset}


def plain(value: Any) -> Any:
    """One spelling for values that mean the same: 2.0 is 2, an enum is its value."""
    value = getattr(value, "value", value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return value
