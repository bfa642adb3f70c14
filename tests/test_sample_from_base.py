"""examples/sample_from_base.py: its rows can be read by training as text to stay near to."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import GenerationConfig

from maskft.models import load_model
from maskft_common.errors import UserError

SCRIPT = Path(__file__).parents[1] / "examples" / "sample_from_base.py"


@pytest.fixture
def sample(base, monkeypatch):
    """Call the script with some options; returns the rows that it wrote."""
    spec = importlib.util.spec_from_file_location("sample_from_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(file, *options, **generation):
        def load(name, dtype):
            model = load_model(name, dtype)
            model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, **generation)
            return model

        monkeypatch.setattr(module, "load_model", load)
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


def test_the_rows_follow_the_base_s_own_distribution(sample, tmp_path):
    """Whatever its generation_config.json has: instruct models have filters, and often a penalty for repetition."""
    options = ("--num_rows", "8", "--num_tokens", "24")
    rows = sample(tmp_path / "new" / "a.jsonl", *options)
    settings = {"repetition_penalty": 20.0, "min_p": 0.9, "no_repeat_ngram_size": 1, "temperature": 0.1}
    assert sample(tmp_path / "b.jsonl", *options, do_sample=True, **settings) == rows


def test_a_file_is_not_written_over(sample, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        sample(file)
    assert file.read_text() == "mine"
