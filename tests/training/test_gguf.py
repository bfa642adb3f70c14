"""A mask trained over a GGUF file: what the file holds is what is masked, and merging into it is exact."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from gguf import GGMLQuantizationType as Type
from maskft.masks.gguf import merge_into_gguf
from maskft.masks.mask_set import read_config
from maskft.masks.merge import load_masked
from maskft.models import load_config, load_model, load_tokenizer, model_identity
from maskft_common.errors import UserError
from maskft_lab.cli.main import main

from ..tiny import save_masks, tiny_llama, token_ids
from ..tiny_gguf import read_gguf, tensor_name, write_gguf
from ..tiny_tokenizer import CHATML


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_llama(2, 288, hidden_size=64, intermediate_size=96, head_dim=16, num_key_value_heads=2)
    write_gguf(folder / "base.gguf", model)
    write_gguf(folder / "without-zero.gguf", model, kinds={"blk.1.ffn_gate.weight": Type.Q4_1})
    rows = [{"prompt": f"{a} + {a} =", "completion": f" {2 * a}"} for a in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(folder, output, *words):
    return main(
        [
            *("train", "--model_name_or_path", str(folder), "--dataset_name", str(folder / "sums.jsonl")),
            *("--eval_split_size", "8", "--as_chat", "false", "--max_steps", "2", "--report_to", "none"),
            *(
                "--bf16",
                "false",
                "--mask_target_modules",
                "gate_proj",
                "q_proj",
                "--mask_sparsity",
                "0.3",
                "--keep_worse",
                "true",
            ),
            *("--output_dir", str(output), *words),
        ]
    )


def test_the_file_is_the_model(folder):
    model = load_model(str(folder / "base.gguf"))
    values = read_gguf(folder / "base.gguf")
    weight = model.get_submodule("model.layers.1.mlp.gate_proj").weight
    assert torch.equal(weight, values["blk.1.ffn_gate.weight"])
    assert load_config(str(folder / "base.gguf")).num_hidden_layers == 2
    assert load_tokenizer(str(folder / "base.gguf")).chat_template == CHATML
    assert model_identity(str(folder / "base.gguf")) != model_identity(str(folder / "without-zero.gguf"))


def test_a_file_of_the_same_name_in_the_working_directory_is_not_read(folder, tmp_path, monkeypatch):
    """transformers takes the weights from there, and the configuration and the tokenizer from the folder."""
    other = tiny_llama(2, 288, seed=5, hidden_size=64, intermediate_size=96, head_dim=16, num_key_value_heads=2)
    write_gguf(tmp_path / "base.gguf", other)
    (tmp_path / "here").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    weight = load_model("here/base.gguf").get_submodule("model.layers.1.mlp.gate_proj").weight
    assert torch.equal(weight, read_gguf(folder / "base.gguf")["blk.1.ffn_gate.weight"])
    assert load_tokenizer("here/base.gguf").chat_template == CHATML
    assert load_config("here/base.gguf").num_hidden_layers == 2
    with pytest.raises(UserError, match=r"'base.gguf' in the working directory .* name that file \(./base.gguf\)"):
        load_model("somebody/model-GGUF/base.gguf")


def test_such_a_model_can_be_saved(folder, tmp_path):
    model = load_model(str(folder / "base.gguf"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = token_ids(vocab_size=288)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_mask_trained_over_the_file_merges_into_it_exactly(folder, tmp_path):
    assert train(folder, tmp_path / "mask", "--gguf_file", "base.gguf") == 0
    task = tmp_path / "task.gguf"
    words = ["merge", str(tmp_path / "mask"), "--gguf", str(folder / "base.gguf"), "--output", str(task)]
    assert main(words) == 0  # without --accept_other_base: the fingerprints match
    assert main(["verify", str(tmp_path / "mask"), "--gguf", str(task)]) == 0

    masked = load_masked(tmp_path / "mask")[0]
    merged = masked.merge_and_unload()
    served = load_model(str(task))
    weights = dict(served.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in merged.named_parameters())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert int((weights[name] == 0).sum()) > int((read_gguf(folder / "base.gguf")[tensor_name(name)] == 0).sum())


def test_a_file_with_a_mask_is_refused_before_training(folder, tmp_path, capsys):
    """No second one could be merged into it."""
    save_masks({"model.layers.0.mlp.gate_proj": torch.ones(96, 64) > 0}, tmp_path / "first")
    merge_into_gguf(tmp_path / "first", folder / "base.gguf", folder / "task.gguf")
    assert train(folder, tmp_path / "mask", "--gguf_file", "task.gguf") == 2
    assert "task.gguf' already holds a mask" in capsys.readouterr().err
    assert not (tmp_path / "mask" / "adapter_config.json").exists()


@pytest.mark.parametrize("option", ["--load_in_4bit", "--load_in_8bit"])
def test_quantising_a_file_once_more_is_refused(folder, tmp_path, capsys, option):
    assert train(folder, tmp_path / "mask", "--gguf_file", "base.gguf", option, "true") == 2
    error = capsys.readouterr().err
    assert "base.gguf' is a GGUF file, whose weights are quantised already: leave them out" in error
    assert error.count("\n") == 1


def test_a_type_without_zero_is_refused_before_training(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "mask", "--gguf_file", "without-zero.gguf") == 2
    error = capsys.readouterr().err
    assert "blk.1.ffn_gate.weight is Q4_1, which has no code for zero" in error
    assert "--tensor-type ffn_gate=q5_0" in error
    assert not (tmp_path / "mask" / "adapter_config.json").exists()


def test_layers_of_that_type_may_be_left_out(folder, tmp_path):
    words = ("--gguf_file", "without-zero.gguf", "--mask_layers_to_transform", "0")
    assert train(folder, tmp_path / "mask", *words) == 0


def test_a_file_of_another_name_is_known_as_gguf_by_a_link(folder, tmp_path, capsys):
    """Ollama's blobs and those of the hub's cache are named by their sha256."""
    blob = folder / "sha256-1f"
    blob.write_bytes((folder / "base.gguf").read_bytes())
    assert train(folder, tmp_path / "mask", "--gguf_file", blob.name) == 2
    assert "gguf_file 'sha256-1f' does not end in .gguf: rename it, or name a link" in capsys.readouterr().err
    link = folder / "linked.gguf"
    link.symlink_to(blob)
    assert train(folder, tmp_path / "mask", "--gguf_file", link.name) == 0
    assert read_config(tmp_path / "mask").base_model_name_or_path == str(link)
    assert load_masked(tmp_path / "mask")[2] == str(link)


@pytest.mark.parametrize(("name", "message"), [("none.gguf", "does not exist"), ("sums.gguf", "is not a GGUF file")])
def test_what_is_not_a_gguf_file_is_refused(folder, tmp_path, capsys, name, message):
    if name == "sums.gguf":
        (folder / name).write_text("no model")
    assert train(folder, tmp_path / "mask", "--gguf_file", name) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=message):
        load_model(str(folder / name))
