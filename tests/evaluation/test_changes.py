"""Part of what training changed: W0 + scale * (W - W0), one definition for adapters and whole models."""

import gc
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig
from maskft.masks.codec import encode_mask
from maskft.masks.mask_set import MaskSet
from maskft_common.errors import UserError
from maskft_lab.cli.main import main
from maskft_lab.evaluation.evaluation_arguments import EvaluationArguments
from maskft_lab.evaluation.load_models import load_changes, load_each
from maskft_lab.results.schema import read_result
from tiny import tiny_llama

IDS = torch.arange(5, 25)[None]


@pytest.fixture
def lora(base, tmp_path):
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def adapter(base, tmp_path):
    config = MaskConfig(sparsity=0.3, target_modules=["gate_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "mask")
    return tmp_path / "mask"


@pytest.fixture
def full(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_part_of_an_adapter_is_what_peft_rescales(base, lora, full):
    plain = AutoModelForCausalLM.from_pretrained(base)
    options = EvaluationArguments(
        model_name_or_path=str(base),
        change=[str(lora), str(lora), "none", str(full), str(lora)],
        scale=[0.3, 1.0, 1.0, 0.5, 1.0],
        output_dir="any",
    )
    found = []
    for loaded in load_changes(options):
        with torch.no_grad():
            found.append((loaded.model(input_ids=IDS).logits, weights(loaded.model), loaded.facts))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
    with torch.no_grad(), rescale_adapter_scale(model, 0.3):
        torch.testing.assert_close(found[0][0], model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(found[1][0], model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    for name, weight in plain.named_parameters():
        assert torch.equal(found[2][1][name], weight), "nothing is left of an adapter"
        torch.testing.assert_close(found[3][1][name], 1.05 * weight)
    torch.testing.assert_close(found[4][0], found[1][0], rtol=0, atol=0)
    assert [facts["scale"] for _, _, facts in found] == options.scale
    assert found[0][2]["num_bytes"] == 2 * 3 * 8 * ((32 + 32) + (48 + 32))
    assert found[3][2]["num_bytes"] == 2 * sum(p.numel() for p in plain.parameters())
    assert found[2][2].get("adapter") is None


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_an_adapter_has_one_size_however_it_is_evaluated(kind, base, request):
    folder = str(request.getfixturevalue(kind))
    whole = EvaluationArguments(model_name_or_path=str(base), adapter=[folder], output_dir="any")
    part = EvaluationArguments(model_name_or_path=str(base), change=[folder], scale=[0.5], output_dir="any")
    (of_whole,) = [loaded.facts["num_bytes"] for loaded in load_each(whole)]
    (of_part,) = [loaded.facts["num_bytes"] for loaded in load_changes(part)]
    assert of_whole == of_part > 0


@pytest.mark.parametrize("save_scores", [False, True])
def test_the_size_of_a_mask_is_that_of_its_code(save_scores, base, tmp_path):
    """Scores, which only further training needs, and their dtype do not count."""
    config = MaskConfig(sparsity=0.3, target_modules=["gate_proj"], save_scores=save_scores)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "mask")
    coded = sum(encode_mask(mask).numel() for mask in MaskSet.from_adapter(tmp_path / "mask").values())
    options = EvaluationArguments(model_name_or_path=str(base), adapter=[str(tmp_path / "mask")], output_dir="any")
    (num_bytes,) = [loaded.facts["num_bytes"] for loaded in load_each(options)]
    assert num_bytes == coded


def test_only_changed_weights_have_to_be_stored(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    gates = [parameter for name, parameter in model.named_parameters() if "gate_proj" in name]
    with torch.no_grad():
        for gate in gates:
            gate[0, 0] += 1.0
    model.save_pretrained(tmp_path / "partial")
    options = EvaluationArguments(
        model_name_or_path=str(base),
        change=[str(tmp_path / "partial")] * 2,
        scale=[0.5, 1.0],
        output_dir="any",
    )
    for loaded in load_changes(options):
        assert loaded.facts["num_bytes"] == 2 * sum(gate.numel() for gate in gates) > 0


def test_part_of_a_removal_makes_weights_smaller(base, adapter):
    options = EvaluationArguments(model_name_or_path=str(base), change=[str(adapter)], scale=[0.25], output_dir="any")
    after = weights(next(load_changes(options)).model)
    masks, seen = MaskSet.from_adapter(adapter), 0
    for name, weight in AutoModelForCausalLM.from_pretrained(base).named_parameters():
        mask = masks.get(name.removesuffix(".weight"))
        expected = weight if mask is None else torch.where(mask, weight, 0.75 * weight)
        torch.testing.assert_close(after[name], expected)
        seen += mask is not None
    assert seen == len(masks) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scale 0.5", "--scale and --kl require --change"),
        ("--kl", "--scale and --kl require --change"),
        ("--change LORA --adapter LORA", "and no --adapter"),
        ("--change LORA --scale 0.5 1", "2 scales for 1 changes"),
        ("--change LORA --scale 1.5", "the part of a change is 0 to 1"),
        ("--change ./nowhere", "model folder './nowhere' does not exist"),
    ],
)
def test_what_cannot_be_a_change_is_one_line(words, message, base, data, lora, tmp_path, capsys):
    words = words.replace("LORA", str(lora)).split()
    words += ["--model_name_or_path", str(base), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", *words, "--no_generate"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("maskft: error") == 1


def test_evaluations_joined_by_a_plus_go_on_where_they_were_stopped(base, data, tmp_path, capsys):
    def words(folder, seed=0):
        common = f"--model_name_or_path {base} --dataset_name {data} --no_generate --seed {seed} --output_dir"
        return f"{common} {tmp_path / folder}".split()

    assert main(["evaluate", *words("a"), "+", *words("a")]) == 2
    assert "is in two of the evaluations joined by +; give each its own" in capsys.readouterr().err
    assert main(["evaluate", *words("a")]) == 0
    assert main(["evaluate", *words("a"), "+", *words("b", 1), "+", *words("c", 2)]) == 0
    assert "already done" in capsys.readouterr().out
    assert [read_result(tmp_path / name / "result.json")["model"]["seed"] for name in "abc"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("", "model_name_or_path is missing; name a model, or adapters with --adapter"),
        ("BASE --device nowhere", "device 'nowhere' cannot be used"),
        ("BASE --change none ./nowhere --name a b", "model folder './nowhere' does not exist"),
        (
            "BASE --change no-such-run none --name a b",
            "change 'no-such-run' is neither a folder here, with an adapter or a model, nor a model that the hub gives",
        ),
        ("BASE --change none OTHER --name a b", "is not a model folder: it has no config.json"),
        ("BASE --chat_template_path nowhere.jinja", "chat_template_path 'nowhere.jinja' is not a .jinja file"),
        ("BASE --change none --chat_template_path no.jinja", "chat_template_path 'no.jinja' is not a .jinja file"),
    ],
)
def test_the_models_of_the_last_evaluation_are_checked_before_the_first_is_measured(
    models, message, base, data, tmp_path, capsys
):
    def words(folder, models):
        return f"{models} --dataset_name {data} --no_generate --output_dir {tmp_path / folder}".split()

    models = models.replace("BASE", str(base)).replace("OTHER", str(tmp_path))
    assert main(["evaluate", *words("a", base), "+", *words("b", models)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.fixture
def base_with_negative_zeros(base, tmp_path):
    """Every dequantised GGUF holds some; ``lerp(w, w, 0)`` makes +0.0 of them."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.flatten()[::7] = -0.0
    model.save_pretrained(tmp_path / "negative-zeros")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "negative-zeros")
    return tmp_path / "negative-zeros"


def bits(model):
    return {name: parameter.detach().clone().view(torch.int32) for name, parameter in model.named_parameters()}


def test_negative_zeros_of_a_base_survive_a_path(base_with_negative_zeros, tmp_path):
    base = base_with_negative_zeros
    config = MaskConfig(sparsity=0.3, target_modules=["gate_proj"])
    masked = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    masked.save_pretrained(tmp_path / "mask")
    mask = str(tmp_path / "mask")
    options = EvaluationArguments(
        model_name_or_path=str(base),
        change=["none", mask, mask, "none", str(base), str(base), mask],
        scale=[1.0, 0.5, 1.0, 0.0, 0.5, 1.0, 0.0],
        output_dir="any",
    )
    found = [bits(loaded.model) for loaded in load_changes(options)]
    expected = bits(AutoModelForCausalLM.from_pretrained(base))
    merged = bits(masked.merge_and_unload())
    masks = MaskSet.from_adapter(mask)
    for name, weight in expected.items():
        for index in (0, 3, 4, 5, 6):
            assert torch.equal(found[index][name], weight), (index, name)
        assert torch.equal(found[2][name], merged[name]), name
        kept = masks.get(name.removesuffix(".weight"), torch.ones_like(weight, dtype=torch.bool))
        assert torch.equal(found[1][name][kept], weight[kept]), name


def bytes_of_tensors():
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        # type(), because isinstance() asks objects that warn when they are looked at.
        if not issubclass(type(each), torch.Tensor):
            continue
        storage = each.untyped_storage()
        try:
            storages[storage.data_ptr()] = storage.nbytes()
        except RuntimeError:
            # A fake tensor that another test's compiled model left: it has no memory.
            continue
    return sum(storages.values())


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("rms_norm_eps", {"rms_norm_eps": 0.5}),
        ("rope_parameters.rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
        ("hidden_act", {"hidden_act": "gelu"}),
    ],
)
def test_a_model_that_computes_otherwise_is_no_change(key, values, base, data, full, tmp_path, capsys):
    """Its weights in the base's configuration are a model that nobody has trained."""
    config = json.loads((full / "config.json").read_text())
    (full / "config.json").write_text(json.dumps({**config, **values}))
    words = ["--model_name_or_path", base, "--change", full, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    assert main(["evaluate", *map(str, words), "--no_generate"]) == 2
    assert f"their configurations differ in {key}; evaluate it as a model of its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_of_training_and_the_last_digit_of_float32_are_no_other_model(base, data, full, tmp_path):
    """A GGUF file holds epsilons in float32."""
    config = json.loads((full / "config.json").read_text())
    epsilon = float(torch.tensor(config["rms_norm_eps"]))
    assert epsilon != config["rms_norm_eps"]
    others = {"rms_norm_eps": epsilon, "attention_dropout": 0.1, "use_cache": False, "pad_token_id": 1}
    (full / "config.json").write_text(json.dumps({**config, **others}))
    words = ["--model_name_or_path", base, "--change", full, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    assert main(["evaluate", *map(str, words), "--no_generate", "--max_eval_samples", "4"]) == 0


def test_a_change_in_another_dtype_is_one_line(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "change")
    options = EvaluationArguments(str(base), change=[str(tmp_path / "change")], dtype="auto", output_dir="any")
    with pytest.raises(UserError, match=r"is in torch.bfloat16 and the base in torch.float32 .*; pass --dtype float32"):
        next(load_changes(options))


def test_a_change_comes_with_its_own_tokenizer(base, full, tmp_path):
    """A folder without one has the base's."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ 'own' }}"
    tokenizer.save_pretrained(tmp_path / "own")
    shutil.copytree(full, tmp_path / "own", dirs_exist_ok=True)
    options = EvaluationArguments(str(base), change=[str(full), str(tmp_path / "own")], output_dir="any")
    templates = [loaded.tokenizer.chat_template for loaded in load_changes(options)]
    assert templates == [AutoTokenizer.from_pretrained(base).chat_template, "{{ 'own' }}"]


def test_a_change_on_the_hub_comes_with_its_own_tokenizer(base, full, tmp_path):
    """The hub's cache, as a download leaves it."""
    cache = tmp_path / "hub" / "models--org--changed"
    snapshot = cache / "snapshots" / ("0" * 40)
    shutil.copytree(full, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ 'own' }}"
    tokenizer.save_pretrained(snapshot)
    code = (
        "from maskft_lab.evaluation.load_models import load_changes\n"
        "from maskft_lab.evaluation.evaluation_arguments import EvaluationArguments\n"
        f"options = EvaluationArguments({str(base)!r}, change=['org/changed'], output_dir='any')\n"
        "print(next(load_changes(options)).tokenizer.chat_template)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    # In a process of its own: transformers reads the cache's place when it is imported.
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "{{ 'own' }}", done.stderr


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_adapter_may_bring_an_output_of_its_own(is_tied, base, data, tmp_path):
    """PEFT unties it from the embedding; the base's part of it is the embedding."""
    model = tiny_llama(vocab_size=len(AutoTokenizer.from_pretrained(base)), tie_word_embeddings=is_tied)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    before = model.lm_head.weight.detach().clone()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trained = model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        trained.mul_(2.0)
    adapted.save_pretrained(tmp_path / "lora")
    lora = str(tmp_path / "lora")

    options = EvaluationArguments(
        model_name_or_path=str(tmp_path / "base"),
        change=["none", lora, "none", lora, str(tmp_path / "base")],
        scale=[1.0, 0.5, 1.0, 1.0, 1.0],
        output_dir="any",
    )
    heads = [loaded.model.lm_head.weight.detach().clone() for loaded in load_changes(options)]
    for head, part in zip(heads, (0.0, 0.5, 0.0, 1.0, 0.0), strict=True):
        torch.testing.assert_close(head, before * (1 + part))
    # The KL divergence to the base swaps the base's weights in.
    words = ["--model_name_or_path", tmp_path / "base", "--change", lora, "--dataset_name", data, "--kl"]
    words += ["--output_dir", tmp_path / "out", "--no_generate", "--max_eval_samples", "4"]
    assert main(["evaluate", *map(str, words)]) == 0
    (task,) = read_result(tmp_path / "out" / "result.json")["tasks"].values()
    assert task["metrics"]["kl"]["value"] > 1e-3


def test_a_path_holds_the_base_and_one_change(base, lora, full):
    size = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_pretrained(base).parameters())
    options = EvaluationArguments(
        model_name_or_path=str(base),
        change=["none", str(full), str(full), str(lora), str(full)],
        scale=[1.0, 0.5, 1.0, 0.5, 1.0],
        output_dir="any",
    )
    start = bytes_of_tensors()
    held = [(bytes_of_tensors() - start) / size for _ in load_changes(options)]
    assert max(held) < 2.1, held
