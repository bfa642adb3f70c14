"""Masks over quantised layers: trained over codes, merged by the code of zero, undone bit for bit."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from gguf import GGMLQuantizationType as Type
from gguf import quantize
from maskft import MaskConfig, UserError, adapter_layers
from maskft.gguf.zero_codes import write_codes
from maskft.quant.layers import Torchao, storage_of

NUM_IN, NUM_OUT = 256, 64

needs_gguf_layers = pytest.mark.skipif(
    importlib.util.find_spec("transformers.integrations.gguf") is None,
    reason="transformers before 5.2x keeps no GGUF weights in blocks",
)


def gguf_linear(kind, seed=0):
    """A layer as transformers makes it, filled with blocks that gguf has quantised."""
    from transformers.integrations.gguf.utils import GgufLinear

    torch.manual_seed(seed)
    layer = GgufLinear(NUM_IN, NUM_OUT, int(kind), bias=True)
    nn.init.normal_(layer.bias)
    if kind in (Type.Q6_K, Type.Q3_K):  # which gguf does not write: random blocks with a small scale
        layer.weight.data.copy_(torch.randint(0, 256, layer.weight.shape, dtype=torch.uint8))
        layer.weight.data[:, -2:] = torch.tensor([0x00, 0x04], dtype=torch.uint8)
    else:
        layer.weight.data.copy_(torch.from_numpy(quantize(torch.randn(NUM_OUT, NUM_IN).numpy() / 16, kind)))
    return layer


def bnb4_linear(kind, nested=False):
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        NUM_IN, NUM_OUT, quant_type=kind, compute_dtype=torch.float32, compress_statistics=nested
    )
    return layer.to("cpu")


def bnb8_linear():
    import bitsandbytes

    return bitsandbytes.nn.Linear8bitLt(NUM_IN, NUM_OUT, has_fp16_weights=False).to("cpu")


def torchao_linear(config):
    from torchao.quantization import quantize_

    layer = nn.Sequential(nn.Linear(NUM_IN, NUM_OUT))
    quantize_(layer, config)
    return layer[0]


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return torchao_linear(Int8WeightOnlyConfig())


def torchao_int4():
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return torchao_linear(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


LAYERS = [
    *(
        pytest.param(lambda kind=kind: gguf_linear(kind), id=f"gguf {kind.name}", marks=needs_gguf_layers)
        for kind in (Type.Q4_0, Type.Q8_0, Type.Q6_K, Type.Q3_K)
    ),
    *(
        pytest.param(make, id=name, marks=pytest.mark.quantised)
        for name, make in {
            "nf4": lambda: bnb4_linear("nf4"),
            "nf4 with nested scales": lambda: bnb4_linear("nf4", nested=True),
            "fp4": lambda: bnb4_linear("fp4"),
            "bnb int8": bnb8_linear,
            "torchao int8": torchao_int8,
            "torchao int4": torchao_int4,
        }.items()
    ),
]


class Model(nn.Module):
    """A quantised layer that is masked, and one that is not."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.up = make()
        self.other = make()
        self.head = nn.Linear(NUM_OUT, 5)

    def forward(self, x):
        return self.head(torch.relu(self.up(x)) + self.other(x))


def codes_of(layer):
    return storage_of(layer).codes().clone()


def scales_of(layer):
    """Everything of a layer that is not codes."""
    kind = type(layer).__name__
    if kind == "GgufLinear":
        form = storage_of(layer).form
        blocks = layer.weight.data.clone().view(-1, form.block_bytes)
        write_codes(blocks, 0, torch.ones(len(blocks), form.block_size, dtype=torch.bool), form)
        return [blocks]
    if kind == "Linear4bit":
        return [layer.weight.quant_state.absmax.clone()]
    if kind == "Linear8bitLt":
        return [(layer.weight.SCB if layer.state.SCB is None else layer.state.SCB).clone()]
    return [layer.weight.scale.clone(), layer.weight.zero_point.clone()]


def masked(make, **config):
    config = {"target_modules": ["up"], "sparsity": 0.3, **config}
    return get_peft_model(Model(make), MaskConfig(**config))


def masked_layer(model):
    return next(iter(adapter_layers(model).values()))


def inputs(seed=3):
    return torch.randn(16, NUM_IN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", LAYERS)
def test_the_effective_weight_is_the_dequantised_one_times_the_mask(make):
    model = masked(make)
    layer = masked_layer(model)
    weight = storage_of(layer.base_layer).dequantise()
    expected = F.linear(inputs(), weight * layer.get_mask("default"), layer.bias)
    assert torch.equal(layer(inputs()), expected)
    assert layer.get_base_dtype() == weight.dtype
    assert f"quantization_backend='{layer.quantization_backend.backend_name}'" in repr(layer)
    assert type(model.base_model.model.other) is type(layer.base_layer)  # stays quantised


@pytest.mark.parametrize("make", LAYERS)
def test_training_moves_the_mask_and_no_code(make):
    model = masked(make).train()
    layer = masked_layer(model)
    codes = codes_of(layer.base_layer)
    mask = layer.get_mask("default").clone()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"base_model.model.up.mask_scores.default"}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        model(inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(layer.get_mask("default"), mask)
    assert torch.equal(codes_of(layer.base_layer), codes)


@pytest.mark.parametrize("make", LAYERS)
def test_merging_writes_zero_codes_and_unmerging_restores_every_byte(make):
    model = masked(make).train()  # in eval mode bitsandbytes takes a bfloat16 kernel on some processors
    layer = masked_layer(model)
    base = layer.base_layer
    codes, scales = codes_of(base), scales_of(base)
    weight = storage_of(base).dequantise()
    mask = layer.get_mask("default")
    with torch.no_grad():
        expected = model(inputs())
        before = base(inputs())

    layer.merge()

    assert torch.equal(storage_of(base).dequantise(), weight * mask)
    assert all(torch.equal(a, b) for a, b in zip(scales_of(base), scales, strict=True))
    assert not torch.equal(codes_of(base), codes)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), expected, atol=1e-4, rtol=1e-4)

    layer.unmerge()

    assert torch.equal(codes_of(base), codes)
    assert torch.equal(storage_of(base).dequantise(), weight)
    with torch.no_grad():
        assert torch.equal(base(inputs()), before)


@pytest.mark.parametrize("make", LAYERS)
def test_inputs_in_bfloat16_without_autocast(make):
    """As in a model of bfloat16, whose int8 and GGUF layers dequantise to float32."""
    model = masked(make)
    layer = masked_layer(model)
    x = inputs().bfloat16()
    weight = (storage_of(layer.base_layer).dequantise() * layer.get_mask("default")).bfloat16()
    bias = layer.bias.bfloat16()
    y = layer(x)
    assert torch.equal(y, F.linear(x, weight, bias))
    y.float().square().sum().backward()
    assert bool(layer.mask_scores["default"].grad.any())

    layer.eval()
    with torch.no_grad():
        mixed = layer(x, adapter_names=["default"] * len(x))
    torch.testing.assert_close(mixed, y.detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("make", LAYERS)
def test_the_gradient_under_torch_compile(make):
    """It needs the dequantised weight, and not the codes, which int8 has in the same shape."""
    layer = masked_layer(masked(make))
    layer(inputs()).square().sum().backward()
    expected = layer.mask_scores["default"].grad.clone()
    layer.mask_scores["default"].grad = None
    torch.compile(layer, backend="eager")(inputs()).square().sum().backward()
    torch.testing.assert_close(layer.mask_scores["default"].grad, expected)


@pytest.mark.parametrize("make", LAYERS)
def test_nothing_computed_from_merged_codes_outlives_them(make):
    model = masked(make)
    model.add_adapter("other", MaskConfig(target_modules=["up"], sparsity=0.3, mask_seed=1))
    layer = masked_layer(model)
    layer.merge(adapter_names=["default"])
    layer.set_adapter("other")
    layer.get_masked_weight()
    layer.unmerge()
    expected = storage_of(layer.base_layer).dequantise() * layer.get_mask("other")
    assert torch.equal(layer.get_masked_weight(), expected)


@pytest.mark.parametrize("make", LAYERS)
def test_merge_and_unload_leaves_a_quantised_model(make):
    model = masked(make)
    layer = masked_layer(model)
    kind = type(layer.base_layer)
    expected = storage_of(layer.base_layer).dequantise() * layer.get_mask("default")
    plain = model.merge_and_unload()
    assert type(plain.up) is kind
    assert torch.equal(storage_of(plain.up).dequantise(), expected)


@pytest.mark.parametrize("make", LAYERS)
def test_saved_masks_load_over_the_same_codes(make, tmp_path):
    model = masked(make)
    layer = masked_layer(model)
    model.save_pretrained(tmp_path)
    assert MaskConfig.from_pretrained(tmp_path).base_quantisation == storage_of(layer.base_layer).kind
    loaded = PeftModel.from_pretrained(Model(make), tmp_path)
    assert torch.equal(masked_layer(loaded).get_mask("default"), layer.get_mask("default"))


@pytest.mark.quantised
def test_the_dtype_of_dequantised_weights_decides_whether_they_are_checked(tmp_path):
    """Not the one that codes are stored in: float16 rounds otherwise than fingerprints do."""
    import bitsandbytes

    def linear():
        layer = bitsandbytes.nn.Linear4bit(NUM_IN, NUM_OUT, quant_type="nf4", quant_storage=storage)
        return layer.to(weights).to("cpu")

    for weights, storage in ((torch.float32, torch.float16), (torch.float16, torch.uint8)):
        model = masked(linear)
        assert masked_layer(model).get_base_dtype() == weights
        folder = tmp_path / str(storage)
        model.save_pretrained(folder)
        is_recorded = MaskConfig.from_pretrained(folder).base_fingerprint is not None
        assert is_recorded == (weights == torch.float32)


@needs_gguf_layers
def test_another_quantisation_warns_with_the_difference(tmp_path):
    masked(lambda: gguf_linear(Type.Q4_0)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"stored as GGUF Q4_0, and these are stored as GGUF Q8_0"):
        PeftModel.from_pretrained(Model(lambda: gguf_linear(Type.Q8_0)), tmp_path)
    with pytest.warns(UserWarning, match=r"stored as GGUF Q4_0, and these are stored as floats"):
        PeftModel.from_pretrained(Model(lambda: nn.Linear(NUM_IN, NUM_OUT)), tmp_path)


@needs_gguf_layers
def test_other_weights_of_the_same_quantisation_are_refused(tmp_path):
    masked(lambda: gguf_linear(Type.Q4_0)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="trained on other base weights"):
        PeftModel.from_pretrained(Model(lambda: gguf_linear(Type.Q4_0, seed=1)), tmp_path)


@needs_gguf_layers
def test_a_format_without_zero_is_refused_before_training():
    with pytest.raises(UserError, match=r"up cannot be masked: it is stored as Q4_1, which has no code for zero"):
        masked(lambda: gguf_linear(Type.Q4_1))


@pytest.mark.quantised
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_layer_that_waits_for_its_quantisation_is_refused(kind):
    import bitsandbytes

    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    with pytest.raises(UserError, match="up cannot be masked: bitsandbytes has not quantised it yet"):
        masked(lambda: getattr(bitsandbytes.nn, kind)(NUM_IN, NUM_OUT, **options))


def test_torchao_without_zero_points():
    """Int8Tensor has them since it can be asymmetric; torchao 0.15 is older."""
    layer = SimpleNamespace(weight=SimpleNamespace())
    assert Torchao(layer).zero() == 0
    layer.weight.zero_point = None
    assert Torchao(layer).zero() == 0


@pytest.mark.quantised
def test_torchao_with_quantised_activations_is_refused():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    with pytest.raises(UserError, match="also quantises activations"):
        masked(lambda: torchao_linear(Int8DynamicActivationInt8WeightConfig()))


@pytest.mark.quantised
def test_torchao_with_floats_of_eight_bits_is_refused():
    from torchao.quantization import Float8WeightOnlyConfig

    with pytest.raises(UserError, match=r"Float8Tensor holds floats, .*; use Int8WeightOnlyConfig"):
        masked(lambda: torchao_linear(Float8WeightOnlyConfig()))


@pytest.mark.quantised
def test_torchao_with_scaled_inputs_is_refused():
    """As AWQ and SmoothQuant leave a weight: its layer multiplies the input, which a masked layer would not."""

    def scaled():
        layer = torchao_int8()
        layer.weight.act_pre_scale = torch.full((NUM_IN,), 2.0)
        return layer

    with pytest.raises(UserError, match=r"Int8Tensor also scales its inputs, .*; quantise without AWQ"):
        masked(scaled)


@pytest.mark.parametrize("make", LAYERS)
def test_removed_weights_cannot_take_another_models_values(make):
    """A merge would write the code of zero in their place."""
    with pytest.raises(UserError, match=r"removed_value='base' needs weights that are floats, and up is quantised"):
        masked(make, removed_value="base", removed_value_model="before")
    model = masked(make)
    with pytest.raises(UserError, match=r"removed_value='base' needs weights that are floats, and up is quantised"):
        model.add_adapter(
            "second", MaskConfig(target_modules=["up"], removed_value="base", removed_value_model="before")
        )


@pytest.mark.quantised
def test_codes_survive_what_bitsandbytes_does_in_eval_mode():
    """On CPUs with AVX-512 and bfloat16 the first forward repacks the codes."""
    layer = bnb4_linear("nf4", nested=True).eval()
    codes = codes_of(layer)
    weight = storage_of(layer).dequantise()
    with torch.no_grad():
        layer(inputs())
    removed = torch.rand(NUM_OUT, NUM_IN, generator=torch.Generator().manual_seed(5)) < 0.3
    storage = storage_of(layer)
    before = storage.remove(removed)
    assert torch.equal(storage.dequantise()[~removed], weight[~removed])
    assert torch.equal(storage_of(layer).dequantise() == 0, removed | (codes == 7))
    with torch.no_grad():
        layer(inputs())
    storage.restore(removed, before)
    assert torch.equal(codes_of(layer), codes)


@pytest.mark.parametrize("make", LAYERS)
def test_each_row_of_a_mixed_batch_is_as_under_its_own_mask_alone(make):
    model = masked(make).eval()
    model.add_adapter("second", MaskConfig(target_modules=["up"], sparsity=0.1, mask_seed=1))
    model.eval()
    names = ["default", "second", "__base__", "default"] * 4
    x = inputs()
    expected = []
    with torch.no_grad():
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected.append(model(x)[row])  # int8 kernels look at all rows of a batch
            else:
                model.set_adapter(name)
                expected.append(model(x)[row])
        mixed = model(x, adapter_names=names)
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=0, atol=1e-5)
