"""Shares of masks by head against loops and chance."""

import numpy as np
import pytest
import torch

from maskft.masks.mask_set import MaskSet
from maskft_common.errors import UserError
from maskft_lab.analysis.masks import head_shares, shares_by_head


def random_mask(shape, share, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= share


def test_the_spread_of_chance_is_that_of_random_masks():
    """Of a thousand masks of equal counts, the standard deviation of one head's share over Q, K and V."""
    generator, shapes, share = torch.Generator().manual_seed(0), {"q_proj": 8, "k_proj": 4, "v_proj": 4}, 0.25
    found = []
    for _ in range(1000):
        masks = MaskSet()
        for name, rows in shapes.items():
            mask = torch.ones(rows * 6, dtype=torch.bool)
            mask[torch.randperm(rows * 6, generator=generator)[: round(share * rows * 6)]] = False
            masks[f"layers.0.{name}"] = mask.reshape(rows, 6)
        found.append(shares_by_head(masks, 4, 2)["0"]["shares"][0])
    assert shares_by_head(masks, 4, 2)["0"]["chance"] == pytest.approx(float(np.std(found)), rel=0.1)


def test_layer_10_comes_after_layer_2():
    """The order of the rows of Fig. 13; an adapter's file is in the order of text."""
    mask = random_mask((8, 6), 0.4, 1)
    masks = MaskSet()
    for layer in ("0", "10", "2"):
        for kind in ("q_proj", "k_proj", "v_proj"):
            masks[f"model.layers.{layer}.self_attn.{kind}"] = mask
    assert list(shares_by_head(masks, 4, 4)) == ["0", "2", "10"]


def test_heads_with_shared_keys_against_a_loop():
    """Four query heads of width 2, two key heads: query heads 0 and 1 use key head 0."""
    q, k = random_mask((8, 6), 0.4, 1), random_mask((4, 6), 0.4, 2)
    found = [head_shares(q, 4, 4), head_shares(k, 2, 4)]
    for head in range(4):
        for shares, mask, block in ((found[0], q, head), (found[1], k, head // 2)):
            part = mask[2 * block : 2 * block + 2]
            assert shares[head] == pytest.approx(float((~part).sum()) / part.numel())
    names = {"q_proj": q, "k_proj": k, "v_proj": k, "o_proj": q.T}
    masks = {f"layers.5.self_attn.{name}": mask for name, mask in names.items()}
    assert shares_by_head(MaskSet(masks), 4, 2)["5"]["shares"] == pytest.approx(
        ((found[0] + 2 * found[1]) / 3).tolist()
    )
    del masks["layers.5.self_attn.v_proj"]
    assert shares_by_head(MaskSet(masks), 4, 2) == {}
    with pytest.raises(UserError, match="does not divide"):
        head_shares(q, 3, 3)
