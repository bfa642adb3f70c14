"""All commands and options, from their parsers: ``docs/reference.md``, and the help texts whose parsers need torch.

``python -m maskft_lab.cli.reference`` writes them after an option has changed; a test fails until then.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from maskft_common.command_line import DEFAULT, has_default

from .early import HELP, TRAIN_OPTIONS, installed_versions
from .main import COMMANDS, make_parser

PAGE = Path(__file__).parents[3] / "docs" / "reference.md"

# Packages whose options `maskft train` takes too.
PACKAGES = ("trl", "transformers", "accelerate")

_HEAD = """\
# Every command and option

<!-- Written by `python -m maskft_lab.cli.reference` from the parsers. Change the help of the option instead. -->

`maskft COMMAND --help` shows the same in a terminal. Options have two dashes and underscores; a list has its values
after one another: `--mask_layers_to_transform 20 21`.
"""
_ABOUT_TRAIN = """\
Options come from a recipe (`maskft train RECIPE.yaml`: lines of `name: value`) and from flags, which win. With several
processes, the options of `accelerate launch` are taken too, and `--accelerate_config`: fsdp2, multi_gpu, or a file.
`maskft train --help` shows those that most people set.
"""
_OF_TRL = "### Options of TRL and transformers"
_ABOUT_TRL = "As of {}. A default that maskft changes is the one shown; those that it refuses are left out."


def write() -> None:
    """Write all files."""
    for file, text in files().items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}")


def files() -> dict[Path, str]:
    """File -> content."""
    from maskft.training.launch import launch_options
    from maskft.training.options import help_text, make_parser

    # Every name that the parser of `maskft train` takes, for early.check_training.
    names = {"config", "help", "help_all"}
    names.update(launch_options())
    for action in make_parser()._actions:
        names.add(action.dest)
        # Every spelling: transformers adds one with dashes, and one with `no_` to options that are on by default.
        names.update(option.lstrip("-") for option in action.option_strings)
    listed = {
        "versions": installed_versions(PACKAGES),
        "options": sorted(names),
    }
    return {
        # The page for people, then the help of parsers that need torch, then the names for checks without them.
        PAGE: page(),
        HELP / "train.txt": help_text() + "\n",
        HELP / "evaluate.txt": _evaluate_help(),
        TRAIN_OPTIONS: json.dumps(listed, indent=1) + "\n",
    }


def _evaluate_help() -> str:
    from ..evaluation.command_line import make_parser

    parser = make_parser()
    # A fixed width: by default it is the width of the terminal in which the file is written.
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100)
    return parser.format_help()


def page() -> str:
    """The page, in Markdown."""
    sections = [_HEAD]
    # In the order of `maskft --help`
    for name, text in COMMANDS.items():
        sections.append(f"## maskft {name}\n")
        # Its options are in our groups, since most of them are TRL's.
        if name == "train":
            sections.append(f"{text[:1].upper()}{text[1:]}. {_ABOUT_TRAIN}")
            sections += _train_sections()
            continue
        for parser in _parsers(name):
            is_first = parser.prog == f"maskft {name}"
            sections += _sections(parser, is_first)
    return "\n".join(sections)


def _parsers(name: str) -> list[argparse.ArgumentParser]:
    """The parsers of a command; ``maskft report`` has two."""
    # The parser of an evaluation is in the room of evaluation, since a study uses it too.
    if name == "evaluate":
        from ..evaluation.command_line import make_parser as evaluate_parser

        return [evaluate_parser()]
    module = importlib.import_module(f".{name}", __package__)
    if name == "report":
        return [module.make_parser(), module.make_tables_parser()]
    if hasattr(module, "make_parser"):
        return [module.make_parser()]
    return [make_parser(module, name)]


def _sections(parser: argparse.ArgumentParser, is_first: bool) -> Iterator[str]:
    if not is_first:
        yield f"### {parser.prog}\n"
    yield f"{_text(parser.description)}\n"
    if parser.epilog:
        yield f"{_text(parser.epilog)}\n"
    # argparse has no public list of groups, nor of the options in one.
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if _is_shown(action)]
        if not actions:
            continue
        # The titles that argparse gives to arguments and options without a group.
        is_named = group.title not in ("positional arguments", "options")
        if is_named:
            heading = f"**{group.title}.** {_text(group.description)}"
            yield heading.rstrip() + "\n"
        yield _table(actions)


def _is_shown(action: argparse.Action) -> bool:
    return action.dest != "help" and action.help != argparse.SUPPRESS


def _train_sections() -> Iterator[str]:
    import dataclasses

    from maskft.data.arguments import DataArguments
    from maskft.training.arguments import TrainingArguments
    from maskft.training.method_arguments import MaskArguments, MethodArguments
    from maskft.training.options import make_parser

    # Of two actions of one name the first: argparse adds --no_gradient_checkpointing after --gradient_checkpointing.
    actions: dict[str, argparse.Action] = {}
    for action in make_parser()._actions:
        actions.setdefault(action.dest, action)

    # The annotations of the class itself, without the fields that it inherits from TRL's.
    own_training = [name for name in TrainingArguments.__annotations__ if name in actions]
    groups = {
        "Method": [field.name for field in dataclasses.fields(MethodArguments)],
        "Mask": [field.name for field in dataclasses.fields(MaskArguments)],
        "Data": [field.name for field in dataclasses.fields(DataArguments)],
        "Training, with a default or meaning of maskft": own_training,
    }
    # Options in one of our tables; the last table has all others.
    seen: set[str] = set()
    for title, names in groups.items():
        yield f"### {title}\n"
        yield _table(actions[name] for name in names if name in actions)
        seen.update(names)

    yield _OF_TRL + "\n"
    versions = [f"{name} {version}" for name, version in installed_versions(PACKAGES).items()]
    yield _ABOUT_TRL.format(", ".join(versions)) + "\n"
    others = sorted(actions.keys() - seen)
    yield _table(actions[name] for name in others if _is_shown(actions[name]))


def without_trl(text: str) -> str:
    """The page without the options of TRL, which differ from version to version."""
    before, _, after = text.partition(_OF_TRL)
    # There is one: train is not the last command.
    next_command = after.find("\n## ")
    return before + after[next_command:]


# Tables


def _table(actions: Iterable[argparse.Action]) -> str:
    lines = [
        "| option | value | default | meaning |",
        "|---|---|---|---|",
    ]
    for action in actions:
        cells = " | ".join(_cells(action))
        lines.append(f"| {cells} |")
    return "\n".join(lines) + "\n"


def _cells(action: argparse.Action) -> tuple[str, str, str, str]:
    # transformers adds --learning-rate beside --learning_rate: the one with underscores is shown.
    names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
    has_short_name = len(names) > 0 and len(names[0]) == 2
    num_shown = 2 if has_short_name else 1  # -o, --output
    option = ", ".join(f"`{name}`" for name in names[:num_shown])
    if not option:
        option = f"`{action.metavar or action.dest}`"  # a positional argument

    # A default in the help's own words goes before that of the parser.
    text = (action.help or "").replace("%%", "%")
    default = _default(action)
    stated = DEFAULT.search(text)
    if stated:
        text = text[: stated.start()]
        default = stated["default"].replace("%(default)s", default)
    return option, _value(action), _text(default), _text(text)


def _default(action: argparse.Action) -> str:
    if not has_default(action):
        return ""
    return str(_plain(action.default))


def _plain(value: Any) -> Any:
    """The value that is typed on the command line; transformers has enums as choices and defaults."""
    return getattr(value, "value", value)


def _value(action: argparse.Action) -> str:
    """The values that an option takes; empty for a switch without value, and for one positional argument."""
    is_list = action.nargs in ("+", "*")
    # A switch: its name alone turns it on.
    if isinstance(action, argparse._StoreTrueAction):
        return ""
    if action.choices:
        choices = [str(_plain(choice)) for choice in action.choices]
        return _text(", ".join(choices))
    if not action.option_strings:
        return "one or more" if is_list else ""
    name = _name_of_type(action.type)
    return f"{name} ..." if is_list else name


def _name_of_type(kind: Any) -> str:
    # Of `float | None` the parts.
    kinds = get_args(kind) or (kind,)
    for each in kinds:
        # bool, our `true_or_false`, and the functions by which transformers parses a bool.
        if "bool" in repr(each) or "true" in repr(each):
            return "true, false"
    # By name: TRL wraps the type of an option that may be None into a function of the same name.
    names = [getattr(each, "__name__", "") for each in kinds]
    if "float" in names:
        return "number"
    if "int" in names:
        return "integer"
    return "text"


def _text(text: str | None) -> str:
    """One line that Markdown shows as it is."""
    words = (text or "").split()
    text = " ".join(words)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    write()
