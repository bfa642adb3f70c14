"""``maskft evaluate --tasks`` on tiny models and files."""

import json
import resource
import shutil
import time

import psutil
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import benchmark_files
import tiny
from killing import Fork
from maskft import MaskConfig
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, JOURNAL, RESULT
from maskft_lab.cli.main import main
from maskft_lab.evaluation import evaluate as run
from maskft_lab.evaluation import load_models as load
from maskft_lab.evaluation.evaluate import evaluate_loaded
from maskft_lab.evaluation.evaluation_arguments import EvaluationArguments
from maskft_lab.generation.lm_eval_model import BatchedLM
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory):
    """A model with room for eight examples in bytes; its random weights are scaled so that answers differ."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = tiny_tokenizer()
    net = tiny.tiny_llama(vocab_size=len(tokenizer), num_layers=2, max_position_embeddings=4096)
    for parameter in net.parameters():
        parameter.data *= 3
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(chat_base):
    """Two masks and a LoRA adapter."""
    out = {}
    for name, config in {
        "mask1": MaskConfig(sparsity=0.1, mask_seed=1),
        "mask2": MaskConfig(sparsity=0.3, mask_seed=2),
        "lora": LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    }.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_base), config)
        out[name] = chat_base.parent / name
        model.save_pretrained(out[name])
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return benchmark_files.write(tmp_path_factory.mktemp("data") / "files")


@pytest.fixture
def short_answers(monkeypatch):
    """Bound the answers to gsm8k: lm-eval's default, 256 tokens, would take most of the time of a test."""
    monkeypatch.setattr(BatchedLM, "max_gen_toks", 16)


def call(words, capsys):
    capsys.readouterr()
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def result_of(folder):
    return json.loads((folder / RESULT).read_text())


def outputs(folder, task="gsm8k"):
    return [item["output"] for item in result_of(folder)["tasks"][task]["items"]]


@pytest.mark.usefixtures("short_answers")
def test_benchmarks_and_heldout_in_one_result(chat_base, files, data, tmp_path, capsys):
    words = ["evaluate", "--model_name_or_path", chat_base, "--tasks", "gsm8k,heldout", "--data_dir", files]
    words += ["--limit", 2, "--dataset_name", data, "--max_eval_samples", 3, "--max_new_tokens", 4]
    words += ["--output_dir", tmp_path / "out"]
    status, out, err = call(words, capsys)
    assert status == 0, err
    assert "gsm8k accuracy" in out and "base: nll" in out
    result = result_of(tmp_path / "out")
    assert {name: len(task["items"]) for name, task in result["tasks"].items()} == {"heldout": 3, "gsm8k": 2}
    assert len(result["model"]["fingerprint"]) == 64 and result["settings"]["limit"] == 2
    assert result["environment"]["device"] == "cpu" and "math-verify" in result["environment"]["packages"]
    assert result["tasks"]["gsm8k"]["seeds"]["fewshot"] == 1234
    assert str(tmp_path) not in json.dumps(result) and str(files) not in json.dumps(result)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RESULT], "the journal is gone"


@pytest.mark.usefixtures("short_answers")
def test_several_adapters_load_the_base_once(chat_base, adapters, files, tmp_path, capsys, monkeypatch):
    loads = []
    load_model = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *args, **how: (loads.append(args), load_model(*args, **how))[1])
    common = ["evaluate", "--model_name_or_path", chat_base, "--tasks", "gsm8k", "--data_dir", files, "--limit", 1]
    many = [adapters["mask1"], adapters["mask2"], "none", adapters["lora"]]
    status, _, err = call([*common, "--output_dir", tmp_path / "all", "--adapter", *many], capsys)
    assert status == 0, err
    assert len(loads) == 1
    found = {path.name: outputs(path) for path in (tmp_path / "all").iterdir()}
    assert set(found) == {"mask1", "mask2", "base", "lora"} and len({text for [text] in found.values()}) == 4
    for name, adapter in {**adapters, "base": "none"}.items():
        call([*common, "--output_dir", tmp_path / name, "--adapter", adapter], capsys)
        assert outputs(tmp_path / name) == found[name], name
        assert result_of(tmp_path / name)["model"] == result_of(tmp_path / "all" / name)["model"]
    masks = [result_of(tmp_path / "all" / name)["model"]["mask_fingerprint"] for name in ("mask1", "mask2")]
    assert len({*masks, None}) == 3
    # Again, with one missing: the others are not evaluated again.
    shutil.rmtree(tmp_path / "all" / "mask2")
    status, out, err = call([*common, "--output_dir", tmp_path / "all", "--adapter", *many], capsys)
    assert status == 0 and out.count("already done") == 3 and outputs(tmp_path / "all" / "mask2") == found["mask2"]


@pytest.mark.usefixtures("short_answers")
def test_training_seeds_share_a_name(chat_base, adapters, files, tmp_path, capsys):
    for seed, name in enumerate(("mask1", "mask2")):
        config = json.loads((adapters[name] / ADAPTER_CONFIG).read_text())
        shutil.copytree(adapters[name], tmp_path / name)
        (tmp_path / name / ADAPTER_CONFIG).write_text(json.dumps(config | {"recipe": {"method": "mask", "seed": seed}}))
    words = ["evaluate", "--model_name_or_path", chat_base, "--tasks", "gsm8k", "--data_dir", files, "--limit", 2]
    words += ["--adapter", "none", tmp_path / "mask1", tmp_path / "mask2", "--name", "base", "mask", "mask"]
    words += ["--seed", 7]
    status, _, err = call([*words, "--output_dir", tmp_path / "out"], capsys)
    assert status == 0, err
    seeds = {path.name: result_of(path)["model"]["seed"] for path in (tmp_path / "out").iterdir()}
    assert seeds == {"base": 7, "mask-seed0": 0, "mask-seed1": 1}, "the option is for what does not tell its seed"
    status, out, err = call(["compare", *sorted((tmp_path / "out").iterdir()), "--baseline", "base"], capsys)
    assert status == 0 and "accuracy on gsm8k (%), 2 items, 2 seeds mask" in " ".join(out.split()), err


def test_a_finished_result_of_another_chat_template_is_refused(chat_base, files, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    words = ["evaluate", "--model_name_or_path", chat_base, "--tasks", "ifeval", "--data_dir", files, "--limit", 1]
    words += ["--adapter", "none", "none", "--name", "a", "b", "--chat_template_path", template]
    words += ["--output_dir", tmp_path / "out"]
    assert call(words, capsys)[0] == 0
    template.write_text(template.read_text() + "!")
    status, _, err = call(words, capsys)
    assert status == 2 and "has ifeval with another chat template" in err


def test_a_tokenizer_of_another_model_is_refused(chat_base, files, tmp_path, capsys):
    small = tmp_path / "small"
    shutil.copytree(chat_base, small)
    tiny.tiny_llama(vocab_size=40, num_layers=2).save_pretrained(small)
    words = ["evaluate", "--model_name_or_path", small, "--tasks", "gsm8k", "--data_dir", files]
    status, _, err = call([*words, "--output_dir", tmp_path / "out"], capsys)
    assert status == 2 and "the model's embedding 40 rows; use this model's tokenizer" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("short_answers")
def test_finished_results_are_of_the_same_weights_and_data(chat_base, adapters, data, tmp_path, capsys):
    lora, files = tmp_path / "lora", benchmark_files.write(tmp_path / "files")
    shutil.copytree(adapters["lora"], lora)
    base = shutil.copytree(chat_base, tmp_path / "base")
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("\n".join(data.read_text().splitlines()[:2]))
    words = ["evaluate", "--model_name_or_path", base, "--adapter", lora, "none", "--tasks", "gsm8k,heldout"]
    words += ["--data_dir", files, "--limit", 1, "--dataset_name", heldout, "--no_generate"]
    words += ["--output_dir", tmp_path / "out"]
    assert call(words, capsys)[0] == 0
    assert len(result_of(tmp_path / "out" / "lora")["model"]["adapter_sha256"]) == 64
    again = call([*words, "--batch_size", 3], capsys)
    assert again[0] == 0 and again[1].count("already done") == 2, again[2]

    for file, old, new, message in (
        (files / "math" / "gsm8k_test.jsonl", "Tom", "Jim", "has gsm8k on other data"),
        (heldout, "0+1", "0+2", "has heldout on other data"),
        (base / "config.json", "10000.0", "500.0", "is of another model, configuration or tokenizer"),
        (lora / ADAPTER_CONFIG, '"lora_alpha": 8', '"lora_alpha": 4', "is of another model"),
    ):
        text = file.read_text()
        file.write_text(text.replace(old, new))
        status, _, err = call(words, capsys)
        assert status == 2 and message in err and "--overwrite" in err
        file.write_text(text)
    weights = load_file(lora / ADAPTER_WEIGHTS)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, lora / ADAPTER_WEIGHTS)
    status, _, err = call(words, capsys)
    assert status == 2 and "is of another model" in err


def test_an_unfinished_evaluation_is_resumed_with_the_same_configuration_only(chat_base, tmp_path):
    folder, target = tmp_path / "model", tmp_path / "out" / RESULT
    shutil.copytree(chat_base, folder)
    rows = [{"id": "0", "prompt": "1+1=", "completion": "2", "answer": "2"}]

    def evaluate(max_new_tokens):
        options = EvaluationArguments(str(folder), max_new_tokens=max_new_tokens)
        return evaluate_loaded(next(load.load_each(options)), {"heldout": rows}, options, target, "a")

    def killed(path, result):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "write_result", killed)
        evaluate(2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"with other settings \(configuration\)"):
        evaluate(2)
    (folder / "config.json").write_text(json.dumps(config))
    # The bound on answers is kept with each of them.
    assert evaluate(3)["tasks"]["heldout"]["generation_kwargs"] == {"max_gen_toks": 3}


def test_a_killed_evaluation_is_resumed(chat_base, files, tmp_path, capsys, monkeypatch):
    words = ["evaluate", "--model_name_or_path", chat_base, "--tasks", "gsm8k", "--data_dir", files]
    words += ["--output_dir", tmp_path / "out", "--batch_size", 1]
    words = [str(word) for word in words]
    process = Fork(words, tmp_path / "log")
    journal = tmp_path / "out" / JOURNAL
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if journal.is_file() and journal.read_text().count("\n") >= 3:  # settings and two answers of four
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    header = json.loads(journal.read_text().splitlines()[0])
    assert "torch" in header["packages"] and "eos_token_id" in header["generation_config"]
    known = journal.read_text().count("\n") - 1
    assert 2 <= known <= 4 and not (tmp_path / "out" / RESULT).exists()

    from maskft_lab.generation import lm_eval_model as backend

    asked = []
    generate = backend.greedy_generate
    monkeypatch.setattr(backend, "greedy_generate", lambda *a, **k: (asked.append(len(a[2])), generate(*a, **k))[1])
    assert call(words, capsys)[0] == 0
    assert sum(asked) == 4 - known and not journal.exists()
    call([*words[:-4], "--output_dir", tmp_path / "whole"], capsys)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


# An unknown task is in tests/evaluation/test_tasks.py: lm-eval's index, which says so, is built once there.
@pytest.mark.parametrize(
    "words,message",
    [
        (["--tasks", ","], "tasks names no task"),
        (["--limit", "0"], "limit is 0; it must be at least 1"),
        (["--limit", "3", "--tasks", "heldout"], "limit is 3, but it applies to benchmarks only"),
        (["--max_new_tokens", "9"], "max_new_tokens is about held-out rows, which are not measured"),
        (["--no_generate"], "no_generate is about held-out rows, which are not measured"),
        (
            ["--apply_chat_template", "true", "--tasks", "heldout"],
            "apply_chat_template is about benchmarks of lm-eval, of which none is measured (rows with messages and",
        ),
        (
            ["--apply_chat_template", "true", "--tasks", "heldout,alpaca_eval"],
            "apply_chat_template is about benchmarks",
        ),
        (["--change", "none", "--kl", "true"], "kl is measured on held-out rows; add heldout to --tasks"),
        (["--max_length", "-1"], "max_length is -1; it must be at least 1"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--include_path", "nowhere"], "include_path 'nowhere' is not a folder"),
        (["--name", "a", "b"], "2 names for 1 models"),
        (["--name", ""], "'' is not a valid --name; use printable characters"),
        (["--output_dir", "FILE"], "it is a file; name another"),
        (["--adapter", "MASK", "MASK"], "two models have the same label"),
        (["--adapter", "MASK", "MASK", "--name", "a", "a"], "were not trained with different seeds"),
        (["--apply_chat_template", "maybe"], "'maybe' is neither true nor false"),
        (["--data_dir", "EMPTY"], "holds no test file of gsm8k"),
        (["--tasks", "heldout", "--dataset_name", "FILE", "--prepare_only", "true"], "unknown option --prepare_only"),
        (["--num_fewshot", "5"], "maskft evaluate has no option --num_fewshot: each task has its own number; a YAML"),
        (["--tasks=heldout", "--dataset_name", "FILE", "--max_train_samples=5"], "unknown option --max_train_samples"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(words, message, chat_base, adapters, files, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {"MASK": adapters["mask1"], "EMPTY": tmp_path / "empty", "FILE": tmp_path / "file" / "out"}
    command = ["evaluate", "--model_name_or_path", chat_base, "--tasks", "gsm8k", "--data_dir", files]
    command += ["--output_dir", tmp_path / "out", *(places.get(word, word) for word in words)]
    status, _, err = call(command, capsys)
    assert status == 2 and message in err.strip().splitlines()[-1] and not (tmp_path / "out").exists()


def test_memory_that_runs_out_is_one_line(tmp_path):
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    tiny.tiny_llama(vocab_size=50_000, num_layers=1).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    rows.write_text("".join(json.dumps({"prompt": f"{n}=", "completion": "1" * 200}) + "\n" for n in range(64)))
    words = ["evaluate", "--model_name_or_path", base, "--dataset_name", rows, "--no_generate", "--batch_size", "64"]
    words += ["--output_dir", tmp_path / "out"]

    def limit_memory():
        bound = psutil.Process().memory_info().vms + 150_000_000
        resource.setrlimit(resource.RLIMIT_AS, (bound, resource.getrlimit(resource.RLIMIT_AS)[1]))

    err = tmp_path / "err"
    assert Fork([str(word) for word in words], err, limit_memory).wait() == 2, err.read_text()
    assert "out of memory (" in err.read_text().splitlines()[-1] and "Traceback" not in err.read_text()
    assert not (tmp_path / "out" / RESULT).exists()


def test_an_adapter_is_evaluated_from_any_folder(chat_base, data, tmp_path, monkeypatch, capsys):
    """Its base is named relative to where it was trained; a name in a folder that is here is not asked of the hub."""
    shutil.copytree(chat_base, tmp_path / "models" / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_base), MaskConfig(sparsity=0.1))
    model.peft_config["default"].base_model_name_or_path = "models/base"
    model.save_pretrained(tmp_path / "runs" / "mask")
    monkeypatch.chdir(tmp_path / "runs")
    words = ["evaluate", "--dataset_name", data, "--no_generate", "--max_eval_samples", 2]
    words += ["--output_dir", tmp_path / "out"]
    status, _, err = call([*words, "--adapter", "mask"], capsys)
    assert status == 0, err
    assert result_of(tmp_path / "out")["model"]["name_or_path"] == "base"
    status, _, err = call([*words[:-1], tmp_path / "b", "--model_name_or_path", "mask/none"], capsys)
    assert status == 2 and "model folder 'mask/none' does not exist" in err
