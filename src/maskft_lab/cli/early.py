"""Checks that need no torch, made before the seconds that its import takes.

Only mistakes that are certain are reported here, in the words of the full checks that follow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from maskft_common.errors import UserError, did_you_mean
from maskft_common.files import expand_user, is_there
from maskft_common.layout import DATA_FILE_ENDINGS, EMBEDDED_MODEL, holds_adapter, no_adapter
from maskft_common.yaml_file import read_yaml

from ..evaluation.evaluation_arguments import NO_ADAPTER

# Options that name training rows, held-out rows, and rows of the KL term.
DATA_OPTIONS = ("dataset_name", "eval_dataset_name", "kl_dataset_name")

# numpy's largest seed; transformers.set_seed seeds numpy too.
MAX_SEED = 2**32 - 1

# Texts that `python -m maskft_lab.cli.reference` writes: the parsers that they come from need torch.
HELP = Path(__file__).parent / "help"
TRAIN_OPTIONS = HELP / "train_options.json"


def help_text(command: str) -> str:
    """The help of a command whose parser needs torch."""
    text = (HELP / f"{command}.txt").read_text(encoding="utf-8")
    return text.rstrip("\n")


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether the words of a command ask for its help."""
    return "-h" in words or "--help" in words


def options_of(words: Sequence[str]) -> dict[str, list[str]]:
    """Option -> its values, as far as that can be told without a parser."""
    options: dict[str, list[str]] = {}
    # The values of the last option; those before the first option are positional and kept nowhere.
    values: list[str] = []
    for word in words:
        if not word.startswith("--"):
            values.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        values = [value] if equals else []
        options[name] = values
    return options


def single_values(options: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Option -> its first value, for options that take one; those without any are left out."""
    return {name: values[0] for name, values in options.items() if values}


def with_config(words: Sequence[str]) -> list[str]:
    """The words of ``maskft train``, in which a recipe may come first without ``--config``."""
    is_recipe = len(words) > 0 and words[0].lower().endswith((".yaml", ".yml"))
    if is_recipe:
        return ["--config", *words]
    return list(words)


def check_training(words: Sequence[str]) -> None:
    """Check the words of ``maskft train``: the recipe's file, the model's folder, data files, names of options.

    Raises:
        UserError: For the first mistake.
    """
    options = options_of(words)
    flags: dict[str, Any] = dict(single_values(options))

    # A flag wins over the recipe, as in the full parser.
    settings = flags
    if "config" in flags:
        content = read_yaml(flags["config"])
        if isinstance(content, dict):
            settings = content | flags

    _check_names(options)
    for name in ("seed", "data_seed"):
        _check_seed(name, settings.get(name))
    check_model(settings.get("model_name_or_path"))
    check_data(settings)


def check_model(name: Any) -> None:
    """Check that a model that can only be a folder of this machine exists."""
    # None, or another type in a recipe, which the parser reports.
    if not isinstance(name, str) or name == EMBEDDED_MODEL:
        return
    # maskft estimate takes a config.json in the place of a model.
    if name.endswith(".json"):
        return
    # A name of the hub is NAME or OWNER/NAME, or that of a file there, OWNER/NAME/FILE.gguf; a folder that looks like
    # one cannot be told from it here.
    most_slashes = 2 if name.lower().endswith(".gguf") else 1
    is_path = name.startswith((".", "/", "~")) or name.count("/") > most_slashes
    if is_path and _is_missing(name):
        raise UserError(f"model folder {name!r} does not exist")


def check_data(settings: Mapping[str, Any]) -> None:
    """Check that data files exist, as far as their names can only be those of files in the working directory.

    Names of the hub, mixtures (``a.jsonl:100,b.jsonl``) and files that ``data_dir`` may hold are left to the reader.
    """
    if settings.get("data_dir") is not None:
        return
    for option in DATA_OPTIONS:
        name = settings.get(option)
        if not isinstance(name, str) or "," in name:
            continue
        if name.lower().endswith(DATA_FILE_ENDINGS) and _is_missing(name):
            raise UserError(f"data file {name} does not exist")


def _is_missing(name: str) -> bool:
    """Whether there is certainly no file or folder of this name; the reader says if it may not be looked up."""
    try:
        return not expand_user(name).exists()
    except PermissionError:
        return False
    except (OSError, ValueError):  # too long, a null byte
        return True


def _check_seed(name: str, value: Any) -> None:
    """Check a seed that numpy takes; anything but a whole number is left to the parser."""
    text = str(value)
    # Python raises ValueError for a number of thousands of digits; the parser has a message for it.
    is_number = text.isdecimal() and len(text) <= 30
    if is_number and int(text) > MAX_SEED:
        raise UserError(f"{name} is {value}; it must be at most {MAX_SEED}")


def check_adapters(names: Sequence[str]) -> None:
    """Check that adapters of ``maskft evaluate`` are adapter folders."""
    for name in names:
        if name != NO_ADAPTER:
            _check_adapter(name)


def check_mask(name: str) -> str:
    """Check the adapter folder of a command that takes nothing else; returns its path."""
    # A shell leaves the ~ of --adapter=~/mask as it is.
    folder = os.path.expanduser(name)
    if name and not _is_adapter(folder) and is_there(f"{folder}/config.json"):
        raise UserError(
            f"{name!r} is not an adapter folder: it is a whole model; name the folder of a mask (adapter_config.json)"
        )
    _check_adapter(name)
    return folder


def _check_names(options: dict[str, list[str]]) -> None:
    """Check names of options against the list that was written with the installed versions of TRL and others."""
    text = TRAIN_OPTIONS.read_text(encoding="utf-8")
    listed = json.loads(text)
    known = listed["options"]
    versions = listed["versions"]
    # Other versions may have other options: the parser checks the names then.
    if installed_versions(versions) != versions:
        return
    for name in options:
        if name not in known:
            raise UserError(f"unknown option --{name}{did_you_mean(name, known)}; see maskft train --help")


def installed_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Package -> installed version."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _check_adapter(name: str) -> None:
    # An empty path is the working directory; an empty name is what "$MASK" becomes in a shell where MASK is not set.
    if not name:
        raise UserError("the name of the adapter folder is empty; name the folder of an adapter")
    folder = os.path.expanduser(name)
    if not _is_adapter(folder):
        raise no_adapter(folder)


def _is_adapter(name: str) -> bool:
    try:
        return holds_adapter(name)
    except (OSError, ValueError):
        # Too long for a path, or with a null byte.
        return False
