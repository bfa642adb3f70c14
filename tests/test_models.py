"""Models come as weights and settings; what else lies in their folder is not run."""

import ast
import json
import os
import pickle
from pathlib import Path

import pytest

import tiny
from maskft import models
from maskft.models import check_tokenizer_fits, load_config, load_model, load_tokenizer
from maskft_common.errors import UserError
from tiny_tokenizer import tiny_tokenizer


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


def test_sampling_options_without_do_sample_stop_no_save(folder, tmp_path):
    """Also where a trainer has set the special tokens: newer transformers saves an unchanged configuration as it is."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "do_sample": False}))
    model = load_model(str(folder))
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.6, 0.9, True)

    # Options that say what they mean stay as they are.
    file.write_text(json.dumps({"do_sample": False, "max_new_tokens": 5}))
    assert load_model(str(folder)).generation_config.do_sample is False


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
    with pytest.raises(UserError, match=r"is not a model folder: its config\.json is not a JSON object"):
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


@pytest.mark.parametrize("name", ["runs/maks", "runs/a/b", "./runs", "maks/", "~nobody-of-this-name/maks"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mask").mkdir(parents=True)
    with pytest.raises(UserError, match=r"model folder .* does not exist|is not a model folder"):
        load_model(name)
    with pytest.raises(UserError, match="is not a folder with a tokenizer"):
        load_tokenizer(name)


@pytest.mark.parametrize("name", ["runs/gguf/maks.gguf", "runs/mask.gguf/mask.gguf", "maks.gguf", "~nobody/a/b.gguf"])
@pytest.mark.parametrize("load", [load_model, load_config, load_tokenizer])
def test_what_looks_like_the_path_of_a_gguf_file_is_never_asked_of_the_hub(name, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "gguf").mkdir(parents=True)
    (tmp_path / "runs" / "mask.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"gguf' does not exist"):
        load(name)


def test_a_gguf_file_is_found_from_a_folder_above_the_adapter(tmp_path, monkeypatch):
    """As a folder is: a script that trains in Python records the name that it was given."""
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "base.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path / "models")
    assert models.base_of(tmp_path / "runs" / "mask", "models/base.gguf") == str(file)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/base", "x" * 300, f"{'x' * 300}.gguf"])
def test_a_base_that_cannot_be_a_path_keeps_its_name(name, tmp_path):
    assert models.base_of(tmp_path, name) == name


# A stranger's folder


@pytest.fixture
def folder(tmp_path):
    """A model with its tokenizer."""
    place = tmp_path / "model"
    tiny.tiny_llama(vocab_size=len(tiny_tokenizer())).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def change(file, **values):
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("config.json", load_model),
        ("generation_config.json", load_model),
        ("tokenizer_config.json", load_tokenizer),
        ("chat_template.jinja", load_tokenizer),
        ("model.safetensors", load_model),
        ("additional_chat_templates", load_tokenizer),
    ],
)
def test_a_link_out_of_the_folder_is_not_read(name, load, folder, tmp_path):
    (tmp_path / "key").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path if name == "additional_chat_templates" else tmp_path / "key")
    with pytest.raises(UserError, match="outside of its folder"):
        load(str(folder))


def test_a_tokenizer_that_names_a_file_elsewhere_is_refused(folder, tmp_path):
    """As ``vocab_file`` some versions of transformers would open it, and save its content."""
    (tmp_path / "key").write_text("secret")
    change(folder / "tokenizer_config.json", vocab_file="/home/author/.cache/vocab.txt")
    load_tokenizer(str(folder))
    change(folder / "tokenizer_config.json", vocab_file=str(tmp_path / "key"))
    with pytest.raises(UserError, match=r"names a file outside of its folder \(vocab_file"):
        load_tokenizer(str(folder))


def test_a_folder_in_the_home_is_not_called_missing(folder, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("it is broken")

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", fails)
    monkeypatch.setenv("HOME", str(folder.parent))
    with pytest.raises(UserError, match="cannot load the tokenizer") as error:
        load_tokenizer(f"~/{folder.name}")
    assert "it is broken" in str(error.value)
    assert "not a folder" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is not an index of weights"),
        ({"weight_map": []}, "is not an index of weights"),
        ({"weight_map": {"a": 1}}, "is not an index of weights"),
        ({"weight_map": {"a": "../key.safetensors"}}, "names a file outside of its folder"),
    ],
)
def test_an_index_of_weights_that_is_none(content, message, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"', "[" * 100_000, '{"a": ' * 100_000])
@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("config.json", load_model),
        ("config.json", load_config),
        ("generation_config.json", load_model),
        ("tokenizer_config.json", load_tokenizer),
        ("tokenizer.json", load_tokenizer),
        ("special_tokens_map.json", load_tokenizer),
        ("added_tokens.json", load_tokenizer),
    ],
)
def test_settings_that_are_no_object_are_one_line(name, load, content, folder):
    """Read where a library does not look at the file, else refused in one line."""
    (folder / name).write_text(content)
    try:
        load(str(folder))
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": []},
        {"model_type": {}},
        {"quantization_config": [1]},
        {"quantization_config": {"quant_method": []}},
        {"architectures": 3},
        {"vocab_size": "many"},
        {"num_hidden_layers": -1},
        {"hidden_size": 0},
        {"rope_parameters": []},
        {"dtype": "no"},
    ],
)
def test_values_of_a_configuration_of_another_type_are_one_line(values, folder):
    change(folder / "config.json", **values)
    for load in (load_config, load_model):
        try:
            load(str(folder))
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "values", [{"num_hidden_layers": 10**6}, {"n_layer": 10**9}, {"text": {"num_layers": 1e300}}, {"num_labels": 10**9}]
)
def test_a_configuration_claims_no_more_layers_than_models_have(values, folder):
    change(folder / "config.json", **values)
    for load in (load_config, load_model):
        with pytest.raises(UserError, match="at most"):
            load(str(folder))


def test_a_template_that_is_not_utf_8_is_one_line(folder, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_bytes("{# für #}".encode("latin-1"))
    with pytest.raises(UserError, match=r"chat_template_path '.*chat\.jinja' is not UTF-8 text: .* at byte 4"):
        load_tokenizer(str(folder), str(template))


def test_a_byte_order_mark_is_no_part_of_a_template(folder, tmp_path):
    """It was the first character of every prompt."""
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}", encoding="utf-8-sig")
    assert load_tokenizer(str(folder), str(template)).chat_template == "{{ messages }}"


def test_a_pickle_is_not_run(folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match="cannot load model"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_pipe_in_the_folder_of_a_model_is_not_waited_for(name, folder):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    load = load_tokenizer if name == "tokenizer_config.json" else load_model
    try:
        load(str(folder))
    except UserError as error:
        assert "\n" not in str(error)


def test_a_special_token_without_an_embedding_is_not_missed():
    """Gemma 3 1B has no row for the image token of its family's tokenizer."""
    tokenizer = tiny_tokenizer()
    model = tiny.tiny_llama(vocab_size=len(tokenizer))
    check_tokenizer_fits(model, tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    check_tokenizer_fits(model, tokenizer)
    with pytest.raises(UserError, match="embedding 20 rows; use this model's tokenizer"):
        check_tokenizer_fits(tiny.tiny_llama(vocab_size=20), tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # comes into every batch
    with pytest.raises(UserError, match="use this model's tokenizer"):
        check_tokenizer_fits(model, tokenizer)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["word"])
    with pytest.raises(UserError, match="use this model's tokenizer"):
        check_tokenizer_fits(model, tokenizer)


@pytest.mark.parametrize("name", ["runs/qwen/missing.gguf", "./missing.gguf", "runs/missing"])
def test_a_missing_model_counts_by_its_name_whatever_else_is_in_the_folder(name, tmp_path, monkeypatch):
    """With a folder `runs`, such as the demo makes, the plan of a recipe ended in a FileNotFoundError."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert models.model_identity(name) == name
