"""Hosts: axolotl, ms-swift and LLaMA-Factory by their real modules where these are installed.

Elsewhere the parts that they call are stand-ins with the names and signatures of axolotl 0.21.0, ms-swift 4.6.0 and
llamafactory 0.9.5. ``docs/hosts.md`` says how they are installed beside maskft.
"""

import importlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from maskft import MaskConfig, UserError, current_masks
from maskft.integrations.settings import config_of
from maskft.training.callbacks import MaskProgress
from tiny import tiny_llama

REPOSITORY = Path(__file__).parents[2]
EXPERIMENTS = REPOSITORY / "recipes" / "peft_metamathqa" / "experiments"
MOVING = {"sparsity": 0.2, "sparsity_ramp": 0.5, "layers_to_transform": [1]}


def stand_in(monkeypatch, contents):
    """Modules of these contents, by their full names, and empty packages above them."""
    for name in contents:
        for end in [i for i, c in enumerate(name) if c == "."]:
            monkeypatch.setitem(sys.modules, name[:end], ModuleType(name[:end]))
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def quantised(folder, **how):
    """A tiny model as bitsandbytes holds it."""
    pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantized]': a wheel of 40 MB")
    tiny_llama(2, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    config = BitsAndBytesConfig(**how)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


HELD = [{"load_in_4bit": True}, {"load_in_8bit": True}]


def by_gptq(base):
    """A model that says of itself what transformers lets one say that was quantised so."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.quantization_method = "gptq"
    return model


@pytest.fixture
def axolotl(monkeypatch):
    """The plugin's module, and how axolotl's configuration is made of a dictionary."""
    if find_spec("axolotl") is None:
        stand_in(
            monkeypatch,
            {
                "axolotl.integrations.base": {"AdapterCapabilities": AdapterCapabilities, "BasePlugin": BasePlugin},
                "axolotl.utils.dict": {"DictDefault": DictDefault},
            },
        )
    monkeypatch.delitem(sys.modules, "maskft.integrations.axolotl", raising=False)
    return importlib.import_module("maskft.integrations.axolotl"), importlib.import_module("axolotl.utils.dict")


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    def get_input_args(self): ...

    def get_adapter_capabilities(self):
        return []

    def load_adapter(self, model, cfg, inference=False, config_only=False): ...

    def add_callbacks_pre_trainer(self, cfg, model):
        return []


class DictDefault(dict):
    def __getattr__(self, name):
        return self.get(name)


def test_axolotl(axolotl, base, tmp_path):
    module, Cfg = axolotl[0], axolotl[1].DictDefault
    plugin = module.MaskPlugin()
    assert [(each.name, each.lora_like) for each in plugin.get_adapter_capabilities()] == [("mask", False)]
    name, _, attribute = plugin.get_input_args().rpartition(".")
    assert "mask" in getattr(importlib.import_module(name), attribute).model_fields
    model = AutoModelForCausalLM.from_pretrained(base)
    cfg = Cfg(adapter="mask", mask={"sparsity": 0.2}, lora_target_modules=["q_proj"], peft_layers_to_transform=[1])
    assert plugin.load_adapter(model, Cfg(adapter="lora")) is None
    assert plugin.add_callbacks_pre_trainer(Cfg(adapter="lora"), model) == []
    nothing, config = plugin.load_adapter(model, cfg, config_only=True)
    assert nothing is None and isinstance(config, MaskConfig) and config.sparsity == 0.2
    masked, _ = plugin.load_adapter(model, cfg)
    assert list(current_masks(masked)) == ["model.layers.1.self_attn.q_proj"]
    assert isinstance(plugin.add_callbacks_pre_trainer(cfg, masked)[0], MaskProgress)
    masked.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base)
    again, _ = plugin.load_adapter(plain, Cfg(**cfg, lora_model_dir=str(tmp_path)), inference=True)
    assert all(torch.equal(m, current_masks(again)[name]) for name, m in current_masks(masked).items())
    with pytest.raises(UserError, match="load_in_4bit: true did not quantise the base"):
        plugin.load_adapter(AutoModelForCausalLM.from_pretrained(base), Cfg(**cfg, load_in_4bit=True))
    with pytest.raises(UserError, match="quantised by gptq"):
        plugin.load_adapter(by_gptq(base), cfg)


@pytest.mark.parametrize("how", HELD)
def test_axolotl_over_bitsandbytes(axolotl, tmp_path, how):
    module, Cfg = axolotl[0], axolotl[1].DictDefault
    masked, _ = module.MaskPlugin().load_adapter(quantised(tmp_path, **how), Cfg(adapter="mask", **how))
    assert len(current_masks(masked)) == 14


@pytest.fixture
def swift(monkeypatch):
    """ms-swift's maps of tuners and callbacks, with what the plugin put into them."""
    if find_spec("swift") is None:
        stand_in(
            monkeypatch,
            {
                "swift.tuner_plugin": {"PeftTuner": PeftTuner, "tuners_map": {}},
                "swift.callbacks": {"callbacks_map": {}},
            },
        )
    tuners = importlib.import_module("swift.tuner_plugin").tuners_map
    callbacks = importlib.import_module("swift.callbacks").callbacks_map
    # As --external_plugins does: a file by its path.
    file = Path(importlib.import_module("maskft.integrations").__path__[0]) / "ms_swift.py"
    spec = importlib.util.spec_from_file_location("ms_swift", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield tuners, callbacks
    del tuners["mask"], callbacks["mask"]


class PeftTuner:
    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, selected_adapters=["default"])

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        return PeftModel.from_pretrained(model, model_id, **kwargs)


def test_ms_swift(swift, base, tmp_path, monkeypatch):
    tuner = swift[0]["mask"]
    monkeypatch.setenv("MASKFT", '{"sparsity": 0.2, "layers_to_transform": [1]}')
    args = SimpleNamespace(target_modules=["all-linear"], modules_to_save=[], callbacks=[])
    masked = tuner.prepare_model(args, AutoModelForCausalLM.from_pretrained(base))
    assert len(current_masks(masked)) == 7
    tuner.save_pretrained(masked, str(tmp_path))
    again = tuner.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path), is_trainable=True)
    assert all(torch.equal(m, current_masks(again)[name]) for name, m in current_masks(masked).items())
    with pytest.raises(UserError, match="quantised by gptq"):
        tuner.prepare_model(args, by_gptq(base))


def test_a_moving_mask_in_ms_swift_needs_its_callback(swift, base, tmp_path, monkeypatch):
    tuners, callbacks = swift
    monkeypatch.setenv("MASKFT", json.dumps(MOVING))
    args = SimpleNamespace(target_modules=[], modules_to_save=[], callbacks=[])
    with pytest.raises(UserError, match=r"sparsity_ramp: 0\.5: .* add --callbacks mask"):
        tuners["mask"].prepare_model(args, AutoModelForCausalLM.from_pretrained(base))
    args.callbacks = ["mask"]
    masked = tuners["mask"].prepare_model(args, AutoModelForCausalLM.from_pretrained(base))
    callback = callbacks["mask"](args, None)
    state, inputs = SimpleNamespace(global_step=1, max_steps=4), torch.arange(9).view(1, -1)
    callback.on_step_end(args, state, None, model=masked)
    masked.train()(inputs)
    masked.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base)
    again = tuners["mask"].from_pretrained(plain, str(tmp_path), is_trainable=True).train()
    with pytest.raises(UserError, match="depends on how far training is"):
        again(inputs)
    callback.on_train_begin(args, state, None, model=again)
    assert again.peft_config["default"].progress == 0.25
    again(inputs)


@pytest.mark.parametrize("how", HELD)
def test_ms_swift_over_bitsandbytes(swift, tmp_path, monkeypatch, how):
    monkeypatch.delenv("MASKFT", raising=False)
    args = SimpleNamespace(target_modules=[], modules_to_save=[], callbacks=[], quant_method="bnb")
    assert len(current_masks(swift[0]["mask"].prepare_model(args, quantised(tmp_path, **how)))) == 14


@pytest.fixture
def llama_factory(monkeypatch):
    """What LLaMA-Factory's registry has under the name ``mask``."""
    name = "llamafactory.v1.plugins.model_plugins.peft"
    if find_spec("llamafactory") is None:
        stand_in(monkeypatch, {name: {"PeftPlugin": PeftPlugin, "load_adapter": load_adapter}})
    monkeypatch.delitem(sys.modules, "maskft.integrations.llama_factory", raising=False)
    importlib.import_module("maskft.integrations.llama_factory")
    return importlib.import_module(name).PeftPlugin("mask")


class PeftPlugin:
    _registry = {}

    def __init__(self, name=None):
        self.name = name

    def register(self):
        return lambda function: self._registry.setdefault(self.name, function)

    def __call__(self, model, config, is_train):
        return self._registry[self.name](model, config, is_train)


def load_adapter(model, adapter_name_or_path, is_train):
    model = PeftModel.from_pretrained(model, adapter_name_or_path, is_trainable=is_train)
    return model if is_train else model.merge_and_unload()


def test_llama_factory(llama_factory, base, tmp_path):
    settings = {"name": "mask", "sparsity": 0.2, "layers_to_transform": [1]}
    masked = llama_factory(AutoModelForCausalLM.from_pretrained(base), settings, True)
    assert len(current_masks(masked)) == 7 and masked.peft_config["default"].sparsity == 0.2
    masked.eval().save_pretrained(tmp_path)
    settings["adapter_name_or_path"] = str(tmp_path)
    merged = llama_factory(AutoModelForCausalLM.from_pretrained(base), settings, False)
    ids = torch.arange(9).view(1, -1)
    with torch.no_grad():
        assert torch.equal(merged(ids).logits, masked(ids).logits)
    with pytest.raises(UserError, match="did you mean 'sparsity'"):
        llama_factory(masked, {"name": "mask", "sparsty": 0.1}, True)
    with pytest.raises(UserError, match="quantised by gptq"):
        llama_factory(by_gptq(base), {"name": "mask"}, True)


@pytest.mark.parametrize("moving", [{"sparsity_ramp": 0.5}, {"selection": "gumbel"}])
def test_a_moving_mask_is_refused_in_llama_factory(llama_factory, base, tmp_path, moving):
    model = AutoModelForCausalLM.from_pretrained(base)
    [(name, value)] = moving.items()
    with pytest.raises(UserError, match=f"{name}: {value}: .* drop the setting, or train with maskft train"):
        llama_factory(model, {"name": "mask", **moving}, True)
    masked = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MaskConfig(**moving, save_scores=True))
    masked.save_pretrained(tmp_path)
    settings = {"name": "mask", "adapter_name_or_path": str(tmp_path)}
    with pytest.raises(UserError, match=f"{name}: {value}"):
        llama_factory(AutoModelForCausalLM.from_pretrained(base), settings, True)
    llama_factory(AutoModelForCausalLM.from_pretrained(base), settings, False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"sparsty": 0.1}', "did you mean 'sparsity'"),
        ("0.1", "give settings of MaskConfig"),
        ("{", "give settings of MaskConfig"),
        ({"sparsity": 2}, "sparsity"),
    ],
)
def test_settings_that_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        config_of(given, "MASKFT")


def test_the_experiment_has_the_form_that_peft_s_comparison_takes():
    """Its runner reads adapter_config.json by PeftConfig, and training_params.json over its defaults."""
    # Fields of TrainConfig in its utils.py.
    known = set(
        "model_id dtype max_seq_length batch_size batch_size_eval max_steps eval_steps compile use_gc query_template "
        "seed grad_norm_clip optimizer_type optimizer_kwargs lr_scheduler use_amp autocast_adapter_dtype "
        "generation_kwargs attn_implementation init_kv_cache_prefix".split()
    )
    folders = [file.parent for file in EXPERIMENTS.rglob("adapter_config.json")]
    assert folders and all(folder.parts[-3:-1] == ("experiments", "mask") for folder in folders)
    for folder in folders:
        config = PeftConfig.from_pretrained(str(folder))
        assert isinstance(config, MaskConfig) and config.sparsity == 0.3
        assert set(json.loads((folder / "training_params.json").read_text())) <= known


@pytest.mark.slow
def test_lm_eval_reads_an_adapter_by_the_documented_line(base, tmp_path):
    """The line of docs/hosts.md, with names of this test in it, gives what the merged model gives."""
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
    text = (REPOSITORY / "docs" / "hosts.md").read_text()
    line = text.split("\n## lm-eval\n")[1].split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
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
