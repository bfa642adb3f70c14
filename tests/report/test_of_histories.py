"""Figures of results and training histories: curves, costs and ablations, by hand and from published results."""

from pathlib import Path

import pytest

from maskft_lab.analysis.runs import TrainedRun, read_study
from maskft_lab.report.fig_ablations import ablations_of
from maskft_lab.report.fig_cost import cost_of, costs_of
from maskft_lab.report.fig_curves import lines_of

PUBLISHED = Path(__file__).parents[2] / "results" / "small-products"


def summary(num_steps, best_step, tokens, time_s, memory):
    history = [{"step": s, "eval_loss": 2 - s / num_steps, "eval_num_tokens": tokens * s / num_steps, "eval_runtime": 1}
               for s in (0, num_steps // 2, num_steps)]  # fmt: skip
    return {
        "num_steps": num_steps,
        "best_step": best_step,
        "num_train_tokens": tokens,
        "train_time_s": time_s,
        "peak_memory_bytes": memory,
        "history": [{"step": 1, "loss": 3.0}, *history],
    }


def result(name, value):
    metric = {"value": value, "stderr": 0.5, "num_items": 1, "higher_is_better": True, "unit": "fraction"}
    return {"name": name, "tasks": {"t": {"metrics": {"accuracy": metric}}}, "study": {"best_step": 5}}


def run_of(run_id, method="mask", start="full", seed=0, value=0.5, base="b", **settings):
    return TrainedRun(
        run_id, method, method, seed, base, start, settings, summary(10, 3, 100, 20.0, 7),  # evaluated is another step
        results={"best": result(run_id, value)},
    )  # fmt: skip


FULL = TrainedRun("full", "full", "full", 0, "b", None, {}, summary(40, 20, 800, 100.0, 9))


def test_a_curve_goes_on_where_the_best_of_its_start_was():
    mask = run_of("m")
    assert lines_of(mask, [FULL, mask]) == {"eval_loss": [(20, 2), (25, 1.5), (30, 1)]}
    assert [step for step, _ in lines_of(FULL, [FULL])["eval_loss"]] == [0, 20, 40]


def test_costs_are_ones_own_and_from_the_beginning():
    mask = run_of("m")
    found = cost_of(mask, "best", [FULL, mask])
    assert found == {"peak_memory_bytes": 7, "tokens": 50, "total_tokens": 450, "time_s": 10, "total_time_s": 60}
    assert cost_of(mask, "last", [FULL, mask])["total_time_s"] == 70


def test_one_line_per_choice_of_the_other_settings():
    runs = [
        run_of("a", sparsity=0.1, rate=1, value=0.2),
        run_of("b", sparsity=0.1, rate=1, value=0.4, seed=1),
        run_of("c", sparsity=0.02, rate=1, value=0.5),
        run_of("d", sparsity=0.1, rate=2, value=0.9),
        run_of("full", method="full", start=None, value=0.1),
    ]
    by_sparsity, by_rate = ablations_of(runs)
    assert (by_sparsity.setting, by_sparsity.task, by_sparsity.metric) == ("sparsity", "t", "accuracy")
    (line,) = by_sparsity.lines
    assert line.fixed == {"rate": 1} and line.start.mean == 0.1
    assert line.points[0] == (0.02, (0.5, 0.5, 1))  # one seed: the error is over items
    value, high = line.points[1]
    assert (value, high.num_seeds) == (0.1, 2)
    assert (high.mean, high.stderr) == (pytest.approx(0.3), pytest.approx(0.1))
    assert by_rate.lines[0].fixed == {"sparsity": 0.1} and len(by_rate.lines[0].points) == 2
    by_layers = [run_of("x", layers=None), run_of("y", layers=[10, 11]), run_of("z", layers=[4, 5])]
    (found,) = ablations_of([*by_layers, FULL])
    assert [value for value, _ in found.lines[0].points] == [[4, 5], [10, 11], None]
    assert ablations_of([FULL, run_of("a", sparsity=0.1)]) == []
    of_base = [run_of(f"base {share}", start=None, sparsity=share) for share in (0.1, 0.2)]
    (found,) = ablations_of([FULL, *(run_of(f"{share}", sparsity=share) for share in (0.1, 0.2)), *of_base])
    assert [line.fixed for line in found.lines] == [{"start": "full"}, {"start": "b"}]


def test_a_start_with_two_names_counts_once():
    """The method in ``from`` was renamed between two masks: the mean over the starts is not weighted by names."""
    starts = [
        run_of(f"full-s{seed}-012345678{seed}", method="full", start=None, seed=seed, value=value)
        for seed, value in enumerate((0.1, 0.4))
    ]
    masks = [
        run_of(f"{start}{seed}", start=f"{start}-s{seed}-012345678{seed}", seed=seed, sparsity=share)
        for start, share, seed in (("full", 0.1, 0), ("old", 0.2, 0), ("full", 0.1, 1), ("full", 0.2, 1))
    ]
    (found,) = ablations_of([*starts, *masks])
    (line,) = found.lines
    assert (line.start.mean, line.start.num_seeds) == (pytest.approx(0.25), 2)


def test_published_histories_are_enough_for_curves_and_cost():
    runs = read_study(PUBLISHED)
    first = {run.name: lines["eval_loss"][0][0] for run in runs if (lines := lines_of(run, runs))}
    # 1,220 steps of additions, then the full run's to its best, of which only the training record is published.
    assert first["additions"] == 0 and first["full"] == 1220 and first["mask, all layers, rate 3e-3, 20 %"] > 2000
    assert {cost.num_seeds for cost in costs_of(runs)} == {6}
