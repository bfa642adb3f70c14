"""Command-line options from a dataclass: its fields' names, types and defaults, and the help in their metadata."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Container, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Arguments = TypeVar("Arguments")


def add_options(parser, arguments: type, leave_out: Container[str] = ()) -> None:
    """Give ``parser`` an option for every field of the dataclass ``arguments``, apart from those in ``leave_out``.

    A switch (a bool that is false by default) may be given with or without a value.
    """
    hints = get_type_hints(arguments)
    for field in dataclasses.fields(arguments):
        if field.name in leave_out:
            continue
        text = field.metadata["help"]
        if field.default is not None and field.default is not False:
            text += " (default: %(default)s)"
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **_kind(hints[field.name]))


def read_options(arguments: type[Arguments], namespace: argparse.Namespace) -> Arguments:
    """Build the dataclass ``arguments`` from parsed options; those that are absent or None keep its own default."""
    values = {field.name: getattr(namespace, field.name, None) for field in dataclasses.fields(arguments)}
    return arguments(**{name: value for name, value in values.items() if value is not None})


def _kind(hint: Any) -> dict:
    """Keywords of ``add_argument`` for a type."""
    if hint is bool:
        return {"type": _true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
    if get_origin(hint) is UnionType:
        choices = [kind for kind in get_args(hint) if kind is not NoneType]
        hint = choices[0] if len(choices) == 1 else str
    if hint is bool:
        return {"type": _true_or_false, "metavar": "true|false"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is Sequence:
        return {"type": get_args(hint)[0], "nargs": "+"}
    return {"type": hint}


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"
