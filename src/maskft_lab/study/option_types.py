"""Types of the options in a recipe: the words that commands get hide that ``"8"`` is a text and ``[8]`` a list."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maskft.data.arguments import DataArguments
from maskft.training.options import IN_A_RECIPE, option_hints
from maskft_common.errors import UserError
from maskft_common.method_options import TAKE_NO
from maskft_common.value_check import check_value

from ..evaluation.evaluation_arguments import EvaluationArguments
from .recipe import CURRENT_RATE, Data, Method

# An option in the file: where, its name, its value.
_Given = tuple[str, str, Any]


def check_option_types(content: Any, source: str | Path) -> None:
    """Check the type of every option in a recipe; names that are no options are left to later checks.

    Args:
        content: The content of the file; sections of a wrong type are left to pydantic.
        source: The file, for errors.

    Raises:
        UserError: For the first value of a wrong type.
    """
    of_evaluation = typing.get_type_hints(DataArguments) | typing.get_type_hints(EvaluationArguments) | IN_A_RECIPE
    of_evaluation["tasks"] = str | list[str] | None
    _check(_training_options(content), option_hints(), source)
    _check(_evaluation_options(content), of_evaluation, source)


def _check(
    options: Iterator[_Given],
    hints: Mapping[str, Any],
    source: str | Path,
) -> None:
    for where, name, value in options:
        is_no = value is False and name in TAKE_NO  # as YAML reads a plain `no`
        is_current = name == "learning_rate" and value == CURRENT_RATE
        # Null takes back what another section gives.
        if name not in hints or value is None or is_no or is_current:
            continue
        try:
            check_value(f"{where}.{name}", value, hints[name])
        except UserError as error:
            raise UserError(f"{source}: {error}") from None


def _training_options(content: Any) -> Iterator[_Given]:
    """Options of ``maskft train``, one of a grid or of ``tune`` for each of its values."""
    for name, value in _mapping(content, "train").items():
        yield "train", name, value
    yield from _of_sections(content, "data", Data)
    yield from _of_sections(content, "methods", Method)

    for method, section in _mapping(content, "methods").items():
        for name, values in _mapping(section, "tune").items():
            yield from _each(f"methods.{method}.tune", name, values)
    for key, values in _mapping(content, "grid").items():
        _, _, name = key.rpartition(".")  # METHOD.OPTION
        yield from _each("grid", name, values)


def _of_sections(
    content: Any,
    name: str,
    model: type[Data] | type[Method],
) -> Iterator[_Given]:
    """Options below each name of a section, without the keys that are fields of the section's own model."""
    own = {field.alias or key for key, field in model.model_fields.items()}
    for part, section in _mapping(content, name).items():
        for key, value in _mapping({part: section}, part).items():
            if key not in own:
                yield f"{name}.{part}", key, value


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
            yield where, name, value
        for name, value in _mapping(section, "heldout").items():
            yield f"{where}.heldout", name, value


def _mapping(content: Any, name: str) -> dict[str, Any]:
    """A section of the content; empty if it is missing or of a wrong type."""
    section = content.get(name) if isinstance(content, dict) else None
    return section if isinstance(section, dict) else {}
