"""Shares, agreement and effects of masks against loops and counting."""

import itertools
import math

import numpy as np
import pytest
import torch

from maskft.adapter.mask_set import MaskSet
from maskft_base.errors import UserError
from maskft_lab.analysis.masks import (
    agreement,
    chance_by_head,
    head_shares,
    shares_by_head,
)


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
        found.append(shares_by_head(masks, 4, 2)["0"]["qkv"][0])
    assert chance_by_head(masks, 4, 2)["0"] == pytest.approx(float(np.std(found)), rel=0.1)


def test_heads_with_shared_keys_against_a_loop():
    """Four query heads of width 2, two key heads: query heads 0 and 1 use key head 0."""
    q, k, o = random_mask((8, 6), 0.4, 1), random_mask((4, 6), 0.4, 2), random_mask((6, 8), 0.4, 3)
    for mask, projection in ((q, "q_proj"), (k, "k_proj"), (o, "o_proj")):
        found = head_shares(mask, projection, 4, 2)
        for head in range(4):
            block = head // 2 if projection == "k_proj" else head
            part = mask[:, 2 * block : 2 * block + 2] if projection == "o_proj" else mask[2 * block : 2 * block + 2]
            assert found[head] == pytest.approx(float((~part).sum()) / part.numel())
    names = {"q_proj": q, "k_proj": k, "v_proj": k}
    shares = shares_by_head(MaskSet({f"layers.5.self_attn.{name}": mask for name, mask in names.items()}), 4, 2)["5"]
    expected = [(shares["q_proj"][h] + 2 * shares["k_proj"][h]) / 3 for h in range(4)]
    assert shares["qkv"] == pytest.approx(expected)
    with pytest.raises(UserError, match="does not divide"):
        head_shares(q, "q_proj", 3, 3)


def test_agreement_has_the_mean_and_variance_of_all_placements():
    """Every way to remove 2 of 5 weights against one fixed choice of 3."""
    first = torch.tensor([[False, False, False, True, True]])
    numbers = []
    for places in itertools.combinations(range(5), 2):
        second = torch.ones(1, 5, dtype=torch.bool)
        second[0, list(places)] = False
        found = agreement(MaskSet({"a": first}), MaskSet({"a": second}))
        numbers.append(found["num_common"])
        z = found["z_score"]
    mean = sum(numbers) / len(numbers)
    variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
    assert found["expected"] == pytest.approx(mean)
    assert z == pytest.approx((numbers[-1] - mean) / math.sqrt(variance))


def test_agreement_of_equal_independent_and_other_masks():
    a = MaskSet({"x": random_mask((200, 200), 0.1, 1), "only_here": random_mask((4, 4), 0.5, 1)})
    b = MaskSet({"x": random_mask((200, 200), 0.2, 2)})
    assert abs(agreement(a, b)["z_score"]) < 4 and agreement(a, b)["num_modules"] == 1
    assert agreement(a, a)["jaccard"] == 1 and agreement(a, a)["z_score"] > 100
    with pytest.raises(UserError, match="no common module"):
        agreement(a, MaskSet({"y": a["x"]}))
    with pytest.raises(UserError, match="other base models"):
        agreement(a, MaskSet({"x": a["x"][:2]}))
