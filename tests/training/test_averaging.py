"""The mean of the last checkpoints: what it is, when it is kept, and that a resumed run has the same."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from maskft.training.record import read_record


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="float32").named_parameters())


# Steps that jump to and fro, so that their mean is better than each.
SETTINGS = {"method": "full", "max_steps": 16, "eval_steps": 1, "save_steps": 1, "average_checkpoints": 5}
SETTINGS |= {"learning_rate": 0.05, "lr_scheduler_type": "constant"}


def test_the_mean_of_the_last_checkpoints_is_kept_where_it_is_better(call, tmp_path):
    status, err = call(**SETTINGS)
    assert status == 0, err
    out = tmp_path / "out"
    summary, saved = read_record(out).summary, weights(out)
    assert summary.averaged_steps == [12, 13, 14, 15, 16] and summary.best_step == 16
    assert f"mean of 5 checkpoints (steps 12, 13, 14, 15, 16): held-out loss {summary.best_loss:.4f}, the best" in err
    measured = [row["eval_loss"] for row in summary.history if "eval_loss" in row]
    assert summary.best_loss < min(measured)
    parts = [weights(out / f"checkpoint-{step}") for step in summary.averaged_steps]
    for name, parameter in saved.items():
        mean = torch.stack([part[name].double() for part in parts]).mean(dim=0)
        torch.testing.assert_close(parameter.double(), mean, rtol=1e-6, atol=1e-7)
    call("again", **SETTINGS)
    for step in (15, 16):
        shutil.rmtree(tmp_path / "again" / f"checkpoint-{step}")
    status, err = call("again", **SETTINGS, resume_from_checkpoint=True)
    assert status == 0, err
    assert all(torch.equal(parameter, saved[name]) for name, parameter in weights(tmp_path / "again").items())


def test_the_best_checkpoint_is_kept_where_the_mean_is_worse(call, tmp_path):
    status, err = call(**SETTINGS | {"learning_rate": 3e-3, "max_steps": 6})  # every step is better than those before
    assert status == 0, err
    out, summary = tmp_path / "out", read_record(tmp_path / "out").summary
    assert summary.averaged_steps == [] and summary.best_step == 6 and "not better than the best one's" in err
    best = weights(out / "checkpoint-6")
    assert all(torch.equal(parameter, best[name]) for name, parameter in weights(out).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average_checkpoints": 0}, "average_checkpoints is 0; it must be at least 1"),
        ({"method": "mask"}, "average_checkpoints goes with --method full, not with mask"),
        ({"eval_strategy": "no"}, "it needs eval_strategy steps"),
    ],
)
def test_where_there_is_nothing_to_average(changes, message, call, tmp_path):
    status, err = call(**SETTINGS | changes)
    assert status == 2 and message in err and not (tmp_path / "out").exists()
