"""Checkpoints that are damaged, of another run, or of a run that was stopped; each test does the real thing."""

import json
import os
import pickle
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
from transformers import AutoModelForCausalLM

from killing import Forked, stop_forked_when, wait_for
from maskft.masks.mask_set import MaskSet
from maskft.training import checkpoints
from maskft.training.arguments import TrainingArguments
from maskft.training.callbacks import StepGuard
from maskft.training.manifest import FREE, damage, read_manifest, seal
from maskft.training.method_arguments import MethodArguments
from maskft.training.options import option_defaults
from maskft.training.record import read_record
from maskft.training.stopping import StopRequest
from maskft_common import layout, locks
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_WEIGHTS, MANIFEST, TRAIN_LOCK
from maskft_lab.cli.main import main
from tiny_tokenizer import tiny_tokenizer

STEPS = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01}
STEPS |= {"keep_worse": True, "save_total_limit": 5}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch):
    monkeypatch.setattr(checkpoints, "LOCK_WAIT_S", 0)


@pytest.fixture
def train(call):
    """Train four steps with checkpoints at 0, 2 and 4; returns exit status and stderr."""
    return lambda name="out", **changes: call(name, **{**STEPS, **changes})


def words_of(base, data, out, **changes):
    settings = {"model_name_or_path": base, "dataset_name": data, "output_dir": out, "eval_split_size": 16, **STEPS}
    settings |= {"per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False, **changes}
    return ["train", *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    """The undisturbed run of ``train``."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert main(words_of(base, data, folder)) == 0
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it, as a kill after step 4 leaves it."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    for file in (layout.TRAINING, ADAPTER_WEIGHTS):
        (folder / file).unlink()
    return folder


def losses(folder):
    history = read_record(folder).summary.history
    return [{k: row.get(k) for k in ("step", "loss", "eval_loss", "learning_rate")} for row in history[:-1]]


def same_result(folder, other, weights=ADAPTER_WEIGHTS):
    """Weights and losses, bit for bit."""
    return (folder / weights).read_bytes() == (other / weights).read_bytes() and losses(folder) == losses(other)


# What is written


def test_every_checkpoint_has_a_manifest_of_all_that_it_holds(finished):
    for step in (0, 2, 4):
        folder = finished / f"checkpoint-{step}"
        manifest = read_manifest(folder)
        assert damage(folder) is None
        assert {*manifest.files, MANIFEST} == {path.name for path in folder.iterdir()}
    assert manifest.course["learning_rate"] == 0.01 and FREE.isdisjoint(manifest.course)
    assert not (finished / TRAIN_LOCK).exists()


def test_names_of_options_are_those_of_options():
    not_in_old_versions = {"dataloader_multiprocessing_context"}
    assert set(option_defaults()) | {"base", "local_rank"} | not_in_old_versions >= FREE


# Damage


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("optimizer.pt", flip),
        ("scheduler.pt", Path.unlink),
        (ADAPTER_WEIGHTS, cut),
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


def test_no_whole_checkpoint(train, out, finished):
    """Nor do names in a manifest steer the terminal."""
    for step in (0, 2, 4):
        manifest = json.loads((out / f"checkpoint-{step}" / MANIFEST).read_text())
        manifest["files"]["optimizer\x1b[2J.pt"] = ""
        (out / f"checkpoint-{step}" / MANIFEST).write_text(json.dumps(manifest))
    status, err = train(resume_from_checkpoint="true")
    assert status == 2 and err.count(r"is damaged (optimizer\x1b[2J.pt is missing)") == 3 and "\x1b" not in err
    assert "no checkpoint to resume from" in err
    assert train(resume_from_checkpoint="auto")[0] == 0
    assert same_result(out, finished)


def test_a_checkpoint_whose_best_is_damaged_is_not_resumed(train, tmp_path):
    options = {"method": "full", "learning_rate": 1.0, "resume_from_checkpoint": "auto"}  # so that the start is best
    for name in ("whole", "out"):
        assert train(name, **options)[0] == 0
    flip(tmp_path / "out" / "checkpoint-0" / "model.safetensors")
    status, err = train(**options)
    assert status == 2 and "checkpoint-4 cannot be resumed: checkpoint-0, the best until then: model.safetens" in err
    assert f"restore it, or remove {tmp_path / 'out'} to start over" in err.splitlines()[-1]
    shutil.rmtree(tmp_path / "out")
    assert train(**options)[0] == 0
    assert same_result(tmp_path / "out", tmp_path / "whole", "model.safetensors")


def test_a_run_cut_between_two_lines_of_the_log(train, tmp_path):
    """The mean loss of the line after resuming is over all its steps; the folder may have been moved, best and all."""
    options = {"max_steps": 6, "logging_steps": 3, "save_total_limit": 9}
    for name in ("whole", "out"):
        assert train(name, **options)[0] == 0
    for step in (4, 6):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    (tmp_path / "out").rename(tmp_path / "moved")
    checkpoint = tmp_path / "moved" / "checkpoint-2"
    kept = json.loads((checkpoint / layout.LOGGED).read_text())
    assert 0 < kept["seconds"] < 1000
    (checkpoint / layout.LOGGED).write_text(json.dumps(kept | {"seconds": 1000.0}))
    seal(checkpoint, read_manifest(checkpoint).course)
    status, err = train("moved", resume_from_checkpoint="true", **options)
    assert status == 0, err
    assert read_record(tmp_path / "moved").summary.train_time_s > 1000
    assert [row["step"] for row in losses(tmp_path / "moved") if row["loss"] is not None] == [3, 6]
    assert same_result(tmp_path / "moved", tmp_path / "whole")


# Another run


CHANGES = {
    "mask_sparsity": 0.2,
    "mask_layers_to_transform": 1,
    "seed": 1,
    "max_steps": 8,
    "gradient_accumulation_steps": 2,
    "bf16": True,
    "max_train_samples": 20,
    "optim": "sgd",
}


def test_every_changed_option_is_refused_and_shown(train, out, data, tmp_path):
    """All in one message."""
    (tmp_path / "other.jsonl").write_text("\n".join(reversed(data.read_text().splitlines())))
    before = sorted(path.name for path in out.iterdir())
    status, err = train(resume_from_checkpoint="auto", dataset_name=tmp_path / "other.jsonl", **CHANGES)
    assert status == 2 and "is from a run with other settings or data (" in err and err.count("maskft: error") == 1, err
    for name in (*CHANGES, "data", "dataset_name"):
        assert re.search(rf"{name}: [^;]+ -> ", err), (name, err)
    assert "give the options of that run to resume it, or name another output_dir" in err
    assert sorted(path.name for path in out.iterdir()) == before


def test_what_does_not_decide_the_course_may_change(train, data, out, finished, tmp_path):
    """Where data lie, what is logged, who loads: the result is that of the undisturbed run."""
    shutil.rmtree(out / "checkpoint-4")
    moved, course = tmp_path / "moved.jsonl", read_manifest(out / "checkpoint-2").course
    shutil.copy(data, moved)
    del course["weight_decay"]  # as if written before there was this option, which stands at its default
    seal(out / "checkpoint-2", course)
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
    with locks.held(tmp_path / "out", TRAIN_LOCK, 0, "run"):
        status, err = train(resume_from_checkpoint="auto")
    assert status == 2 and "another run is running in" in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_not_called_in_use():
    folder = Path("/proc/none/out")
    message = "output_dir '/proc/none/out' cannot be made; name another folder"
    with pytest.raises(UserError, match=message), locks.held(folder, TRAIN_LOCK, 0, "run"):
        pass


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_a_record_of_no_run_is_one_line(content, train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / layout.TRAINING).write_text(content)
    status, err = train(resume_from_checkpoint="auto")
    assert status == 2 and "training.json' is not the record of a run; name another output_dir" in err


def test_a_lock_dies_with_its_owner(tmp_path):
    code = "import sys, time; from pathlib import Path; from maskft_common import locks\n"
    code += "with locks.held(Path(sys.argv[1]), 'train.lock', 0, 'run'): time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], env=ENVIRONMENT)
    wait_for(process, (tmp_path / "out" / TRAIN_LOCK).exists)
    process.kill()
    process.wait()
    with locks.held(tmp_path / "out", TRAIN_LOCK, 0, "run") as hold:
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
        wait_for(process, moments.uniform(0.5, 2.5))
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
    is_time = (out / "checkpoint-0" / MANIFEST).exists
    status, lines = stop_forked_when(is_time, words_of(base, data, out, **options), tmp_path / "log")
    assert status == 143, lines
    assert any("stopping: the step is finished and saved first" in line for line in lines)
    assert lines[-2].startswith("maskft: stopped by SIGTERM after step ") and lines[-2].endswith("to resume:")
    newest = checkpoints.checkpoints_in(out)[-1]
    assert f"step {checkpoints.step_of(newest)} of 60" in lines[-2] and damage(newest) is None
    assert 0 < checkpoints.step_of(newest) < 30
    command = lines[-1].split()
    assert command[0] == "maskft" and command[-2:] == ["--resume_from_checkpoint", "true"]
    assert main(command[1:]) == 0
    assert same_result(out, tmp_path / "whole")


# Two epochs of three steps.
EPOCHS = {"num_train_epochs": 2, "max_steps": None, "per_device_train_batch_size": 16}
# The loss falls in step 1, rises in step 2, and is lower in the end.
UNSTEADY = {"method": "full", "learning_rate": 0.3, "lr_scheduler_type": "constant", "eval_steps": 1, "max_steps": 4}


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({**EPOCHS, "eval_strategy": "epoch", "save_strategy": "epoch"}, 3),
        pytest.param({**EPOCHS, "eval_strategy": "epoch", "save_strategy": "epoch"}, 6, marks=pytest.mark.slow),
        ({**EPOCHS, "logging_strategy": "epoch"}, 3),
        # Without the signal step 1, the best of the first three, would not be saved.
        ({**UNSTEADY, "save_steps": 4}, 1),
        ({**UNSTEADY, "save_strategy": "best"}, 2),
    ],
)
def test_a_signal_in_any_step_changes_nothing(options, step, train, monkeypatch, tmp_path):
    weights = ADAPTER_WEIGHTS
    if options.get("method") == "full":
        weights = "model.safetensors"
    status, err = train("whole", **options)
    assert status == 0, err

    with monkeypatch.context() as patch:
        before = StepGuard.on_pre_optimizer_step

        def with_signal(self, args, state, control, **kwargs):
            if state.global_step + 1 == step:
                self.stop.signal = signal.SIGTERM
            return before(self, args, state, control, **kwargs)

        patch.setattr(StepGuard, "on_pre_optimizer_step", with_signal)
        status, err = train(**options)
    assert status == 143 and f"stopped by SIGTERM after step {step} of " in err, err

    status, err = train(**options, resume_from_checkpoint="true")
    assert status == 0, err
    assert same_result(tmp_path / "out", tmp_path / "whole", weights)
    stopped, whole = (read_record(tmp_path / name).summary for name in ("out", "whole"))
    assert stopped.best_step == whole.best_step


def test_a_run_killed_after_an_epoch_has_the_line_of_its_log(train, tmp_path):
    """Its checkpoint is written at the end of the epoch, with what is due then, and not after its last step."""
    options = {**EPOCHS, "logging_strategy": "epoch", "eval_steps": 3, "save_steps": 3}
    status, err = train("whole", **options)
    assert status == 0, err
    state = json.loads((tmp_path / "whole" / "checkpoint-3" / "trainer_state.json").read_text())
    of_step_3 = [row for row in state["log_history"] if row["step"] == 3]
    assert [("loss" in row, "eval_loss" in row) for row in of_step_3] == [(True, False), (False, True)]


@pytest.mark.parametrize("is_resumable", [True, False])
def test_ctrl_c_does_too(is_resumable, train, finished, tmp_path):
    """But does not say how to resume where it cannot be done."""
    out, before = tmp_path / "out", signal.getsignal(signal.SIGINT)

    def press():
        while not (out / "checkpoint-0" / MANIFEST).exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    status, err = train(max_steps=400, save_steps=400, eval_steps=400, save_only_model=not is_resumable)
    assert status == 130 and "stopped by SIGINT" in err
    assert (" after step" in err) == ("resume" in err) == is_resumable
    assert signal.getsignal(signal.SIGINT) is before
    assert damage(checkpoints.checkpoints_in(out)[-1]) is None


def test_a_second_signal_ends_at_once():
    """Not the same one, which launchers pass on to processes that have heard it."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGTERM and not heard
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    assert signal.signal(signal.SIGTERM, before) is not before


# The disk


@pytest.mark.parametrize("save_only_model", [False, True])
@pytest.mark.parametrize("method", ["mask", "full", "peft"])
def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(
    method, save_only_model, train, tmp_path, monkeypatch
):
    """What is asked for is what the files with weights and moments take, to within a quarter."""
    options = {"method": method, "save_only_model": save_only_model, "eval_on_start": False}
    if method == "peft":
        options["peft_config"] = '{"peft_type": "LORA", "r": 8, "target_modules": "all-linear"}'
    assert train("roomy", **options)[0] == 0
    roomy = tmp_path / "roomy"
    written = 0
    for file in (*roomy.glob("checkpoint-4/*"), *roomy.iterdir()):
        if file.name == "optimizer.pt" or file.suffix == ".safetensors":
            written += file.stat().st_size

    def disk_with(free):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        return lambda folder: usage

    # Not counted: the saved mask, and headers, which are long in a file of many small matrices.
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", disk_with(round(0.75 * written)))
    status, err = train("full-disk", **options)
    assert status == 2 and "Traceback" not in err
    assert "a checkpoint and the trained weights take" in err and "are free for output_dir" in err
    assert not list((tmp_path / "full-disk").glob("checkpoint-*"))
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", disk_with(written))
    assert train("full-disk", **options, resume_from_checkpoint="auto")[0] == 0


@pytest.mark.parametrize(
    ("options", "num_steps", "most"),
    [
        # The best, the newest, and the one that was the newest until it was written.
        ({}, None, 3),
        ({"save_total_limit": 1}, None, 3),
        ({"save_total_limit": 5}, None, 6),
        # Before the first step, at each tenth of the run, and at its end.
        ({"save_total_limit": 50}, None, 12),
        ({"save_total_limit": None, "save_steps": 0.25}, None, 6),
        ({"save_total_limit": None, "save_steps": 40}, None, None),
        ({"save_total_limit": None, "save_steps": 40}, 100, 5),
        ({"save_total_limit": None, "save_steps": 40, "max_steps": 80}, None, 4),
        ({"save_total_limit": None, "save_strategy": "epoch", "eval_strategy": "epoch"}, None, 5),
        ({"save_strategy": "no", "load_best_model_at_end": False}, 100, 0),
    ],
)
def test_the_number_of_checkpoints_at_one_time(options, num_steps, most):
    options["eval_steps"] = options.get("save_steps", 0.1)
    arguments = TrainingArguments(**options, num_train_epochs=3, bf16=False, report_to="none")
    assert checkpoints.most_checkpoints(arguments, num_steps) == most


def test_what_a_run_writes_follows_from_the_sizes_of_its_model():
    arguments = TrainingArguments(bf16=False, report_to="none")

    def of(method, weights=1000, trained=320, scores=0, **settings):
        settings = MethodArguments(method=method, **settings)
        needs = checkpoints.disk_needs(weights, trained, scores, settings, arguments)
        return needs.checkpoint, needs.model

    # With two moments of each trained parameter; scores of 32 bits are saved as bits.
    assert of("full", trained=1000) == (3000, 1000)
    assert of("full") == (1640, 1000)
    assert of("mask", scores=320) == (960, 10)
    assert of("mask", scores=288) == (960, 41)
    assert of("peft") == (960, 320)
    assert of("full", trained=1000, keep_last=True) == (3000, 2000)
    assert of("peft", start_mask="mask") == (960, 1000)
    assert of("l1_mask", scores=320) == (0, 10)
    assert of("interpolate", trained=0) == (0, 1000)


@pytest.mark.parametrize(
    ("resume", "advice"),
    [
        ("true", "then resume with --resume_from_checkpoint true"),
        # As in a study, which has no such option.
        ("auto", "then run the same command again"),
    ],
)
def test_a_file_that_is_larger_than_a_process_may_write(resume, advice, train, out, finished):
    """The checkpoint that was begun is gone, those before are whole, and the run resumes when the limit is raised."""
    shutil.rmtree(out / "checkpoint-4")
    numel = sum(mask.numel() for mask in MaskSet.from_adapter(finished).values())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * numel, before[1]))  # room for the scores, not for two moments
    try:
        status, err = train(resume_from_checkpoint=resume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and "Traceback" not in err
    assert re.search(r"checkpoint-4 cannot be written \(.+\): .* are free; make room", err), err
    assert err.strip().endswith(advice)
    assert not (out / "checkpoint-4").exists() and damage(out / "checkpoint-2") is None
    assert train(resume_from_checkpoint=resume)[0] == 0
    assert same_result(out, finished)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("trainer_state.json", b"[]", "trainer_state.json is not the state of a run"),
        ("trainer_state.json", b"null", "trainer_state.json is not the state of a run"),
        ("optimizer.pt", pickle.dumps(os.getcwd), "cannot be read"),
        ("scheduler.pt", b"", "cannot be read"),
    ],
)
def test_a_stranger_s_checkpoint_is_one_line(file, content, message, out, train):
    """Its manifest is right: whoever made it sealed it."""
    checkpoint = out / "checkpoint-4"
    (checkpoint / file).write_bytes(content)
    course = read_manifest(checkpoint).course
    seal(checkpoint, course)
    status, err = train(resume_from_checkpoint="true", max_steps=4)
    assert status == 2 and message in err and err.count("error:") == 1 and "Traceback" not in err, err
