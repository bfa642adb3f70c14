"""The models of ``maskft evaluate`` by position: adapters, or one model."""

import pytest

from maskft_common.errors import UserError
from maskft_common.files import write_text
from maskft_common.layout import ADAPTER_CONFIG
from maskft_lab.cli.evaluate import main
from maskft_lab.evaluation.command_line import make_parser, read


@pytest.fixture
def folders(tmp_path):
    for name in ("a", "b", "model"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / name / ADAPTER_CONFIG).write_text("{}")
    return {name: str(tmp_path / name) for name in ("a", "b", "model")}


def options(*words):
    return read(make_parser().parse_args([*words, "--output_dir", "out"]))[0]


def test_models_by_position(folders):
    both = options(folders["a"], folders["b"])
    assert both.adapter == [folders["a"], folders["b"]] and both.model_name_or_path is None
    over = options("none", folders["a"], folders["model"])
    assert (over.adapter, over.model_name_or_path) == (["none", folders["a"]], folders["model"])
    assert options("owner/name").model_name_or_path == "owner/name"
    assert options("--adapter", folders["a"]).adapter == [folders["a"]]


def test_models_that_are_given_twice(folders):
    with pytest.raises(UserError, match="as arguments and with --adapter"):
        options(folders["a"], "--adapter", folders["b"])
    for words in (("x", "y"), ("x", "--model_name_or_path", "y")):
        with pytest.raises(UserError, match="one model is evaluated at a time"):
            options(*words)


def test_the_home_folder_of_an_output(monkeypatch, tmp_path):
    """A shell leaves the ~ of --output_dir=~/results as it is, and a folder of that name was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    args = make_parser().parse_args(["owner/name", "--output_dir=~/results"])
    assert read(args)[0].output_dir == str(tmp_path / "results")
    write_text("~/table.md", "a table")
    assert (tmp_path / "table.md").read_text() == "a table"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset_name", "test.jsonl"], "dataset_name is about held-out rows, .*; write --tasks gsm8k,heldout, or"),
        (["--max_eval_samples", "5"], "max_eval_samples is about held-out rows"),
        (["--eval_split_size", "0.1"], "eval_split_size is about held-out rows"),
        (
            ["--reference_outputs", "a.json"],
            "reference_outputs is about alpaca_eval, .*--tasks gsm8k,alpaca_eval",
        ),
    ],
)
def test_options_of_tasks_that_are_not_evaluated(words, message):
    """The file was never measured, and the first rows were all of them."""
    with pytest.raises(UserError, match=message):
        options("a/model", "--tasks", "gsm8k", *words)


def test_missing_data_is_reported_before_the_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match="dataset_name is missing; name the data to measure on, or other --tasks"):
        main(["--model_name_or_path", "no-one/no-model", "--output_dir", str(tmp_path / "out")])
