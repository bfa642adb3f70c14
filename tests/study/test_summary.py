"""What a study's table leaves out."""

from types import SimpleNamespace

import pytest

from maskft.study.summary import _of_common_seeds, _unchanged, _without_repeats


def result(name, role, best_step, num_steps=8):
    return {"name": name, "study": {"role": role, "best_step": best_step, "num_steps": num_steps}}


BEST = [result("mask (best)", "best", 8), result("mask (best)", "best", 8)]


def test_an_end_that_is_the_best_at_every_seed_is_left_out():
    ends = [result("mask (complete)", "last", 8), result("mask (complete)", "last", 8)]
    kept, notes = _without_repeats([*BEST, *ends], None)
    assert kept == BEST
    assert notes == ["Note: mask (complete) is not listed: it is the best one, whose step is the last."]
    assert _without_repeats([*BEST, *ends], "mask (complete)") == ([*BEST, *ends], []), "the baseline stays"


@pytest.mark.parametrize("best_step", [6, 0])
def test_an_end_that_differs_at_one_seed_stays_for_all(best_step):
    results = [*BEST, result("mask (complete)", "last", 8), result("mask (complete)", "last", best_step)]
    assert _without_repeats(results, None) == (results, [])


def plan_of(seeds):
    """A plan of one model: label -> its seeds."""
    runs = [SimpleNamespace(model="m", seed=s, labels={"best": name}) for name, each in seeds.items() for s in each]
    return SimpleNamespace(runs=runs)


def rows_of(seeds):
    return [{"name": name, "model": {"seed": seed}} for name, each in seeds.items() for seed in each]


def test_a_seed_that_failed_leaves_the_others_comparable():
    planned = {"pre-trained": [0], "full": [0, 1, 2], "mask": [0, 1, 2], "L1 mask": [0, 1, 2]}
    done = {**planned, "mask": [0, 1]}
    kept, notes = _of_common_seeds(rows_of(done), plan_of(planned), "m")
    assert kept == rows_of({"pre-trained": [0], "full": [0, 1], "mask": [0, 1], "L1 mask": [0, 1]})
    assert notes == ["Note: seed 2 is left out of every row: mask has no result for it."]
    assert _of_common_seeds(rows_of(planned), plan_of(planned), "m") == (rows_of(planned), [])
    # A method without any result is not waited for; one seed of three is paired with its own.
    kept, _ = _of_common_seeds(rows_of({"full": [0, 1, 2], "mask": [1]}), plan_of(planned), "m")
    assert kept == rows_of({"full": [1], "mask": [1]})


def test_what_is_its_own_start_is_named_with_its_seeds():
    def full(seed, best_step, epochs=1.0):
        study = {"role": "best", "best_step": best_step, "num_steps": 8, "start": "full-s0", "epochs": epochs}
        return {"name": "warm restart", "model": {"method": "full", "seed": seed}, "study": study}

    unchanged = "its parent, unchanged; no step lowered its held-out loss."
    assert _unchanged([full(0, 0), full(1, 0)]) == [f"Note: warm restart is {unchanged}"]
    assert _unchanged([full(0, 0), full(1, 8), full(2, 0)]) == [f"Note: warm restart (seed 0, 2) is {unchanged}"]
    assert _unchanged([full(0, 8)]) == []
    already = "Note: warm restart (seed 1) is its parent, unchanged; the rate of its schedule was 0 already."
    assert _unchanged([full(0, 8), full(1, None, 0)]) == [already]
