"""Types of the options in a recipe: the words that commands get hide that ``"8"`` is a text and ``[8]`` a list."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maskft.data.arguments import DATA_NAMES, DataArguments
from maskft.training.options import IN_A_RECIPE, option_hints
from maskft_common.errors import UserError
from maskft_common.method_options import TAKE_NO
from maskft_common.value_check import check_value

from ..evaluation.evaluation_arguments import EvaluationArguments

# Options of which a command takes one text, and a recipe of `maskft train` more.
_AS_WORDS = dict.fromkeys(("report_to", "optim_target_modules", "fsdp", "trackio_static_space_id"), str | None)

# An option in the file: where, its name, its value.
_Given = tuple[str, str, Any]


def check_option_types(
    content: Any,
    source: str | Path,
    stands_for: Mapping[str, str],
) -> None:
    """Check the type of every option in a recipe; names that are no options are left to later checks.

    Args:
        content: The content of the file; sections of a wrong type are left to pydantic.
        source: The file, for errors.
        stands_for: Option -> a text that a study takes in place of its value.

    Raises:
        UserError: For the first value of a wrong type.
    """
    of_evaluation = typing.get_type_hints(DataArguments) | typing.get_type_hints(EvaluationArguments)
    for name in DATA_NAMES:
        of_evaluation[name] = IN_A_RECIPE[name]
    of_evaluation["tasks"] = str | list[str] | None
    of_training = option_hints() | _AS_WORDS
    given = [(*each, of_training) for each in _training_options(content)]
    given += [(*each, of_evaluation) for each in _evaluation_options(content)]
    for where, name, value, hints in given:
        is_no = value is False and name in TAKE_NO  # as YAML reads a plain `no`
        # Null takes back what another section gives.
        if name not in hints or value is None or is_no or value == stands_for.get(name):
            continue
        try:
            check_value(where, value, hints[name])
            _check_list(where, value)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None


def _check_list(where: str, value: Any) -> None:
    """Raise for a list that means something else as words of a command."""
    if value == []:  # a switch without a value is true
        raise UserError(f"{where} is an empty list; give it a value, or leave the line out")
    for item in value if isinstance(value, list) else [value]:
        is_option = isinstance(item, str) and item.startswith("-")
        if is_option and (item == "--" or isinstance(value, list)):
            raise UserError(f"{where} has {item!r}, which a command would take for an option; leave it out")


def _training_options(content: Any) -> Iterator[_Given]:
    """Options of ``maskft train``, one of a grid or of ``tune`` for each of its values."""
    for name, value in _mapping(content, "train").items():
        yield f"train.{name}", name, value
    for part in ("data", "methods"):
        sections = _mapping(content, part)
        for key in sections:
            section = _mapping(sections, key)
            # Keys of the section itself, such as `from`, are no options; `start_mask` is both, and text in both.
            for name, value in section.items():
                yield f"{part}.{key}.{name}", name, value
            # Only methods have it.
            for name, values in _mapping(section, "tune").items():
                yield from _each(f"{part}.{key}.tune.{name}", name, values)
    for key, values in _mapping(content, "grid").items():
        _, _, name = key.rpartition(".")  # METHOD.OPTION
        yield from _each(f"grid.{key}", name, values)


def _each(where: str, name: str, values: Any) -> Iterator[_Given]:
    """Each value of a list; `times_parent` is no list, and read by pydantic."""
    for value in values if isinstance(values, list) else []:
        yield where, name, value


def _evaluation_options(content: Any) -> Iterator[_Given]:
    """Options of ``maskft evaluate``: of the section, of its held-out rows, and of sets of earlier abilities."""
    sections = {"evaluation": _mapping(content, "evaluation")}
    for place, parent in (("evaluation", sections["evaluation"]), ("path", _mapping(content, "path"))):
        before = _mapping(parent, "before")
        for name in before:
            sections[f"{place}.before.{name}"] = _mapping(before, name)
    for where, section in sections.items():
        for name, value in section.items():
            yield f"{where}.{name}", name, value
        for name, value in _mapping(section, "heldout").items():
            yield f"{where}.heldout.{name}", name, value


def _mapping(content: Any, name: str) -> dict[str, Any]:
    """A section of the content; empty if it is missing or of a wrong type."""
    section = content.get(name) if isinstance(content, dict) else None
    return section if isinstance(section, dict) else {}
