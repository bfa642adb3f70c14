"""What is known of a model that is to be evaluated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from maskft_common.errors import UserError
from maskft_lab.evaluation import load_models as load
from maskft_lab.evaluation.evaluate import labelled_files
from maskft_lab.evaluation.evaluation_arguments import EvaluationArguments
from maskft_lab.evaluation.model_facts import base_and_revision, portable_name


def _edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "name,values,is_same",
    [
        ("config.json", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, False),
        ("config.json", {"transformers_version": "4.0.0", "dtype": "bfloat16", "_name_or_path": "x"}, True),
        ("generation_config.json", {"eos_token_id": [1, 2]}, False),
        ("tokenizer_config.json", {"bos_token": "<|im_start|>", "add_bos_token": True}, False),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, True),  # its hash is of a task
    ],
)
def test_the_hash_of_a_configuration(name, values, is_same, base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    hashes = []
    for change in ({}, values):
        _edit(folder / name, **change)
        hashes.append(next(load.load_each(EvaluationArguments(str(folder)))).facts["config_sha256"])
    assert len(hashes[0]) == 64 and (hashes[0] == hashes[1]) is is_same


@pytest.mark.parametrize(
    "field,value,is_same",
    [("base_model_name_or_path", "elsewhere", True), ("target_modules", ["b", "a"], True), ("lora_alpha", 2, False)],
)
def test_the_hash_of_an_adapter(field, value, is_same, tmp_path):
    config = {"base_model_name_or_path": "here", "target_modules": ["a", "b"], "lora_alpha": 1}
    hashes = []
    for values in (config, {**config, field: value}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
        hashes.append(load.adapter_sha256(tmp_path))
    assert (hashes[0] == hashes[1]) is is_same


def test_an_adapter_without_revision_is_over_the_main_one(base, tmp_path):
    """PEFT writes null where another program may write the branch."""
    for name, revision in (("a", None), ("b", "main"), ("c", "v1")):
        LoraConfig(base_model_name_or_path=str(base), revision=revision).save_pretrained(tmp_path / name)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert base_and_revision(None, [a, b]) == (str(base), "main")
    assert base_and_revision(None, [c, "none"]) == (str(base), "v1")
    with pytest.raises(UserError, match="belong to different revisions"):
        base_and_revision(None, [a, c])


def test_a_base_that_is_not_here_is_said_to_be_the_adapters(tmp_path):
    """As after a folder has moved: the name is not one that the user gave."""
    LoraConfig(base_model_name_or_path="/elsewhere/base").save_pretrained(tmp_path / "a")
    message = "names the base model '/elsewhere/base', which is not here; name its folder with --model_name_or_path"
    with pytest.raises(UserError, match=message):
        base_and_revision(None, [str(tmp_path / "a")])


def test_an_adapter_of_virtual_tokens_is_refused(base, tmp_path):
    """PEFT puts them before each text: the loss would be that of other tokens."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, base_model_name_or_path=str(base))
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"puts virtual tokens before each text .*: name adapters that change weights"):
        base_and_revision(None, [str(tmp_path)])


@pytest.mark.parametrize(
    "model,expected", [(".", "inner"), ("..", "outer"), ("org/model", "model"), ("./a\x1b[2J", r"a\x1b[2J")]
)
def test_labels(model, expected, tmp_path, monkeypatch):
    (tmp_path / "outer" / "inner" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "outer" / "inner")
    assert labelled_files("out", [model], []) == [(expected, Path("out/result.json"))]


def test_a_link_is_labelled_by_its_own_name(tmp_path, monkeypatch):
    """A file in the hub's cache is one, to a name that is a checksum."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1f2e").write_text("model")
    (tmp_path / "model.gguf").symlink_to("1f2e")
    assert labelled_files("out", ["model.gguf"], []) == [("model.gguf", Path("out/result.json"))]


def test_the_current_folder_has_a_name_in_a_result(tmp_path, monkeypatch):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "outer" / "inner")
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [portable_name(name) for name in (".", "..", "../inner/", "~/outer", "org/model")]
    assert names == ["inner", "outer", "inner", "outer", "org/model"]


@pytest.mark.parametrize("name", ["../../x", "..", "a/b", "a\x1b[2J", "\u3164"])  # the last is drawn as nothing
def test_labels_that_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"give a --name without a slash|not a valid --name"):
        labelled_files(str(tmp_path), ["one", "two"], [name, "other"])


def _other_size(folder):
    net = tiny.tiny_llama(vocab_size=96, hidden_size=16)
    get_peft_model(net, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


def _other_layers(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["no_such_layer"]}))


@pytest.mark.parametrize(
    "damage,message",
    [
        (_other_size, "does not fit"),
        (_other_layers, "does not fit"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"cut"), "does not fit"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "has no adapter_config.json that PEFT can"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "does not fit"),
    ],
)
def test_adapters_that_cannot_be_loaded_are_one_line(damage, message, base, tmp_path):
    folder = tmp_path / "lora"
    get_peft_model(tiny.tiny_llama(vocab_size=96), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        next(load.load_each(EvaluationArguments(str(base), adapter=[str(folder)])))
    assert len(str(caught.value).splitlines()) == 1


def _with_trained_output(base, folder):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2.0)
    model.save_pretrained(folder)


def _pissa(base, folder):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


@pytest.mark.parametrize("save", [_with_trained_output, _pissa])
def test_what_an_adapter_leaves_in_the_base_is_not_in_the_next_result(save, base, tmp_path):
    save(base, tmp_path / "adapter")
    adapters = ["none", str(tmp_path / "adapter"), "none", str(tmp_path / "adapter")]
    logits = []
    for loaded in load.load_each(EvaluationArguments(str(base), adapter=adapters)):
        with torch.no_grad():
            logits.append(loaded.model(input_ids=torch.arange(5, 25)[None]).logits)
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[3])
    if save is _with_trained_output:
        torch.testing.assert_close(logits[1], 2 * logits[0])


def test_an_adapter_of_an_older_peft_has_a_size(base, tmp_path):
    """Its weights are in adapter_model.bin."""
    config = LoraConfig(target_modules=["q_proj"], r=2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, is_safe in (("new", True), ("old", False)):
        model.save_pretrained(tmp_path / name, safe_serialization=is_safe)
    assert (tmp_path / "old" / "adapter_model.bin").is_file()
    options = EvaluationArguments(str(base), adapter=[str(tmp_path / "new"), str(tmp_path / "old")])
    sizes = [loaded.facts["num_bytes"] for loaded in load.load_each(options)]
    assert sizes[0] == sizes[1] == 2 * 3 * 2 * (32 + 32)
