"""A finished study whose files were damaged makes again what is damaged, and that alone."""

import json

import pytest

from maskft_base import files
from maskft_base.errors import UserError
from maskft_lab.cli.main import main
from maskft_lab.study.damage import damage_of_result, damage_of_run
from small_study import FULL, MASK, outcome, recipe, write


def times(folder, name):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob(f"*/*/{name}")}


def flip(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.fixture
def in_this_process(monkeypatch):
    """The commands of a study without a new interpreter for each, which takes most of the time."""

    def run(words, log, tick, lock_fd):
        log.parent.mkdir(parents=True, exist_ok=True)
        if main(words[words.index("maskft_lab.cli.main") + 1 :]):
            raise UserError("failed")

    monkeypatch.setattr("maskft_lab.study.execute.run_command", run)


def test_a_damaged_study_repeats_what_is_damaged_and_nothing_else(in_this_process, base, data, tmp_path, capsys):
    full = {key: value for key, value in FULL.items() if key != "last"} | {"num_train_epochs": 1}
    mask = {key: value for key, value in MASK.items() if key != "last"}
    file, out = write(tmp_path, recipe(base, data, {"full": full, "mask": mask})), tmp_path / "out"
    assert main(["study", str(file), "--output_dir", str(out)]) == 0
    whole, trained, measured = outcome(out), times(out, files.TRAINING), times(out, files.RESULT)
    (weights,) = out.glob(f"{files.RUNS}/full-*/model.safetensors")
    (result,) = out.glob(f"{files.RESULTS}/mask-*/{files.RESULT}")

    # A weight of one run, and a result of the other.
    flip(weights)
    result.write_text(result.read_text()[:-100])
    assert main(["study", str(file), "--output_dir", str(out), "--dry_run"]) == 0
    assert "to do" in capsys.readouterr().out and not (out / "damaged").exists()
    assert main(["study", str(file), "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert "full, seed 0: its model.safetensors is not what was written; moved to" in said
    assert "not JSON" in said and "it is measured again" in said
    assert outcome(out) == whole
    now, again = times(out, files.TRAINING), times(out, files.RESULT)
    assert [name[:4] for name in now if now[name] != trained.get(name) and "damaged" not in name] == ["full"]
    assert [name[:4] for name in again if again[name] != measured[name]] == ["mask"]
    assert {path.relative_to(out / "damaged").parts[0] for path in out.glob("damaged/*/*")} == {"runs", "results"}

    # The account of the other run.
    (account,) = out.glob(f"{files.RUNS}/mask-*/{files.RUN}")
    account.write_text("")
    trained = times(out, files.TRAINING)
    assert main(["study", str(file), "--output_dir", str(out)]) == 0
    assert "mask, seed 0: its run.json cannot be read; moved to" in capsys.readouterr().out
    now = times(out, files.TRAINING)
    assert [name[:4] for name in now if now[name] != trained[name]] == ["mask"]
    assert outcome(out) == whole


def test_what_counts_as_damage(tmp_path):
    """Every file that the account names; neither logs nor what is added later."""
    record = {
        **dict.fromkeys(("study", "run", "method", "name", "model", "data"), "x"),
        **dict.fromkeys(("start", "match", "num_steps", "best_step", "best_heldout_loss", "learning_rate_at_best")),
        **{key: {} for key in ("settings", "models", "epochs", "tokens", "total_epochs", "total_tokens")},
        **dict.fromkeys(("train_time_s", "peak_memory_bytes")),
        "seed": 0,
    }
    account, weights = tmp_path / files.RUN, tmp_path / "last" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    account.write_text(json.dumps(record | {"files": {"last/model.safetensors": files.digest(b"weights")}}))
    (tmp_path / files.LOG).write_text("new")
    assert damage_of_run(tmp_path) is None
    weights.write_bytes(b"Weights")
    assert damage_of_run(tmp_path) == "its last/model.safetensors is not what was written"
    weights.unlink()
    assert damage_of_run(tmp_path) == "its last/model.safetensors is missing"
    account.write_text(json.dumps(record))  # of an earlier version
    assert damage_of_run(tmp_path) is None
    account.write_text("")
    assert damage_of_run(tmp_path) == "its run.json cannot be read"
    (tmp_path / files.RESULT).write_text("{")
    assert "not JSON" in damage_of_result(tmp_path / files.RESULT)
