"""A short training that a test changes a few options of."""

import json

import pytest

from maskft_lab.cli.main import main


@pytest.fixture
def text(tmp_path):
    """Rows of plain text, in the letters of the tiny tokenizer."""
    file = tmp_path / "text.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": f"{a}*{b}={a * b} and {b}*{a}={a * b}"}) for a in range(6) for b in range(8))
    )
    return file


@pytest.fixture
def words(base, data, tmp_path):
    """The command line of a training on the sums; an option that is None is left out."""

    def words(name="out", **changes):
        settings = {
            "model_name_or_path": base, "dataset_name": data, "output_dir": tmp_path / name, "eval_split_size": 16,
            "max_steps": 2, "per_device_train_batch_size": 4, "eval_steps": 2, "save_steps": 2,
            "learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False,
        }  # fmt: skip
        given = {key: value for key, value in {**settings, **changes}.items() if value is not None}
        parts = ([f"--{key}", *(value if isinstance(value, list) else [value])] for key, value in given.items())
        return ["train", *(str(word) for part in parts for word in part)]

    return words


@pytest.fixture
def call(words, capsys):
    """Train on the sums; returns exit status and stderr on one line."""

    def call(name="out", **changes):
        capsys.readouterr()
        status = main(words(name, **changes))
        return status, " ".join(capsys.readouterr().err.split())

    return call
