"""Models come as weights and settings; what else lies in their folder is not run."""

import ast
import json
from pathlib import Path

import pytest

import tiny
from maskft.models import load_config, load_model, load_tokenizer
from maskft_common.errors import UserError


@pytest.mark.parametrize("load", [load_model, load_config, load_tokenizer])
def test_code_in_the_folder_of_a_model_is_not_run(load, tmp_path, monkeypatch):
    tiny.tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    classes = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", "mine.T"]}
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mine", "auto_map": classes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["mine.T", "mine.T"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    # Not even asked for: transformers would take a "y" from the terminal.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot"):
        load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "values", [{"_attn_implementation": "owner/kernel"}, {"attn_implementation": {"": "a/b@v1:c"}}]
)
def test_a_configuration_that_names_a_kernel_of_the_hub_is_refused(values, tmp_path):
    tiny.tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | values
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load, name in ((load_model, tmp_path), (load_config, tmp_path), (load_config, tmp_path / "config.json")):
        with pytest.raises(UserError, match="asks for code from the hub"):
            load(str(name))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"is not a model folder: its config\.json holds no object"):
        load_model(str(tmp_path))


def test_every_call_that_could_run_such_code_says_that_it_does_not():
    found = 0
    for file in (Path(__file__).parents[1] / "src").rglob("*.py"):
        for call in [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]:
            name = ast.unparse(call.func)
            if name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config")):
                said = {keyword.arg or ast.unparse(keyword.value) for keyword in call.keywords}
                assert said & {"trust_remote_code", "_NO_CODE"}, f"{file.name}, line {call.lineno}: {name}"
                found += 1
    assert found >= 4


@pytest.mark.parametrize("name", ["runs/maks", "runs/a/b", "./runs", "maks/"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mask").mkdir(parents=True)
    with pytest.raises(UserError, match=r"model folder .* does not exist|is not a model folder"):
        load_model(name)
    with pytest.raises(UserError, match="is not a folder with a tokenizer"):
        load_tokenizer(name)
