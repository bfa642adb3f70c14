"""Parsers of commands: mistakes are one line, in scripts too, and options come from the fields of a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Container, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import UserError, did_you_mean, install_hint, printable

Arguments = TypeVar("Arguments")

# A default at the end of a help text.
DEFAULT = re.compile(r"\s*\(default: (?P<default>.*)\)\.?$")


class OneLineParser(argparse.ArgumentParser):
    """Argument parser whose errors are one line and suggest the option that was meant.

    Args:
        prog: Name of the command, e.g. ``maskft merge``.
        hints: Option or positional that people give by mistake -> the remedy.
        **options: Of ``argparse.ArgumentParser``.
    """

    def __init__(
        self,
        prog: str,
        hints: dict[str, str] | None = None,
        **options: Any,
    ):
        # argparse would take --output_di for --output_dir without a word.
        super().__init__(prog, allow_abbrev=False, **options)
        self.hints = hints or {}

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, after a look for mistakes of which it would say nothing, or something else."""
        words = sys.argv[1:] if args is None else list(args)
        # argparse would first ask for the option that was meant, if that has to be given.
        for word in words:
            option = word.split("=")[0]
            if word.startswith("-") and option in self.hints:
                self.error(f"unrecognized arguments: {word}")
        check_lists(self, words)
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        """Raise instead of printing usage and exiting."""
        # argparse lists all words that it does not know; the first one is likely the mistake.
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            words = message.removeprefix(prefix).split()
            # There is no word if the argument is empty, as "$NAME" is in a shell where NAME is not set.
            message = self._unknown(words[0] if words else "")
        raise UserError(f"{message}; see {self.prog} --help")

    def _unknown(self, word: str) -> str:
        # The word may be --NAME=VALUE.
        option = word.split("=")[0]
        if option in self.hints:
            return f"{self.prog} has no option {option}: {self.hints[option]}"
        if not word.startswith("-"):
            return f"unexpected argument {word!r}"
        known = []
        for action in self._actions:
            known += action.option_strings
        return f"unknown option {word}{did_you_mean(option, known)}"


def check_lists(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Raise if an option of several values is given twice: argparse would drop the first values without a word.

    Args:
        parser: Its ``error`` says it.
        words: Words of the command line.
    """
    # argparse has no public list of a parser's options.
    for action in parser._actions:
        if action.nargs not in ("+", "*"):
            continue
        given = [word for word in words if word.split("=")[0] in action.option_strings]
        if len(given) > 1:
            option = given[0].split("=")[0]
            parser.error(f"{option} is given {len(given)} times: write all its values after one {option}")


def with_default(text: str, default: Any = "%(default)s") -> str:
    """A help text that ends in ``(default: X)``, the one way in which help states a default.

    Args:
        text: The help of an option; returned as it is if it states a default.
        default: Its default in words; by default the parser's own, which argparse fills in.
    """
    if DEFAULT.search(text):
        return text
    return f"{text} (default: {default})"


def has_default(action: argparse.Action) -> bool:
    """Whether help has a default to state: an option that is not set, or a switch that is off, has none."""
    if not action.option_strings:  # a positional
        return False
    is_unset = action.default is None or action.default is False
    return not is_unset and action.default != argparse.SUPPRESS


def add_options(parser, arguments: type, leave_out: Container[str] = ()) -> None:
    """Give ``parser`` an option for every field of the dataclass ``arguments``, apart from those in ``leave_out``.

    A switch (a bool that is false by default) may be given with or without a value.
    """
    # Annotations are texts in modules with `from __future__ import annotations`; this makes types of them.
    hints = get_type_hints(arguments)
    for field in dataclasses.fields(arguments):
        if field.name in leave_out:
            continue
        keywords = _keywords(hints[field.name])
        action = parser.add_argument(
            f"--{field.name}",
            default=field.default,
            help=field.metadata["help"],
            **keywords,
        )
        if has_default(action):
            action.help = with_default(action.help)


def read_options(arguments: type[Arguments], namespace: argparse.Namespace) -> Arguments:
    """Build the dataclass ``arguments`` from parsed options; options that are absent or None keep its default."""
    # Absent: a command may leave out options of the dataclass, see add_options.
    values = {}
    for field in dataclasses.fields(arguments):
        value = getattr(namespace, field.name, None)
        if value is not None:
            values[field.name] = value
    return arguments(**values)


def _keywords(hint: Any) -> dict[str, Any]:
    """Keywords of ``add_argument`` for a type."""
    # A switch: --NAME alone is true.
    if hint is bool:
        return {
            "type": true_or_false,
            "nargs": "?",
            "const": True,
            "metavar": "true|false",
        }

    # X | None is X; other unions are read as text.
    if get_origin(hint) is UnionType:
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        hint = kinds[0] if len(kinds) == 1 else str

    # A bool that may also be None is no switch: its value has to be given.
    if hint is bool:
        return {"type": true_or_false, "metavar": "true|false"}

    # Literal: one of several texts. Sequence: one or more values. Anything else: one value.
    origin = get_origin(hint)
    if origin is Literal:
        return {"choices": get_args(hint)}
    if origin is Sequence:
        (element,) = get_args(hint)
        return {"type": element, "nargs": "+"}
    return {"type": hint}


def true_or_false(text: str) -> bool:
    """The type of a switch."""
    # bool("false") would be True. argparse turns this error into a message with the name of the option.
    lower = text.lower()
    if lower not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return lower == "true"


def positive(text: str) -> int:
    """The type of a number of rows, rounds or threads: a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def not_empty(text: str) -> str:
    """The type of a name or a folder: an empty text, as of a variable that is not set in a script, is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: name one, or leave the option out")
    return text


def run_script(main: Callable[[], None], extra: str | None = None) -> None:
    """Run the ``main`` of a script; a user's mistake ends it with one line and status 2, as it ends a command.

    Args:
        main: The script.
        extra: maskft's extra that has the packages which the script imports in its functions.
    """
    try:
        main()
    except BrokenPipeError:
        # Of `script | head`: nobody reads the line.
        raise
    except (UserError, OSError, ModuleNotFoundError) as error:
        message = str(error)
        if isinstance(error, ModuleNotFoundError):
            message = f"{error.name} is not installed"
            if extra is not None:
                message += f"; {install_hint(extra)}"
        line = " ".join(message.split())
        print(f"error: {printable(line)}", file=sys.stderr)
        sys.exit(2)
