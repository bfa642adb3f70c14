"""Typed files: pydantic models of files, and one line for the first mistake in one."""

from __future__ import annotations

import os
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError, did_you_mean, printable

Model = TypeVar("Model", bound=BaseModel)


def _name(text: str) -> str:
    if not text.strip() or printable(text) != text:
        raise ValueError(f"name {printable(text)!r} is empty or contains non-printable characters")
    return text


Name = Annotated[str, Field(min_length=1), AfterValidator(_name)]


class FileModel(BaseModel):
    """Base of the models of our files: unknown keys and NaN are errors, and values are not changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_model(model: type[Model], content: Any, source: str | os.PathLike, remedy: str = "") -> Model:
    """Return ``content`` (parsed JSON or YAML) as ``model``.

    Raises:
        UserError: For the first mistake, in one line: the file, the place in it, the value, and what to write.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = first_problem(error, model)
    raise UserError(f"{os.fspath(source)}: {problem}{'; ' + remedy if remedy else ''}")


def first_problem(error: ValidationError, kind: Any) -> str:
    """Return the first mistake in content that does not fit ``kind``: the place, the value, and the remedy."""
    problem = error.errors(include_url=False)[0]
    place = printable(".".join(str(part) for part in problem["loc"] if not _is_choice_of_union(part)))
    where = place or "the content"
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])
        known = _field_names(kind, problem["loc"][:-1])
        return f"unknown key {place!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{place} is missing"
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "value_error":
        return f"{where} is {_shown(problem['input'])}: {text[:1].lower()}{text[1:]}"
    return text if not place or text.startswith(place) else f"{place}: {text}"


def _is_choice_of_union(part: str | int) -> bool:
    """Whether a part of a place names a branch of a union (``function-after[...]``, a type), not a key."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool", "none"))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _field_names(kind: Any, place: tuple) -> list[str]:
    """Names of the fields of the model at ``place`` below ``kind``, a model or a type made of models."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not place:
            return [field.alias or name for name, field in kind.model_fields.items()]
        below = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
        return _field_names(below.get(place[0]), place[1:])
    # A key of a dict or an index of a list takes one part of the place, a union takes none.
    rest = place[1:] if get_origin(kind) in (dict, list) else place
    return next((names for part in get_args(kind) if (names := _field_names(part, rest))), [])
