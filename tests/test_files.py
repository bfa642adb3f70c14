"""Typed files: a mistake is one line with its place."""

import re

import pytest
from pydantic import Field

from maskft_common.errors import UserError
from maskft_common.files import append_to, read_json, size, whole_folder, write_text
from maskft_common.locks import held
from maskft_common.schema import FileModel, read_model
from maskft_common.yaml_file import read_yaml
from maskft_lab.cli.main import main


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
        ({"name": "x", "methods": {"a\nb": 1}}, r"r.yaml: methods.a\\nb is 1: "),
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


@pytest.mark.parametrize(
    ("text", "message"), [("a: 1\nb: 2\na: 3", "line 3: two entries are named 'a'"), ("[" * 5000, "is not YAML")]
)
def test_recipes_that_are_refused(text, message, tmp_path, capsys):
    """Each through the reader of studies and through that of training."""
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_yaml(file)
    assert main(["train", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_json_that_is_a_bomb(tmp_path):
    file = tmp_path / "adapter_config.json"
    for text, message in (("[" * 100_000, "is not JSON"), ("{", "is not JSON"), ("1" * 5000, "is not JSON")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_json(file)
    with file.open("wb") as sparse:
        sparse.truncate(2**30)
    with pytest.raises(UserError, match="has more than 64 MiB"):
        read_json(file)


def test_bytes_are_told_in_units_that_say_something():
    assert [size(n) for n in (0, 5e6, 3.21e10)] == ["0 bytes", "5 MB", "32.1 GB"]


def test_a_folder_that_is_made_whole_takes_no_name_that_is_there(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("kept")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial"]
    with whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
    assert (tmp_path / "out.partial" / "mine").read_text() == "kept"


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "answers.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic link"):
        append_to(tmp_path / "answers.jsonl")
    write_text(tmp_path / "answers.jsonl", "new")
    assert (tmp_path / "mine").read_text() == "kept" and (tmp_path / "answers.jsonl").read_text() == "new"


@pytest.mark.parametrize("place", ["log.txt", "runs/full-s0/log.txt", "results/full/result.json"])
def test_an_output_folder_with_a_link_is_refused(place, tmp_path):
    link = tmp_path / "out" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link and no file of ours"), held(tmp_path / "out", "lock", 0.0, "run"):
        raise AssertionError
    assert not (tmp_path / "elsewhere").exists()


def test_an_output_folder_that_is_a_link_leads_to_a_folder(base, data, tmp_path, capsys):
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("nowhere", "loop"):
        words = ["--output_dir", str(tmp_path / name)]
        assert main(["merge", str(base), *words]) == 2
        assert main(["evaluate", "--model_name_or_path", str(base), "--dataset_name", str(data), *words]) == 2
        assert capsys.readouterr().err.count("is a link that leads to no folder") == 2
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with held(tmp_path / "runs", "lock", 0.0, "run"):
        assert (tmp_path / "disk" / "lock").is_file()
