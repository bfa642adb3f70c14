"""What a study's table leaves out."""

import pytest

from maskft_lab.results.compare import compare, compare_measured
from maskft_lab.results.schema import build_result, build_task, metric_from_items
from maskft_lab.study.summary import _accounts_table, _kl_of_budget, without_repeats


def result(name, role, best_step, num_steps=8):
    return {"name": name, "study": {"role": role, "best_step": best_step, "num_steps": num_steps}}


BEST = [result("mask (best)", "best", 8), result("mask (best)", "best", 8)]


def test_an_end_that_is_the_best_at_every_seed_is_left_out():
    ends = [result("mask (complete)", "last", 8), result("mask (complete)", "last", 8)]
    kept, notes = without_repeats([*BEST, *ends], None)
    assert kept == BEST
    assert notes == ["Note: mask (complete) is not listed: same as the best checkpoint (last step)."]
    assert without_repeats([*BEST, *ends], "mask (complete)") == ([*BEST, *ends], []), "the baseline stays"
    ends = [end | {"name": f"{end['name']} [learning_rate=0.1]"} for end in ends]
    assert without_repeats(ends, "mask (complete)") == (ends, []), "also that of a grid"


@pytest.mark.parametrize("best_step", [6, 0])
def test_an_end_that_differs_at_one_seed_stays_for_all(best_step):
    results = [*BEST, result("mask (complete)", "last", 8), result("mask (complete)", "last", best_step)]
    assert without_repeats(results, None) == (results, [])


def test_without_an_evaluation_during_training_the_last_step_is_the_best():
    ends = [result("mask (complete)", "last", None), result("mask (complete)", "last", None)]
    kept, notes = without_repeats([*BEST, *ends], None)
    assert kept == BEST and len(notes) == 1
    end = ends[0] | {"model": {"seed": 0}}
    end["study"] |= dict.fromkeys(("epochs", "tokens", "total_epochs", "total_tokens"), 1)
    assert "8 of 8" in _accounts_table([end], {})


def test_a_size_below_a_kilobyte_is_not_written_as_none():
    """Nor are the epochs of a few steps over many rows."""
    run = result("mask", "best", 8) | {"model": {"seed": 0, "num_bytes": 312}}
    run["study"] |= {"epochs": 0.0031, "tokens": 900, "total_epochs": 1.25, "total_tokens": 2e6}
    *_, row = _accounts_table([run], {}).splitlines()
    assert row == "| mask | 0 | 8 of 8 | 0.003 | 900 | 1.25 | 2e+06 | 0.3 |"
    run["model"]["num_bytes"] = 2_402_000
    assert _accounts_table([run], {}).endswith("| 2,402 |")


def evaluated(name, losses):
    items = [{"id": f"{n}", "nll": loss, "num_tokens": 1, "accuracy": n % 2} for n, loss in enumerate(losses)]
    metrics = {metric: metric_from_items(items, metric) for metric in ("nll", "accuracy")}
    task = build_task(items, metrics, version=1, num_fewshot=0, fingerprint="0")
    return build_result(name, {"name_or_path": name, "method": name, "seed": 0}, {}, {"heldout": task})


def test_a_model_without_a_loss_stops_no_comparison_of_the_others():
    losses = [1.0, 1.5, 2.0, 2.5]
    results = [evaluated("full", losses), evaluated("mask", losses), evaluated("peft", [*losses[:3], None])]
    comparison = compare_measured(results, "full")
    note = comparison.notes[0]
    assert note.startswith("nll on heldout of 'peft' seed 0 is not compared: an item has no value")
    compared = {(row.method, row.metric) for row in comparison.differences}
    assert compared == {("mask", "nll"), ("mask", "accuracy"), ("peft", "accuracy")}
    assert results[2]["tasks"]["heldout"]["metrics"]["nll"]["value"] is None, "the results stay"
    assert compare_measured(results[:2], "full") == compare(results[:2], "full")


@pytest.mark.parametrize(
    "reached, shown",
    [
        (0.0471, "0.0471 of 0.05"),
        (0.05, "0.0500 of 0.05"),
        (0.050002, "0.050002 of 0.05, missed"),  # enough decimals to see it
        (0.0612, "0.0612 of 0.05, missed"),
        (None, "not measured, of 0.05"),
    ],
)
def test_a_kl_stands_beside_its_budget(reached, shown):
    assert _kl_of_budget({"reached": reached, "budget": 0.05}) == shown


def test_a_run_without_a_budget_has_no_kl():
    assert _kl_of_budget(None) == "–"
