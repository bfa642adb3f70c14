"""Checkpoints that are damaged, of another run, or of a run that was stopped; each test does the real thing."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from killing import Forked, start
from maskft.adapter.mask_set import MaskSet
from maskft.training import checkpoints, manifest
from maskft.training.manifest import FREE, damage, read_manifest
from maskft.training.options import option_defaults
from maskft.training.record import read_record
from maskft.training.trainer import MaskTrainer
from maskft_base import files
from maskft_base.files import ADAPTER_WEIGHTS, MANIFEST, TRAIN_LOCK
from maskft_lab.cli.main import main
from tiny_tokenizer import tiny_tokenizer

STEPS = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01}
STEPS |= {"keep_worse": True, "save_total_limit": 5}


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch):
    monkeypatch.setattr(checkpoints, "LOCK_WAIT_S", 0)


@pytest.fixture
def train(call):
    """Train four steps with checkpoints at 0, 2 and 4; returns exit status and stderr."""
    return lambda name="out", **changes: call(name, **{**STEPS, **changes})


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    """The undisturbed run of ``train``."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    options = {"model_name_or_path": base, "dataset_name": data, "output_dir": folder, "eval_split_size": 16, **STEPS}
    options |= {"per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False}
    assert main(["train", *(str(w) for k, v in options.items() for w in (f"--{k}", v))]) == 0
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it, as a kill after step 4 leaves it."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    for file in (files.TRAINING, ADAPTER_WEIGHTS):
        (folder / file).unlink()
    return folder


def losses(folder):
    history = read_record(folder).summary.history
    return [{k: row.get(k) for k in ("step", "loss", "eval_loss", "learning_rate")} for row in history[:-1]]


def same_result(folder, other):
    """Masks and losses, bit for bit."""
    return (folder / ADAPTER_WEIGHTS).read_bytes() == (other / ADAPTER_WEIGHTS).read_bytes() and losses(
        folder
    ) == losses(other)


# What is written


def test_every_checkpoint_has_a_manifest_of_all_that_it_holds(finished):
    for step in (0, 2, 4):
        folder = finished / f"checkpoint-{step}"
        manifest = read_manifest(folder)
        assert manifest.step == step and manifest.num_processes == 1
        assert {*manifest.files, MANIFEST} == {path.name for path in folder.iterdir()}
        assert damage(folder) is None
    assert manifest.course.options["learning_rate"] == 0.01 and FREE.isdisjoint(manifest.course.options)
    assert not (finished / TRAIN_LOCK).exists()


def test_names_of_options_are_those_of_options():
    not_in_old_versions = {"dataloader_multiprocessing_context"}
    assert set(option_defaults()) | {"base", "local_rank"} | not_in_old_versions >= FREE


# Damage


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("optimizer.pt", cut),
        ("optimizer.pt", zero),
        ("optimizer.pt", flip),
        ("scheduler.pt", zero),
        ("scheduler.pt", Path.unlink),
        ("rng_state.pth", cut),
        (ADAPTER_WEIGHTS, flip),
        ("trainer_state.json", cut),
        (MANIFEST, cut),
        (MANIFEST, Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_resumed(file, harm, train, out, finished):
    harm(out / "checkpoint-4" / file)
    status, err = train(resume_from_checkpoint="true")
    assert status == 0, err
    assert "checkpoint-4 is damaged (" in err and file in err and "it is checkpoint-4.damaged now" in err
    assert (out / "checkpoint-4.damaged").is_dir() and damage(out / "checkpoint-4") is None
    assert same_result(out, finished)


def test_a_file_that_was_added_to_a_checkpoint(out):
    (out / "checkpoint-4" / "model.safetensors").write_bytes((out / "checkpoint-4" / ADAPTER_WEIGHTS).read_bytes())
    assert damage(out / "checkpoint-4") == "model.safetensors was added to it"


def test_names_of_files_do_not_steer_the_terminal(train, out):
    shutil.copy(out / "checkpoint-4" / ADAPTER_WEIGHTS, out / "checkpoint-4" / "a\x1b[2J.pt")
    status, err = train(resume_from_checkpoint="true")
    assert status == 0 and "\x1b" not in err and r"a\x1b[2J.pt was added to it" in err


def test_no_whole_checkpoint(train, out, finished):
    for step in (0, 2, 4):
        zero(out / f"checkpoint-{step}" / "optimizer.pt")
    status, err = train(resume_from_checkpoint="true")
    assert status == 2 and err.count("is damaged (optimizer.pt") == 3 and "no checkpoint to resume from" in err
    assert train(resume_from_checkpoint="auto")[0] == 0
    assert same_result(out, finished)


def test_a_best_checkpoint_that_is_damaged_is_told_when_resumed(train, tmp_path):
    options = {"method": "full", "learning_rate": 1.0}  # so that the start is the best
    assert train(**options)[0] == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    zero(tmp_path / "out" / "checkpoint-0" / "model.safetensors")
    status, err = train(resume_from_checkpoint="true", **options)
    assert status == 0 and "the best checkpoint (step 0, " in err, err
    assert "is damaged: model.safetensors is not what was written (sha256)" in err
    assert "from here on, the best of the later ones is kept" in err
    assert (tmp_path / "out" / "checkpoint-0.damaged").is_dir()
    assert read_record(tmp_path / "out").summary.best_step == 4


def test_a_best_checkpoint_that_is_damaged_while_training(train, tmp_path):
    """The last state is saved, and the loss of what is lost is told."""
    out = tmp_path / "out"
    done = threading.Event()

    def harm():
        while not (out / "checkpoint-2" / MANIFEST).exists() and not done.wait(0.001):
            pass
        zero(out / "checkpoint-0" / "model.safetensors")

    thread = threading.Thread(target=harm)
    thread.start()
    status, err = train(method="full", learning_rate=1.0, keep_last=True)  # so that the start is the best
    done.set()
    thread.join()
    assert status == 2 and "the best checkpoint (step 0, " in err
    assert "is damaged: model.safetensors is not what was written (sha256); the last state (step 4) is saved in" in err
    kept, last = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (out, out / files.LAST))
    assert all(torch.equal(kept[name], last[name]) for name in last)
    assert read_record(out).summary.best_step == 4


def test_a_folder_that_was_moved_keeps_its_best(train, call, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "moved")
    (tmp_path / "moved" / files.TRAINING).unlink()
    status, err = train("moved", resume_from_checkpoint="true")
    assert status == 0, err
    assert same_result(tmp_path / "moved", finished)


def test_a_run_cut_between_two_lines_of_the_log(train, tmp_path):
    """The mean loss of the line after resuming is over all its steps."""
    options = {"max_steps": 6, "logging_steps": 3, "save_total_limit": 9}
    for name in ("whole", "out"):
        assert train(name, **options)[0] == 0
    for step in (4, 6):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    status, err = train(resume_from_checkpoint="true", **options)
    assert status == 0, err
    assert [row["step"] for row in losses(tmp_path / "out") if row["loss"] is not None] == [3, 6]
    assert same_result(tmp_path / "out", tmp_path / "whole")


# Another run


CHANGES = {
    "learning_rate": 0.1,
    "mask_sparsity": 0.2,
    "mask_rank_by": "signed",
    "mask_seed": 1,
    "mask_init_scores": "constant",
    "seed": 1,
    "split_seed": 1,
    "max_steps": 8,
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "bf16": True,
    "max_length": 16,
    "eval_split_size": 8,
    "max_train_samples": 20,
    "optim": "sgd",
    "completion_only_loss": False,
    "eval_steps": 1,
    "mask_layers_to_transform": 1,
}


def test_every_changed_option_is_refused_and_shown(train, out):
    before = sorted(path.name for path in out.iterdir())
    for name, value in CHANGES.items():
        status, err = train(resume_from_checkpoint="true", **{name: value})
        assert status == 2 and "is of a run that differs (" in err, (name, err)
        assert f"{name}: " in err and " -> " in err and err.count("maskft: error") == 1, (name, err)
    assert sorted(path.name for path in out.iterdir()) == before


def test_all_changes_are_in_one_message(train, out, data, tmp_path):
    rows = data.read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(reversed(rows)))
    changes = {"learning_rate": 0.1, "lr_scheduler_type": "cosine", "dataset_name": tmp_path / "other.jsonl"}
    status, err = train(resume_from_checkpoint="auto", **changes)
    assert status == 2 and "learning_rate: 0.01 -> 0.1; lr_scheduler_type: linear -> cosine)" in err
    assert "data: " in err and "dataset_name: sha256:" in err
    assert "give the options of that run to resume it, or name another output_dir" in err


def test_what_does_not_decide_the_course_may_change(train, data, out, finished, tmp_path):
    """Where data lie, what is logged, who loads: the result is that of the undisturbed run."""
    shutil.rmtree(out / "checkpoint-4")
    moved = tmp_path / "moved.jsonl"
    shutil.copy(data, moved)
    changes = {"dataset_name": moved, "dataloader_num_workers": 1, "save_total_limit": 1, "report_to": "none"}
    status, err = train(resume_from_checkpoint="true", **changes)
    assert status == 0, err
    assert same_result(out, finished)
    assert not (out / "checkpoint-0").exists()  # the limit is the new one


def test_one_weight_of_the_base_is_another(train, base, out, tmp_path):
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.embed_tokens.weight.data[3, 5] += 1e-3
    model.save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    status, err = train(resume_from_checkpoint="true", model_name_or_path=other)
    assert status == 2 and "base: " in err and "name another output_dir" in err


@pytest.mark.parametrize("how", ["true", "auto"])
def test_a_mask_is_not_replaced_by_one_of_another_method(how, train, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    mask = (finished / ADAPTER_WEIGHTS).read_bytes()
    for method in ("random_mask", "full"):
        status, err = train(method=method, resume_from_checkpoint=how)
        assert status == 2 and err.count("maskft: error") == 1, err
    assert (tmp_path / "out" / ADAPTER_WEIGHTS).read_bytes() == mask


def test_a_checkpoint_of_other_processes_is_refused(train, out):
    manifest = json.loads((out / "checkpoint-4" / MANIFEST).read_text())
    (out / "checkpoint-4" / MANIFEST).write_text(json.dumps({**manifest, "num_processes": 2}))
    status, err = train(resume_from_checkpoint="auto")
    assert status == 2
    assert "checkpoint-4' was written by 2 processes, and this run has 1; resume with as many" in err


# The output folder


def test_auto_does_not_write_into_a_folder_of_others(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    status, err = train(resume_from_checkpoint="auto")
    assert status == 2 and "holds files that are not from a run (config.json); name another folder" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_auto_begins_again_where_a_run_was_killed_before_its_first_checkpoint(train, finished, tmp_path):
    (tmp_path / "out" / "checkpoint-0").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-0" / "config.json").write_text("{}")
    (tmp_path / "out" / TRAIN_LOCK).touch()
    (tmp_path / "out" / "notes.txt").touch()
    assert train(resume_from_checkpoint="auto")[0] == 0
    assert same_result(tmp_path / "out", finished)


def test_a_folder_that_another_run_holds(train, tmp_path):
    with files.held(tmp_path / "out", TRAIN_LOCK, 0, "run"):
        status, err = train(resume_from_checkpoint="auto")
    assert status == 2 and "another run is running in" in err
    assert not (tmp_path / "out").exists()


def words_of(base, data, out, **changes):
    settings = {"model_name_or_path": base, "dataset_name": data, "output_dir": out, "eval_split_size": 16, **STEPS}
    settings |= {"per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False, **changes}
    return ["train", *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]


@pytest.mark.slow
def test_of_two_runs_that_start_at_once_one_is_refused(base, data, tmp_path):
    runs = [start(words_of(base, data, tmp_path / "out", keep_worse=True)) for _ in range(2)]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], said
    refused = said[runs[0].returncode == 0]
    assert refused.count("maskft: error") == 1 and "Traceback" not in refused
    assert damage(tmp_path / "out" / "checkpoint-4") is None


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def test_a_lock_dies_with_its_owner(tmp_path):
    code = "import sys, time; from pathlib import Path; from maskft_base import files\n"
    code += "with files.held(Path(sys.argv[1]), 'train.lock', 0, 'run'): time.sleep(600)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], env=environment)
    wait_for(tmp_path / "out" / TRAIN_LOCK, process)
    process.kill()
    process.wait()
    with files.held(tmp_path / "out", TRAIN_LOCK, 0, "run") as hold:
        assert hold.is_left_over


@pytest.mark.slow
def test_ten_kills_at_random_moments(base, data, tmp_path):
    """Real processes, SIGKILL; the masks and every logged loss are those of the undisturbed run."""
    options = {"max_steps": 400, "eval_steps": 10, "save_steps": 10, "logging_steps": 3, "save_total_limit": 2}
    assert main(words_of(base, data, tmp_path / "whole", **options)) == 0
    words = words_of(base, data, tmp_path / "out", resume_from_checkpoint="auto", **options)
    moments, killed = random.Random(0), 0
    for _ in range(10):
        process = Forked(words, tmp_path / "log")
        deadline = time.monotonic() + moments.uniform(0.5, 2.5)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            killed += 1
            process.kill()
        process.wait()
    assert killed >= 3
    assert main(words) == 0
    assert same_result(tmp_path / "out", tmp_path / "whole")


# Signals


def test_sigterm_saves_the_step_and_says_how_to_resume(base, data, tmp_path):
    """A real process; resumed by the line that it prints, it ends as the undisturbed run."""
    options = {"max_steps": 60, "eval_steps": 30, "save_steps": 30}
    assert main(words_of(base, data, tmp_path / "whole", **options)) == 0
    out = tmp_path / "out"
    process = start(words_of(base, data, out, **options))
    wait_for(out / "checkpoint-0" / MANIFEST, process)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 143, err
    lines = err.strip().splitlines()
    assert "stopping: the step is finished and saved first" in err
    assert lines[-2].startswith("maskft: stopped by SIGTERM after step ") and lines[-2].endswith("to resume:")
    newest = checkpoints.checkpoints_in(out)[-1]
    assert f"step {checkpoints.step_of(newest)} of 60" in lines[-2] and damage(newest) is None
    assert 0 < checkpoints.step_of(newest) < 30
    command = lines[-1].split()
    assert command[0] == "maskft" and command[-2:] == ["--resume_from_checkpoint", "true"]
    assert main(command[1:]) == 0
    assert (out / ADAPTER_WEIGHTS).read_bytes() == (tmp_path / "whole" / ADAPTER_WEIGHTS).read_bytes()
    assert losses(out) == losses(tmp_path / "whole")


def test_ctrl_c_does_too(train, finished, tmp_path):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGINT)

    def press():
        while not (out / "checkpoint-0" / MANIFEST).exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    status, err = train(max_steps=400, save_steps=400, eval_steps=400)
    assert status == 130 and "stopped by SIGINT after step" in err and "--resume_from_checkpoint true" in err
    assert signal.getsignal(signal.SIGINT) is before
    assert damage(checkpoints.checkpoints_in(out)[-1]) is None


def test_a_signal_after_the_last_step_is_heeded_too(train, finished, tmp_path, monkeypatch):
    """While the last state is evaluated: it is saved, and the same run then only has to say its result."""
    evaluate = MaskTrainer.evaluate

    def press(self, *args, **kwargs):
        if self.state.global_step == self.state.max_steps:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MaskTrainer, "evaluate", press)
        status, err = train()
    assert status == 130 and "stopped by SIGINT after step 4 of 4, which is saved; to resume" in err
    assert not (tmp_path / "out" / files.TRAINING).exists()
    assert train(resume_from_checkpoint=True)[0] == 0
    assert same_result(tmp_path / "out", finished)


def test_a_second_signal_ends_at_once(base, data, tmp_path):
    """While the first step waits for its rows."""
    code = "import sys, time, torch; from maskft_lab.cli.main import main\n"
    code += "from maskft.training.trainer import MaskTrainer as T\n"
    code += "def slow(*args, **kwargs): print('slow', flush=True); time.sleep(600)\n"
    code += "T.training_step = slow; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    words = [sys.executable, "-c", code, *words_of(base, data, tmp_path / "out")]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "slow\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)  # as a launcher passes it on: the same wish
    time.sleep(1.5)
    assert process.poll() is None
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:  # a busy machine hears the first ones late
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert process.wait(timeout=20) == -signal.SIGTERM


# The disk


def test_a_file_that_is_larger_than_a_process_may_write(train, out, finished):
    """The checkpoint that was begun is gone, those before are whole, and the run resumes when the limit is raised."""
    shutil.rmtree(out / "checkpoint-4")
    numel = sum(mask.numel() for mask in MaskSet.from_adapter(finished).values())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * numel, before[1]))  # room for the scores, not for two moments
    try:
        status, err = train(resume_from_checkpoint="true")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and "Traceback" not in err
    pattern = r"checkpoint-4/optimizer.pt cannot be written \(.+\): it needs .*, and .* are free"
    assert re.search(pattern, err), err
    assert not (out / "checkpoint-4").exists() and damage(out / "checkpoint-2") is None
    assert train(resume_from_checkpoint="true")[0] == 0
    assert same_result(out, finished)


def test_a_checkpoint_that_is_made_whole_slowly_takes_no_later_one_with_it(train, tmp_path, monkeypatch):
    """A disk slower than a step: older checkpoints are deleted when the newest is whole, and only they."""

    def slowly(*args):
        time.sleep(0.3)
        manifest.seal(*args)

    monkeypatch.setattr(checkpoints, "seal", slowly)
    status, err = train(eval_steps=1, save_steps=1, save_total_limit=1)
    assert status == 0, err
    left = checkpoints.checkpoints_in(tmp_path / "out")
    assert checkpoints.step_of(left[-1]) == 4 and len(left) <= 2 and not any(map(damage, left))


@pytest.mark.parametrize("step", [2, 4])
def test_a_disk_that_is_full_when_it_is_asked_to_write(train, finished, tmp_path, monkeypatch, step):
    """Beside a step (2) or after the last one (4)."""

    def sync(path):
        if path.parent.name == f"checkpoint-{step}":
            raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", sync)
        status, err = train()
    assert status == 2 and "Traceback" not in err and f"checkpoint-{step}/manifest.json cannot be written" in err
    assert not (out / f"checkpoint-{step}").exists() and damage(out / f"checkpoint-{step - 2}") is None
    assert train(resume_from_checkpoint="true")[0] == 0
    assert same_result(out, finished)
