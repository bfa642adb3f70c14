"""What is known of a model that is to be evaluated."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from maskft.evaluation import load


def test_a_folder_for_vllm_is_known_by_its_files(base, tmp_path, monkeypatch):
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: name)  # vLLM itself is not asked for anything
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    [loaded] = load.load_for_vllm(str(folder))
    assert len(loaded.facts["fingerprint"]) == 64 and loaded.identity == loaded.facts["fingerprint"]
    assert [again.identity for again in load.load_for_vllm(str(base))] == [loaded.identity], "wherever it lies"
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors")
    [other] = load.load_for_vllm(str(folder))
    assert other.identity != loaded.identity


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
