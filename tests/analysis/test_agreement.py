"""What two masks remove in common, against chance."""

import itertools
import json
from math import comb

import pytest
import torch

import tiny
from maskft_lab.analysis.agreement import agreement, chance_interval
from maskft_lab.cli.main import main


@pytest.mark.parametrize("counts", [[(12, 5, 4)], [(12, 5, 4), (7, 3, 6), (9, 0, 2)]])
def test_chance_has_the_interval_of_all_placements(counts):
    """Against the distribution of the sum by counting, of each matrix and of all."""
    chances = {0: 1.0}
    for n, n1, n2 in counts:
        one = {c: comb(n1, c) * comb(n - n1, n2 - c) / comb(n, n2) for c in range(min(n1, n2) + 1) if n2 - c <= n - n1}
        sums = {}
        for (a, p), (b, q) in itertools.product(chances.items(), one.items()):
            sums[a + b] = sums.get(a + b, 0.0) + p * q
        chances = sums
    for confidence in (0.5, 0.8, 0.95):
        low, high = chance_interval(counts, confidence)
        tail = (1 - confidence) / 2
        assert sum(p for c, p in chances.items() if c < low) < tail <= sum(p for c, p in chances.items() if c <= low)
        assert sum(p for c, p in chances.items() if c > high) <= tail + 1e-12


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
