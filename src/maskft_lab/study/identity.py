"""Names of runs and evaluations: hashes of everything that decides their outcome."""

from __future__ import annotations

import json
from typing import Any

from maskft.data.arguments import mixture_text
from maskft.data.prepared import data_identity
from maskft.training.arguments import default_learning_rate
from maskft.training.method_arguments import MASK_METHODS, UNTRAINED_METHODS, default_start, selection_of
from maskft.tuner.presets import PRESETS
from maskft.tuner.selection import is_free
from maskft_common.files import digest, digest_file, expand_user

from ..evaluation.benchmarks import benchmark_files

_HASH_LENGTH = 10  # hexadecimal digits, 40 bits: among 10,000 runs, two have one name once in 20,000 studies


def short_digest(settings: dict) -> str:
    """Digest of settings, as part of a folder's name; the order of keys does not matter."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return digest(text)[:_HASH_LENGTH]


def options_identity(options: dict) -> dict:
    """The options as they enter a run's hash: data by its content."""
    plain_options = {}
    for key, value in options.items():
        plain_options[key] = plain(value)
    return data_identity(plain_options)


def data_digest(options: dict) -> str:
    """Digest of a run's options with their data files by content, by which a changed file is noticed."""
    identity = options_identity(options)
    return short_digest(identity)


def evaluation_identity(evaluation: dict, before: dict[str, dict] | None = None) -> dict:
    """Options of ``maskft evaluate``, with data and benchmarks by their content.

    Args:
        evaluation: The options.
        before: Options for each set of earlier abilities.
    """
    identity = options_identity(evaluation)

    # Benchmarks that are read from files of data_dir; those of the hub are named by the options alone.
    folder = evaluation.get("data_dir")
    if folder is not None:
        tasks = mixture_text(evaluation.get("tasks")) or ""
        digests = _benchmark_digests(tasks, folder)
        for task, digest_of_files in digests.items():
            identity[f"files of {task}"] = digest_of_files

    # Only where there are sets: an empty entry would rename the published evaluations without them.
    if before:
        identities = {}
        for name, options in before.items():
            identities[name] = evaluation_identity(options)
        identity["before"] = identities
    return identity


def _benchmark_digests(tasks: str, folder: str) -> dict[str, str]:
    """Task -> hash of its files in a folder, for tasks with files there."""
    data_folder = expand_user(folder)
    digests = {}
    for task in tasks.split(","):
        task = task.strip()
        if not task:
            continue
        files = benchmark_files(task, data_folder)
        # A benchmark without files there is read from the hub.
        if files:
            digests_of_files = [digest_file(file) for file in files]
            digests[task] = short_digest({"files": digests_of_files})
    return digests


def written_out(method: str, options: dict) -> dict:
    """The options of a method, with ``mask_preset`` replaced by its options and with defaults the method decides.

    Two recipes that mean the same, one by a preset and one by its options, get the same runs.
    """
    # The preset.
    name = options.get("mask_preset")
    if not name and method in MASK_METHODS:
        name = "recommended"
    # PRESETS has names of MaskConfig, the options of the command line begin with `mask_`.
    preset = PRESETS.get(str(name), {})
    implied = {}
    for key, value in preset.items():
        implied[f"mask_{key}"] = value

    # Defaults that depend on the method or on other options.
    if method in MASK_METHODS:
        implied["mask_init_scores"] = default_start(options)
    if method == "mask":
        cuts_at_zero = is_free(selection_of(options))
        if cuts_at_zero and "mask_init_value" not in implied:
            # The default of learners that cut at 0 was 0 once. This text keeps their runs apart from today's.
            implied["mask_init_value"] = "nearly all kept"
    if method not in UNTRAINED_METHODS:
        implied["learning_rate"] = default_learning_rate(method, options)

    # The method's own options win. An unknown preset stays in them; checking the run reports it.
    given = dict(options)
    if preset:
        given.pop("mask_preset", None)
    return implied | given


def plain(value: Any) -> Any:
    """One spelling for values that mean the same: 2.0 is 2, an enum is its value."""
    value = getattr(value, "value", value)  # of an enum
    # JSON writes 2.0 and 2 in two ways, and the hash of a run is one of its JSON.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        plain_items = {}
        for key, item in value.items():
            plain_items[str(key)] = plain(item)
        return plain_items
    return value
