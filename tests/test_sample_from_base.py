"""examples/sample_from_base.py: its rows can be read by training as text to stay near to."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "sample_from_base.py"


@pytest.fixture
def sample(base, monkeypatch):
    """Call the script with some options; returns the rows that it wrote."""
    spec = importlib.util.spec_from_file_location("sample_from_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(file, *options):
        monkeypatch.setattr(sys, "argv", ["sample", str(base), str(file), *options])
        module.main()
        return [json.loads(line) for line in file.read_text().splitlines()]

    return call


def test_the_rows_are_texts_of_the_seed(sample, tmp_path):
    options = ("--num_rows", "40", "--num_tokens", "12")
    rows = sample(tmp_path / "a.jsonl", *options)
    assert 30 <= len(rows) <= 40
    assert all(row.keys() == {"text"} and row["text"].strip() for row in rows)
    # Sampled, not greedy: rows differ.
    assert len({row["text"] for row in rows}) > 30
    assert rows == sample(tmp_path / "b.jsonl", *options)
    assert rows != sample(tmp_path / "c.jsonl", *options, "--seed", "1")


def test_a_file_is_not_written_over(sample, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("mine")
    with pytest.raises(SystemExit, match="already exists"):
        sample(file)
    assert file.read_text() == "mine"
