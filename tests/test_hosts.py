"""Masks in other programs: PEFT's comparison of methods, ms-swift, lm-eval by the line of docs/compatibility.md."""

import importlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

import maskft
import tiny
from maskft import MaskConfig, current_masks
from maskft_common.errors import UserError

REPOSITORY = Path(__file__).parents[1]
EXPERIMENTS = REPOSITORY / "recipes" / "peft_metamathqa" / "experiments"


def test_the_experiment_has_the_form_that_peft_s_comparison_takes():
    """Its runner reads adapter_config.json by PeftConfig, and training_params.json over its defaults."""
    # Fields of TrainConfig in its utils.py.
    known = set(
        "model_id dtype max_seq_length batch_size batch_size_eval max_steps eval_steps compile use_gc query_template "
        "seed grad_norm_clip optimizer_type optimizer_kwargs lr_scheduler use_amp autocast_adapter_dtype "
        "generation_kwargs attn_implementation init_kv_cache_prefix".split()
    )
    folders = [file.parent for file in EXPERIMENTS.rglob("adapter_config.json")]
    assert all(folder.parts[-3:-1] == ("experiments", "mask") for folder in folders)
    configs = [PeftConfig.from_pretrained(str(folder)) for folder in folders]
    assert sorted(config.sparsity for config in configs) == [0.0005, 0.01, 0.1, 0.3]
    for folder, config in zip(folders, configs, strict=True):
        config.layers_to_transform = None
        masked = get_peft_model(tiny.tiny_llama(), config)  # and nothing else: its runner knows no mask
        masked(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        assert masked.get_nb_trainable_parameters()[0] > 0
        assert set(json.loads((folder / "training_params.json").read_text())) <= known


class AxolotlOptions(SimpleNamespace):
    """An option that is not given is None, as in axolotl's DictDefault."""

    def __getattr__(self, name):
        return None


@pytest.fixture
def axolotl_plugin(monkeypatch):
    """The plugin without axolotl, which need not be installed: its two classes are stubs."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = object
    sys.modules["axolotl.integrations.base"].AdapterCapabilities = object
    # Set first, so that monkeypatch removes the module that is imported with the stubs.
    monkeypatch.setattr(maskft, "axolotl", None, raising=False)
    monkeypatch.setitem(sys.modules, "maskft.axolotl", None)
    del sys.modules["maskft.axolotl"]
    return importlib.import_module("maskft.axolotl").MaskPlugin()


def test_options_of_axolotl_that_choose_layers_are_followed_or_refused(axolotl_plugin):
    def load(**options):
        model, _ = axolotl_plugin.load_adapter(tiny.tiny_llama(), AxolotlOptions(adapter="mask", **options))
        return {name.removeprefix("model.layers.") for name in current_masks(model)}

    names = load(lora_target_modules=["q_proj"], peft_layers_to_transform=[1], peft_layers_pattern=["layers"])
    assert names == {"1.self_attn.q_proj"}
    with pytest.raises(UserError, match="names no list of layers"):
        load(lora_target_modules=["q_proj"], peft_layers_to_transform=[1], peft_layers_pattern=["h"])
    names = load(lora_target_linear=True, peft_layers_to_transform=[1], mask={"preset": "deletion_tuning"})
    assert len(names) == 7, "and not the layers of the preset alone"
    names = load(lora_target_linear=True, lora_exclude_modules=["gate_proj"], peft_layers_to_transform=[1])
    assert len(names) == 6
    names = load(lora_target_linear=True, peft_layers_to_transform=[1], mask={"target_modules": ["v_proj"]})
    assert names == {"1.self_attn.v_proj"}

    refused = {
        "peft_trainable_token_indices": [1],
        "lora_target_parameters": ["experts.gate_up_proj"],
        "peft_layer_replication": [(0, 1)],
    }
    for name, value in refused.items():
        with pytest.raises(UserError, match=f"^{name} is "):
            load(**{name: value})
    with pytest.raises(UserError, match="lora_target_linear names every linear layer and lora_target_modules some"):
        load(lora_target_linear=True, lora_target_modules=["q_proj"])


def test_a_zero_under_mask_is_a_value_in_axolotl(axolotl_plugin, tmp_path):
    plugin = axolotl_plugin
    cfg = AxolotlOptions(
        adapter="mask",
        lora_target_modules=["q_proj"],
        lora_modules_to_save=[],
        peft_layers_to_transform=None,
        mask={"sparsity": 0, "mask_seed": None},
    )
    model, config = plugin.load_adapter(None, cfg, config_only=True)
    assert model is None
    assert config.sparsity == 0, "and not the default"
    assert config.save_scores and config.mask_seed == 0
    assert config.modules_to_save is None and config.layers_to_transform is None

    cfg.mask = {"save_scores": False, "target_modules": ["v_proj"]}
    _, config = plugin.load_adapter(None, cfg, config_only=True)
    assert config.save_scores is False
    assert set(config.target_modules) == {"v_proj"}

    cfg.mask = {"sparcity": 0.3}
    with pytest.raises(UserError, match=r"mask has 'sparcity', which is no field .* \(did you mean 'sparsity'\?\)"):
        plugin.load_adapter(None, cfg, config_only=True)
    cfg.mask = {"task_type": "SEQ_CLS"}
    assert plugin.load_adapter(None, cfg, config_only=True)[1].task_type == "SEQ_CLS"

    get_peft_model(tiny.tiny_llama(), MaskConfig(sparsity=0.3, save_scores=True)).save_pretrained(tmp_path)
    cfg.lora_model_dir = str(tmp_path)
    cfg.mask = {"sparsity": 0.2}
    masked, config = plugin.load_adapter(tiny.tiny_llama(), cfg)
    assert config is masked.peft_config["default"] and config.sparsity == 0.3 and config.save_scores


def test_the_plugin_of_ms_swift_passes_on_settings_that_are_false(monkeypatch):
    """With modules in the place of ms-swift's; tests/test_hosts_train.py runs ms-swift itself."""
    callbacks = ModuleType("swift.callbacks")
    callbacks.callbacks_map = {}
    tuner_plugin = ModuleType("swift.tuner_plugin")
    tuner_plugin.PeftTuner = object
    tuner_plugin.tuners_map = {}
    for module in (ModuleType("swift"), callbacks, tuner_plugin):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    file = REPOSITORY / "examples" / "hosts" / "maskft_ms_swift.py"
    spec = importlib.util.spec_from_file_location("maskft_ms_swift", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

    monkeypatch.setenv("MASKFT", json.dumps({"sparsity": 0.3, "verify_base": False}))
    args = SimpleNamespace(target_modules=["all-linear"], target_regex=None, modules_to_save=[])
    model = tuner_plugin.tuners_map["mask"].prepare_model(args, tiny.tiny_llama())
    config = model.peft_config["default"]
    assert config.sparsity == 0.3
    assert config.verify_base is False
    assert config.save_scores is True
    assert config.modules_to_save is None

    for text in ("sparsity: 0.3", "0.3"):
        monkeypatch.setenv("MASKFT", text)
        with pytest.raises(UserError, match="not a JSON object"):
            tuner_plugin.tuners_map["mask"].prepare_model(args, tiny.tiny_llama())
    monkeypatch.delenv("MASKFT")

    args.target_regex = r".*layers\.1\.mlp\.(gate|up)_proj"
    model = tuner_plugin.tuners_map["mask"].prepare_model(args, tiny.tiny_llama())
    masked = [name for name, module in model.named_modules() if hasattr(module, "mask_scores")]
    assert [name.rpartition("layers.")[2] for name in masked] == ["1.mlp.gate_proj", "1.mlp.up_proj"]


@pytest.mark.slow
def test_lm_eval_reads_an_adapter_by_the_documented_line(base, tmp_path):
    """The line of docs/compatibility.md, with names of this test in it, gives what the merged model gives."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    masked = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MaskConfig(sparsity=0.3)).eval()
    masked.save_pretrained(tmp_path / "mask")
    rows = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))  # which YAML contains
    text = (REPOSITORY / "docs" / "compatibility.md").read_text()
    line = text.split("```sh\n")[1].split("```")[0].replace("\\\n", " ")
    names = {"your-name/your-model": str(base), "runs/mask": str(tmp_path / "mask"), "gsm8k": "sums"}
    for name, ours in names.items():
        assert name in line
        line = line.replace(name, ours)
    command = [sys.executable, *shlex.split(line)[1:], "--include_path", str(tmp_path), "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [samples] = (tmp_path / "out").rglob("samples_sums_*.jsonl")
    found = [json.loads(row)["filtered_resps"][0] for row in samples.read_text().splitlines()]

    requests = [Instance("loglikelihood", {}, (row["question"], row["answer"]), n) for n, row in enumerate(rows)]
    tokenizer = HFLM(pretrained=str(base), device="cpu").tokenizer
    plain, merged = AutoModelForCausalLM.from_pretrained(base), masked.merge_and_unload()
    logits = [
        HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
        for model in (merged, plain)
    ]
    expected, unmasked = ([value for value, _ in each] for each in logits)
    assert [float(value) for value, _ in found] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(unmasked, rel=1e-5)
