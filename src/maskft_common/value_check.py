"""Whether a value of a YAML file fits the annotation of its option; argparse checks texts alone."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any

from .errors import UserError

# What a value of a type is called in errors.
_WORDS = {
    Any: "values",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}
_PLURAL = {
    "a whole number": "whole numbers",
    "a number": "numbers",
}


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise if a value does not fit.

    Args:
        name: The option, for the error; the place in the file may be before it.
        value: Its value, as YAML gives it: text, a number, true, false, null, a list or a mapping.
        hint: Its annotation, such as ``list[str] | None``.

    Raises:
        UserError: What the value is, and what it must be.
    """
    if fits(value, hint):
        return
    if value == "":
        raise UserError(f"{name} is empty; give it a value, or leave the line out")
    raise UserError(f"{name} is {value!r}; it must be {in_words(hint)}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation, with everything inside it; an unknown type fits nothing."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, UnionType):
        return any(fits(value, part) for part in arguments)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if hint is dict or origin in (dict, Mapping):
        # Names are text, see yaml_file.py.
        of_value = arguments[1] if arguments else Any
        return isinstance(value, dict) and all(fits(part, of_value) for part in value.values())
    if origin in (list, Sequence):
        # As on a command line, one value is a list of one.
        items = value if isinstance(value, list) else [value]
        return all(fits(item, arguments[0]) for item in items)
    if hint in (NoneType, None):
        return value is None
    if hint is str:
        # An empty one is a variable of a template that was not set.
        return isinstance(value, str) and value.strip() != ""
    if _is_enum(hint):
        return isinstance(value, str) and value in [choice.value for choice in hint]
    # A bool is an int in Python, and no number here; a whole number is a float, too.
    if hint is float:
        return type(value) in (int, float)
    return hint in (bool, int) and type(value) is hint


def in_words(hint: Any) -> str:
    """What a value of an annotation must be, such as ``text or a list of text``; null is left out."""
    # Without repeats, in their order.
    return " or ".join(dict.fromkeys(_kinds(hint)))


def _kinds(hint: Any) -> list[str]:
    """Each kind of value that an annotation takes, in words: text first, lists last."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        # Names of an enum are text, and which ones is said where they are read.
        parts = [part for part in arguments if part is not NoneType and not (_is_enum(part) and str in arguments)]
        kinds = [kind for part in parts for kind in _kinds(part)]
        return sorted(kinds, key=lambda kind: (kind.startswith("a list of"), kind != "text"))
    if origin is typing.Literal:
        return [f"one of {', '.join(str(choice) for choice in arguments)}"]
    if hint is dict or origin in (dict, Mapping):
        of_value = in_words(arguments[1]) if arguments else "values"
        return [f"a mapping of names to {_PLURAL.get(of_value, of_value)}"]
    if origin in (list, Sequence):
        item = in_words(arguments[0])
        of_items = "such" if " or " in item else _PLURAL.get(item, item)
        return [*_kinds(arguments[0]), f"a list of {of_items}"]
    if _is_enum(hint):
        return [f"one of {', '.join(str(choice.value) for choice in hint)}"]
    return [_WORDS.get(hint, "left out: a file cannot give it")]


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)
