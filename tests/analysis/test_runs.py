"""The runs of a study, records of analyses, and the command's mistakes."""

import gzip
import json

import pytest
import torch

import tiny
from finished_study import write_run
from maskft_common import layout
from maskft_common.errors import UserError
from maskft_lab.analysis.records import digest_folder, is_finished, pieces_of, write_record
from maskft_lab.analysis.runs import TrainedRun, find_mask, full_run, parent_of, read_study, start_model
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


def test_the_model_at_the_chosen_point_is_analysed(tmp_path):
    """``path.choose`` may take another checkpoint than the best by held-out loss, or a part of the change."""

    def model_at(scale, step):
        (result,) = write_run(tmp_path, "mask-s0-aaaaaaaaaa", "mask", "mask", 0)
        block = result["study"] | {"best_step": step, "point": {"checkpoint": 0.5, "scale": scale}}
        file = tmp_path / layout.RESULTS / "mask-s0-aaaaaaaaaa-best" / layout.RESULT
        write_result(file, result | {"study": block})
        (run,) = read_study(tmp_path)
        return run.models.get("best")

    folder = tmp_path / layout.RUNS / "mask-s0-aaaaaaaaaa"
    assert model_at(1.0, 7) == str(folder), "the best by held-out loss too"
    assert model_at(1.0, 4) is None, "it was deleted"
    (folder / "checkpoint-4").mkdir()
    assert model_at(1.0, 4) == str(folder / "checkpoint-4")
    assert model_at(0.5, 4) is None and model_at(0.5, 7) is None
    with pytest.raises(UserError, match=r"a part of a mask, which path\.choose may take"):
        find_mask(read_study(tmp_path))


def test_a_mask_over_a_revision_is_not_analysed_over_the_main_one(tmp_path):
    mask = {"up": torch.ones(2, 2, dtype=torch.bool)}
    run = TrainedRun("m", "mask", "mask", 0, "b", models={"best": str(tmp_path / "m")})
    tiny.save_masks(mask, tmp_path / "m", base_model_name_or_path="owner/name", revision="v2")
    with pytest.raises(UserError, match=r"m is over revision 'v2' of 'owner/name'"):
        start_model(run, [run])
    # A relative name is that of a folder above the adapter, as in all other commands.
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    tiny.save_masks(mask, tmp_path / "m", base_model_name_or_path="base", revision="main")
    assert start_model(run, [run]) == str(tmp_path / "base")
    with pytest.raises(UserError, match="full has no model here"):
        start_model(TrainedRun("m", "mask", "mask", 0, "b", "full"), [FULL])


def test_a_gguf_file_is_known_by_its_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_text("one")
    before = digest_folder(tmp_path / "a.gguf")
    assert before == digest_folder(tmp_path / "b.gguf")
    (tmp_path / "a.gguf").write_text("another")
    assert before != digest_folder(tmp_path / "a.gguf")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", gzip.compress(b"{" * 99, mtime=0)[:-9], b"no gzip"])
def test_a_file_that_cannot_be_read_beside_published_results_is_named(content, tmp_path):
    (tmp_path / "other.json").mkdir()  # a folder is no file
    (tmp_path / "x.json.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json\.gz: "):
        read_study(tmp_path)
    # A plain file may be anything, unless it begins as a result.
    (tmp_path / "x.json.gz").unlink()
    (tmp_path / "x.json").write_bytes(b'{"kind": "evaluation", ' + content)
    with pytest.raises(UserError, match=r"x\.json: "):
        read_study(tmp_path)


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
