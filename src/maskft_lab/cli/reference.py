"""All commands and options, from their parsers: ``docs/reference.md``, and the help texts that need torch to be made.

``python -m maskft_lab.cli.reference`` writes them after an option has changed; a test fails until then.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

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
_ABOUT_TRL = "As of {}. A default that maskft changes is the one shown."


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

    parser = make_parser()
    names = {name.lstrip("-") for action in parser._actions for name in action.option_strings}
    names |= {action.dest for action in parser._actions} | set(launch_options()) | {"config", "help", "help_all"}
    listed = {"versions": installed_versions(PACKAGES), "options": sorted(names)}
    return {
        PAGE: page(),
        HELP / "train.txt": help_text() + "\n",
        HELP / "evaluate.txt": _evaluate_help(),
        TRAIN_OPTIONS: json.dumps(listed, indent=1) + "\n",
    }


def _evaluate_help() -> str:
    from ..evaluation.command_line import make_parser

    parser = make_parser()
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100)
    return parser.format_help()


def page() -> str:
    """The page, in Markdown."""
    sections = [_HEAD]
    for name, text in COMMANDS.items():
        sections.append(f"## maskft {name}\n")
        if name == "train":
            sections += [f"{text[:1].upper()}{text[1:]}. {_ABOUT_TRAIN}", *_train_sections()]
        else:
            for parser in _parsers(name):
                sections += _sections(parser, is_first=parser.prog == f"maskft {name}")
    return "\n".join(sections)


def _parsers(name: str) -> list[argparse.ArgumentParser]:
    """The parsers of a command; ``maskft report`` has two."""
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
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if _is_shown(action)]
        if not actions:
            continue
        is_named = group.title not in ("positional arguments", "options", "optional arguments")
        if is_named:
            yield f"**{group.title}.** {_text(group.description)}".rstrip() + "\n"
        yield _table(actions)


def _is_shown(action: argparse.Action) -> bool:
    return action.dest != "help" and action.help != argparse.SUPPRESS


def _train_sections() -> Iterator[str]:
    import dataclasses

    from maskft.data.arguments import DataArguments
    from maskft.training.arguments import TrainingArguments
    from maskft.training.method_arguments import MaskArguments, MethodArguments
    from maskft.training.options import make_parser

    # The first of each name: argparse adds --no_gradient_checkpointing after --gradient_checkpointing.
    actions = {action.dest: action for action in reversed(make_parser()._actions)}
    own_training = [name for name in TrainingArguments.__annotations__ if name in actions]
    groups = {
        "Method": [field.name for field in dataclasses.fields(MethodArguments)],
        "Mask": [field.name for field in dataclasses.fields(MaskArguments)],
        "Data": [field.name for field in dataclasses.fields(DataArguments)],
        "Training, with a default or meaning of maskft": own_training,
    }
    seen: set[str] = set()
    for title, names in groups.items():
        yield f"### {title}\n"
        yield _table(actions[name] for name in names if name in actions)
        seen.update(names)

    yield _OF_TRL + "\n"
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions(PACKAGES).items())
    yield _ABOUT_TRL.format(versions) + "\n"
    others = sorted(actions.keys() - seen - {"help"})
    yield _table(actions[name] for name in others)


def without_trl(text: str) -> str:
    """The page without the options of TRL, which differ from version to version."""
    before, _, after = text.partition(_OF_TRL)
    return before + after[after.find("\n## ") :]


# Tables


def _table(actions: Iterable[argparse.Action]) -> str:
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(_cells(action))} |" for action in actions]
    return "\n".join(lines) + "\n"


def _cells(action: argparse.Action) -> tuple[str, str, str, str]:
    names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
    names = names[:2] if names and len(names[0]) == 2 else names[:1]  # -o, --output
    option = ", ".join(f"`{name}`" for name in names) or f"`{action.metavar or action.dest}`"

    text = (action.help or "").replace("%%", "%")
    found = DEFAULT.search(text)
    if found:
        text = text[: found.start()]
        default = found["default"].replace("%(default)s", _default(action))
    else:
        default = _default(action)
    return option, _value(action), _text(default), _text(text)


def _default(action: argparse.Action) -> str:
    value = getattr(action.default, "value", action.default)  # of an enum
    return f"{value}" if has_default(action) else ""


def _value(action: argparse.Action) -> str:
    if isinstance(action, argparse._StoreTrueAction):
        return ""
    if action.choices:
        return _text(", ".join(str(getattr(choice, "value", choice)) for choice in action.choices))
    if not action.option_strings:
        return "one or more" if action.nargs in ("+", "*") else ""
    kinds = get_args(action.type) or (action.type,)  # of `float | None`
    if any("bool" in repr(kind) or "true" in repr(kind) for kind in kinds):
        name = "true, false"
    elif float in kinds:
        name = "number"
    else:
        name = "integer" if int in kinds else "text"
    return f"{name} ..." if action.nargs in ("+", "*") else name


def _text(text: str | None) -> str:
    """One line that Markdown shows as it is."""
    text = " ".join((text or "").split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    write()
