"""Models come as weights and settings; what else lies in their folder is not run."""

import ast
import json
from pathlib import Path

import pytest

import tiny
from maskft.models import load_config, load_model, load_tokenizer, with_defaults
from maskft_base.errors import UserError
from tiny_tokenizer import CHATML, tiny_tokenizer


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
    with pytest.raises(UserError, match="asks for code of the hub"):
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
    assert found >= 8


# As Qwen 3's: a thought that is empty, so that none is written.
THINKING = CHATML.replace(
    "'<|im_start|>assistant\n' }}",
    "'<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
QUESTION = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize("start", ["", "\n", "  {% set a = 1 %}\nx"])
def test_values_of_a_template_are_written_into_it(start):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = start + THINKING

    def rendered(**given):
        return tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True, **given)

    plain, off = rendered(), rendered(enable_thinking=False)
    assert plain + "<think>\n\n</think>\n\n" == off
    tokenizer.chat_template = with_defaults(start + THINKING, '{"enable_thinking": false}')
    assert rendered() == off and rendered(enable_thinking=True) == plain  # a server may still ask for the other


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"enable_thinkin": false}', "which the chat template does not use"),
        ("[1]", "write a JSON object"),
        ("{x}", "write a JSON object"),
        ({"enable_thinking": [1]}, "give a text, a number, true, false or null"),
    ],
)
def test_values_that_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        with_defaults(THINKING, given)
    with pytest.raises(UserError, match="the tokenizer has none"):
        with_defaults(None, {"enable_thinking": False})


@pytest.mark.parametrize("name", ["runs/maks", "runs/a/b", "./runs", "maks/"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mask").mkdir(parents=True)
    with pytest.raises(UserError, match=r"model folder .* does not exist|is not a model folder"):
        load_model(name)
    with pytest.raises(UserError, match="is not a folder with a tokenizer"):
        load_tokenizer(name)
