"""What a study's table leaves out."""

import pytest

from maskft_lab.study.summary import without_repeats


def result(name, role, best_step, num_steps=8):
    return {"name": name, "study": {"role": role, "best_step": best_step, "num_steps": num_steps}}


BEST = [result("mask (best)", "best", 8), result("mask (best)", "best", 8)]


def test_an_end_that_is_the_best_at_every_seed_is_left_out():
    ends = [result("mask (complete)", "last", 8), result("mask (complete)", "last", 8)]
    kept, notes = without_repeats([*BEST, *ends], None)
    assert kept == BEST
    assert notes == ["Note: mask (complete) is not listed: it is the best one, whose step is the last."]
    assert without_repeats([*BEST, *ends], "mask (complete)") == ([*BEST, *ends], []), "the baseline stays"


def test_an_end_is_not_the_mean_of_checkpoints():
    """Which has no step of its own, and counts as made at the last one."""
    best = {"name": "full (best)", "study": {"role": "best", "best_step": 8, "num_steps": 8, "averaged_steps": [7, 8]}}
    results = [best, {"name": "full (end)", "study": best["study"] | {"role": "last"}}]
    assert without_repeats(results, None) == (results, [])


@pytest.mark.parametrize("best_step", [6, 0])
def test_an_end_that_differs_at_one_seed_stays_for_all(best_step):
    results = [*BEST, result("mask (complete)", "last", 8), result("mask (complete)", "last", best_step)]
    assert without_repeats(results, None) == (results, [])
