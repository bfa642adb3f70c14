"""The masked layer: outputs and gradients against a naive reference, caching, accumulation, precision."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import reference
from maskft import MaskConfig
from maskft.masking import score_gradient
from maskft.masks.adapter import CodedMask
from maskft.masks.codec import encode_mask
from maskft.tuner.layer import MaskedLinear
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
    with pytest.raises(UserError, match=r"masks do not work under torch\.nn\.DataParallel"):
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
        y.float().square().sum().backward()
        expected = F.linear(x, layer.base_layer.weight * layer.get_mask("default"), layer.base_layer.bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    assert layer.mask_scores["default"].grad.dtype == torch.float32


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
    with pytest.raises(UserError, match="merged alone"):
        layer.merge(adapter_names=names[1:])
    layer.unmerge()


def test_scores_forced_to_bfloat16_are_refused():
    layer = make_layer()
    layer.mask_scores["default"].data = layer.mask_scores["default"].data.bfloat16()
    with pytest.raises(UserError, match=r"were cast to torch\.bfloat16"):
        layer(torch.randn(2, 12))


def test_training_after_a_forward_in_inference_mode():
    layer = make_layer()
    with torch.inference_mode():
        layer(torch.randn(2, 12))
    layer(torch.randn(2, 12)).sum().backward()
    assert layer.mask_scores["default"].grad is not None


def test_scores_on_meta_are_refused():
    layer = make_layer()
    layer.mask_scores["default"] = nn.Parameter(torch.empty(8, 12, device="meta"))
    with pytest.raises(UserError, match="still on the meta device"):
        layer(torch.randn(2, 12))


def test_gradient_checkpointing_gives_the_same_gradient():
    from peft import get_peft_model

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
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_that_a_mask_bypasses_are_warned_about(register):
    base = nn.Linear(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MaskedLinear(base, "default", MaskConfig(sparsity=0.5), "layer")
    getattr(base, register)(lambda *args: None)
    with pytest.warns(UserWarning, match="Set the hooks on the same path after the mask is applied"):
        MaskedLinear(base, "default", MaskConfig(sparsity=0.5), "layer")
