"""What two masks remove in common, against chance."""

import itertools
import json
import math

import pytest
import torch

import tiny
from maskft.adapter.mask_set import MaskSet
from maskft_base.errors import UserError
from maskft_lab.analysis.agreement import agreement
from maskft_lab.cli.main import main


def random_mask(shape, share, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= share


def test_random_masks_fall_into_the_interval_as_often_as_it_says():
    inside, generator = 0, torch.Generator().manual_seed(0)
    for _ in range(200):
        a, b = ({"x": torch.rand(100, 100, generator=generator) >= 0.3} for _ in range(2))
        pair = agreement(a, b)
        inside += pair["chance_low"] <= pair["num_common"] <= pair["chance_high"]
    assert 0.90 <= inside / 200 <= 0.99


def test_compare_tells_masks_that_share_something_from_random_ones(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    masks = [{"up_proj": torch.rand(64, 32, generator=generator) >= 0.1} for _ in range(2)]
    like = masks[0]["up_proj"].clone()
    like[:8] = torch.rand(8, 32, generator=generator) >= 0.1
    for name, mask in (("0/mask", masks[0]), ("1/mask", masks[1]), ("like", {"up_proj": like})):
        tiny.save_masks(mask, tmp_path / name)
    words = ["masks", "compare", *(str(tmp_path / name) for name in ("0/mask", "1/mask", "like"))]
    assert main([*words, "--format", "json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["pairs"]
    assert [pair["verdict"] for pair in pairs] == ["what chance gives", "more than chance", "what chance gives"]
    assert [pair["first"] for pair in pairs] == ["0/mask", "0/mask", "1/mask"]
    assert main(words) == 0
    assert "more than chance" in capsys.readouterr().out
    for bad in ([*words, "--confidence", "1"], words[:3]):
        assert main(bad) == 2
        assert capsys.readouterr().err.count("\n") == 1


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
