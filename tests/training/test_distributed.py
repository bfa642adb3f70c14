"""Training in two or four processes over gloo: the result is that of one, and a mistake is one line, not a hang."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import tiny
from killing import start, stop_when, wait_for
from maskft.masks.adapter_file import check_scores
from maskft.masks.mask_set import MaskSet
from maskft.training.checkpoints import checkpoints_in, step_of
from maskft.training.manifest import damage, read_manifest
from maskft.training.options import parse_words
from maskft.training.record import read_record
from maskft.training.verdict import read_heldout
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_WEIGHTS, LAST, MANIFEST, TRAINING
from maskft_lab.cli.main import main
from tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
# Absolute, in nats per token: sums over half a batch on each of two ranks round otherwise than one over the whole.
LOSS_TOLERANCE = 1e-5
LORA = json.dumps({"peft_type": "LORA", "r": 4, "target_modules": "all-linear"})
LAUNCH = {"num_processes": 2, "mixed_precision": "no", "main_process_port": 0}
# torch 2.8 shards on CPUs, and cannot save with transformers 5.10; 2.7 and 2.9 to 2.12 were not tried.
HAS_FSDP2_ON_CPUS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
needs_fsdp2_on_cpus = pytest.mark.skipif(not HAS_FSDP2_ON_CPUS, reason="FSDP2 on CPUs needs torch 2.13")
FSDP2 = pytest.param("fsdp2", marks=needs_fsdp2_on_cpus)


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory):
    """A base model with matrices of 49 rows, which two ranks cannot share evenly."""
    folder = tmp_path_factory.mktemp("odd")
    tokenizer = tiny_tokenizer()
    tiny.tiny_llama(vocab_size=len(tokenizer), num_layers=2, intermediate_size=49).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(odd_base, data):
    # Of two last batches of 4 held-out rows one is short, and one repeats rows and nothing else.
    settings = {
        "model_name_or_path": odd_base, "dataset_name": data, "eval_split_size": 11, "max_steps": 4,
        "global_batch_size": 8, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "eval_steps": 2,
        "save_steps": 2, "save_total_limit": 3, "logging_steps": 1, "keep_worse": True, "learning_rate": 1e-2,
        "bf16": False, "gradient_checkpointing": False, "keep_last": True,
    }  # fmt: skip

    def build(**changes):
        pairs = [(f"--{key}", str(value)) for key, value in {**settings, **changes}.items() if value is not None]
        return ["train", *(word for pair in pairs for word in pair)]

    return build


@pytest.fixture(scope="module")
def one_process(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert main(arguments(output_dir=folder)) == 0
    return folder


def call(words, timeout_s=300):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def losses(folder):
    history = json.loads((folder / TRAINING).read_text())["summary"]["history"]
    return {(row["step"], name): row[name] for row in history for name in ("loss", "eval_loss") if name in row}


def check_equal(folder, reference, resumed=False):
    """Losses within tolerance, same masks bit for bit, at the best step and at each checkpoint; the same tokens."""
    one, many = (json.loads((f / TRAINING).read_text())["summary"] for f in (reference, folder))
    if not resumed:  # TRL counts tokens from where it resumed
        assert many["num_train_tokens"] == one["num_train_tokens"]
    for name in ("num_trainable", "num_target_weights", "num_steps", "best_step"):
        assert many[name] == one[name], name
    assert many["start_loss"] == pytest.approx(one["start_loss"], abs=LOSS_TOLERANCE)
    assert losses(folder).keys() == losses(reference).keys()
    assert losses(folder) == pytest.approx(losses(reference), abs=LOSS_TOLERANCE)
    flips = [[row.get("mask_flips_per_step") for row in run["history"] if "loss" in row] for run in (one, many)]
    assert flips[0] == flips[1] and any(flips[0])
    assert (folder / ADAPTER_WEIGHTS).read_bytes() == (reference / ADAPTER_WEIGHTS).read_bytes()
    last, expected = MaskSet.from_adapter(folder / LAST), MaskSet.from_adapter(reference / LAST)
    assert last.keys() == expected.keys() and all(torch.equal(last[name], expected[name]) for name in expected)
    for checkpoint in reference.glob("checkpoint-*"):
        expected = load_file(checkpoint / ADAPTER_WEIGHTS)
        found = load_file(folder / checkpoint.name / ADAPTER_WEIGHTS)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if "mask_coded" in name:
                assert torch.equal(found[name], tensor)
            elif "mask_scores_sha256" in name:
                # Scores differ by rounding, and so their checksums do: each is that of its own file's scores.
                assert found[name].shape == tensor.shape
            else:
                assert torch.allclose(found[name], tensor, rtol=0, atol=1e-5), name
        of_one, of_many = (check_scores(f / checkpoint.name / ADAPTER_WEIGHTS) for f in (reference, folder))
        assert of_one == of_many > 0
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (reference, folder)]
    for name in ("mask_sha256", "base_fingerprint"):
        assert configs[0][name] == configs[1][name]
    expected, found = read_heldout(reference), read_heldout(folder)
    assert (found.ids, found.num_tokens) == (expected.ids, expected.num_tokens) and len(found.ids) == 11
    assert found.nll == pytest.approx(expected.nll, abs=1e-4) != found.parent_nll
    assert found.parent_nll == pytest.approx(expected.parent_nll, abs=1e-4)


def signal_rank(launcher, rank, signum):
    """Send a signal to one of the processes that a launcher started."""
    (process,) = [p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == str(rank)]
    process.send_signal(signum)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", FSDP2])
def test_four_processes_give_the_mask_of_one_with_a_killed_rank_and_a_straggler(
    config, arguments, one_process, tmp_path
):
    out = tmp_path / "out"
    words = arguments(output_dir=out, accelerate_config=config, **LAUNCH | {"num_processes": 4})
    launcher = start(words)
    wait_for(launcher, (out / "checkpoint-0" / MANIFEST).exists)
    signal_rank(launcher, 3, signal.SIGSTOP)  # the others wait for it
    time.sleep(5)
    signal_rank(launcher, 3, signal.SIGCONT)
    wait_for(launcher, (out / "checkpoint-2" / MANIFEST).exists)
    signal_rank(launcher, 3, signal.SIGSTOP)
    time.sleep(1)
    signal_rank(launcher, 3, signal.SIGKILL)
    err = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 137 and "error: rank 3 was ended by SIGKILL" in err.strip().splitlines()[-1], err
    whole = [step_of(checkpoint) for checkpoint in checkpoints_in(out) if damage(checkpoint) is None]
    assert whole == [0, 2] and not (out / TRAINING).exists() and not (out / ADAPTER_WEIGHTS).exists()
    words += ["--resume_from_checkpoint", "true"]
    fewer = call(["maskft_lab.cli.main", *words, "--num_processes", "2"])
    assert fewer.returncode == 2 and fewer.stderr.count("maskft: error: ") == 1
    assert "num_processes: 4 -> 2" in fewer.stderr.strip().splitlines()[-1]
    resumed = call(["maskft_lab.cli.main", *words])
    assert resumed.returncode == 0, resumed.stderr
    check_equal(out, one_process, resumed=True)


@pytest.mark.slow
@needs_fsdp2_on_cpus
def test_two_processes_of_fsdp2_give_the_mask_of_one(arguments, one_process, tmp_path):
    out = tmp_path / "out"
    result = call(["maskft_lab.cli.main", *arguments(output_dir=out, accelerate_config="fsdp2", **LAUNCH)])
    assert result.returncode == 0, result.stderr
    check_equal(out, one_process)
    for line in ("held-out loss without the mask", "one sample, supervised text", "step 0/4  held-out "):
        assert result.stderr.count(line) == 1, line  # one process speaks
    for debris in ("FutureWarning", "it/s", "Tokenizing", "[transformers]"):
        assert debris not in result.stderr
    checkpoint = sorted(path.name for path in (out / "checkpoint-4").iterdir())
    assert "optimizer.bin" in checkpoint and "rng_state_1.pth" in checkpoint


@pytest.mark.slow
@needs_fsdp2_on_cpus
def test_kl_to_base_in_two_processes_is_that_of_one(arguments, tmp_path):
    """Its base is computed without the mask, in the midst of a step."""
    for name, options in (("one", {}), ("out", {"accelerate_config": "fsdp2", **LAUNCH})):
        words = arguments(output_dir=tmp_path / name, kl_to_base=20.0, **options)
        result = call(["maskft_lab.cli.main", *words])
        assert result.returncode == 0, result.stderr
    check_equal(tmp_path / "out", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", FSDP2])
@pytest.mark.parametrize("rows", ["task", "text"])
def test_a_kl_budget_in_two_processes_is_that_of_one(rows, config, arguments, text, tmp_path):
    """The multiplier follows the KL of all ranks, which together have the rows of one process."""
    # A budget below the KL of the untrained mask: the multiplier is at work from the first step.
    settings = {"kl_budget": 1e-3}
    if rows == "text":
        settings |= {"kl_dataset_name": text, "kl_batch_size": 2}
    reports = {}
    steps = {}
    for name, options in (("one", {}), ("out", {"accelerate_config": config, **LAUNCH})):
        words = arguments(output_dir=tmp_path / name, **settings, **options)
        result = call(["maskft_lab.cli.main", *words])
        assert result.returncode == 0, result.stderr
        summary = read_record(tmp_path / name).summary
        reports[name] = summary.kl
        steps[name] = [row for row in summary.history if "kl_multiplier" in row]
    check_equal(tmp_path / "out", tmp_path / "one")
    one, two = reports["one"], reports["out"]
    assert (two.num_tokens, two.step, two.rows) == (one.num_tokens, one.step, one.rows)
    assert two.reached == pytest.approx(one.reached, abs=1e-5)
    for expected, found in zip(steps["one"], steps["out"], strict=True):
        assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3)
        assert found["kl_multiplier"] == pytest.approx(expected["kl_multiplier"], rel=1e-2)
    assert steps["one"][0]["kl_multiplier"] != steps["one"][-1]["kl_multiplier"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", FSDP2])
@pytest.mark.parametrize("method", ["full", "mask", "lora"])
def test_what_is_beyond_a_budget_is_taken_back_in_two_processes(method, config, arguments, tmp_path):
    settings = {
        "full": {"method": "full", "learning_rate": 0.01},
        "mask": {"learning_rate": 0.3, "mask_init_scores": "magnitude"},
        "lora": {"method": "peft", "peft_config": LORA, "learning_rate": 0.05},
    }
    kls = {}
    for name, options in (("one", {}), ("out", {"accelerate_config": config, **LAUNCH})):
        words = arguments(output_dir=tmp_path / name, kl_budget=3e-4, **settings[method], **options)
        result = call(["maskft_lab.cli.main", *words])
        assert result.returncode == 0, result.stderr
        kls[name] = read_record(tmp_path / name).summary.kl
    one, two = kls["one"], kls["out"]
    assert 0 < one.part < 1 and one.at_end > 3e-4 >= one.reached
    assert two.part == pytest.approx(one.part, rel=1e-2) and two.reached == pytest.approx(one.reached, rel=1e-2)
    assert two.at_end == pytest.approx(one.at_end, rel=1e-2)

    # What is saved is that part.
    if method == "mask":
        expected, found = (MaskSet.from_adapter(tmp_path / name) for name in kls)
        num_different = sum(int((found[name] != expected[name]).sum()) for name in expected)
        assert num_different <= 3
        return
    file = "model.safetensors" if method == "full" else ADAPTER_WEIGHTS
    expected, found = (load_file(tmp_path / name / file) for name in kls)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@needs_fsdp2_on_cpus
def test_a_finished_run_is_given_again_and_saved_modules_are_refused(arguments, tmp_path):
    """It saves without a forward pass."""
    words = arguments(output_dir=tmp_path / "out", eval_strategy="no", accelerate_config="fsdp2", **LAUNCH)
    for more in ([], ["--resume_from_checkpoint", "true"]):
        result = call(["maskft_lab.cli.main", *words, *more])
        assert result.returncode == 0, result.stderr
    settings = {"mask_modules_to_save": "lm_head", "accelerate_config": "fsdp2", **LAUNCH}
    result = call(["maskft_lab.cli.main", *arguments(output_dir=tmp_path / "head", **settings)])
    assert result.returncode == 2 and "modules_to_save does not train under FSDP" in result.stderr


@pytest.mark.slow
def test_two_processes_that_are_resumed_inside_an_epoch_end_as_an_undisturbed_run(arguments, tmp_path):
    """Bit for bit, the line of the log as well: each goes on from its own sum of losses, and sees the same rows."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"method": "full", "max_steps": 12, "save_steps": 5, "eval_steps": 5, "logging_steps": 12, **LAUNCH}
    options["train_sampling_strategy"] = "group_by_length"
    words = arguments(output_dir=whole, accelerate_config="multi_gpu", keep_last=None, **options)
    assert call(["maskft_lab.cli.main", *words]).returncode == 0
    shutil.copytree(whole, cut)
    assert 1 < json.loads((cut / "checkpoint-10" / "trainer_state.json").read_text())["epoch"] < 2
    (cut / TRAINING).unlink()
    words = arguments(output_dir=cut, accelerate_config="multi_gpu", keep_last=None, **options)
    result = call(["maskft_lab.cli.main", *words, "--resume_from_checkpoint", "true"])
    assert result.returncode == 0, result.stderr
    assert losses(cut) == losses(whole) and (12, "loss") in losses(whole)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_launcher_that_is_stopped_saves_the_step(arguments, tmp_path):
    """Both processes stop after the same step, and the line that is printed resumes it with both."""
    out = tmp_path / "out"
    words = arguments(output_dir=out, accelerate_config="multi_gpu", max_steps=5000, save_steps=5000, **LAUNCH)
    status, lines = stop_when((out / "checkpoint-0" / MANIFEST).exists, words)
    assert status == 143, lines
    newest = checkpoints_in(out)[-1]
    assert step_of(newest) > 0 and damage(newest) is None and read_manifest(newest).course["num_processes"] == 2
    assert f"stopped by SIGTERM after step {step_of(newest)} of 5000" in lines[-2]
    assert lines[-1].startswith("maskft train ") and "--accelerate_config multi_gpu" in lines[-1]
    assert lines[-1].endswith("--resume_from_checkpoint true") and sum("maskft: " in line for line in lines) == 1


@pytest.mark.slow
def test_fsdp2_in_bfloat16_with_recomputed_activations(arguments, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    settings = {"bf16": True, "gradient_checkpointing": True}
    assert main(arguments(output_dir=one, **settings)) == 0
    words = arguments(output_dir=many, accelerate_config="fsdp2", num_processes=2, main_process_port=0, **settings)
    result = call(["maskft_lab.cli.main", *words])
    assert result.returncode == 0, result.stderr
    assert losses(many) == pytest.approx(losses(one), abs=0.02)
    expected, found = MaskSet.from_adapter(one / LAST), MaskSet.from_adapter(many / LAST)
    assert all(found[name].sum() == expected[name].sum() for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_gpu", FSDP2])
def test_removed_weights_stay_at_zero_in_two_processes(config, arguments, tmp_path):
    """Of matrices that two ranks share unevenly; gradients are clipped as in one process."""
    mask, one, many = tmp_path / "mask", tmp_path / "one", tmp_path / "many"
    assert main(arguments(output_dir=mask, method="random_mask", mask_sparsity=0.3, keep_last=None)) == 0
    settings = {"method": "full", "keep_mask": mask, "max_grad_norm": 0.1}
    assert main(arguments(output_dir=one, **settings)) == 0
    words = arguments(output_dir=many, accelerate_config=config, **settings, **LAUNCH)
    result = call(["maskft_lab.cli.main", *words])
    assert result.returncode == 0, result.stderr
    assert losses(many) == pytest.approx(losses(one), abs=1e-4)
    weights = load_file(many / LAST / "model.safetensors")
    for name, kept in MaskSet.from_adapter(mask).items():
        assert not weights[f"{name}.weight"][~kept].any() and weights[f"{name}.weight"][kept].all()


@pytest.fixture(scope="module")
def seen(arguments, tmp_path_factory):
    """What each of two ranks saw; see distributed_worker.py."""
    if not HAS_FSDP2_ON_CPUS:
        pytest.skip("FSDP2 on CPUs needs torch 2.13")
    folder = tmp_path_factory.mktemp("worker")
    nan = {"eval_steps": 1, "save_steps": 1, "global_batch_size": 4, "keep_last": None}
    for name, options in (("ddp", {}), ("nan", nan)):
        words = arguments(output_dir=folder / name, **options)
        (folder / f"{name}.txt").write_text("\n".join(words[1:]))
    worker = Path(__file__).with_name("distributed_worker.py")
    result = call(["torch.distributed.run", "--standalone", "--nproc_per_node", 2, worker, folder])
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_two_processes_of_ddp_give_the_mask_of_one(seen, one_process):
    folder, ranks = seen
    assert [rank["ddp"] for rank in ranks] == [None, None]
    check_equal(folder / "ddp", one_process)


@pytest.mark.parametrize("config", ["matrix", "threshold", "ramp", "gumbel", "hard_concrete", "base"])
def test_fsdp2_trains_the_unsharded_mask(config, seen):
    for rank in seen[1]:
        result = rank[config]
        assert result["loss_difference"] < LOSS_TOLERANCE
        assert result["gradient_difference"] < 1e-3
        assert result["masks_different"] == 0 and result["counts_equal"]
        assert result["base_fingerprint_kept"] and result["unmasked_without_adapter"] and result["masked_again"]
        assert result["num_score_units"] == 9 and result["scores_never_gathered"]
        assert result["gathered_state"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("mixed_dtypes", "the models differ between processes: base_model.model.lm_head.weight is torch.float32"),
        ("meta", "layers.1.mlp.up_proj.base_layer.weight is still on the meta device on rank 1"),
        ("data", "the data differ between processes: number of training rows is 8 on rank 0 and 16 on rank 1"),
        ("by_main", "only the main process looks"),
        ("in_the_root_unit", "is not sharded as masks need it: take FSDP2"),
        ("a_part", "call the model, not a part of it"),
        ("merge", "is sharded by FSDP and cannot be merged; save the adapter"),
        ("unmasked_before_backward", "changed between forward and backward, for which FSDP gathers the weight again"),
    ],
)
def test_a_mistake_on_one_rank_is_one_line_on_every_rank(mistake, message, seen):
    first, second = (rank["refusals"][mistake] for rank in seen[1])
    assert first == second and message in first and "\n" not in first


def test_no_mistake_no_error(seen):
    assert all(rank["refusals"]["all_well"] is None and rank["refusals"]["decided"] == "yes" for rank in seen[1])


def test_a_nan_on_one_rank_stops_every_rank_and_keeps_the_best(seen):
    folder, ranks = seen
    assert ranks[0]["nan"] == ranks[1]["nan"]
    assert ranks[0]["nan"].startswith("loss is not finite at step 3: stopped before the update was applied")
    assert "the best so far" in ranks[0]["nan"]
    assert MaskSet.from_adapter(folder / "nan").sparsity == pytest.approx(0.1, abs=1e-2)


# Mistakes that are found before anything is started


def mistake(words, capsys):
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("maskft: error: ")
    return error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 2}, "num_processes is 2, but no strategy for them: add --accelerate_config fsdp2"),
        ({"accelerate_config": "LIST", "num_processes": 2}, "is not a file that accelerate config writes"),
        ({"accelerate_config": "fsdp3"}, "config fsdp3 is neither a file nor a valid config"),
        ({"num_procesess": 2}, "unknown option --num_procesess (did you mean 'num_processes'?)"),
        ({"global_batch_size": 7}, "is 7, not a multiple of per_device_train_batch_size 2 x 1 processes"),
    ],
)
def test_launch_mistakes(changes, message, arguments, tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- 1\n")
    changes = {name: tmp_path / "list.yaml" if value == "LIST" else value for name, value in changes.items()}
    error = mistake(arguments(output_dir=tmp_path / "out", **changes), capsys)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_switch_of_accelerate_in_a_recipe_has_no_value(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    run = "model_name_or_path: tiny\ndataset_name: rows\nbf16: false\n"
    recipe.write_text(run + "multi_gpu: true\nuse_fsdp: false\nnum_processes: 2\n")
    words = ["--config", str(recipe), "--num_machines", "1"]
    _, launch_words, other_words = parse_words(words)
    assert launch_words == ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    assert other_words == ["--config", str(recipe)]
    recipe.write_text(run + "multi_gpu: 1\n")
    with pytest.raises(UserError, match=r"^multi_gpu is '1' in the recipe; it must be true or false$"):
        parse_words(words)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1 flattens scores and weights"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
            "fsdp_state_dict_type is SHARDED_STATE_DICT",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "use --gradient_checkpointing true",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported; use --accelerate_config fsdp2"),
    ],
)
def test_a_process_that_others_launched_refuses_too(environment, message, arguments, tmp_path, capsys, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert message in mistake(arguments(output_dir=tmp_path / "out"), capsys)
