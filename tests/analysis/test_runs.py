"""Curves, costs and ablations from published results and made-up runs; the command; and its mistakes."""

import json
import shutil
from pathlib import Path

import pytest

from finished_study import write_run
from maskft_base import files
from maskft_base.errors import UserError
from maskft_lab.analysis.ablations import ablations_of, lines_of, varied_settings
from maskft_lab.analysis.curves import cost_of, costs_of, curves_of, series_of
from maskft_lab.analysis.records import is_finished, pieces_of, write_record
from maskft_lab.analysis.runs import TrainedRun, find_mask, full_run, read_study
from maskft_lab.cli.main import main

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


def result(name, value, items="x"):
    metric = {"value": value, "stderr": 0.5, "num_items": 1, "higher_is_better": True, "unit": "fraction"}
    return {"name": name, "tasks": {"t": {"items_fingerprint": items, "metrics": {"accuracy": metric}}}}


def run_of(run_id, method="mask", start="full", seed=0, value=0.5, base="b", **settings):
    return TrainedRun(
        run_id, method, method, seed, base, start, settings, summary(10, 5, 100, 20.0, 7),
        results={"best": result(run_id, value)},
    )  # fmt: skip


FULL = TrainedRun("full", "full", "full", 0, "b", None, {}, summary(40, 20, 800, 100.0, 9))


def test_a_curve_goes_on_where_the_best_of_its_start_was():
    mask = run_of("m")
    found = series_of(mask, [FULL, mask])
    assert found["steps"] == [20, 25, 30] and found["tokens"] == [400, 450, 500]
    assert found["metrics"] == {"eval_loss": [2, 1.5, 1]}
    assert found["train"] == {"steps": [21], "loss": [3.0]}
    assert series_of(FULL, [FULL])["steps"] == [0, 20, 40]


def test_a_run_is_found_under_the_name_that_another_study_gave_it():
    full = TrainedRun("fft-s0-0123456789", "fft", "full", 0, "b", None, {}, FULL.summary)
    assert series_of(run_of("m", start="full-s0-0123456789"), [full])["steps"][0] == 20
    with pytest.raises(UserError, match="is not among these runs"):
        series_of(run_of("m", start="full-s0-9876543210"), [full])


def test_what_tuning_tried_and_did_not_take_is_no_run_of_the_study(tmp_path):
    write_run(tmp_path, "mask-s0-aaaaaaaaaa", "mask", "mask", 0, roles=())
    write_run(tmp_path, "mask-s0-bbbbbbbbbb", "mask", "mask", 0)
    write_run(tmp_path, "mask-s1-cccccccccc", "mask", "mask", 1, roles=())  # not evaluated yet
    assert [run.id for run in read_study(tmp_path)] == ["mask-s0-bbbbbbbbbb", "mask-s1-cccccccccc"]


def test_costs_are_ones_own_and_from_the_beginning():
    mask = run_of("m")
    found = costs_of(mask, "best", [FULL, mask])
    assert found == {"peak_memory_bytes": 7, "tokens": 50, "total_tokens": 450, "time_s": 10, "total_time_s": 60}
    assert costs_of(mask, "last", [FULL, mask])["total_time_s"] == 70


def test_one_line_per_choice_of_the_other_settings():
    runs = [
        run_of("a", sparsity=0.1, rate=1, value=0.2),
        run_of("b", sparsity=0.1, rate=1, value=0.4, seed=1),
        run_of("c", sparsity=0.02, rate=1, value=0.5),
        run_of("d", sparsity=0.1, rate=2, value=0.9),
        run_of("full", method="full", start=None, value=0.1),
    ]
    assert varied_settings(runs[:4]) == ["sparsity", "rate"]
    (found,) = lines_of(runs, "sparsity", "t", "accuracy")
    assert found["fixed"] == {"rate": 1} and found["start"]["mean"] == 0.1
    low, high = found["points"]
    assert (low["value"], low["mean"], low["stderr_over"]) == (0.02, 0.5, "items")
    assert high["mean"] == pytest.approx(0.3) and high["stderr"] == pytest.approx(0.1) and high["num_seeds"] == 2
    (by_rate,) = lines_of(runs, "rate", "t", "accuracy")
    assert by_rate["fixed"] == {"sparsity": 0.1} and len(by_rate["points"]) == 2
    by_layers = [run_of("x", layers=None), run_of("y", layers=[10, 11]), run_of("z", layers=[4, 5])]
    assert [p["value"] for p in lines_of([*by_layers, FULL], "layers", "t", "accuracy")[0]["points"]] == [
        [4, 5], [10, 11], None,
    ]  # fmt: skip


def test_what_cannot_be_compared_or_is_not_there(tmp_path):
    file = tmp_path / "out.json"
    with pytest.raises(UserError, match="no two evaluated masks differ"):
        ablations_of([FULL, run_of("a", sparsity=0.1)])
    with pytest.raises(UserError, match=r"no learned mask .*methods: full"):
        find_mask([FULL])
    with pytest.raises(UserError, match="is not among these runs"):
        full_run(run_of("a"), [run_of("a")])
    for analyse in (curves_of, cost_of):
        with pytest.raises(UserError, match=r"training\.json"):
            analyse([TrainedRun("p", "p", "pretrained", None, "b")])
    with pytest.raises(UserError, match="a number is NaN or infinite"):
        write_record(file, {"rows": [1, {"x": float("nan")}]}, {})
    assert not file.exists()


def test_runs_of_one_base_model(tmp_path):
    for run, base in (("a", "small"), ("b", "large")):
        write_run(tmp_path, run, run, "full", 0, roles=())
        record = tmp_path / files.RUNS / run / files.RUN
        record.write_text(json.dumps(json.loads(record.read_text()) | {"model": base}))
    with pytest.raises(UserError, match="different base models cannot be compared"):
        read_study(tmp_path)
    assert [run.id for run in read_study(tmp_path, "large")] == ["b"]


def test_pieces_are_dropped_with_other_settings(tmp_path):
    file = tmp_path / "a.json"
    assert pieces_of(file, {"x": 1}).get("k", lambda: 0.1) == 0.1
    assert pieces_of(file, {"x": 1}).get("k", lambda: 0) == 0.1
    assert pieces_of(file, {"x": 2}).get("k", lambda: 3) == 3
    write_record(file, {}, {"x": 1})
    assert is_finished(file, {"x": 1}) and not is_finished(file, {"x": 2})


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Results of two masks and a full run at two seeds, as small files; their training."""
    folder = tmp_path_factory.mktemp("published")
    for file in PUBLISHED.glob("*-s[01].json.gz"):
        shutil.copy(file, folder)
    for name in ("training.json", "summary.json"):
        shutil.copy(PUBLISHED / name, folder)
    return folder


def test_published_results_are_enough_for_curves_and_cost(published, tmp_path, capsys):
    """And what needs models or a grid is left out with its reason, or an error where it was asked for."""
    runs = read_study(published)
    assert {run.method for run in runs} == {"full", "mask", "random_mask", "l1_mask", "wanda_mask"}
    assert {run.name for run in runs if run.results} >= {"full", "warm restart"}
    assert main(["analyze", str(published), "--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"curves: {tmp_path / 'curves.json'}" in out and "left out masks: there is no learned mask" in out
    curves = json.loads((tmp_path / "curves.json").read_text())["series"]
    first = {series["name"]: series["steps"][0] for series in curves if series["steps"]}
    # 1,220 steps of additions, then the full run's to its best, of which only the training record is published.
    assert first["additions"] == 0 and first["full"] == 1220 and first["mask, all layers, rate 3e-3, 20 %"] > 2000
    assert {row["num_seeds"] for row in json.loads((tmp_path / "cost.json").read_text())["rows"]} == {6}
    assert main(["analyze", str(published), "--what", "masks", "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_mistakes_of_the_command_are_one_line(tmp_path, capsys):
    for words, message in (
        ([str(tmp_path), "--what", "curve"], "did you mean 'curves'"),
        ([str(tmp_path)], "holds neither finished runs"),
        ([str(tmp_path / "no")], "is not a folder"),
        ([str(tmp_path), "--num_rows", "0"], "--num_rows is 0"),
    ):
        assert main(["analyze", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
