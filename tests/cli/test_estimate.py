"""``maskft estimate`` as a command: table, JSON, recipe with flags on top, and mistakes in one line."""

import json

import pytest

from maskft_lab.cli.main import main


def call(words, capsys):
    capsys.readouterr()
    status = main(["estimate", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def recipe(base, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model_name_or_path: {base}\nmax_steps: 7\nmax_length: 32\nper_device_train_batch_size: 2\n"
        "gradient_checkpointing: false\nmask_layers_to_transform: [1]\n"
    )
    return file


def test_table_and_json_with_flags_on_top(recipe, base, capsys):
    """A configuration takes the place of the model, which need not be there."""
    status, out, err = call(["--config", recipe, "--device", "cpu"], capsys)
    assert status == 0, err
    assert all(text in out for text in ("process", "scores", "total"))
    recipe.write_text(recipe.read_text().replace(str(base), "runs/not-there-yet"))
    status, _, err = call(["--config", recipe, "--format", "json"], capsys)
    assert status == 2 and "runs/not-there-yet" in err
    words = ["--config", recipe, "--format", "json", "--model_name_or_path", base / "config.json"]
    result = json.loads(call([*words, "--max_length", 256, "--device", "cuda", "--device_memory_gb", 1.2], capsys)[1])
    assert result["num_masked"] > 0 and result["largest_micro_batch"] >= 1
    assert sum(result["memory"].values()) == result["peak_bytes"]


def test_the_largest_batch_that_is_tried_is_told_as_that(recipe, capsys):
    _, out, _ = call(["--config", recipe, "--device", "cpu", "--device_memory_gb", 1000], capsys)
    assert "largest per_device_train_batch_size: 1024 or more" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask_layers_to_transform", "5"], "the model has layers 0 to 2"),
        (["--device_memory_gb", "0.001"], "too small for micro-batch 1"),
        (["--device_memory_gb", "nan"], "device_memory_gb is nan; give a number of GB"),
        (["--device_memory_gb", "1e300"], "device_memory_gb is 1e+300; give a number of GB"),
        (["--device_memory_gb", "much"], "invalid float value"),
        (["--learning_rat", "1"], "unknown option --learning_rat (did you mean 'learning_rate'?)"),
    ],
)
def test_mistakes_are_one_line(words, message, recipe, capsys):
    status, out, err = call(["--config", recipe, "--format", "json", *words], capsys)
    lines = [line for line in err.splitlines() if line.startswith("maskft: error: ")]
    assert status == 2 and out == "" and len(lines) == 1 and message in lines[0]
