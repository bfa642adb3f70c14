"""A masked model under torch.compile: the weight that is kept between steps is never an old one."""

import copy
import shutil

import pytest
import torch
from peft import get_peft_model

from maskft import MaskConfig, current_masks, start_scores
from tiny import IS_OLD_TORCH, tiny_llama, token_ids

OLD_TORCH = "2.7 does not compile the plain model; 2.8 to 2.12 not tried"
LOGIT = {"selection": "logit", "gradient": "sigmoid", "init_value": 0.04, "sharpness": 10.0}


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


@pytest.mark.skipif(IS_OLD_TORCH, reason=OLD_TORCH)
@pytest.mark.parametrize(
    "backend, options",
    [
        ("aot_eager", LOGIT),
        pytest.param("eager", {**LOGIT, "price": 1.0}, marks=pytest.mark.slow),  # the price breaks the graph
        pytest.param(
            "inductor",
            {"sparsity": 0.2, "layers_to_transform": [0]},
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
            ],
        ),
    ],
)
def test_a_compiled_model_trains_as_the_plain_one(backend, options):
    config = MaskConfig(**options, task_type="CAUSAL_LM")
    plain = get_peft_model(tiny_llama(num_layers=1), copy.deepcopy(config))
    other = get_peft_model(tiny_llama(num_layers=1), copy.deepcopy(config))
    compiled, ids, losses = torch.compile(other, backend=backend, fullgraph="price" not in options), token_ids(), []
    for model, parameters in ((plain, plain.parameters()), (compiled, other.parameters())):
        optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0]
    plain.eval(), other.eval()
    close = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, plain(input_ids=ids).logits, **close)
        with plain.disable_adapter(), other.disable_adapter():
            torch.testing.assert_close(compiled(input_ids=ids).logits, plain(input_ids=ids).logits, **close)


@pytest.mark.skipif(IS_OLD_TORCH, reason=OLD_TORCH)
def test_a_graph_follows_whatever_changes_the_mask():
    model = get_peft_model(tiny_llama(num_layers=1), MaskConfig(sparsity=0.2, task_type="CAUSAL_LM")).eval()
    model.add_adapter("other", MaskConfig(sparsity=0.4, mask_seed=1, task_type="CAUSAL_LM"))
    compiled, ids = torch.compile(model, backend="eager", fullgraph=True), token_ids()

    def check():
        with torch.no_grad():
            assert torch.equal(compiled(input_ids=ids).logits, model(input_ids=ids).logits)

    check()
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        check()
    keys = {name: torch.randn(mask.shape) for name, mask in current_masks(model, "other").items()}
    start_scores(model, keys, "other")
    check()
    model.load_state_dict(
        {name: value.flip(0) if "mask_scores" in name else value for name, value in model.state_dict().items()}
    )
    check()
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0).step()
    check()
    copied = copy.deepcopy(model)
    other = torch.compile(copied, backend="eager", fullgraph=True)
    for parameter in copied.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.1).step()
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, copied(input_ids=ids).logits)
    check()
    model.merge_adapter()
    check()


@pytest.mark.skipif(IS_OLD_TORCH, reason=OLD_TORCH)
def test_exporting_says_to_merge_first():
    model = get_peft_model(tiny_llama(num_layers=1), MaskConfig(sparsity=0.2, task_type="CAUSAL_LM")).eval()
    with pytest.raises(Exception, match="merge it first"):
        torch.export.export(model, (), {"input_ids": token_ids()})
    exported = torch.export.export(model.merge_and_unload(), (), {"input_ids": token_ids(), "use_cache": False})
    assert exported.module()(input_ids=token_ids(), use_cache=False).logits.shape[0] == 2
