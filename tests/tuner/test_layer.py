"""The masked layer: outputs and gradients against a naive reference, caching, accumulation, precision."""

import copy
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import maskft.fast
import reference
from maskft import MaskConfig
from maskft.masking import score_gradient
from maskft.masks.adapter import CodedMask
from maskft.masks.codec import encode_mask
from maskft.tuner.adapter_files import AdapterFiles, set_adapter_files
from maskft.tuner.layer import MaskedLinear
from maskft.tuner.scores import draw_scores
from maskft_common.errors import UserError
from tiny import tiny_llama, token_ids


def make_layer(bias=True, conv1d=False, dtype=torch.float32, in_features=12, out_features=8, **config):
    if conv1d:
        base = Conv1D(out_features, in_features)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(in_features, out_features, bias=bias)
    base.to(dtype).requires_grad_(False)
    layer = MaskedLinear(base, "default", MaskConfig(**config), "lin")
    layer.set_adapter("default")
    return layer


def as_OI(layer, tensor):
    return tensor.t() if layer.is_transposed else tensor


@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.9])
def test_output_and_all_gradients_are_bitwise_those_of_the_reference(rank_by, conv1d, sparsity):
    layer = make_layer(conv1d=conv1d, sparsity=sparsity if sparsity < 0.5 else 0.4, rank_by=rank_by)
    x, grad = torch.randn(5, 12, requires_grad=True), torch.randn(5, 8)
    y = layer(x)
    y.backward(grad)
    weight, scores = layer.base_layer.weight, layer.mask_scores["default"]
    mask = reference.topk_mask(scores, layer.mask_configs["default"].sparsity, rank_by)
    expected = reference.masked_linear(
        x.detach(),
        as_OI(layer, weight).contiguous(),
        as_OI(layer, scores.detach()),
        layer.base_layer.bias,
        as_OI(layer, mask),
        grad,
        rank_by,
    )
    torch.testing.assert_close(y, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(as_OI(layer, scores.grad), expected[2], rtol=1e-6, atol=1e-6)


def test_output_and_gradient_are_bitwise_those_of_autograd_in_float32():
    """The fast path against plain autograd through the straight-through function: same kernels, same bits."""
    layer = make_layer(in_features=64, out_features=48)
    x = torch.randn(33, 64)
    y = layer(x)
    y.square().sum().backward()
    fast = layer.mask_scores["default"].grad.clone()
    layer.mask_scores["default"].grad = None
    slow_y = plain(layer, x)
    slow_y.square().sum().backward()
    assert torch.equal(y, slow_y)
    assert torch.equal(fast, layer.mask_scores["default"].grad)


def test_mask_is_computed_once_per_step_and_not_per_forward(monkeypatch):
    from maskft.fast import masker as module

    calls = []
    original = module.keep_highest_
    monkeypatch.setattr(module, "keep_highest_", lambda *a: calls.append(a[1].data_ptr()) or original(*a))
    layer = make_layer()
    optimizer = torch.optim.AdamW(layer.mask_scores.parameters(), lr=0.1)
    for step in range(3):
        for _ in range(4):
            layer(torch.randn(3, 12)).square().sum().backward()
        # A step refreshes compiled models, too, and one of another test may still be there.
        assert calls.count(layer.weight.data_ptr()) == step + 1
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_the_mask_follows_the_scores_after_every_optimizer(optimizer, options):
    layer = make_layer(sparsity=0.25)
    before = layer.get_masked_weight().clone()
    layer(torch.randn(30, 12)).square().sum().backward()
    optimizer(layer.mask_scores.parameters(), lr=0.5, **options).step()
    expected = layer.base_layer.weight * reference.topk_mask(layer.mask_scores["default"].detach(), 0.25)
    assert torch.equal(layer.get_masked_weight(), expected)
    assert not torch.equal(before, expected)


def plain(layer, x, *names):
    """The layer through the plain definitions and autograd alone."""
    weight = layer.base_layer.weight
    for name in names or ("default",):
        weight = reference.straight_through(weight, layer.mask_scores[name], layer.get_mask(name), "abs")
    return F.linear(x, weight, layer.base_layer.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_micro_batch_of_a_step_gets_the_gradient_of_the_definition(dtype):
    """Once a step has a second one, weight * sign(scores) is kept until one of the two changes, told of it or not."""
    layer = make_layer(in_features=48, out_features=32, dtype=dtype, sparsity=0.3)
    scores, weight = layer.mask_scores["default"], layer.base_layer.weight
    with torch.no_grad():
        scores[0, 0] = 0.0
    optimizer = torch.optim.AdamW([scores], lr=0.5, fused=True)

    def kept():
        """One backward pass; the product that was kept for it."""
        scores.grad = None
        x, grad = torch.randn(5, 48, dtype=dtype), torch.randn(5, 32, dtype=dtype)
        layer(x).backward(grad)
        assert torch.equal(scores.grad, score_gradient(grad.t().mm(x), weight, scores.detach()))
        return layer.masker._kept["default"][1]

    for _ in range(2):
        assert kept() is None
        optimizer.step()
    assert kept() is None
    product = kept()
    assert product is kept() and product.dtype == dtype
    before = torch.sign(scores.detach()).clone()
    optimizer.step()
    assert not torch.equal(torch.sign(scores.detach()), before)
    assert kept() is product
    with torch.no_grad():
        weight.mul_(-1.5)
    assert kept() is product
    with torch.no_grad():
        scores.neg_()
    assert kept() is product


def test_adapters_trained_at_once_each_get_the_gradient_at_the_others_mask():
    layer = make_layer(sparsity=0.3)
    layer.update_layer("other", MaskConfig(sparsity=0.4, mask_seed=1))
    layer.set_adapter(["default", "other"])
    x = torch.randn(5, 12)
    y = layer(x)
    y.square().sum().backward()
    ours = [layer.mask_scores[name].grad.clone() for name in ("default", "other")]
    layer.mask_scores.zero_grad()
    expected = plain(layer, x, "default", "other")
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    for name, gradient in zip(("default", "other"), ours, strict=True):
        assert torch.equal(gradient, layer.mask_scores[name].grad)


def test_a_layer_used_twice_in_one_forward():
    layer = make_layer(in_features=8, out_features=8)
    x = torch.randn(5, 8)
    layer(layer(x)).square().sum().backward()
    fast = layer.mask_scores["default"].grad.clone()
    layer.mask_scores["default"].grad = None
    plain(layer, plain(layer, x)).square().sum().backward()
    torch.testing.assert_close(fast, layer.mask_scores["default"].grad, rtol=1e-5, atol=1e-5)


def test_a_graph_of_another_set_of_adapters_stays_good():
    """A reference adapter runs between forward and backward of the one that is trained."""
    layer = make_layer()
    layer.update_layer("ref", MaskConfig(sparsity=0.4))
    layer.set_adapter("default")
    x = torch.randn(5, 12, requires_grad=True)
    y = layer(x)
    layer.set_adapter("ref", inference_mode=True)
    with torch.no_grad():
        layer(x)
    layer.set_adapter("default")
    y.sum().backward()
    expected = torch.where(layer.get_mask("default"), layer.base_layer.weight, 0.0).sum(0)
    torch.testing.assert_close(x.grad, expected.expand(5, 12))


@pytest.mark.parametrize("config", [{"selection": "gumbel"}, {"selection": "hard_concrete"}, {"sparsity": 0.2}])
def test_scores_get_the_gradient_of_their_forward_whatever_ran_since(config):
    """TRL's DPO runs the reference before the backward pass; another mask may be active by then."""
    gradients = []
    for runs_between in (False, True):
        torch.manual_seed(0)
        layer = make_layer(**config).train()
        layer.mask_configs["default"].progress = 0.5
        layer.update_layer("other", MaskConfig(sparsity=0.5, mask_seed=1))
        layer.set_adapter("default")
        x = torch.randn(5, 12)
        loss = layer(x).square().sum()
        if runs_between:
            layer.set_adapter("other", inference_mode=True)
            layer(x)
            layer.set_adapter(["default", "other"])
        loss.backward()
        gradients.append(layer.mask_scores["default"].grad)
    assert torch.equal(*gradients) and bool(gradients[0].any())


def test_second_derivatives_are_refused_and_a_bias_that_trains_has_its_gradient():
    layer, x = make_layer(), torch.randn(5, 12, requires_grad=True)
    layer.bias.requires_grad_(True)
    layer(x).square().sum().backward()
    bias_gradient, layer.bias.grad = layer.bias.grad, None
    F.linear(x, layer.get_masked_weight(), layer.bias).square().sum().backward()
    torch.testing.assert_close(bias_gradient, layer.bias.grad)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_data_parallel_is_refused():
    layer = make_layer()
    layer._is_replica = True  # what torch.nn.DataParallel sets on its copies
    message = (
        r"^masks do not work under torch\.nn\.DataParallel; start one process per GPU \(accelerate launch; maskft "
        r"train --accelerate_config multi_gpu\), or show one GPU only \(CUDA_VISIBLE_DEVICES=0\)$"
    )
    with pytest.raises(UserError, match=message):
        layer(torch.randn(5, 12))


def test_backward_after_a_step_on_an_old_graph_is_an_error():
    layer = make_layer()
    x = torch.randn(5, 12, requires_grad=True)
    y = layer(x)
    old = layer.get_masked_weight().clone()
    with torch.no_grad():
        layer.mask_scores["default"].mul_(-1).add_(torch.randn(8, 12))
    assert not torch.equal(layer.get_masked_weight(), old)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base_keeps_float32_scores(dtype):
    layer = make_layer(dtype=dtype, bias=False)
    y = layer(torch.randn(5, 12, dtype=dtype))
    y.float().square().sum().backward()
    scores = layer.mask_scores["default"]
    assert y.dtype == dtype and scores.dtype == scores.grad.dtype == torch.float32
    mask = reference.topk_mask(scores.detach(), 0.1)
    assert torch.equal(layer.get_masked_weight(), layer.base_layer.weight.masked_fill(~mask, 0))


def test_autocast_trains_and_evaluates_with_one_mask():
    layer = make_layer()
    x = torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        expected = F.linear(x, layer.base_layer.weight * layer.get_mask("default"), layer.base_layer.bias)
    y.float().square().sum().backward()  # outside, as torch's documentation has it
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    assert layer.mask_scores["default"].grad.dtype == torch.float32


def test_autocast_leaves_float64_as_it_is():
    layer = make_layer().double()
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float64 and torch.equal(y, layer(x))


def test_casting_the_model_does_not_move_the_mask():
    """A bfloat16 cast of the scores would create ties at the cut and another mask."""
    layer = make_layer(in_features=400, out_features=300)
    before, values = layer.get_mask("default"), layer.mask_scores["default"].detach().clone()
    assert not torch.equal(reference.topk_mask(values.bfloat16().float(), 0.1), before)
    layer.to(torch.bfloat16)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.mask_scores["default"], values) and torch.equal(layer.get_mask("default"), before)
    layer(torch.randn(2, 400).bfloat16()).sum().backward()
    layer.half().float()
    assert torch.equal(layer.mask_scores["default"], values)
    assert layer.half().mask_scores["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("adapter_names", [None, ["default"] * 3])
def test_a_weight_that_is_cast_back_to_its_old_address_is_seen(adapter_names):
    """No version of a tensor says so. The allocator is not to decide this test: the cast is one that stays in place."""
    layer = make_layer(in_features=64, out_features=64).eval()
    x = torch.randn(3, 64)

    def rounded(tensor):
        if tensor.data_ptr() == layer.base_layer.weight.data_ptr():
            tensor.data.copy_(tensor.bfloat16())
        return tensor

    with torch.no_grad():
        layer(x, adapter_names=adapter_names)
        layer._apply(rounded)
        found = layer(x, adapter_names=adapter_names)
        weight = layer.base_layer.weight * layer.get_mask("default")
    torch.testing.assert_close(found, F.linear(x, weight, layer.base_layer.bias), rtol=1e-5, atol=1e-5)


def test_a_saved_mask_that_is_replaced_is_seen():
    """Also where Python gives the new one the id of an earlier one."""
    layer = make_layer(in_features=8, sparsity=0.25, inference_mode=True)
    x = torch.randn(2, 8)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        masks = [torch.rand(8, 8, generator=generator) > 0.5 for _ in range(2)]
        for mask in masks:
            layer.saved_masks["default"] = CodedMask(encode_mask(mask), "lin")
        with torch.no_grad():
            expected = F.linear(x, layer.base_layer.weight * masks[-1], layer.base_layer.bias)
            torch.testing.assert_close(layer(x), expected)


def test_a_copy_keeps_no_plan_of_a_mixed_batch():
    """Its key holds ids of the layer's objects, which the copy does not keep alive."""
    layer = make_layer().eval()
    with torch.no_grad():
        layer(torch.randn(2, 12), adapter_names=["default", "__base__"])
    assert layer.mixed_batch.num_bytes > 0
    assert copy.deepcopy(layer).mixed_batch.num_bytes == 0


def test_training_over_a_weight_made_in_inference_mode():
    with torch.inference_mode():
        base = nn.Linear(12, 8, bias=False)
    layer = MaskedLinear(base, "default", MaskConfig(sparsity=0.25), "lin")
    layer.set_adapter("default")
    for _ in range(2):
        layer(torch.randn(2, 12)).sum().backward()
    assert layer.mask_scores["default"].grad is not None


@pytest.mark.parametrize("names", [["default", "other"], ["other", "default"]])
def test_a_mask_with_values_is_merged_alone_in_either_order(names):
    layer = make_layer()
    layer.update_layer("other", MaskConfig(mask_seed=1))
    layer.removed_values["default"] = torch.ones(8, 12)
    layer.merge(adapter_names=names[:1])
    message = "^a mask whose removed_value is base is merged alone; unmerge the others, or name one adapter$"
    with pytest.raises(UserError, match=message):
        layer.merge(adapter_names=names[1:])
    layer.unmerge()


def test_scores_forced_to_bfloat16_are_refused():
    layer = make_layer()
    layer.mask_scores["default"].data = layer.mask_scores["default"].data.bfloat16()
    with pytest.raises(
        UserError, match=r"were cast to torch\.bfloat16, and .* in four or eight bits; how to undo it: d"
    ):
        layer(torch.randn(2, 12))
    # As docs/compatibility.md says.
    layer.mask_scores["default"].data = layer.fresh_scores(layer.mask_configs["default"])
    assert torch.equal(layer.get_mask("default"), make_layer().get_mask("default"))
    layer(torch.randn(2, 12))


def test_training_after_a_forward_in_inference_mode():
    layer = make_layer()
    with torch.inference_mode():
        layer(torch.randn(2, 12))
    layer(torch.randn(2, 12)).sum().backward()
    assert layer.mask_scores["default"].grad is not None


@pytest.mark.parametrize("is_fast", [True, False])
def test_training_after_a_mask_with_values_ran_in_inference_mode(is_fast):
    """The values are cast to the dtype of the weight once, and kept."""
    layer = make_layer(dtype=torch.bfloat16)
    layer.removed_values["default"] = torch.ones(8, 12)
    x = torch.randn(2, 12, dtype=torch.bfloat16)
    with nullcontext() if is_fast else maskft.fast.disabled():
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    assert layer.mask_scores["default"].grad is not None


def test_a_layer_whose_tensors_are_swapped_is_moved_after_a_forward():
    """As those of torchao are, with any .to(): torch refuses it for a tensor with a weak reference to it."""
    layer = make_layer(dtype=torch.float64)
    layer.update_layer("other", MaskConfig(mask_seed=1))
    x = torch.randn(2, 12, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
        layer.eval()(x, adapter_names=["default", "__base__"])
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to("cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("init_scores", ["normal", "magnitude", "constant"])
@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"])
def test_defaults_of_torch_change_no_mask(default, is_fast, init_scores):
    """Scores in bfloat16 have ties, and another mask; on another device their CPU generator is refused."""
    base = nn.Linear(64, 48, bias=False)
    x = torch.randn(3, 64)
    settings = {"target_modules": ["0"], "init_scores": init_scores, "sparsity": 0.2}
    if init_scores == "constant":
        settings |= {"init_value": 0.5}
    wanted = get_peft_model(nn.Sequential(copy.deepcopy(base)), MaskConfig(**settings))(x)

    old = torch.get_default_dtype()
    try:
        if default != "meta":
            torch.set_default_dtype(default)
        with torch.device("meta") if default == "meta" else nullcontext():
            model = get_peft_model(nn.Sequential(base), MaskConfig(**settings))
            with nullcontext() if is_fast else maskft.fast.disabled():
                found = model(x)
                found.sum().backward()
    finally:
        torch.set_default_dtype(old)
    assert torch.equal(found, wanted)


def test_scores_on_meta_are_refused():
    layer = make_layer()
    layer.mask_scores["default"] = nn.Parameter(torch.empty(8, 12, device="meta"))
    with pytest.raises(UserError, match="still on the meta device"):
        layer(torch.randn(2, 12))


def test_gradient_checkpointing_gives_the_same_gradient():
    grads = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny_llama(), MaskConfig(layers_to_transform=[1]))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        ids = token_ids()
        # Checkpointing switches the cache off, and with it transformers 4 takes another attention mask.
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_that_a_mask_bypasses_are_warned_about(register):
    base = nn.Linear(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MaskedLinear(base, "default", MaskConfig(sparsity=0.5), "layer")
    getattr(base, register)(lambda *args: None)
    message = (
        r"^One of the layers that are masked has forward or backward \(pre\) hooks, which the masked layer ignores: it "
        r"does not call the base layer\. Set the hooks on the same path after the mask is applied\.$"
    )
    with pytest.warns(UserWarning, match=message):
        MaskedLinear(base, "default", MaskConfig(sparsity=0.5), "layer")


# The state of a layer


def test_a_layer_has_the_sizes_of_its_base_and_masks_without_further_calls():
    linear = MaskedLinear(nn.Linear(12, 8), "default", MaskConfig(sparsity=0.3), "lin")
    conv1d = MaskedLinear(Conv1D(8, 12), "default", MaskConfig(sparsity=0.3), "lin")
    for layer in (linear, conv1d):
        assert (layer.in_features, layer.out_features) == (12, 8)
        assert layer.active_masks == ["default"] and layer.mask_scores["default"].requires_grad
    assert (conv1d.nx, conv1d.nf) == (12, 8) and not hasattr(linear, "nx") and not hasattr(linear, "nf")
    assert repr(linear).startswith("mask.MaskedLinear(")


def test_fresh_scores_are_decided_by_the_name_of_the_layer():
    config = MaskConfig(sparsity=0.3)
    layer = make_layer(sparsity=0.3)
    assert torch.equal(layer.fresh_scores(config), draw_scores(config, layer.base_layer.weight, "lin"))
    other = MaskedLinear(layer.base_layer, "default", config, "another")
    assert not torch.equal(other.fresh_scores(config), layer.fresh_scores(config))
    assert torch.equal(layer.mask_scores["default"], layer.fresh_scores(config))


def test_an_adapter_of_the_same_name_is_replaced_whole():
    """As when one model is wrapped again: what was there before is not applied."""
    layer = make_layer(sparsity=0.3)
    layer.removed_values["default"] = torch.ones(8, 12)
    layer.mask_scores["default"].data.neg_()
    layer.update_layer("default", MaskConfig(sparsity=0.2))
    assert torch.equal(layer.mask_scores["default"], layer.fresh_scores(MaskConfig()))
    assert not layer.removed_values and layer.mask_configs["default"].sparsity == 0.2
    layer.update_layer("default", MaskConfig(inference_mode=True))
    assert len(layer.mask_scores) == 0


def test_a_reference_starts_as_a_copy_of_the_adapter_that_is_trained():
    layer = make_layer(sparsity=0.3)
    layer.mask_scores["default"].data.neg_()
    config = MaskConfig(sparsity=0.3)
    config.copy_of = "default"
    layer.update_layer("ref", config)
    assert torch.equal(layer.mask_scores["ref"], layer.mask_scores["default"])
    layer.mask_scores["default"].data.neg_()
    assert not torch.equal(layer.mask_scores["ref"], layer.mask_scores["default"])

    loaded = make_layer(sparsity=0.3, inference_mode=True)
    loaded.saved_masks["default"] = CodedMask(encode_mask(layer.get_mask("default")), "lin")
    config = MaskConfig(sparsity=0.3, inference_mode=True)
    config.copy_of = "default"
    loaded.update_layer("ref", config)
    assert torch.equal(loaded.get_mask("ref"), layer.get_mask("default"))


def test_scores_of_an_adapter_for_inference_are_frozen():
    before = set_adapter_files(AdapterFiles())  # plain files have scores to load into
    try:
        base = nn.Linear(12, 8).requires_grad_(False)
        layer = MaskedLinear(base, "default", MaskConfig(sparsity=0.3, inference_mode=True), "lin")
    finally:
        set_adapter_files(before)
    assert not layer.mask_scores["default"].requires_grad
    layer.set_adapter("default")
    assert layer.mask_scores["default"].requires_grad
    layer.set_adapter("default", inference_mode=True)
    assert not layer.mask_scores["default"].requires_grad


def test_scores_that_are_loaded_into_a_layer_are_seen():
    layer = make_layer(sparsity=0.3)
    other = make_layer(sparsity=0.3)
    other.mask_scores["default"].data.neg_().add_(0.01)
    layer(torch.randn(2, 12))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.get_masked_weight(), other.get_masked_weight())


def test_nothing_of_a_deleted_adapter_is_kept():
    layer = make_layer(sparsity=0.3)
    layer.update_layer("other", MaskConfig(sparsity=0.2))
    layer(torch.randn(2, 12)).sum().backward()
    with torch.no_grad():
        layer(torch.randn(2, 12), adapter_names=["default", "other"])
    assert layer.mixed_batch.num_bytes > 0
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        layer.delete_adapter("default")
    assert layer.mixed_batch.num_bytes == layer.mixed_batch.places["other"][2].columns.nbytes + 4 * 9
    assert layer._get_available_adapters() == {"other"} and layer.active_masks == ["other"]
    assert "default" not in layer.masker._near and layer.masker.value is None
    layer.delete_adapter("other")
    assert torch.equal(layer(torch.ones(1, 12)), layer.base_layer(torch.ones(1, 12)))


def test_train_is_on_by_default_and_reaches_what_is_inside():
    layer = make_layer().eval()
    assert layer.train() is layer
    assert layer.training and layer.base_layer.training


def test_a_layer_without_its_own_tensors_can_be_emptied():
    """``recurse=False`` as in torch's own modules: the base layer is left as it is."""
    layer = make_layer()
    layer.to_empty(device="meta", recurse=False)
    assert layer.base_layer.weight.device.type == "cpu"
    layer.to_empty(device="meta")
    assert layer.base_layer.weight.device.type == layer.mask_scores["default"].device.type == "meta"


def test_scores_without_data_are_not_moved():
    layer = make_layer()
    before = layer.mask_scores["default"].detach().clone()
    layer._move_adapter_to_device_of_base_layer("default")
    assert torch.equal(layer.mask_scores["default"], before)
    layer._move_adapter_to_device_of_base_layer("default", torch.device("meta"))
    assert torch.equal(layer.mask_scores["default"], before)
    layer._move_adapter_to_device_of_base_layer("nobody")
    layer.mask_scores["default"] = nn.Parameter(torch.empty(8, 12, device="meta"))
    layer._move_adapter_to_device_of_base_layer("default")
    assert layer.mask_scores["default"].device.type == "meta"


def test_a_copy_of_a_layer_shares_nothing_and_has_a_masker():
    """Not made at the first forward pass, which may be traced by torch.compile."""
    model = get_peft_model(nn.Sequential(nn.Linear(12, 8)), MaskConfig(target_modules=["0"], sparsity=0.3))
    layer = model.base_model.model[0]
    layer(torch.randn(2, 12))
    assert layer.place is not None
    copied = copy.deepcopy(layer)
    assert vars(copied).keys() == vars(layer).keys() and copied.place is None
    assert copied.cached_masker is not layer.cached_masker and copied.cached_masker.layer is copied
    assert copied.cached_masker.value is None
    assert torch.equal(copied.get_masked_weight(), layer.get_masked_weight())


# Arguments


class Scaled(nn.Linear):
    """Its forward takes more than the input."""

    def forward(self, x, factor=1.0, *, shift=0.0):
        return super().forward(x) * factor + shift


def test_where_no_mask_applies_the_base_layer_gets_every_argument():
    base = Scaled(12, 8).requires_grad_(False)
    layer = MaskedLinear(base, "default", MaskConfig(sparsity=0.3), "lin")
    plain = copy.deepcopy(base)
    x = torch.randn(5, 12)
    expected = plain(x, 2.0, shift=3.0)

    layer.merge()
    merged = layer(x, 2.0, shift=3.0)
    assert torch.equal(merged, base(x, 2.0, shift=3.0)) and not torch.equal(merged, expected)
    assert not merged.requires_grad
    layer.enable_adapters(False)
    assert torch.equal(layer(x, 2.0, shift=3.0), expected) and not layer.merged

    layer.enable_adapters(True)
    names = ["__base__"] * 5
    assert torch.equal(layer(x, 2.0, shift=3.0, adapter_names=names), expected)
    layer.set_adapter([])
    assert torch.equal(layer(x, 2.0, shift=3.0), expected)


def test_a_merged_mask_is_all_that_applies():
    layer = make_layer(sparsity=0.3)
    layer.update_layer("other", MaskConfig(sparsity=0.3, mask_seed=1))
    layer.merge(adapter_names=["default"])
    layer.set_adapter("other")
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_names_of_rows_are_counted_also_where_masks_are_off():
    layer = make_layer()
    layer.enable_adapters(False)
    with pytest.raises(UserError, match="adapter_names has 4 names and the batch 5 rows; give one name per row"):
        layer(torch.randn(5, 12), adapter_names=["default"] * 4)


def test_an_adapter_without_a_mask_says_how_to_load_it():
    layer = make_layer(inference_mode=True)
    message = (
        r"^adapter 'default' has no mask in lin: load it with PeftModel\.from_pretrained or PeftModel\.load_adapter "
        r"\(transformers' own model\.load_adapter and add_adapter cannot read masks\)$"
    )
    with pytest.raises(UserError, match=message):
        layer.get_mask("default")


# Weights and merging


@pytest.mark.parametrize("value", [None, 2.0])
def test_the_delta_weight_is_what_the_mask_changes(value):
    layer = make_layer(sparsity=0.3)
    weight = layer.base_layer.weight.clone()
    if value is not None:
        layer.removed_values["default"] = torch.full((8, 12), value)
    expected = torch.where(layer.get_mask("default"), 0.0, (value or 0.0) - weight)
    assert torch.equal(layer.get_delta_weight("default"), expected)
    layer.merge()
    assert torch.equal(layer.get_delta_weight("default"), expected)
    assert layer.supports_lora_conversion() is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_masked_weight_is_in_the_dtype_that_is_asked_for(dtype):
    layer = make_layer(sparsity=0.3, dtype=dtype)
    weight = layer.base_layer.weight * layer.get_mask("default")
    assert layer.get_masked_weight().dtype == dtype and torch.equal(layer.get_masked_weight(), weight)
    assert layer.get_masked_weight(torch.float64).dtype == torch.float64


def test_values_of_removed_weights_follow_the_weight():
    layer = make_layer(dtype=torch.bfloat16)
    assert layer.removed_value("default") is None
    layer.removed_values["default"] = torch.ones(8, 12)
    value = layer.removed_value("default")
    assert value.dtype == torch.bfloat16 and layer.removed_value("default") is value
    layer.base_layer.to("meta")
    assert layer.removed_value("default").device.type == "meta"


def test_a_loaded_mask_is_where_the_weight_is():
    layer = make_layer(inference_mode=True)
    layer.saved_masks["default"] = CodedMask(encode_mask(torch.ones(8, 12, dtype=torch.bool)), "lin")
    layer.base_layer.to("meta")
    assert layer.get_mask("default").device.type == "meta"
    layer.saved_masks["default"] = CodedMask(encode_mask(torch.ones(4, 12, dtype=torch.bool)), "lin")
    with pytest.raises(UserError, match=r"has shape \(4, 12\), the model's weight \(8, 12\)"):
        layer.get_mask("default")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_two_masks_that_overlap_are_merged_and_unmerged_bit_for_bit(dtype):
    """Also where the model is cast in between: the values that were kept are cast with it."""
    layer = make_layer(sparsity=0.3)
    layer.update_layer("other", MaskConfig(sparsity=0.4, mask_seed=1))
    weight = layer.base_layer.weight.clone()
    masks = layer.get_mask("default") & layer.get_mask("other")
    layer.merge(adapter_names=["default", "other"])
    assert layer.merged_adapters == ["default", "other"]
    merged = layer.base_layer.weight.clone()
    assert torch.equal(merged, weight * masks)
    assert torch.equal(layer.get_unmerged_weight(), weight)
    assert torch.equal(layer.base_layer.weight, merged)
    layer.to(dtype)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight.to(dtype)) and not layer.merged
    with pytest.warns(UserWarning, match=r"^Already unmerged\. Nothing to do\.$"):
        layer.unmerge()


def test_merging_writes_the_values_of_removed_weights():
    layer = make_layer(sparsity=0.3)
    weight = layer.base_layer.weight.clone()
    layer.removed_values["default"] = torch.full((8, 12), 2.0)
    layer.merge()
    assert torch.equal(layer.base_layer.weight, torch.where(layer.get_mask("default"), weight, 2.0))
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)


def test_a_weight_that_is_not_finite_is_merged_unless_that_is_asked_about():
    layer = make_layer(sparsity=0.3)
    layer.merge(safe_merge=True)
    layer.unmerge()
    layer.base_layer.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"^lin has weights that are not finite after merging 'default'$"):
        layer.merge(safe_merge=True)
    layer.merge()
    assert layer.merged


def test_a_sharded_weight_is_not_merged():
    layer = make_layer()
    layer.base_layer.weight.full_tensor = None  # a method of DTensor
    message = "^lin is sharded by FSDP and cannot be merged; save the adapter and run maskft merge$"
    with pytest.raises(UserError, match=message):
        layer.merge()


def test_a_layer_outlives_its_model():
    layer = make_layer()
    parent = nn.Sequential(layer)
    layer.place = (weakref.ref(parent), "0")
    del parent
    assert layer.place[0]() is None
    layer.merge()
    assert layer.merged
