"""Code lengths and bounds against exact counting and the paper's own numbers."""

import json
import math

import pytest
import torch

import tiny
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_WEIGHTS
from maskft_lab.analysis.bound import (
    analyse_bound,
    code_lengths,
    complexity_term,
    log2_binomial,
    stable_training_loss,
    upper_bounds,
)


def test_the_papers_difference_per_weight():
    """Eq. 14: H(0.027) - 8 x 0.027 is about -0.037."""
    lengths = code_lengths(1_000_000, 27_000, 8)
    assert (lengths["mask"] - lengths["full"]) / 1_000_000 == pytest.approx(-0.037, abs=5e-4)


def test_the_index_counts_subsets():
    for d, z in ((1, 0), (5, 2), (40, 7), (100, 10)):
        assert log2_binomial(d, z) == pytest.approx(math.log2(math.comb(d, z)), abs=1e-9)
    assert code_lengths(4, 2, 16) == {"full": 64, "mask": pytest.approx(32 + math.log2(6))}


def test_the_bound_by_hand():
    """Eqs. 6-10 with Table 7's losses of coding."""
    phi = math.sqrt((64 + math.log(20)) / (2 * 9))
    assert complexity_term(64, 10) == pytest.approx(phi)
    found = upper_bounds((0.098, 0.054), 4, 2, 16, 10, vocab_size=50)
    assert found["bound"]["full"] == pytest.approx(0.098 + phi)
    assert found["difference"] == pytest.approx(found["bound"]["mask"] - found["bound"]["full"])
    assert found["delta_train"] == pytest.approx(-0.044) and found["delta_complexity"] < 0
    assert not found["is_vacuous"] and upper_bounds((1, 1), 4, 2, 16, 10, vocab_size=2)["is_vacuous"]
    with pytest.raises(UserError, match="2 training rows or more"):
        complexity_term(64, 1)


def test_stable_training_loss_is_that_of_the_last_quarter_up_to_the_best():
    history = [{"step": step, "loss": float(step)} for step in range(1, 13)] + [{"step": 3, "eval_loss": 1.0}]
    assert stable_training_loss(history) == 11  # 10, 11, 12
    assert stable_training_loss(history, until_step=8) == 7.5
    with pytest.raises(UserError, match="up to the best checkpoint"):
        stable_training_loss(history, until_step=0)


def test_the_real_file_stands_beside_its_bounds(tmp_path):
    mask = torch.ones(64, 64, dtype=torch.bool)
    mask.flatten()[::10] = False
    tiny.save_masks({"a": mask}, tmp_path)
    analyse_bound(tmp_path / "bound.json", str(tmp_path), (0.1, 0.08), (10_000, 50), 48)
    record = json.loads((tmp_path / "bound.json").read_text())
    assert record["adapter_bytes"] == (tmp_path / ADAPTER_WEIGHTS).stat().st_size
    assert record["masked_matrices"]["8"]["code_lengths"]["full"] == 8 * 4096
    assert record["model"]["16"]["code_lengths"]["full"] == 16 * 10_000
