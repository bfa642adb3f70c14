"""The runs of a study, records of analyses, and the command's mistakes."""

import json

import pytest

from finished_study import write_run
from maskft_common import layout
from maskft_common.errors import UserError
from maskft_lab.analysis.records import is_finished, pieces_of, write_record
from maskft_lab.analysis.runs import TrainedRun, find_mask, full_run, parent_of, read_study
from maskft_lab.cli.main import main
from maskft_lab.results.schema import write_result

FULL = TrainedRun("full", "full", "full", 0, "b")


def test_a_run_is_found_under_the_name_that_another_study_gave_it():
    full = TrainedRun("fft-s0-0123456789", "fft", "full", 0, "b")
    mask = TrainedRun("m", "mask", "mask", 0, "b", "full-s0-0123456789")
    assert parent_of(mask, [full]) is full
    with pytest.raises(UserError, match="is not among these runs"):
        parent_of(mask, [FULL])


def test_what_tuning_tried_and_did_not_take_is_no_run_of_the_study(tmp_path):
    write_run(tmp_path, "mask-s0-aaaaaaaaaa", "mask", "mask", 0, roles=())
    write_run(tmp_path, "mask-s0-bbbbbbbbbb", "mask", "mask", 0)
    write_run(tmp_path, "mask-s1-cccccccccc", "mask", "mask", 1, roles=())  # not evaluated yet
    assert [run.id for run in read_study(tmp_path)] == ["mask-s0-bbbbbbbbbb", "mask-s1-cccccccccc"]
    # Nor is, once it has a summary, what an earlier recipe or another study left; but what its runs start from.
    (result,) = write_run(tmp_path, "mask-s0-dddddddddd", "mask", "mask", 0, "mask-s1-cccccccccc")
    write_result(tmp_path / layout.RESULTS / "mask-s0-dddddddddd-old" / layout.RESULT, result | {"name": "old"})
    for study, run in (("small", "mask-s0-dddddddddd"), ("other", "mask-s0-bbbbbbbbbb")):
        rows = {"runs": [{"run": run, "role": "best", "result": f"{run}-best"}]}
        (tmp_path / layout.SUMMARY.format(study)).write_text(json.dumps({"study": study, "models": {"tiny": rows}}))
    run, start = read_study(tmp_path, study_name="small")
    assert (run.id, run.results["best"]["name"]) == ("mask-s0-dddddddddd", "mask") and run.start == start.id
    assert len(read_study(tmp_path)) == 3


def test_what_is_not_there(tmp_path):
    file, mask = tmp_path / "out.json", TrainedRun("m", "mask", "mask", 0, "b", "full")
    with pytest.raises(UserError, match=r"no learned mask .*methods: full"):
        find_mask([FULL])
    with pytest.raises(UserError, match="is not among these runs"):
        full_run(mask, [mask])
    with pytest.raises(UserError, match="a number is NaN or infinite"):
        write_record(file, {"rows": [1, {"x": float("nan")}]}, {})
    assert not file.exists()


def test_runs_of_one_base_model(tmp_path):
    for run, base in (("a", "small"), ("b", "large")):
        write_run(tmp_path, run, run, "full", 0, roles=())
        record = tmp_path / layout.RUNS / run / layout.RUN
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


def test_mistakes_of_the_command_are_one_line(tmp_path, capsys):
    for words, message in (
        ([str(tmp_path), "--what", "mask"], "did you mean 'masks'"),
        ([str(tmp_path)], "holds neither finished runs"),
        ([str(tmp_path / "no")], "is not a folder"),
        ([str(tmp_path), "--num_rows", "0"], "--num_rows is 0"),
    ):
        assert main(["analyze", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
