"""Typed files: pydantic models of files, and one line for the first mistake in one."""

from __future__ import annotations

import os
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError, did_you_mean, printable

Model = TypeVar("Model", bound=BaseModel)


def _name(text: str) -> str:
    # A name is printed, and two names that look alike would be confused.
    if not text.strip() or printable(text) != text:
        raise ValueError(f"name {printable(text)!r} is empty or contains non-printable characters")
    return text


Name = Annotated[str, Field(min_length=1), AfterValidator(_name)]


class FileModel(BaseModel):
    """Base of the models of our files: unknown keys and NaN are errors, and values are not changed once read."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )


def read_model(
    model: type[Model],
    content: Any,
    source: str | os.PathLike,
    remedy: str = "",
) -> Model:
    """Return ``content`` (parsed JSON or YAML) as ``model``.

    Args:
        model: The pydantic model of the file.
        content: Its content.
        source: The file, for errors.
        remedy: Added to errors.

    Raises:
        UserError: For the first mistake, in one line: the file, the place in it, the value, and the remedy.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = first_problem(error, model)
    # Raised outside of the block, so that pydantic's own message, of many lines, is not shown as the cause.
    advice = f"; {remedy}" if remedy else ""
    raise UserError(f"{os.fspath(source)}: {problem}{advice}")


def first_problem(error: ValidationError, kind: Any) -> str:
    """Return the first mistake in content that does not fit ``kind``: the place, the value, and the remedy."""
    # One mistake is enough for one line. For a union pydantic reports the failure of each branch, in their order.
    problems = error.errors(include_url=False)
    problem = problems[0]
    if problem["type"] == "missing":
        # An unknown key beside it is most likely this one, misspelt.
        for other in problems:
            if other["type"] == "extra_forbidden" and other["loc"][:-1] == problem["loc"][:-1]:
                problem = other
                break
    parts = [str(part) for part in problem["loc"] if not _is_choice_of_union(part)]
    # Keys come from the file, and may hold control characters.
    place = printable(".".join(parts))

    if problem["type"] == "extra_forbidden":
        *parents, name = problem["loc"]
        known = _field_names(kind, tuple(parents))
        hint = did_you_mean(str(name), known)
        return f"unknown key {place!r}{hint}; there are {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{place} is missing"

    # pydantic's own message, such as "Input should be ...", says nothing of the value.
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "value_error":
        where = place or "the content"
        text = text[:1].lower() + text[1:]
        return f"{where} is {_shown(problem['input'])}: {text}"
    # One of our validators, which may name the place itself.
    if not place or text.startswith(place):
        return text
    return f"{place}: {text}"


def _is_choice_of_union(part: str | int) -> bool:
    """Whether a part of a place names a branch of a union (``function-after[...]``, a type), not a key.

    pydantic puts the branch that it tried between the keys, where a reader of the file has nothing to look for.
    """
    if not isinstance(part, str):  # the index of a list
        return False
    return "[" in part or part in ("str", "int", "float", "bool", "none")


def _shown(value: Any) -> str:
    # Shortened: a value may be a whole block of a recipe.
    text = repr(value)
    if len(text) <= 60:
        return text
    return text[:57] + "..."


def _field_names(kind: Any, place: tuple) -> list[str]:
    """Names of the fields of the model at ``place`` below ``kind``, a model or a type made of models."""
    # A model: the names are its own, or those below one of its fields.
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        annotations = {}
        for name, field in kind.model_fields.items():
            # In the file a field goes by its alias.
            annotations[field.alias or name] = field.annotation
        if not place:
            return list(annotations)
        return _field_names(annotations.get(place[0]), place[1:])

    # A key of a dict or an index of a list takes one part of the place, a union takes none.
    rest = place[1:] if get_origin(kind) in (dict, list) else place
    for part in get_args(kind):
        # For a union: the first branch that is a model. Other types, such as the keys of a dict, have no fields.
        names = _field_names(part, rest)
        if names:
            return names
    return []
