"""The output folder by itself: whose it is, which of its checkpoints is resumed, which are deleted, what is saved."""

import io
import json
import os
import re
import stat
import warnings

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from maskft import MaskConfig, current_masks
from maskft.training import checkpoints
from maskft.training.arguments import TrainingArguments
from maskft.training.checkpoints import best_beside, checkpoints_in, delete_oldest, held_output, prepare_output_dir
from maskft.training.manifest import seal
from maskft_common import layout
from maskft_common.errors import UserError
from tiny import IS_OLD_TORCH, tiny_llama


def test_a_name_that_no_file_of_weights_can_have_is_told_before_the_first_step(tmp_path):
    args = TrainingArguments(str(tmp_path / os.fsdecode(b"t\xe9")), use_cpu=True)
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match=r"t\\udce9' is not UTF-8"), held_output(args, "mask", console):
        raise AssertionError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def checkpoint(folder, step, best=None, optimizer="optimizer.pt"):
    """A checkpoint of which every file is there."""
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": best}))
    if optimizer:
        (path / optimizer).write_bytes(b"moments")
    seal(path, {})
    return path


def spoil(path):
    (path / "trainer_state.json").write_text("{}")


def prepare(folder, resume=None, method="mask", is_ours=False):
    """The checkpoint to resume, and what was printed."""
    # As on a terminal, where rich would draw numbers in colours.
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=True, color_system="standard", width=1000)
    args = TrainingArguments(str(folder), resume_from_checkpoint=resume, bf16=False)
    return prepare_output_dir(args, method, is_ours, console), printed.getvalue()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(message, *args, **kwargs):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        prepare(*args, **kwargs)


def write_record(folder, content):
    (folder / layout.TRAINING).write_text(json.dumps(content))


# Whose it is


@pytest.mark.parametrize("resume", [None, "", "auto", "AUTO"])
def test_a_new_folder_is_taken(resume, folder):
    (folder / layout.TRAIN_LOCK).touch()
    assert prepare(folder, resume) == (None, "")


def test_a_folder_with_a_run_is_not_begun_again(folder):
    checkpoint(folder, 4)
    message = f"output_dir {str(folder)!r} holds another run; name another folder, or resume it: "
    refused(message + "--resume_from_checkpoint true", folder)


def test_to_resume_is_no_advice_for_files_that_are_not_from_a_run(folder):
    (folder / "train.jsonl").touch()
    message = f"output_dir {str(folder)!r} holds files that are not from a run (train.jsonl); name another folder"
    refused(message, folder)


@pytest.mark.parametrize("resume", ["true", "True", "1", "auto"])
def test_a_run_is_resumed(resume, folder):
    newest = checkpoint(folder, 10)
    checkpoint(folder, 9)
    assert prepare(folder, resume) == (str(newest), "")


def test_a_word_that_is_none_of_these(folder):
    refused("resume_from_checkpoint is 'yes'; write true, or auto", folder, "yes")


def test_nothing_to_resume(folder):
    message = f"there is no checkpoint to resume from in {str(folder)!r}; run the command without "
    for method in ("mask", "random_mask"):
        refused(message + "--resume_from_checkpoint, or with auto", folder, "true", method=method)


def test_files_that_are_not_from_a_run(folder):
    for name in "dcba":
        (folder / name).touch()
    message = f"output_dir {str(folder)!r} holds files that are not from a run (a, b, c); name another folder"
    refused(message, folder, "auto")
    (folder / layout.LOG).touch()
    refused(message, folder, "auto")
    # Unless something tells that a run has been here.
    assert prepare(folder, "auto", is_ours=True) == (None, "")
    write_record(folder, {"summary": {"method": "mask"}})
    assert prepare(folder, "auto") == (None, "")


def test_a_log_alone_is_of_the_study_that_begins_the_run(folder):
    (folder / layout.LOG).touch()
    assert prepare(folder, "auto") == (None, "")


def test_checkpoints_beside_other_files_are_a_run(folder):
    (folder / "notes.txt").touch()
    newest = checkpoint(folder, 4)
    assert prepare(folder, "auto") == (str(newest), "")


@pytest.mark.parametrize("content", [{}, [], {"summary": {}}, {"summary": None}])
def test_a_record_of_no_run(content, folder):
    write_record(folder, content)
    record = str(folder / layout.TRAINING)
    refused(f"{record!r} is not the record of a run; name another output_dir, or remove the file", folder, "auto")


def test_a_run_of_another_method(folder):
    message = f"output_dir {str(folder)!r} holds a run of another method, not {{}}; name another folder"
    write_record(folder, {"summary": {"method": "full"}})
    refused(message.format("mask"), folder, "auto")
    assert prepare(folder, "auto", method="full") == (None, "")
    (folder / layout.TRAINING).unlink()
    # Methods that are not trained have no checkpoints.
    newest = checkpoint(folder, 4)
    refused(message.format("random_mask"), folder, "auto", method="random_mask")
    assert prepare(folder, "auto") == (str(newest), "")


# Which checkpoint


def test_checkpoints_are_in_the_order_of_their_steps(folder):
    for name in ("10", "9", "100", "9.damaged", "old-5", "²", "x"):
        (folder / f"checkpoint-{name}").mkdir()
    found = checkpoints_in(folder)
    assert [path.name for path in found] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert [checkpoints.step_of(path) for path in found] == [9, 10, 100]


def test_a_damaged_checkpoint_is_renamed_also_where_one_of_its_step_was_before(folder):
    whole = checkpoint(folder, 2)
    (folder / "checkpoint-4.damaged").mkdir()
    (folder / "checkpoint-4.damaged" / "old").touch()
    spoil(checkpoint(folder, 4))
    found, printed = prepare(folder, "true")
    assert found == str(whole)
    problem = "trainer_state.json has changed since it was written (sha256)"
    assert printed == f"checkpoint-4 is damaged ({problem}); it is checkpoint-4.damaged now\n"
    assert names(folder) == ["checkpoint-2", "checkpoint-4.damaged"]
    assert not (folder / "checkpoint-4.damaged" / "old").exists()


@pytest.mark.parametrize("optimizer", ["optimizer.pt", "optimizer.bin", "optimizer_0"])
def test_a_checkpoint_without_moments_is_passed_over(optimizer, folder):
    resumable = checkpoint(folder, 2, optimizer=optimizer)
    checkpoint(folder, 4, optimizer=None)
    assert prepare(folder, "true") == (str(resumable), "")
    assert names(folder) == ["checkpoint-2", "checkpoint-4"]


def test_the_best_until_then_must_be_whole_too(folder):
    """Also where the folder of both was moved; an older checkpoint needs no other."""
    oldest = checkpoint(folder, 1)
    best = checkpoint(folder, 2)
    newest = checkpoint(folder, 3, best="/elsewhere/checkpoint-2")
    assert prepare(folder, "true") == (str(newest), "")
    spoil(best)
    found, printed = prepare(folder, "true")
    assert found == str(oldest)
    assert printed.splitlines()[1] == (
        "checkpoint-3 is damaged (checkpoint-2, the best until then: trainer_state.json has changed since it was "
        "written (sha256)); it is checkpoint-3.damaged now"
    )
    assert names(folder) == ["checkpoint-1", "checkpoint-2.damaged", "checkpoint-3.damaged"]


def test_a_run_is_not_begun_again_because_its_best_is_damaged(folder):
    spoil(checkpoint(folder, 2))
    for step in (3, 4):
        checkpoint(folder, step, best="checkpoint-2")
    problem = "checkpoint-2, the best until then: trainer_state.json has changed since it was written (sha256)"
    message = f"{folder / 'checkpoint-4'} cannot be resumed: {problem}; restore it, or remove {folder} to start over"
    refused(message, folder, "auto")
    assert {"checkpoint-3", "checkpoint-4"} <= set(names(folder))


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ({}, None),
        ({"best_model_checkpoint": None}, None),
        ({"best_model_checkpoint": ""}, None),
        ({"best_model_checkpoint": "runs/out/checkpoint-7"}, "checkpoint-7"),
    ],
)
def test_the_best_is_looked_for_beside(state, name, folder):
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert best_beside(folder) == (name and folder.parent / name)


@pytest.mark.parametrize("state", [[], None, "x", {"best_model_checkpoint": 3}])
def test_what_is_no_state(state, folder):
    (folder / "trainer_state.json").write_text(json.dumps(state))
    message = f"{folder / 'trainer_state.json'} is not the state of a run; remove {folder}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        best_beside(folder)


# Which are deleted


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 9, 10]),
        (0, None, [1, 2, 9, 10]),
        (-1, None, [1, 2, 9, 10]),
        (5, None, [1, 2, 9, 10]),
        (4, None, [1, 2, 9, 10]),
        (3, None, [2, 9, 10]),
        (2, None, [9, 10]),
        (1, None, [10]),
        (3, 10, [2, 9, 10]),
        (3, 1, [1, 9, 10]),
        (2, 1, [1, 10]),
        (1, 1, [1, 10]),
    ],
)
def test_the_oldest_are_deleted_but_for_the_newest_and_the_best(limit, best, left, folder):
    for step in (1, 2, 9, 10):
        checkpoint(folder, step)
    delete_oldest(folder / "checkpoint-10", best and f"/moved/checkpoint-{best}", limit)
    assert [checkpoints.step_of(path) for path in checkpoints_in(folder)] == left


def test_the_newest_is_on_the_disk_before_an_older_one_is_deleted(folder, monkeypatch):
    oldest = checkpoint(folder, 1)
    newest = checkpoint(folder, 2)
    (newest / "parts").mkdir()
    (newest / "parts" / "0.bin").touch()
    synced = []
    original = os.fsync

    def fsync(descriptor):
        assert oldest.exists()
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    delete_oldest(newest, None, 2)
    assert synced == []
    delete_oldest(newest, None, 1)
    assert sorted(synced) == sorted(str(path) for path in newest.rglob("*") if path.is_file())
    assert "0.bin" in str(synced) and not oldest.exists()


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_a_run(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    checkpoint(folder, 2)
    delete_oldest(checkpoint(folder, 3), None, 1)
    assert names(folder) == ["checkpoint-1", "checkpoint-3"] and (tmp_path / "elsewhere").exists()


# What is saved


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode_of(file):
    return stat.S_IMODE(file.stat().st_mode)


@pytest.mark.usefixtures("umask", "one_process")
def test_a_mask_is_saved_with_its_recipe_and_nothing_of_the_base(folder):
    model = get_peft_model(tiny_llama(num_layers=1), MaskConfig(sparsity=0.3))
    model.peft_config["default"].base_model_name_or_path = "nobody/named-this"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT would ask the hub about the vocabulary of the base
        checkpoints.save_final(model, folder, {"steps": 3})
    assert json.loads((folder / layout.ADAPTER_CONFIG).read_text())["recipe"] == {"steps": 3}
    assert mode_of(folder / layout.ADAPTER_WEIGHTS) == 0o640
    saved = load_file(folder / layout.ADAPTER_WEIGHTS)
    assert len(saved) == len(current_masks(model)) and all("mask_coded" in name for name in saved)


@pytest.mark.usefixtures("umask")
def test_a_model_without_an_adapter_is_saved_whole(folder):
    model = tiny_llama(num_layers=1)
    checkpoints.save_final(model, folder)
    assert load_file(folder / "model.safetensors").keys() == dict(model.named_parameters()).keys()
    assert mode_of(folder / "model.safetensors") == 0o640
    # A state that was gathered already is saved in place of the model's.
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    checkpoints.save_weights(model, folder, state)
    assert not any(value.any() for value in load_file(folder / "model.safetensors").values())


class Trainer:
    """The part of a trainer that saving reads."""

    def __init__(self, is_fsdp_enabled):
        self.is_fsdp_enabled = is_fsdp_enabled


@pytest.mark.skipif(IS_OLD_TORCH, reason="FSDP2 on a CPU before torch 2.13")
@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_is_gathered_and_saved_whole(folder):
    """FSDP2 itself, with one process."""
    model = tiny_llama(num_layers=1)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    next(model.parameters()).requires_grad_(False)
    fully_shard(model)
    assert isinstance(next(model.parameters()), DTensor)
    state = checkpoints.trainable_state(model)
    assert state.keys() == expected.keys()
    assert all(type(value) is torch.Tensor and torch.equal(value, expected[name]) for name, value in state.items())
    checkpoints.save_final(model, folder, None, Trainer(is_fsdp_enabled=True))
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())


def test_the_state_of_an_adapter_has_no_frozen_weights():
    model = get_peft_model(tiny_llama(num_layers=1), MaskConfig(sparsity=0.3))
    state = checkpoints.trainable_state(model)
    assert state and all("mask_scores" in name for name in state)


def test_a_trainer_without_fsdp_gathers_nothing(folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "trainable_state", None)
    checkpoints.save_final(tiny_llama(num_layers=1), folder, None, Trainer(is_fsdp_enabled=False))
    assert (folder / "model.safetensors").exists()
