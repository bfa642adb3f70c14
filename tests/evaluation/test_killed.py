"""Evaluations that are killed or stopped, given again, end as the undisturbed one."""

import json
import shlex
import shutil

import pytest

from killing import Forked, kill_ten_times, stop_forked_when
from maskft_common import layout
from maskft_lab.cli.main import main


@pytest.fixture
def words(base, data, tmp_path):
    """One answer at a time, each of many tokens."""
    options = {"model_name_or_path": base, "dataset_name": data, "batch_size": 1, "max_new_tokens": 24}
    options |= {"output_dir": tmp_path / "out", "as_chat": False}
    return ["evaluate", *(str(word) for key, value in options.items() for word in (f"--{key}", value))]


def answers_in(folder):
    return [json.loads(line) for line in (folder / layout.JOURNAL).read_text().splitlines()[:-1]]


def result_in(folder):
    result = json.loads((folder / layout.RESULT).read_text())
    return result["model"], result["tasks"]


def undisturbed(words, tmp_path):
    """The result of the evaluation when nothing stops it."""
    whole = tmp_path / "whole"
    assert main([str(whole) if word == str(tmp_path / "out") else word for word in words]) == 0
    return result_in(whole)


def test_an_evaluation_that_is_stopped_says_how_it_is_resumed(words, tmp_path):
    words = [*words, "--max_eval_samples", "20"]
    expected = undisturbed(words, tmp_path)
    out = shutil.copytree(tmp_path / "whole", tmp_path / "out")

    def has_answered_some():
        return (out / layout.JOURNAL).is_file() and len(answers_in(out)) > 4

    status, lines = stop_forked_when(has_answered_some, [*words, "--overwrite", "true"], tmp_path / "log")
    assert status == 143, lines
    assert lines[-2].startswith("maskft: stopped by SIGTERM;") and lines[-1] == shlex.join(["maskft", *words])
    assert not (out / layout.RESULT).exists()
    assert main(shlex.split(lines[-1])[1:]) == 0
    assert result_in(out) == expected


@pytest.mark.slow
def test_ten_kills_of_an_evaluation(words, tmp_path):
    expected = undisturbed(words, tmp_path)
    out = tmp_path / "out"

    def check():
        assert result_in(out) == expected

    def begin(words):
        return Forked(words, tmp_path / "log")

    kill_ten_times(words, out, 3.0, check, begin)
