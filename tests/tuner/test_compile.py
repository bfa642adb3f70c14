"""A masked model under torch.compile: the weight that is kept between steps is never an old one."""

import copy
import shutil

import pytest
import torch
from peft import get_peft_model

from maskft import MaskConfig
from tiny import tiny_llama, token_ids


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="2.6 does not compile the plain model; 2.7 to 2.12 not tried",
)
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
            ],
        ),
    ],
)
def test_a_compiled_model_trains_as_the_plain_one(backend):
    config = MaskConfig(sparsity=0.2, layers_to_transform=[1], task_type="CAUSAL_LM")
    plain = get_peft_model(tiny_llama(num_layers=2), copy.deepcopy(config))
    other = get_peft_model(tiny_llama(num_layers=2), copy.deepcopy(config))
    compiled, ids, losses = torch.compile(other, backend=backend), token_ids(), []
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
