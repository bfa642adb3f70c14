"""Typed files: a mistake is one line with its place."""

import pytest
from pydantic import Field

from maskft.errors import UserError
from maskft.files import FileModel, read_model


class Method(FileModel):
    rate: float = Field(gt=0)
    layers: list[int] | None = None


class Recipe(FileModel):
    name: str
    methods: dict[str, Method] = {}
    base: str | Method | None = None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "r.yaml: name is missing"),
        ({"name": "x", "method": {}}, r"r.yaml: unknown key 'method' \(did you mean 'methods'\?\); there are name"),
        ({"name": "x", "methods": {"a": {"rate": 1, "layer": [0]}}}, r"unknown key 'methods.a.layer' .*'layers'"),
        ({"name": "x", "methods": {"a": {"rate": -1.0}}}, "methods.a.rate is -1.0: input should be greater than 0"),
        ({"name": "x", "methods": {"a": {"rate": float("nan")}}}, "methods.a.rate is nan: .* finite"),
        ({"name": 3}, "name is 3: input should be a valid string"),
        ([], "input should be a valid dictionary"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(content, message):
    with pytest.raises(UserError, match=message) as error:
        read_model(Recipe, content, "r.yaml")
    assert "\n" not in str(error.value)


def test_what_is_right_is_returned_typed():
    recipe = read_model(Recipe, {"name": "x", "methods": {"a": {"rate": 1, "layers": [0, 1]}}}, "r.yaml")
    assert recipe.methods["a"].layers == [0, 1] and recipe.methods["a"].rate == 1.0
