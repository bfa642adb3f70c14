"""The method on a GPU; each test runs on the CPU too, so that there only the device is new."""

import pytest
import torch
from peft import PeftModel, get_peft_model

import tiny
from maskft import MaskConfig, adapter_layers, current_masks, masking, set_mask_progress
from maskft.fast import selection
from maskft.masks.codec import encode_mask

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LEARNERS = {
    "topk": {},
    "threshold": {"selection": "threshold", "rank_by": "signed"},
    "deletion": {"selection": "logit", "init_value": 0.04, "gradient": "sigmoid", "price": 1.0},
    "gumbel": {"selection": "gumbel", "init_value": 3.0},
    "hard concrete": {"selection": "hard_concrete", "init_value": 3.0},
}


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def masked(device, **options):
    model = get_peft_model(tiny.tiny_llama().to(device), MaskConfig(mask_seed=1, **options))
    set_mask_progress(model, 0.5)
    return model


def loss_of(model, device, dtype=None):
    ids = torch.arange(16, device=device)[None]
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_masks_are_those_of_the_plain_definition(device, kind):
    scores = torch.randn(3, 100_003, generator=torch.Generator().manual_seed(0))
    scores = (scores * 4).round() / 4 if kind == "ties" else scores
    for sparsity in (0.0005, 0.1, 0.9):
        mask = selection.mask_without_lowest(scores.to(device), masking.num_removed(scores.numel(), sparsity))
        assert torch.equal(mask.cpu(), masking.topk_mask(scores, sparsity))
        assert torch.equal(encode_mask(mask).cpu(), encode_mask(mask.cpu()))


def test_masks_are_the_same_where_algorithms_must_be_deterministic(device):
    """torch before 2.10 refuses kthvalue on a GPU then."""
    scores = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    expected = masking.topk_mask(scores, 0.1)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(masking.topk_mask(scores.to(device), 0.1).cpu(), expected)
        found = selection.mask_without_lowest(scores.to(device), masking.num_removed(scores.numel(), 0.1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_learner_trains(device, learner, dtype):
    model = masked(device, **LEARNERS[learner]).train()
    scores = [p for p in model.parameters() if p.requires_grad]
    before = [s.detach().clone() for s in scores]
    optimizer = torch.optim.AdamW(scores, lr=1e-2, fused=True)
    for _ in range(2):
        loss = loss_of(model, device, dtype)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss) and all(s.device.type == device.type and s.dtype == torch.float32 for s in scores)
    assert any(not torch.equal(a, b) for a, b in zip(before, scores, strict=True))


def test_the_gradient_is_that_of_the_cpu(device):
    grads = []
    for on in (torch.device("cpu"), device):
        model = masked(on).train()
        loss_of(model, on).backward()
        grads.append([layer.mask_scores["default"].grad.cpu() for layer in adapter_layers(model).values()])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_a_saved_mask_answers_as_the_trained_one_and_as_the_merged_one(device, tmp_path):
    model = masked(device).eval()
    model.save_pretrained(tmp_path)
    expected, masks = loss_of(model, device), current_masks(model)
    loaded = PeftModel.from_pretrained(tiny.tiny_llama().to(device), tmp_path).eval()
    assert torch.equal(loss_of(loaded, device), expected)
    assert all(torch.equal(mask.cpu(), current_masks(loaded)[name].cpu()) for name, mask in masks.items())
    assert torch.equal(loss_of(loaded.merge_and_unload(), device), expected)


@pytest.mark.skipif(tiny.IS_OLD_TORCH, reason="2.7 does not compile the plain model; 2.8 to 2.12 not tried")
def test_a_compiled_step_is_the_plain_one(device):
    losses = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = masked(device).train()
        run = torch.compile(model, backend="inductor" if device.type == "cuda" else "eager") if is_compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(2):
            loss = loss_of(run, device)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
