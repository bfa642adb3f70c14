"""Files and folders of results: which are read, and what is passed over."""

import gzip
import json
import shutil

import pytest

from maskft_common.errors import UserError
from maskft_lab.results.reading import check_output, input_files, read_all
from maskft_lab.results.schema import build_result, build_task, metric_from_items, write_result


def result(name):
    items = [{"id": "a", "accuracy": 1}, {"id": "b", "accuracy": 0}]
    metrics = {"accuracy": metric_from_items(items, "accuracy")}
    task = build_task(items, metrics, version=1, num_fewshot=0, fingerprint="f")
    return build_result(name, {"name_or_path": "m"}, {}, {"sums": task})


def test_folders_in_folders_hold_results_and_other_files(tmp_path):
    write_result(tmp_path / "runs" / "a" / "result.json", result("full"))
    write_result(tmp_path / "named" / "mask--a.json", result("mask"))
    for place in ("runs/a-s0/path/heldout-1/1-1", "results/a-best-1.2.partial"):  # of a study, no models of their own
        write_result(tmp_path / place / "result.json", result("passing"))
    with gzip.open(tmp_path / "named" / "l1.json.gz", "wt") as packed:
        packed.write(json.dumps(result("L1 mask")))
    (tmp_path / "named" / "comparison.json").write_text('{"kind": "comparison"}')
    (tmp_path / "named" / "summary.json").write_text('{"kind": ["evaluation"]}')
    (tmp_path / "named" / "training.json").write_text('{"evaluation": NaN')
    (tmp_path / "named" / "rows.json").write_text('["evaluation"]')
    (tmp_path / "named" / "folder.json").mkdir()
    (tmp_path / "named" / "rows.json.gz").write_bytes(gzip.compress(b"[1]"))
    assert [each["name"] for each in read_all([str(tmp_path)])] == ["L1 mask", "mask", "full"]
    runs, named = str(tmp_path / "runs" / "a"), str(tmp_path / "named" / "mask--a.json")
    assert [each["name"] for each in read_all([f"other={named}", runs])] == ["other", "full"]
    assert {file.name for file in input_files([runs, named])} == {"result.json", "mask--a.json"}
    shutil.rmtree(tmp_path / "named")
    (tmp_path / "runs" / "a" / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json: not a result file"):
        read_all([str(tmp_path)])
    for nowhere in (tmp_path / "nowhere", tmp_path / "runs" / "b"):
        with pytest.raises(UserError, match="no such result file"):
            read_all([str(nowhere)])


@pytest.mark.parametrize("name, num_bytes", [("b.json.gz", 100), ("b.json.gz", 0), ("b.json", 300)])
def test_a_damaged_result_in_a_folder_is_not_passed_over(name, num_bytes, tmp_path):
    write_result(tmp_path / "a.json", result("full"))
    write_result(tmp_path / "b.json", result("mask"))
    content = (tmp_path / "b.json").read_bytes()
    (tmp_path / "b.json").unlink()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    (tmp_path / name).write_bytes(content[:num_bytes])
    with pytest.raises(UserError, match=rf"{name}: "):
        read_all([str(tmp_path)])


def test_home_is_found_where_a_shell_leaves_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_result(tmp_path / "a.json", result("full"))
    assert [each["name"] for each in read_all(["~/a.json", "mask=~/a.json"])] == ["full", "mask"]
    with pytest.raises(UserError, match="is one of the results"):
        check_output("~/a.json", [str(tmp_path)])


def test_places_without_room_for_a_file_are_refused_before_the_work(tmp_path):
    write_result(tmp_path / "a.json", result("full"))
    with pytest.raises(UserError, match=r"--output .* is a folder"):
        check_output(str(tmp_path), [str(tmp_path)])
    with pytest.raises(UserError, match=r"--output .*a\.json' is a file and no folder"):
        check_output(str(tmp_path / "a.json" / "new" / "b.md"), [str(tmp_path)])
    check_output(str(tmp_path / "new" / "b.md"), [str(tmp_path)])
