"""vLLM's plugin, on the CPU: registering, putting masks on and off a model with packed and sharded matrices.

Where vLLM is installed its own modules are used. Elsewhere stand-ins keep to what vLLM 0.33.0 has in these places: the
base class of engines, the registry, and the loader of sparse patches, which gives NaN to the model's loader for what is
to stay and takes only what is not NaN from its copies.
"""

import importlib
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Generic, NamedTuple, TypeVar

import pytest
import torch
from torch import nn

import tiny
from maskft import UserError
from maskft.adapter.mask_set import MaskSet
from maskft.adapter.patch import patch_of_adapter, write_patch

BASE = "vllm.distributed.weight_transfer.base"
FACTORY = "vllm.distributed.weight_transfer.factory"
LOADER = "vllm.model_executor.model_loader.checkpoint_weight_patch"
A, B = TypeVar("A"), TypeVar("B")


class Engine(Generic[A, B]):
    def __init__(self, config, vllm_config, device, model):
        self.parallel_config, self.model_config = vllm_config.parallel_config, vllm_config.model_config
        self.device, self.model = device, model

    def update_weights(self, update_info):
        self.receive_weights(self.update_info_cls(**update_info))


class Registry:
    _registry = {}

    @classmethod
    def register_engine(cls, name, module, class_name):
        if name in cls._registry:
            raise ValueError("registered already")
        cls._registry[name] = lambda: getattr(importlib.import_module(module), class_name)


class SparsePatch(NamedTuple):
    name: str
    shape: tuple
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor


def load_patches(model, patches, *, validate_unique_indices=True):
    def keep_where_nan(destination, source, non_blocking=False):
        assert destination.shape == source.shape
        return torch.where(source.isnan(), destination, source.to(destination.dtype), out=destination)

    whole = []
    for patch in patches:
        weight = torch.full(patch.shape, torch.nan, dtype=patch.dtype)
        weight.view(-1)[patch.indices.long()] = patch.values
        whole.append((patch.name, weight))
    copy, torch.Tensor.copy_ = torch.Tensor.copy_, keep_where_nan
    try:
        model.load_weights(whole)
    finally:
        torch.Tensor.copy_ = copy


@pytest.fixture
def vllm(monkeypatch):
    """The three modules of vLLM that the plugin uses, by their last names."""
    if find_spec("vllm") is None:
        contents = {
            BASE: {
                "WeightTransferEngine": Engine,
                "WeightTransferInitInfo": object,
                "WeightTransferUpdateInfo": object,
            },
            FACTORY: {"WeightTransferEngineFactory": Registry},
            LOADER: {"CheckpointWeightPatch": SparsePatch, "load_checkpoint_weight_patches": load_patches},
        }
        for name, content in contents.items():
            for end in [i for i, c in enumerate(name) if c == "."]:
                monkeypatch.setitem(sys.modules, name[:end], ModuleType(name[:end]))
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
    factory = importlib.import_module(FACTORY).WeightTransferEngineFactory
    monkeypatch.setattr(factory, "_registry", {})
    monkeypatch.delitem(sys.modules, "maskft.adapter.vllm_engine", raising=False)
    yield factory
    sys.modules.pop("maskft.adapter.vllm_engine", None)


class Served(nn.Module):
    """A server's model: Q, K and V in one matrix, gate and up in another, rows divided among ranks, and its loader."""

    PACKED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
    PACKED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    # Rows of the parts of a packed matrix, and whether a matrix is divided by rows or by columns.
    PARTS = {"qkv_proj": (32, 16, 16), "gate_up_proj": (48, 48), "o_proj": (32,), "down_proj": (32,)}
    BY_COLUMNS = ("o_proj", "down_proj")

    def __init__(self, source, rank=0, world=1, dtype=torch.float32):
        super().__init__()
        self.rank, self.world = rank, world
        for layer in range(3):
            for name, parts in self.PARTS.items():
                columns = 48 if name == "down_proj" else 32
                shape = (sum(parts), columns // world) if name in self.BY_COLUMNS else (sum(parts) // world, columns)
                self.register_parameter(f"{layer}/{name}", nn.Parameter(torch.zeros(shape, dtype=dtype)))
        self.load_weights((name, weight) for name, weight in source.items() if ".layers." in name and weight.dim() == 2)

    def named_parameters(self, *args, **kwargs):
        for name, weight in super().named_parameters(*args, **kwargs):
            layer, matrix = name.split("/")
            yield f"model.layers.{layer}.some_block.{matrix}.weight", weight

    @torch.no_grad()
    def load_weights(self, weights):
        loaded = set()
        for name, weight in weights:
            layer, matrix = name.split(".")[2], name.split(".")[-2]
            packed, part = self.PACKED.get(matrix, (matrix, 0))
            target = self.get_parameter(f"{layer}/{packed}")
            if matrix in self.BY_COLUMNS:
                shard = weight.chunk(self.world, dim=1)[self.rank]
            else:
                rows = [size // self.world for size in self.PARTS[packed]]
                target = target.narrow(0, sum(rows[:part]), rows[part])
                shard = weight.chunk(self.world, dim=0)[self.rank]
            target.copy_(shard)
            loaded.add(name)
        return loaded


def engine_of(factory, model, world=1):
    from maskft.adapter.vllm_plugin import BACKEND, register

    register()
    register()  # vLLM may call it more than once
    parallel = SimpleNamespace(world_size=world)
    config = SimpleNamespace(
        parallel_config=parallel, model_config=SimpleNamespace(dtype=next(model.parameters()).dtype)
    )
    return factory._registry[BACKEND]()(SimpleNamespace(backend=BACKEND), config, torch.device("cpu"), model)


def update(engine, patch):
    engine.start_weight_update()
    engine.receive_weights(engine.update_info_cls(patch=None if patch is None else str(patch)))
    engine.finish_weight_update()


def bits(model):
    kind = {2: torch.int16, 4: torch.int32}[next(model.parameters()).element_size()]
    return {name: weight.detach().view(kind).clone() for name, weight in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def random_adapter(folder, seed, **shape):
    generator, model = torch.Generator().manual_seed(seed), tiny.tiny_llama(**shape)
    masks = {
        name: torch.rand(module.weight.shape, generator=generator) >= 0.2
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and "layers.1." not in name
    }
    tiny.save_masks(masks, folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2])
def test_masks_are_put_on_swapped_and_taken_off_bit_for_bit(vllm, tmp_path, world, dtype):
    folders = [random_adapter(tmp_path / str(seed), seed) for seed in range(2)]
    write_patch(patch_of_adapter(folders[1]), tmp_path / "one.safetensors")
    for rank in range(world):
        source = tiny.tiny_llama()
        with torch.no_grad():
            source.model.layers[0].mlp.up_proj.weight[:, ::3] = -0.0
        expected = []
        for folder in folders:
            masked = tiny.tiny_llama()
            masked.load_state_dict(source.state_dict())
            MaskSet.from_adapter(folder).apply_(masked)
            expected.append(bits(Served(masked.state_dict(), rank, world, dtype)))
        model = Served(source.state_dict(), rank, world, dtype)
        before = bits(model)
        engine = engine_of(vllm, model, world)
        update(engine, folders[0])
        assert same(bits(model), expected[0])
        update(engine, tmp_path / "one.safetensors")
        assert same(bits(model), expected[1])
        update(engine, None)
        assert same(bits(model), before)
        update(engine, None)
        assert same(bits(model), before)


def test_after_an_error_the_base_is_bare(vllm, tmp_path):
    model = Served(tiny.tiny_llama().state_dict())
    before = bits(model)
    engine = engine_of(vllm, model)
    update(engine, random_adapter(tmp_path / "mask", 0))
    with pytest.raises(UserError, match="is no patch file"):
        update(engine, tmp_path / "nothing")
    assert not same(bits(model), before)  # what cannot be read takes nothing off
    with pytest.raises((AttributeError, KeyError)):  # layer 4: the loader's own error
        update(engine, random_adapter(tmp_path / "large", 0, num_layers=5))
    assert same(bits(model), before)


def test_a_loader_that_takes_nothing_is_an_error(vllm, tmp_path):
    model = Served(tiny.tiny_llama().state_dict())
    model.load_weights = lambda weights: set()
    with pytest.raises(UserError, match="vLLM's loader changed no weight of"):
        update(engine_of(vllm, model), random_adapter(tmp_path / "mask", 0))


def test_the_entry_point_names_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["maskft"].partition(":")
    from maskft.adapter.vllm_plugin import register

    assert getattr(importlib.import_module(module), name) is register


def test_without_vllm_registering_is_a_warning(monkeypatch, caplog):
    for name in (BASE, FACTORY, LOADER):
        monkeypatch.setitem(sys.modules, name, None)
    from maskft.adapter.vllm_plugin import register

    register()
    assert "need a newer vLLM" in caplog.text
