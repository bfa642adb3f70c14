"""A start in Wanda's order, and deletion tuning in a plain loop."""

import pytest
import torch
from peft import get_peft_model

import maskft
import tiny
from maskft import MaskConfig, UserError
from maskft.baselines.fixed import fixed_masks


@pytest.mark.parametrize(("build", "target"), [(tiny.tiny_llama, "gate_proj"), (tiny.tiny_gpt2, "c_fc")])
def test_removing_the_lowest_keys_is_wandas_mask(build, target):
    model = get_peft_model(build(), MaskConfig(target_modules=[target], init_scores="wanda"))
    rows = [tiny.token_ids(1, 9, seed=seed)[0].tolist() for seed in range(3)]
    keys = maskft.wanda_keys(model.train(), rows)
    assert model.training
    layers = maskft.adapter_layers(model)
    assert set(keys) == {layer.module_name for layer in layers.values()}
    seen = {}
    for name, layer in layers.items():
        layer.get_base_layer().register_forward_hook(
            lambda m, args, out, name=name: seen.setdefault(name, []).append(args[0])
        )
    with model.disable_adapter():
        for ids in rows:
            model(input_ids=torch.tensor([ids]))
    for name, layer in layers.items():
        norms = torch.cat([x[0] for x in seen[name]]).norm(dim=0)
        (expected,) = fixed_masks(
            "wanda_mask", [layer.weight], 0.3, input_norms=[norms[:, None] if layer.is_transposed else norms[None]]
        )
        rank = keys[layer.module_name]
        assert bool(
            (rank[~expected].max() <= rank[expected].min()) or (rank[~expected].median() < rank[expected].median())
        )
        assert rank.shape == layer.weight.shape and rank.dtype == torch.float32
    with pytest.raises(UserError, match="no calibration row reached"):
        maskft.wanda_keys(model, [])
    with pytest.raises(UserError, match="is not a list of token ids"):
        maskft.wanda_keys(model, [{"input_ids": [1, 2]}])
    assert model.training


def test_the_preset_trains_in_a_plain_loop():
    model = get_peft_model(tiny.tiny_llama(), MaskConfig(preset="deletion_tuning", init_scores="wanda", price=0.01))
    ids = tiny.token_ids(4, 12)
    maskft.start_scores(model, maskft.wanda_keys(model, ids))
    scores = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(scores, lr=3e-3), []
    for step in range(30):
        maskft.set_mask_progress(model, step / 30)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    masks = maskft.current_masks(model)
    assert 0 < sum(int((~mask).sum()) for mask in masks.values()) < 0.5 * sum(mask.numel() for mask in masks.values())
