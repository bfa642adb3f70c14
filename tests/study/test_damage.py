"""A finished study whose files were damaged says which."""

import json
import shutil

import pytest

from maskft_common import files, layout
from maskft_lab.cli.main import main
from maskft_lab.study.damage import damage_of_result, damage_of_run
from small_study import FULL, MASK, outcome, recipe, replace_commands, write


def test_a_damaged_study_stops_and_makes_again_what_is_removed(base, data, tmp_path, monkeypatch, capsys):
    """In this process, without a new interpreter for each command."""
    replace_commands(monkeypatch, lambda words, log: main(words[3:]))
    methods = {"full": {**FULL, "num_train_epochs": 1, "last": None}, "mask": {**MASK, "last": None}}
    file, out = write(tmp_path, recipe(base, data, methods)), tmp_path / "out"
    words = ["study", str(file), "--output_dir", str(out)]
    assert main(words) == 0
    whole = outcome(out)
    trained = {path: path.stat().st_mtime_ns for path in out.glob(f"{layout.RUNS}/mask-*/{layout.TRAINING}")}
    (weights,) = out.glob(f"{layout.RUNS}/full-*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    (result,) = out.glob(f"{layout.RESULTS}/mask-*/{layout.RESULT}")
    result.write_text(result.read_text()[:-100])
    for file, problem in (
        (weights, "full, seed 0: its model.safetensors differs from the file that was written"),
        (result, "not JSON"),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert problem in err and f"delete {str(file.parent)!r} to run it again" in err
        shutil.rmtree(file.parent)
    assert main(words) == 0
    assert outcome(out) == whole and trained == {path: path.stat().st_mtime_ns for path in trained}


def test_what_counts_as_damage(tmp_path):
    """Every file that the account names; neither logs nor what is added later."""
    record = {
        **dict.fromkeys(("study", "run", "method", "name", "model", "data"), "x"),
        **dict.fromkeys(("start", "match", "num_steps", "best_step", "best_heldout_loss", "learning_rate_at_best")),
        **{key: {} for key in ("settings", "models", "epochs", "tokens", "total_epochs", "total_tokens")},
        **dict.fromkeys(("train_time_s", "peak_memory_bytes")),
        "seed": 0,
    }
    account, weights = tmp_path / layout.RUN, tmp_path / "last" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    account.write_text(json.dumps(record | {"files": {"last/model.safetensors": files.digest(b"weights")}}))
    (tmp_path / layout.LOG).write_text("new")
    assert damage_of_run(tmp_path) is None
    weights.write_bytes(b"Weights")
    assert damage_of_run(tmp_path) == "its last/model.safetensors differs from the file that was written"
    weights.unlink()
    assert damage_of_run(tmp_path) == "its last/model.safetensors is missing"
    account.write_text(json.dumps(record))  # of an earlier version
    assert damage_of_run(tmp_path) is None
    account.write_text("")
    assert damage_of_run(tmp_path) == "its run.json cannot be read"
    (tmp_path / layout.RESULT).write_text("{")
    assert "not JSON" in damage_of_result(tmp_path / layout.RESULT)


@pytest.mark.parametrize("place", [layout.RUNS, f"{layout.RUNS}/full-s0-0123456789", f"{layout.RESULTS}/a/b"])
def test_a_link_to_a_folder_is_not_written_through(place, base, data, tmp_path, capsys):
    """A stranger's study could have checkpoints deleted, or a model written, wherever its links lead."""
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    (elsewhere / "checkpoint-3").mkdir(parents=True)
    (out / place).parent.mkdir(parents=True)
    (out / place).symlink_to(elsewhere)
    file = write(tmp_path, recipe(base, data, {"full": FULL}))
    assert main(["study", str(file), "--output_dir", str(out)]) == 2
    assert f"{str(out / place)!r} is a link to a folder" in capsys.readouterr().err
    assert [path.name for path in elsewhere.rglob("*")] == ["checkpoint-3"]
