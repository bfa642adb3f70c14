"""Hosts by their interfaces: axolotl and ms-swift do not install beside this torch, so the parts they call are here.

Each stand-in has the names and signatures of the host's own source, at the commit named in the integration.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from maskft import MaskConfig, UserError, current_masks
from maskft.integrations.settings import config_of
from maskft.training.callbacks import MaskProgress

EXPERIMENTS = Path(__file__).parents[2] / "recipes" / "peft_metamathqa" / "experiments"


class Cfg(dict):
    """axolotl's DictDefault: a key that is not there is None."""

    def __getattr__(self, name):
        return self.get(name)


@pytest.fixture
def axolotl(monkeypatch):
    @dataclass
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

    base = ModuleType("axolotl.integrations.base")
    base.AdapterCapabilities, base.BasePlugin = AdapterCapabilities, BasePlugin
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "maskft.integrations.axolotl", raising=False)
    return importlib.import_module("maskft.integrations.axolotl")


def test_axolotl(axolotl, base, tmp_path):
    plugin = axolotl.MaskPlugin()
    assert [(each.name, each.lora_like) for each in plugin.get_adapter_capabilities()] == [("mask", False)]
    module, _, name = plugin.get_input_args().rpartition(".")
    assert "mask" in getattr(importlib.import_module(module), name).model_fields
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
    with pytest.raises(UserError, match="drop load_in_4bit"):
        plugin.load_adapter(model, Cfg(**cfg, load_in_4bit=True))


def test_ms_swift(base, tmp_path, monkeypatch):
    class PeftTuner:
        @staticmethod
        def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
            model.save_pretrained(save_directory, safe_serialization=safe_serialization, selected_adapters=["default"])

        @staticmethod
        def from_pretrained(model, model_id, **kwargs):
            return PeftModel.from_pretrained(model, model_id, **kwargs)

    plugin = ModuleType("swift.tuner_plugin")
    plugin.PeftTuner, plugin.tuners_map = PeftTuner, {}
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.tuner_plugin", plugin)
    # As --external_plugins does: a file by its path.
    file = Path(importlib.import_module("maskft.integrations").__path__[0]) / "ms_swift.py"
    spec = importlib.util.spec_from_file_location("ms_swift", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    tuner = plugin.tuners_map["mask"]
    monkeypatch.setenv("MASKFT", '{"sparsity": 0.2, "layers_to_transform": [1]}')
    args = SimpleNamespace(target_modules=["all-linear"], modules_to_save=[], quant_method=None)
    masked = tuner.prepare_model(args, AutoModelForCausalLM.from_pretrained(base))
    assert len(current_masks(masked)) == 7
    tuner.save_pretrained(masked, str(tmp_path))
    again = tuner.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path), is_trainable=True)
    assert all(torch.equal(m, current_masks(again)[name]) for name, m in current_masks(masked).items())
    with pytest.raises(UserError, match="drop quant_method"):
        tuner.prepare_model(SimpleNamespace(quant_method="bnb"), masked)


def test_llama_factory(base, tmp_path, monkeypatch):
    registry = {}

    class PeftPlugin:
        def __init__(self, name=None):
            self.name = name

        def register(self):
            def decorator(obj):
                registry[self.name] = obj
                return obj

            return decorator

    def load_adapter(model, adapter_name_or_path, is_train):
        model = PeftModel.from_pretrained(model, adapter_name_or_path, is_trainable=is_train)
        return model if is_train else model.merge_and_unload()

    peft = ModuleType("llamafactory.v1.plugins.model_plugins.peft")
    peft.PeftPlugin, peft.load_adapter = PeftPlugin, load_adapter
    names = peft.__name__.split(".")
    for n in range(1, len(names)):
        monkeypatch.setitem(sys.modules, ".".join(names[:n]), ModuleType(".".join(names[:n])))
    monkeypatch.setitem(sys.modules, peft.__name__, peft)
    monkeypatch.delitem(sys.modules, "maskft.integrations.llama_factory", raising=False)
    importlib.import_module("maskft.integrations.llama_factory")
    settings = {"name": "mask", "sparsity": 0.2, "layers_to_transform": [1]}
    masked = registry["mask"](AutoModelForCausalLM.from_pretrained(base), peft_config=settings, is_train=True)
    assert len(current_masks(masked)) == 7 and masked.peft_config["default"].sparsity == 0.2
    masked.eval().save_pretrained(tmp_path)
    settings["adapter_name_or_path"] = str(tmp_path)
    merged = registry["mask"](AutoModelForCausalLM.from_pretrained(base), peft_config=settings, is_train=False)
    ids = torch.arange(9).view(1, -1)
    with torch.no_grad():
        assert torch.equal(merged(ids).logits, masked(ids).logits)
    with pytest.raises(UserError, match="did you mean 'sparsity'"):
        registry["mask"](masked, peft_config={"name": "mask", "sparsty": 0.1}, is_train=True)


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
def test_lm_eval_reads_an_adapter_by_its_own_option(base, tmp_path):
    """``--model_args pretrained=...,peft=...`` in a process that has imported maskft."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from peft import get_peft_model

    masked = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MaskConfig(sparsity=0.3)).eval()
    masked.save_pretrained(tmp_path)
    requests = [Instance("loglikelihood", {}, (f"{n}+1=", str(n + 1)), n) for n in range(4)]
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 2}
    found = HFLM(pretrained=str(base), peft=str(tmp_path), **settings).loglikelihood(requests, disable_tqdm=True)
    merged = masked.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer = HFLM(pretrained=str(base), **settings).tokenizer
    expected = HFLM(pretrained=merged, tokenizer=tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    plain = HFLM(pretrained=str(base), **settings).loglikelihood(requests, disable_tqdm=True)
    assert found == expected != plain
