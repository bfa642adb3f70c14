"""Training through the command line on a tiny model: every method, resume, and every way it can go wrong."""

import copy
import dataclasses
import json
import math
import re
import shutil

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

import tiny
from maskft.masks.mask_set import MaskSet
from maskft.training.arguments import TrainingArguments
from maskft.training.build import heldout_loss
from maskft.training.callbacks import StepGuard, is_checkpointing_reentrant
from maskft.training.method_arguments import MaskArguments, MethodArguments, mask_config, removes_a_share
from maskft.training.options import option_defaults
from maskft.training.record import _plain, read_record
from maskft.training.train import train
from maskft.training.trainer import MaskTrainer
from maskft.training.verdict import read_heldout
from maskft.tuner.config import MaskConfig
from maskft.tuner.presets import PRESETS
from maskft_common.errors import NotFiniteError
from maskft_common.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, HELDOUT, LAST, TRAINING
from maskft_common.memory import peak_memory_bytes
from maskft_lab.cli.main import main
from maskft_lab.cli.train import parse
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def arguments(words):
    return lambda **changes: words(**{"max_steps": 4, "logging_steps": 1, "keep_worse": True, **changes})


def run(words, capsys):
    """Exit status and the lines on stderr."""
    capsys.readouterr()
    status = main([str(w) for w in words])
    return status, capsys.readouterr().err


def summary(folder):
    return json.loads((folder / TRAINING).read_text())["summary"]


def heldout_losses(folder):
    return {row["step"]: row["eval_loss"] for row in summary(folder)["history"] if "eval_loss" in row}


@pytest.mark.parametrize("method", ["full", "mask", "random_mask", "l1_mask", "wanda_mask"])
def test_every_method_trains_and_saves_what_loads(method, arguments, base, tmp_path, capsys):
    weights = (base / "model.safetensors").read_bytes()
    # A study gives this to every mask.
    of_learner = {} if method == "full" else {"mask_init_scores": "normal"}
    status, err = run(arguments(method=method, **of_learner), capsys)
    assert status == 0, err
    assert (base / "model.safetensors").read_bytes() == weights
    out = tmp_path / "out"
    assert summary(out)["method"] == method
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(out)
        assert not torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)
    else:
        plain = AutoModelForCausalLM.from_pretrained(base)
        assert isinstance(PeftModel.from_pretrained(plain, out), PeftModel)
    if method in ("random_mask", "l1_mask", "wanda_mask", "mask"):
        masks = MaskSet.from_adapter(out)
        assert all(int((~m).sum()) == round(0.1 * m.numel()) for m in masks.values()) and len(masks) == 21
    else:
        assert set(heldout_losses(out)) == {0, 2, 4}

    recipe = read_record(out).recipe
    of_training = {"learning_rate", "max_steps", "num_train_epochs", "warmup_steps", "weight_decay", "best_step"}
    is_trained = method in ("full", "mask")
    assert of_training & recipe.keys() == (of_training if is_trained else set())
    assert ("mask_init_scores" in recipe) == (method == "mask")


def test_what_a_run_prints(arguments, capsys, tmp_path):
    _, err = run(arguments(), capsys)
    lines, text = err.splitlines(), " ".join(err.split())
    assert all(len(line) <= 80 or line.startswith("next: ") for line in lines)  # a command is pasted whole
    assert "it/s" not in err and "Warning" not in err and "[transformers]" not in err
    assert re.search(r"sparsity 0.1: removes 10 % of [\d,]+ target weights", text)
    assert re.search(r"48 training rows \(\d+ supervised tokens\), 16 held out", text)
    assert re.search(r"\d\+\d=\[\[\d+<\|im_end\|>\]\]", text)
    wanted = f"next: maskft evaluate --adapter {tmp_path / 'out'} --dataset_name TEST.jsonl"
    assert any(line.startswith(wanted) and line.endswith("results/NAME") for line in lines)
    assert "held-out loss without the mask" in text and "step 0/4 held-out 5." in text
    logged = [row for row in read_record(tmp_path / "out").summary.history if "loss" in row]
    assert logged and all(
        {"tokens_per_s", "peak_memory_bytes", "mask_removed_share", "mask_flips_per_step", "grad_norm"} <= set(row)
        for row in logged
    )
    assert any(row["mask_flips_per_step"] > 0 for row in logged)


def test_a_log_line_of_an_epoch_has_the_flips_of_its_last_step(arguments, tmp_path, capsys):
    options = {"logging_strategy": "epoch", "num_train_epochs": 2, "max_steps": None, "logging_steps": 10}
    assert run(arguments(**options, per_device_train_batch_size=16), capsys)[0] == 0
    logged = [row for row in summary(tmp_path / "out")["history"] if "loss" in row]
    assert [row["step"] for row in logged] == [3, 6]
    assert all("mask_flips_per_step" in row for row in logged)


def test_the_saved_mask_is_the_best_one_measured(arguments, base, data, tmp_path, capsys):
    """The held-out loss of the reloaded adapter is the best loss of the run: trained mask == saved mask."""
    run(arguments(max_steps=8, learning_rate=0.02, per_device_eval_batch_size=16), capsys)
    out = tmp_path / "out"
    losses = heldout_losses(out)
    best = summary(out)["best_loss"]
    assert best == min(loss for step, loss in losses.items() if step > 0)
    where = {"--adapter": out, "--output_dir": tmp_path / "eval", "--dataset_name": data, "--eval_split_size": 16}
    status = main(["evaluate", "--no_generate", *(str(word) for pair in where.items() for word in pair)])
    assert status == 0
    record = json.loads((tmp_path / "eval" / "result.json").read_text())["tasks"]["heldout"]
    assert record["metrics"]["nll"]["value"] == pytest.approx(best, rel=1e-4)


def test_the_start_is_kept_when_every_step_makes_it_worse(arguments, base, tmp_path, capsys):
    run(arguments(method="full", learning_rate=1.0), capsys)
    out = summary(tmp_path / "out")
    assert out["best_step"] == 0 and out["best_loss"] == out["start_loss"] < out["end_loss"]
    kept, start = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "out", base))
    assert all(torch.equal(kept[name], start[name]) for name in start)


def test_a_trained_model_generates_with_its_cache(arguments, tmp_path, capsys):
    """Trainers switch it off in the configuration where activations are recomputed."""
    words = arguments(method="full", gradient_checkpointing=True, max_steps=1, eval_strategy="no", save_strategy="no")
    assert run(words, capsys)[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True
    assert not (tmp_path / "out" / "README.md").exists()  # TRL's would link a base that is on no hub to None


def test_without_evaluation_the_last_step_is_kept(arguments, tmp_path, capsys):
    status, err = run(arguments(eval_strategy="no"), capsys)
    assert status == 0 and "saved to" in err and "best" not in err.splitlines()[-1]
    assert MaskSet.from_adapter(tmp_path / "out").sparsity == pytest.approx(0.1, abs=1e-3)
    assert read_record(tmp_path / "out").verdict is None and not (tmp_path / "out" / HELDOUT).exists()


def test_a_checkpoint_of_the_model_alone_is_not_resumed_from(arguments, tmp_path, capsys):
    """Without optimizer and schedule the rest would be another training: `auto` begins anew, `true` is refused."""
    options = {"max_steps": 4, "save_only_model": True, "keep_last": True, "method": "full"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        assert run(arguments(output_dir=folder, **options), capsys)[0] == 0
    shutil.rmtree(cut / "checkpoint-4")
    for how, said in (("true", "no checkpoint to resume from"), (cut / "checkpoint-2", "2'; write true, or auto")):
        status, err = run(arguments(output_dir=cut, resume_from_checkpoint=how, **options), capsys)
        assert status == 2 and said in err
    assert run(arguments(output_dir=cut, resume_from_checkpoint="auto", **options), capsys)[0] == 0
    for file in ("model.safetensors", f"{LAST}/model.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()


def test_preparing_data_leaves_the_output_folder_alone_and_training_finds_the_rows(arguments, tmp_path, capsys):
    kept, out = tmp_path / "kept", tmp_path / "out"
    assert run(arguments(prepared_data_dir=kept, dataset_num_proc=2), capsys)[0] == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    assert run(arguments(prepared_data_dir=kept, prepare_only=True), capsys)[0] == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before
    assert len(list(kept.iterdir())) == 1


def test_held_out_rows_are_not_packed(arguments, tmp_path, capsys):
    """The loss that chooses the best does not depend on how training rows are put together."""
    options = {"packing": True, "packing_strategy": "bfd", "max_length": 16, "per_device_eval_batch_size": 1}
    for name, more in (("plain", {"max_length": 16, "per_device_eval_batch_size": 1}), ("packed", options)):
        status, err = run(arguments(output_dir=tmp_path / name, **more), capsys)
        assert status == 0, err
    plain, packed = (summary(tmp_path / name)["start_loss"] for name in ("plain", "packed"))
    assert packed == pytest.approx(plain, abs=1e-6)


def test_several_gpus_without_a_launcher_are_for_what_runs_on_one(arguments, tmp_path, capsys, monkeypatch):
    """A study prepares data and makes fixed masks in one process of its own."""
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda _: 2))
    preparing = {"prepare_only": True, "prepared_data_dir": tmp_path / "kept"}
    for name, options in (("fixed", {"method": "l1_mask"}), ("prepared", preparing)):
        status, err = run(arguments(output_dir=tmp_path / name, **options), capsys)
        assert status == 0, err
    for method in ("mask", "full"):
        status, err = run(arguments(method=method), capsys)
        assert status == 2 and "trains on one: add --accelerate_config multi_gpu --num_processes 2" in err


def untimed(folder):
    """The record of a run without what depends on the machine and the moment."""
    timing = ("train_time_s", "peak_memory_bytes")
    record = {key: value for key, value in summary(folder).items() if key not in timing}
    history = [{k: v for k, v in row.items() if not re.search("per_s|runtime|memory", k)} for row in record["history"]]
    return record | {"history": history}


@pytest.mark.parametrize("options", [{"train_sampling_strategy": "group_by_length"}, {"save_strategy": "best"}])
def test_a_resumed_run_sees_the_same_rows_and_a_finished_one_trains_nothing(options, arguments, tmp_path, capsys):
    """Cut in the middle of its second epoch; with `best` the last step is saved whatever its loss is."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = {"max_steps": 12, "save_steps": 1, "eval_steps": 1, "save_total_limit": 20, "max_train_samples": 24}
    options = {"method": "full", **steps, **options}
    for folder in (whole, cut):
        status, err = run(arguments(output_dir=folder, **options), capsys)
        assert status == 0, err
    status, err = run(arguments(output_dir=whole, resume_from_checkpoint="true", **options), capsys)
    assert status == 0 and "already finished: all 12 steps had been trained" in err
    if "save_strategy" in options:
        return
    epochs = {row["step"]: row["epoch"] for row in summary(cut)["history"] if "loss" in row}
    middle = max(step for step, epoch in epochs.items() if epoch < 1.8)
    for step in range(middle + 1, 13):
        shutil.rmtree(cut / f"checkpoint-{step}")
    for path in cut.iterdir():
        if path.is_file():
            path.unlink()
    status, err = run(arguments(output_dir=cut, resume_from_checkpoint="true", **options), capsys)
    assert status == 0, err
    assert untimed(cut) == untimed(whole)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_weights_that_an_optimizer_averages_are_the_ones_that_are_measured_and_saved(arguments, capsys, monkeypatch):
    """As schedule_free_adamw does: its weights between steps are not its result until eval() is called."""
    seen = []

    class Averaging(torch.optim.SGD):
        mode = "train"

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    def create(self, *args, **kwargs):
        self.optimizer = Averaging(self.model.parameters(), lr=1e-3)
        return self.optimizer

    def save(model, tokenizer, record, losses, folder, trainer):
        seen.append(trainer.optimizer.optimizer.mode)

    monkeypatch.setattr(MaskTrainer, "create_optimizer", create)
    monkeypatch.setattr("maskft.training.train.save", save)
    for evaluates in ({"eval_strategy": "no"}, {"eval_steps": 3, "load_best_model_at_end": False}):
        status, err = run(
            arguments(method="full", save_strategy="no", resume_from_checkpoint="auto", **evaluates), capsys
        )
        assert status == 0, err
    assert seen == ["eval", "eval"]


def test_lines_of_the_log_are_those_of_the_resumed_command(arguments, tmp_path, capsys):
    options = {"max_steps": 8, "save_steps": 4, "eval_steps": 4, "method": "full"}
    assert run(arguments(logging_steps=4, **options), capsys)[0] == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    status, err = run(arguments(logging_steps=1, resume_from_checkpoint="true", **options), capsys)
    assert status == 0, err
    assert [row["step"] for row in summary(tmp_path / "out")["history"] if "loss" in row] == [4, 5, 6, 7, 8]


def test_other_options_are_found_before_the_model_is_loaded(arguments, tmp_path, capsys, monkeypatch):
    assert run(arguments(method="full"), capsys)[0] == 0
    monkeypatch.setattr("maskft.training.train.load_base", lambda *args: pytest.fail("loaded"))
    status, err = run(arguments(method="full", resume_from_checkpoint="true", learning_rate=0.5), capsys)
    assert status == 2 and "is from a run with other settings or data (learning_rate: " in err


GUMBEL = {"mask_selection": "gumbel", "mask_init_value": 0.3, "mask_sharpness": 5.0, "mask_price": 0.1}


@pytest.mark.parametrize(
    ("is_finished", "options"),
    [
        pytest.param(True, {"method": "mask"}, marks=pytest.mark.slow),
        pytest.param(
            False, {"method": "mask", "mask_sparsity": 0.4, "mask_sparsity_ramp": 0.9}, marks=pytest.mark.slow
        ),
        (False, {"method": "mask", **GUMBEL}),
        (False, {"method": "full"}),
    ],
    ids=["finished", "ramp", "gumbel", "full"],
)
def test_a_killed_run_trains_no_step_twice(is_finished, options, arguments, tmp_path, capsys):
    """After its last step, or where the newest checkpoint is cut short; every token counts once."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {**options, "max_steps": 6, "save_steps": 3, "eval_steps": 3, "save_total_limit": 5}
    options |= {"keep_last": True, "resume_from_checkpoint": "auto"}
    for folder in (whole, cut):
        assert run(arguments(output_dir=folder, **options), capsys)[0] == 0
    for path in cut.iterdir():
        if path.is_file():
            path.unlink()
        elif path.name == LAST:
            shutil.rmtree(path)
    if not is_finished:
        state = cut / "checkpoint-6" / "trainer_state.json"
        state.write_text(state.read_text()[:100])
    status, err = run(arguments(output_dir=cut, **options), capsys)
    assert status == 0 and ("already finished: all 6 steps" in err) == is_finished, err
    once, again = untimed(whole), untimed(cut)
    assert once == again and once["num_steps"] == 6 and once["num_train_tokens"] > 0
    rates = [row["learning_rate"] for row in again["history"] if "eval_loss" in row]
    assert rates[0] == 0 and rates[1] > 0 and rates[-1] == 0  # warm-up, in between, the end of a linear schedule
    name = "model.safetensors" if options["method"] == "full" else ADAPTER_WEIGHTS
    for place in ("", "last"):
        assert (whole / place / name).read_bytes() == (cut / place / name).read_bytes()


def test_best_of_several_random_masks_is_the_one_with_the_lowest_loss(arguments, base, data, tmp_path, capsys):
    options = {"method": "random_mask", "mask_sparsity": 0.3, "per_device_eval_batch_size": 16}
    status, err = run(arguments(output_dir=tmp_path / "best", num_candidates=4, mask_seed=5, **options), capsys)
    assert status == 0 and "best of 4 by held-out loss" in err
    tried = summary(tmp_path / "best")["history"]
    assert [row["mask_seed"] for row in tried] == [5, 6, 7, 8] and len({row["eval_loss"] for row in tried}) == 4
    best = min(tried, key=lambda row: row["eval_loss"])
    assert summary(tmp_path / "best")["best_loss"] == best["eval_loss"]
    run(arguments(output_dir=tmp_path / "one", **options | {"mask_seed": best["mask_seed"]}), capsys)
    one, chosen = MaskSet.from_adapter(tmp_path / "one"), MaskSet.from_adapter(tmp_path / "best")
    assert all(torch.equal(one[name], chosen[name]) for name in chosen)


def test_fixed_masks_take_a_learned_masks_counts(arguments, tmp_path, capsys):
    learned = tmp_path / "learned"
    run(arguments(output_dir=learned, mask_selection="threshold", mask_rank_by="signed", mask_threshold=0.0005), capsys)
    counts = {n: int((~m).sum()) for n, m in MaskSet.from_adapter(learned).items()}
    for method in ("random_mask", "l1_mask", "wanda_mask"):
        out = tmp_path / method
        assert run(arguments(output_dir=out, method=method, match_adapter=learned), capsys)[0] == 0
        assert {n: int((~m).sum()) for n, m in MaskSet.from_adapter(out).items()} == counts


def test_a_matched_mask_of_other_layers_is_one_line(arguments, tmp_path, capsys):
    for name, layers in (("small", [0]), ("large", [0, 1])):
        options = {"method": "l1_mask", "mask_layers_to_transform": layers}
        assert run(arguments(output_dir=tmp_path / name, **options), capsys)[0] == 0
    for name, layers in (("small", [0, 1]), ("large", [0])):
        options = {"method": "l1_mask", "mask_layers_to_transform": layers}
        status, err = run(arguments(match_adapter=tmp_path / name, **options), capsys)
        assert status == 2 and "masks other layers than this run, or of another shape: model.layers.1." in err


def test_partial_layers_train_what_a_mask_of_them_covers(arguments, base, tmp_path, capsys):
    run(arguments(method="full", partial_layers=[1]), capsys)
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 7 and all(".layers.1." in n and n.endswith("proj.weight") for n in changed)


def test_partial_target_modules_train_what_a_mask_of_them_covers(arguments, base, tmp_path, capsys):
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    gates = {name for name in before if name.endswith("gate_proj.weight")}
    assert len(gates) > 1
    for layers, expected in (({}, gates), ({"partial_layers": [1]}, {"model.layers.1.mlp.gate_proj.weight"})):
        out = tmp_path / f"out{len(expected)}"
        options = {"method": "full", "partial_target_modules": ["gate_proj"], "output_dir": out, **layers}
        assert run(arguments(**options), capsys)[0] == 0
        after = AutoModelForCausalLM.from_pretrained(out).state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == expected


def test_recipe_file_with_flags_on_top(arguments, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    words = arguments()[1:]
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    recipe.write_text("\n".join(f"{key[2:]}: {value}" for key, value in pairs.items()) + "\nmask_sparsity: 0.3\n")
    assert run(["train", "--config", recipe, "--mask_sparsity", "0.2"], capsys)[0] == 0
    assert MaskSet.from_adapter(tmp_path / "out").sparsity == pytest.approx(0.2, abs=0.001)


def mean_nll_of(folder):
    """Held-out loss of the model that a run has saved, a mean over tokens."""
    losses = read_heldout(folder)
    return sum(n * nll for n, nll in zip(losses.num_tokens, losses.nll, strict=True)) / sum(losses.num_tokens)


@pytest.mark.parametrize("loads_best", [True, False])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_best(loads_best, arguments, tmp_path, capsys):
    """With load_best_model_at_end false as well; the record is of the model that is saved."""
    settings = {"eval_steps": 1, "save_steps": 1, "max_grad_norm": 0, "max_steps": 9}
    settings["load_best_model_at_end"] = loads_best
    status, err = run(arguments(method="full", learning_rate=1e30, **settings), capsys)
    last = err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err
    assert re.search(
        r"error: (loss|gradient) is not finite at step \d+: stopped before the update .* is saved in", last
    )
    out = summary(tmp_path / "out")
    assert math.isfinite(out["best_loss"])
    assert out["best_loss"] == pytest.approx(mean_nll_of(tmp_path / "out"), rel=1e-6)
    assert all(p.isfinite().all() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())


def test_the_host_does_not_wait_for_a_gpu_to_note_whether_the_loss_is_finite():
    """A copy from the CPU would wait for all work of the device."""

    class NoCopies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._to_copy.default, torch.ops.aten._local_scalar_dense.default)
            return func(*args, **(kwargs or {}))

    guard = StepGuard(None)
    with NoCopies():
        for _ in range(2):
            guard.see_loss(torch.empty((), device="meta"))
    guard = StepGuard(None)
    for loss in (1.0, math.inf, 1.0):
        guard.see_loss(torch.tensor(loss))
    with pytest.raises(NotFiniteError, match="loss is not finite"):
        guard.on_pre_optimizer_step(None, None, None)


def test_the_peak_memory_of_a_run_on_the_cpu_is_not_that_of_the_gpu_beside_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 7)
    assert peak_memory_bytes() == peak_memory_bytes("cuda") == 7
    assert peak_memory_bytes("cpu") > 10**7


@pytest.mark.parametrize("name", ["_load_from_checkpoint", "_load_best_model"])
def test_the_scores_of_a_checkpoint_are_read_by_the_cpu(name, tmp_path, monkeypatch):
    """PEFT would read them onto the first GPU, in every process."""
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(save_scores=True))
    model.save_pretrained(tmp_path)
    trainer = MaskTrainer.__new__(MaskTrainer)
    trainer.model = model
    monkeypatch.setattr(SFTTrainer, name, lambda self: self.model.load_adapter(tmp_path, "default"))
    devices = []
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: pytest.fail("a device of PEFT's choice"))
    real = peft_model.load_peft_weights

    def read(*args, device, **kwargs):
        devices.append(device)
        return real(*args, device=device, **kwargs)

    monkeypatch.setattr(peft_model, "load_peft_weights", read)
    getattr(trainer, name)()
    assert devices == ["cpu"] and "load_adapter" not in vars(model)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_while_the_loss_is_finite(max_grad_norm, arguments, base, tmp_path, capsys):
    """A head 1e25 times as large behind a norm 1e25 times as small: the same loss, and a gradient whose norm is inf.

    Clipping would divide by that norm, so every gradient would be 0 and the run would go on without learning.
    """
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(1e-25)
        model.lm_head.weight.mul_(1e25)
    model.save_pretrained(tmp_path / "steep")
    tiny_tokenizer().save_pretrained(tmp_path / "steep")
    settings = {"model_name_or_path": tmp_path / "steep", "max_grad_norm": max_grad_norm, "max_steps": 2}
    status, err = run(arguments(method="full", **settings), capsys)
    assert status == 2 and "error: gradient is not finite at step 1: stopped before the update" in err
    assert math.isfinite(summary(tmp_path / "out")["best_loss"])


def test_the_best_checkpoint_is_the_best_of_those_that_are_saved(arguments, tmp_path, capsys):
    """A loss that is lower between two of them belongs to weights that nobody kept."""
    options = {"eval_steps": 1, "save_steps": 3, "max_steps": 6, "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    assert run(arguments(method="full", **options), capsys)[0] == 0
    found = summary(tmp_path / "out")
    losses = {row["step"]: row["eval_loss"] for row in found["history"] if "eval_loss" in row}
    assert min(losses.values()) < min(losses[step] for step in (0, 3, 6)) == found["best_loss"], losses
    assert losses[found["best_step"]] == found["best_loss"]


def test_rows_that_are_packed_beyond_the_context(arguments, base, tmp_path, capsys):
    """Rows of a stream count their positions on; those of the other strategies begin anew in each row."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.max_position_embeddings = 64
    model.save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 128}
    status, err = run(arguments(model_name_or_path=tmp_path / "short", **options), capsys)
    assert status == 2 and "the longest row has 128 tokens, the model's context 64: lower max_length" in err
    assert run(arguments(model_name_or_path=tmp_path / "short", **options | {"max_length": 64}), capsys)[0] == 0


def test_a_base_that_lacks_weights_or_context(arguments, base, tmp_path, capsys):
    for change, message in (
        ("context", "tokens, the model's context 4"),
        ("weights", "it lacks 1 weights, model.norm"),
    ):
        model = AutoModelForCausalLM.from_pretrained(base)
        if change == "context":
            model.config.max_position_embeddings = 4
        state = {
            name: value for name, value in model.state_dict().items() if change != "weights" or "model.norm" not in name
        }
        model.save_pretrained(tmp_path / change, state_dict=state)
        tiny_tokenizer().save_pretrained(tmp_path / change)
        status, err = run(arguments(model_name_or_path=tmp_path / change), capsys)
        assert status == 2 and message in err and not (tmp_path / "out").exists()


def test_a_base_that_gives_nan(arguments, base, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(float("inf"))
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    tiny_tokenizer().save_pretrained(broken)
    status, err = run(arguments(model_name_or_path=broken, mask_layers_to_transform=[1]), capsys)
    assert status == 2 and "loss is not finite at step 1: stopped before the update" in err.strip().splitlines()[-1]
    assert not (tmp_path / "out" / ADAPTER_WEIGHTS).exists()


# Bad input: one line, status 2, nothing written


def cases():
    yield {"mask_sparsity": 1.0}, r"sparsity is 1.0; .* must be in \[0, 1\)"
    yield {"mask_layers_to_transform": [1, 7]}, "names layer 7; the model has layers 0 to 2"
    yield (
        {"mask_target_modules": ["q_prj"]},
        r"match no layer \(did you mean 'q_proj'\?\); the model's linear layers are",
    )
    yield {"mask_preset": "papr"}, "did you mean 'paper'"
    for steps in (0, -2):
        yield {"max_steps": steps}, f"max_steps is {steps}; it must be at least 1, or -1 to count num_train_epochs"
    yield {"metric_for_best_model": "mean_token_accuracy"}, "the best checkpoint is that of the lowest eval_loss"
    yield {"greater_is_better": True}, "with greater_is_better True; the best checkpoint"
    yield {"max_length": -1}, "max_length is -1; it must be at least 1"
    yield {"seed": -1}, "seed is -1; it must be at least 0"
    yield {"dataset_num_proc": -1}, "dataset_num_proc is -1; it must be at least 0"
    yield {"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0; it must be a whole number of at least 1, or auto"
    # TRL before "auto" has a number.
    no_number = "pad_to_multiple_of is x; it must be a whole number|pad_to_multiple_of.*: invalid int value: 'x'"
    yield {"pad_to_multiple_of": "x"}, no_number
    yield {"max_grad_norm": "nan"}, "max_grad_norm is nan; it must be a number, 0 for no clipping"
    for name in ("weight_decay", "eval_delay"):
        yield {name: "nan"}, f"{name} is nan; it must be 0 or more"
    yield {"weight_decay": -1}, "weight_decay is -1.0; it must be 0 or more"
    yield {"neftune_noise_alpha": -1}, "neftune_noise_alpha is -1.0; it must be 0 or more"
    yield {"label_smoothing_factor": 2}, "label_smoothing_factor is 2.0; it must be at least 0 and below 1"
    yield {"dataloader_persistent_workers": True}, "needs workers: give dataloader_num_workers too"
    yield {"gradient_checkpointing_kwargs": '{"use_reentrand": true}'}, "did you mean 'use_reentrant'"
    yield {"accelerator_config": '{"use_seedable_sampler": false}'}, "a run is not resumed exactly|no run is resumed"
    yield {"accelerator_config": '{"dispatch_batches": true}'}, "dispatch_batches true, with which no run is resumed"
    # Earlier releases of transformers do not have this choice.
    yield {"train_sampling_strategy": "batch_rebalance"}, "with which seed has no effect|invalid choice"
    yield (
        {"method": "l1_mask", "keep_last": True},
        "keep_last goes with --method full or peft or mask, not with l1_mask",
    )
    kasa = '{"peft_type": "LORA", "target_modules": ["q_proj"], "kasa_config": {}}'
    yield {"method": "peft", "peft_config": kasa}, "peft_config has kasa_config, which changes the base's weights"
    yield {"adam_beta1": 1.5}, "the optimizer cannot be made: Invalid beta"
    yield {"learning_rat": 3}, r"unknown option --learning_rat \(did you mean 'learning_rate'\?\)"
    yield {"method": "masks"}, "invalid choice: 'masks'"
    yield {"dataset_name": "no-such-file.jsonl"}, "data file no-such-file.jsonl does not exist"
    yield {"model_name_or_path": "./no-such-model"}, "model folder './no-such-model' does not exist"
    yield {"model_name_or_path": None}, "model_name_or_path is missing"
    yield {"dataset_name": None}, "dataset_name is missing"
    yield {"max_length": 2}, "every label is masked"
    yield {"eval_split_size": 1000}, "eval_split_size"
    yield {"method": "full", "mask_seed": 3}, "mask_seed is an option of masks and has no effect on method full"
    yield {"method": "l1_mask", "num_candidates": 2}, "num_candidates goes with --method random_mask, not with l1_mask"
    yield {"method": "wanda_mask", "num_calibration_samples": 0}, "num_calibration_samples is 0"
    yield {"partial_layers": [1]}, "partial_layers goes with --method full"
    yield {"partial_target_modules": ["gate_proj"]}, "partial_target_modules goes with --method full"
    yield {"method": "full", "partial_target_modules": ["gate"]}, "partial_target_modules"
    yield {"trust_remote_code": True}, "code in the folder of a model is not run"
    yield {"load_in_4bit": True, "method": "full"}, "method full needs weights that are floats"
    yield {"match_adapter": "x"}, "match_adapter goes with --method random_mask or l1_mask or wanda_mask, not with mask"
    unused = {
        "eos_token": "<pad>",
        "length_column_name": "labels",
        "truncation_mode": "keep_end",
        "model_init_kwargs": '{"use_kernels": true}',
    }
    unused |= dict.fromkeys(("assistant_only_loss", "shuffle_dataset", "push_to_hub", "eval_packing"), True)
    for name, value in unused.items():
        yield {name: value}, f"{name} is .*, which maskft train does not use; "
    of_head = '{"peft_type": "LORA", "target_modules": ["lm_head"]}'
    yield {"method": "peft", "peft_config": of_head}, "`lm_head` is (not supported|wrapped by a PEFT adapter)"
    threshold = {"mask_selection": "threshold", "mask_rank_by": "signed"}
    yield {"method": "l1_mask", **threshold}, "l1_mask removes mask_sparsity of the weights"
    for name in ("other-model", "missing.jinja"):
        yield {"chat_template_path": name}, f"chat_template_path '{name}' is not a .jinja file"
    yield {"resume_from_checkpoint": "true"}, "there is no checkpoint to resume from"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat' (did you mean 'learning_rate'?)"),
        ("method: loro", "method is 'loro'; it must be one of full, peft, mask"),
        ("method:", "method has no value; give it one, or leave the line out: its default is mask"),
        ("max_steps: 2.5", "max_steps is 2.5; it must be a whole number"),
        ("kl_to_base: [1]", "kl_to_base is [1]; it must be a number"),
        ("kl_budget: [1]", "kl_budget is [1]; it must be a number"),
        ("kl_budget: true", "kl_budget is True; it must be a number"),
        ("max_length: 2.5", "max_length is 2.5; it must be a whole number"),
        ("kl_dataset_name: 3", "kl_dataset_name is 3; it must be text"),
        ("keep_mask: [a]", "keep_mask is ['a']; it must be text"),
        ("chat_template_path: 5", "chat_template_path is 5; it must be text"),
        ("output_dir: 5", "output_dir is 5; it must be text"),
        ("output_dir:", "output_dir has no value; give it one, or leave the line out: its default is runs/mask"),
        ("lr_scheduler_kwargs: 5", "lr_scheduler_kwargs is 5; it must be text"),
        ("report_to: {none: 1}", "report_to is {'none': 1}; it must be text"),
        ("save_strategy: [steps]", "save_strategy is ['steps']; it must be text"),
        ("bf16: [false]", "bf16 is [False]; it must be true or false"),
        ("gradient_checkpointing: 2", "gradient_checkpointing is 2; it must be true or false"),
        ("liger_kernel_config: 3", "liger_kernel_config is 3; it must be a mapping of names to true or false"),
        ("mask_target_modules: [q_proj, 3]", "mask_target_modules is ['q_proj', 3]; it must be text or a list of text"),
        ('partial_layers: ["1"]', "partial_layers is ['1']; it must be a whole number or a list of whole numbers"),
        ("report_to: [[x]]", "report_to is [['x']]; it must be text or a list of text"),
        ("parallelism_config: 5", "parallelism_config is 5; it must be left out: a file cannot give it"),
        ('output_dir: ""', "output_dir is empty; give it a value, or leave the line out"),
        ("dataset_name: {a: [1]}", "dataset_name is {'a': [1]}; it must be text or a mapping of names to numbers or"),
        ("warmup_steps: .inf", "warmup_steps is inf; it must be a number of steps, or below 1 a fraction of the run"),
        ("save_steps: -5", "save_steps is -5; it must be a number of steps"),
        ("accelerator_config: missing.json", "No such file or directory: 'missing.json'"),
        ("gpu_ids:", "gpu_ids has no value; give it one, or leave the line out"),
        ("gpu_ids: [0, 1]", "gpu_ids is [0, 1]; it must be text or"),
        ("env: [A]", "env is ['A']; it must be lines of `NAME: value`"),
        ('env: {"A=B": x}', "env has 'A=B': 'x'; write NAME: text, or NAME: number"),
        ("env: {A: null}", "env has 'A': None; write NAME: text"),
        ('run_name: "a\\0b"', "has a character that no file can hold; leave it out"),
        ('run_name: "\\ud800"', "has a character that no file can hold; leave it out"),
        ("dataloader_prefetch_factor: -1", "dataloader_prefetch_factor is -1; it must be at least 1"),
        ("- a", "must have lines of `name: value`"),
        ("model_init_kwargs: {no: 1}", "line 1: a name must be text, not False; put it in quotes"),
        ("seed: 0xFFFFFFFFFFFFFFFFFF", "line 1: 0xFFFFFFFFFFFFFFFFFF is larger than a number of 64 bits"),
        ("model_init_kwargs: {a: !!binary aGk=}", "b'hi' is of a kind that is not read"),
        ("max_grad_norm: null", "max_grad_norm has no value; give it one, or leave the line out: its default is 1.0"),
        ("eval_split_size:", "eval_split_size has no value; give it one, or leave the line out: its default is 0.1"),
        ("seed: null", "seed has no value"),
        ("num_train_epochs: null", "num_train_epochs has no value"),
        ("split_seed: null", "split_seed has no value"),
    ],
)
def test_mistakes_in_a_recipe(line, message, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(line)
    status, err = run(["train", "--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "out"], capsys)
    assert status == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "change,message", list(cases()), ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_bad_input_ends_in_one_line(change, message, arguments, tmp_path, capsys):
    status, err = run(arguments(**change), capsys)
    assert status == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("maskft: error: ") and re.search(message, last), err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_a_model(arguments, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    status, err = run(arguments(model_name_or_path=tmp_path / "empty"), capsys)
    assert status == 2 and "is not a model folder: it has no config.json" in err
    # An adapter, which the command has no option for.
    (tmp_path / "empty" / ADAPTER_CONFIG).write_text("{}")
    status, err = run(arguments(model_name_or_path=tmp_path / "empty"), capsys)
    assert status == 2 and "it is an adapter: name its base, or a model made by maskft merge" in err


def test_an_output_folder_that_holds_other_files(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep")
    status, err = run(arguments(), capsys)
    assert status == 2 and "holds files that are not from a run (precious.txt); name another folder" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_checkpointing_runs_frozen_layers_below_the_mask_once(arguments, capsys, monkeypatch):
    """A float32 run with checkpointing: the same losses, and no second pass through layers that need no gradient."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    ran = []
    forward = LlamaMLP.forward

    def counted(self, x):
        if self.training:
            ran.append(id(self))
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    settings = {"mask_layers_to_transform": 1, "max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    status, err = run(arguments(gradient_checkpointing=True, **settings), capsys)
    assert status == 0, err
    # Three layers, two steps: layer 0 once a step, layers 1 and 2 again in the backward pass.
    assert sorted(ran.count(layer) for layer in set(ran)) == [2, 4, 4]


@pytest.mark.parametrize(
    ("options", "is_reentrant"),
    [
        (None, False),
        ({}, False),
        ({"every_n_layers": 2}, False),
        ({"selective": True}, False),
        ({"use_reentrant": False}, False),
        ({"use_reentrant": False, "preserve_rng_state": False}, False),
        ({"use_reentrant": True}, True),
        ({"preserve_rng_state": False}, True),
    ],
)
def test_checkpointing_with_options_is_reentrant_unless_they_say_otherwise(options, is_reentrant):
    """As torch decides: the gradient must then reach the embeddings, or checkpointed layers have none."""
    assert is_checkpointing_reentrant(options) is is_reentrant


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bfloat16_is_the_default_where_the_processor_multiplies_it(has_instructions, monkeypatch, tmp_path):
    from maskft.training import arguments as training_arguments

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(training_arguments, "multiplies_bfloat16", lambda: has_instructions)
    assert TrainingArguments(output_dir=str(tmp_path)).bf16 is has_instructions
    for bf16 in (True, False):
        args = TrainingArguments(output_dir=str(tmp_path), bf16=bf16)
        with heldout_loss(None, tiny_tokenizer(), args).context():  # also where nothing is trained
            assert torch.is_autocast_enabled(args.device.type) is args.bf16 is bf16


@pytest.mark.parametrize(("instructions", "expected"), [([], False), (["bf16"], True), (None, True)])
def test_a_processor_of_arm_multiplies_bfloat16_if_it_lists_the_instructions(instructions, expected, monkeypatch):
    from maskft.training import arguments as training_arguments

    monkeypatch.setattr(training_arguments.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(training_arguments, "bfloat16_instructions", lambda: instructions)
    assert training_arguments.multiplies_bfloat16() is expected


@pytest.mark.parametrize(
    ("words", "sparsity", "start", "rate"),
    [
        ([], 0.1, "magnitude", 3e-4),
        (["--mask_preset", "recommended"], 0.1, "magnitude", 3e-4),
        (["--method", "random_mask"], 0.1, "magnitude", 2e-5),
        (["--mask_preset", "paper"], 0.1, "normal", 1e-2),
        (["--mask_sparsity", "0.3", "--learning_rate", "1e-4"], 0.3, "magnitude", 1e-4),
        (["--mask_init_scores", "normal"], 0.1, "normal", 1e-2),
        (["--mask_init_scores", "wanda"], 0.1, "wanda", 3e-4),
        (["--mask_selection", "logit", "--mask_init_value", "0.1"], 0.1, "normal", 1e-2),
        (["--mask_selection", "logit", "--mask_init_value", "0.1", "--mask_init_scores", "wanda"], 0.1, "wanda", 1e-2),
        (["--mask_preset", "deletion_tuning"], 0.1, "magnitude", 5e-3),
        (["--mask_removed_value", "base", "--mask_removed_value_model", "any"], 0.1, "normal", 1e-2),
        (["--method", "full"], 0.1, "magnitude", 2e-5),
    ],
)
def test_the_recommended_mask_is_the_default(words, sparsity, start, rate):
    config = parse(["--model_name_or_path", "any", "--dataset_name", "any", *words])
    made = mask_config(config.mask)
    assert (made.sparsity, made.init_scores, config.training.learning_rate) == (sparsity, start, rate)
    if not words:
        recommended = MaskConfig(preset="recommended")
        assert all(getattr(made, name) == getattr(recommended, name) for name in PRESETS["recommended"])


@pytest.mark.parametrize(
    ("name", "value"), [("price", 0.0), ("gradient", "straight_through"), ("sharpness", 1.0), ("selection", "topk")]
)
def test_an_option_beside_a_preset_wins_also_at_its_default(name, value):
    words = ["--model_name_or_path", "any", "--dataset_name", "any", "--mask_preset", "deletion_tuning"]
    run = parse([*words, f"--mask_{name}", str(value)])
    assert getattr(mask_config(run.mask), name) == value != PRESETS["deletion_tuning"][name]
    assert removes_a_share(vars(run.mask)) == (mask_config(run.mask).selection == "topk")
    # Names of runs leave out what stands at its default.
    assert option_defaults()[f"mask_{name}"] == MaskConfig.__dataclass_fields__[name].default


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["all-linear"], "all-linear"),
        ([".*q_proj"], ".*q_proj"),
        (["q_proj"], ["q_proj"]),
        (["self_attn.q_proj"], ["self_attn.q_proj"]),
        (["q_proj", "k_proj"], ["q_proj", "k_proj"]),
    ],
)
def test_names_of_layers_or_a_regular_expression(given, meant):
    words = ["--model_name_or_path", "any", "--dataset_name", "any"]
    made = mask_config(parse([*words, "--mask_target_modules", *given, "--mask_exclude_modules", *given]).mask)
    assert (made.target_modules, made.exclude_modules) == (meant, meant)
    one = MaskArguments(mask_target_modules="q_proj")  # as YAML has it
    assert mask_config(one).target_modules == ["q_proj"] and MethodArguments(partial_layers=1).partial_layers == [1]
    assert MethodArguments(partial_target_modules="q_proj").partial_target_modules == ["q_proj"]


def test_a_run_leaves_its_configuration_as_it_was(base, data, tmp_path):
    words = ["--model_name_or_path", base, "--dataset_name", data, "--output_dir", tmp_path / "out", "--max_steps", 1]
    words += ["--method", "peft", "--peft_config", '{"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}']
    words += ["--global_batch_size", 8, "--per_device_train_batch_size", 4, "--padding_free", True]
    config = parse([str(word) for word in [*words, "--max_length", 16, "--bf16", False, "--eval_on_start", False]])
    parts = (config.method, config.model, config.data, config.mask, config.training)

    def values():
        return {spec.name: copy.copy(getattr(part, spec.name)) for part in parts for spec in dataclasses.fields(part)}

    before = values()
    train(config)
    assert values() == before
    record = read_record(tmp_path / "out")
    assert record.recipe["gradient_accumulation_steps"] == 2 and record.recipe["max_length"] == 16
    assert record.recipe["padding_free"] is True and record.recipe.keys().isdisjoint(("use_cpu", "dtype", "optim"))
    assert record.summary.start_loss is None


def test_no_telemetry(arguments, capsys, monkeypatch):
    sent = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: sent.append("sent"))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    assert run(arguments(max_steps=1, eval_strategy="no", save_strategy="no"), capsys)[0] == 0
    assert not sent


def test_a_base_model_learns_conversations_by_a_template_file(arguments, tmp_path, capsys):
    """A base model as they are published: its tokenizer has no chat template."""
    plain_base, conversations = tmp_path / "plain", tmp_path / "chat.jsonl"
    tokenizer = tiny_tokenizer(chat_template=False)
    tiny.tiny_llama(vocab_size=len(tokenizer), num_layers=3).save_pretrained(plain_base)
    tokenizer.save_pretrained(plain_base)
    turns = [("user", "say {}"), ("assistant", "{}")]
    rows = [{"messages": [{"role": r, "content": text.format(n)} for r, text in turns]} for n in range(32)]
    conversations.write_text("\n".join(map(json.dumps, rows)))
    words = {"model_name_or_path": plain_base, "dataset_name": conversations, "eval_split_size": 8}
    status, err = run(arguments(**words), capsys)
    assert status == 2 and "chat_template_path" in err
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ':' + m.content + '|' }}{% endfor %}")
    status, err = run(arguments(**words, chat_template_path=template), capsys)
    assert status == 0, err
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template.read_text()


def test_a_record_names_the_current_folder(tmp_path, monkeypatch):
    folder = tmp_path / "my-model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert _plain(".") == "my-model", "and not an empty name"
    assert _plain(str(folder)) == _plain(f"{folder}/") == "my-model"
    assert _plain("no-path/at-all") == "no-path/at-all"
    assert _plain(0.5) == 0.5


def test_a_folder_with_brackets_is_printed_as_it_is(arguments, tmp_path, capsys):
    """Rich would take [draft] for markup, and a shell for a pattern."""
    folder = tmp_path / "out[draft]"
    status, err = run(arguments(method="l1_mask", output_dir=folder), capsys)
    assert status == 0, err
    assert f"next: maskft evaluate --adapter '{folder}' --dataset_name" in err


@pytest.mark.parametrize("method", ["mask", "full"])
def test_saved_weights_are_as_readable_as_the_files_beside_them(method, arguments, tmp_path, capsys):
    assert run(arguments(method=method, keep_worse=True if method == "mask" else None), capsys)[0] == 0
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in folder.iterdir() if file.is_file()}
        weights = [name for name in modes if name.endswith(".safetensors")]
        assert weights and len({*modes.values()}) == 1, modes


def test_tied_weights_are_not_missing(arguments, tmp_path, capsys, caplog):
    tokenizer = tiny_tokenizer()
    model = tiny.tiny_llama(vocab_size=len(tokenizer), tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    status, err = run(arguments(method="full", model_name_or_path=tmp_path / "tied"), capsys)
    assert status == 0, err
    assert "missing keys" not in err + caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mask_preset": "deletion_tuning", "mask_sparsity": 0.1},
            "mask_sparsity 0.1 has no effect with mask_preset deletion_tuning (mask_selection logit)",
        ),
        (
            {"mask_preset": "deletion_tuning", "mask_sparsity": 0.3},
            "mask_sparsity 0.3 has no effect with mask_preset deletion_tuning (mask_selection logit)",
        ),
        (
            {"mask_selection": "threshold", "mask_threshold": 0.01, "mask_sparsity": 0.1},
            "mask_sparsity 0.1 has no effect with mask_selection threshold, which removes",
        ),
        ({"seed": 1099511627776}, "seed is 1099511627776; it must be at most 4294967295"),
        ({"method": "lora"}, """method is 'lora', which is an adapter of PEFT's: give --method peft --peft_config"""),
        ({"method": "dora"}, '"use_dora": true'),
        ({"eval_split_size": 0}, "eval_split_size is 0; held-out rows choose the best checkpoint"),
        ({"eval_delay": 5}, "eval_delay is 5, and the run has 4 steps: nothing that it learns would be measured"),
        (
            {"eval_delay": 3, "eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 24},
            "eval_delay is 3, and the run has 2 epochs",
        ),
        (
            # The second epoch ends after its first step.
            {"eval_delay": 2, "eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 13},
            "eval_delay is 2, and the run has 1.08333 epochs",
        ),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint is True, which maskft train does not use"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is True, which maskft train does not use"),
        ({"label_names": "labels"}, "label_names is ['labels'], which maskft train does not use; remove the option"),
        ({"prediction_loss_only": True}, "prediction_loss_only is True, which maskft train does not use"),
        ({"activation_offloading": True}, "activation_offloading moves tensors from a GPU to the CPU, which trains"),
        (
            {"global_batch_size": 8, "gradient_accumulation_steps": 4},
            "global_batch_size 8 and gradient_accumulation_steps 4 contradict each other: with "
            "per_device_train_batch_size 4 x 1 processes it takes 2; give one of them",
        ),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 100},
            "dataloader_drop_last drops the only batch: there are 48 training rows, and per_device_train_batch_size "
            "100 x 1 processes = 100; leave it out, or lower",
        ),
    ],
)
def test_options_without_effect_or_out_of_range_are_one_line(options, message, arguments, capsys):
    status, err = run(arguments(**options), capsys)
    assert status == 2 and message in err and err.count("error:") == 1, err


def test_method_lora_in_a_recipe_names_the_way(arguments, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("method: lora\n")
    status, err = run([*arguments(), "--config", tmp_path / "recipe.yaml"], capsys)
    assert status == 2 and "give --method peft --peft_config" in err


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("method", ["random_mask", "l1_mask", "wanda_mask"])
def test_a_fixed_mask_of_a_base_that_is_not_finite_is_not_made(value, method, arguments, base, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    status, err = run(arguments(method=method, model_name_or_path=tmp_path / "broken"), capsys)
    assert status == 2 and "hold NaN or inf" in err and f"{method} cannot be made" in err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_second_data_set_after_a_space_is_one_line(arguments, capsys):
    """Rows of several sets are a mixture, which is one word; "unknown option b.jsonl" did not say so."""
    status, err = run([*arguments(), "b.jsonl"], capsys)
    assert status == 2 and "several data sets are separated by commas (a.jsonl,b.jsonl)" in err


@pytest.mark.parametrize("keep_worse", [False, True])
def test_too_few_steps_for_a_score_to_reach_zero_are_said(keep_worse, arguments, tmp_path, capsys):
    """The mask of the start removes nothing, so naming its checkpoint would be no help; a study keeps such a mask."""
    options = {"mask_preset": "deletion_tuning", "learning_rate": 1e-6, "max_steps": 2, "mask_init_value": 0.1}
    options["keep_worse"] = keep_worse
    status, err = run(arguments(**options), capsys)
    words = " ".join(err.split())
    assert status == 0 and "The mask is in" not in words, err
    assert "No checkpoint beat the starting mask. Too few steps: scores start around mask_init_value 0.1" in words
    assert "2 steps at learning_rate 1e-06 move them by about 1e-06 (steps * rate / 2)" in words
