"""Files and folders of results: which are read, and what is passed over."""

import gzip
import json
import shutil

import pytest

from maskft_common.errors import UserError
from maskft_lab.results.reading import input_files, read_all
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
    (tmp_path / "named" / "rows.json.gz").write_bytes(b"no gzip")
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
