import gzip
import json
import math
import re
from datetime import datetime
from pathlib import Path

import pytest

from maskft_common.environment import environment
from maskft_common.errors import UserError
from maskft_lab.results.schema import (
    build_result,
    build_task,
    check_result,
    items_fingerprint,
    metric_from_items,
    read_result,
    write_result,
)

ITEMS = [
    {"id": "p0", "nll": 1.0, "num_tokens": 2, "accuracy": 1, "output": "4"},
    {"id": "p1", "nll": 3.0, "num_tokens": 6, "accuracy": 0, "output": "5"},
]
QUESTIONS = [{"id": "p0", "prompt": "2+2", "reference": "4"}, {"id": "p1", "prompt": "3+3", "reference": "6"}]


@pytest.fixture
def result():
    task = build_task(
        ITEMS,
        {name: metric_from_items(ITEMS, name) for name in ("nll", "accuracy")},
        version=1,
        num_fewshot=0,
        fingerprint=items_fingerprint(QUESTIONS),
    )
    return build_result("mask", {"name_or_path": "base", "seed": 3}, {"dtype": "float32"}, {"sums": task})


def test_nll_is_the_mean_per_token():
    metric = metric_from_items(ITEMS, "nll")
    assert metric["value"] == 2.5  # (1 * 2 + 3 * 6) / 8, not the 2.0 of the items' plain mean
    assert metric["stderr"] == pytest.approx(0.75)
    assert (metric["unit"], metric["higher_is_better"], metric["num_items"]) == ("nats/token", False, 2)


def test_zero_one_scores_are_a_fraction():
    metric = metric_from_items([{"id": str(i), "accuracy": score} for i, score in enumerate([1, 1, 1, 0])], "accuracy")
    assert metric["value"] == 0.75
    assert metric["stderr"] == pytest.approx(0.25)  # sd 0.5 / sqrt(4)
    assert (metric["unit"], metric["higher_is_better"], metric["num_items"]) == ("fraction", True, 4)


def test_any_number_can_be_a_metric():
    items = [{"id": "a", "length": 3}, {"id": "b", "length": 5.0}]
    assert metric_from_items(items, "length") == {
        "value": 4.0,
        "stderr": 1.0,
        "num_items": 2,
        "higher_is_better": True,
        "unit": "score",
    }
    metric = metric_from_items(items, "length", unit="words", higher_is_better=False)
    assert (metric["unit"], metric["higher_is_better"]) == ("words", False)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_an_item_without_value_leaves_the_metric_without(missing):
    metric = metric_from_items([{"id": "a", "score": 1.0}, {"id": "b", "score": missing}], "score")
    assert (metric["value"], metric["stderr"], metric["num_items"]) == (None, None, 2)


def test_a_single_item_has_no_standard_error():
    assert metric_from_items(ITEMS[:1], "nll")["stderr"] is None


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no items"),
        ([{"id": "a", "nll": 1.0, "num_tokens": 1}, {"id": "b"}], "item 'b' has no 'nll'"),
        ([{"id": "a", "nll": 1.0}], "item 'a' has num_tokens None"),
        ([{"id": "a", "nll": 1.0, "num_tokens": 0}], "item 'a' has num_tokens 0"),
    ],
)
def test_metric_refuses(items, message):
    with pytest.raises(UserError, match=message):
        metric_from_items(items, "nll")


def test_fingerprint_tells_questions_apart_whatever_their_order():
    fingerprint = items_fingerprint(QUESTIONS)
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert items_fingerprint(QUESTIONS[::-1]) == fingerprint
    assert items_fingerprint([{**question, "output": "x"} for question in QUESTIONS]) == fingerprint
    for field in ("id", "prompt", "reference"):
        assert items_fingerprint([QUESTIONS[0], {**QUESTIONS[1], field: "other"}]) != fingerprint
    assert items_fingerprint(QUESTIONS[:1]) != fingerprint
    chat = [{"id": "a", "prompt": [{"role": "user", "content": "é"}], "reference": None}]
    assert items_fingerprint(chat) != fingerprint


def test_environment_names_what_the_numbers_were_made_with(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    facts = environment()
    assert facts["num_threads"] == 3
    assert facts["cpu"]
    assert {"maskft", "numpy", "torch"} <= facts["packages"].keys()
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    assert environment()["num_threads"] >= 1


def test_a_built_result_says_when_and_by_what(result):
    assert datetime.fromisoformat(result["created"]).utcoffset().total_seconds() == 0
    assert result["model"] == {
        "name_or_path": "base",
        "fingerprint": None,
        "adapter": None,
        "mask_fingerprint": None,
        "adapter_sha256": None,
        "num_bytes": None,
        "config_sha256": None,
        "method": None,
        "seed": 3,
    }
    assert result["environment"]["python"]


def test_write_and_read_back(result, tmp_path):
    file = tmp_path / "new" / "folder" / "result.json"
    write_result(file, result)
    assert read_result(file) == result
    assert read_result(file.parent) == result
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]


def test_the_documented_result_is_valid():
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    example = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert check_result(example) == example
    for name, metric in example["tasks"]["products"]["metrics"].items():
        assert metric == metric_from_items(example["tasks"]["products"]["items"], name)


def test_null_is_written_and_nan_refused(result, tmp_path):
    task = result["tasks"]["sums"]
    task["items"][0]["nll"] = None
    task["metrics"]["nll"] = metric_from_items(task["items"], "nll")
    write_result(tmp_path / "null.json", result)
    assert read_result(tmp_path / "null.json")["tasks"]["sums"]["metrics"]["nll"]["value"] is None
    task["items"][0]["nll"] = math.nan
    with pytest.raises(UserError, match="cannot hold NaN"):
        write_result(tmp_path / "nan.json", result)
    assert not (tmp_path / "nan.json").exists()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(result, tmp_path, monkeypatch, step):
    file = tmp_path / "result.json"
    write_result(file, result)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"os.{step}", full_disk)
    with pytest.raises(UserError, match=r"result\.json: cannot be written \(No space left on device\)"):
        write_result(file, {**result, "name": "other"})
    assert read_result(file)["name"] == "mask"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_gzipped_file_is_read(result, tmp_path):
    write_result(tmp_path / "result.json", result)
    packed = tmp_path / "full.json.gz"
    packed.write_bytes(gzip.compress((tmp_path / "result.json").read_bytes()))
    assert read_result(packed) == read_result(tmp_path)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"full\.json\.gz: not a result file, not JSON"):
        read_result(packed)
    packed.write_text("{}")
    with pytest.raises(UserError, match=r"full\.json\.gz: the result cannot be read \(Not a gzipped file"):
        read_result(packed)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such result file"):
        read_result(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"result\.json: no such result file"):
        read_result(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\xff\xfe", '{"schema_version": NaN}'])
def test_not_json(text, tmp_path):
    (tmp_path / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="not JSON") as caught:
        read_result(tmp_path)
    assert "\n" not in str(caught.value)


def change(path, value):
    """Return a function that sets one place in a result, or removes it (value ...)."""

    def apply(result):
        *parents, last = path
        for key in parents:
            result = result[key]
        if value is ...:
            del result[last]
        else:
            result[last] = value

    return apply


NLL = ("tasks", "sums", "metrics", "nll")
# A metric of the task, without items.
WIN_RATE = ("tasks", "sums", "metrics", "win_rate")
SUMMARY = {"value": 0.4, "stderr": None, "num_items": 2, "higher_is_better": True, "unit": "fraction"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(["schema_version"], ...), "not a result file, no schema_version"),
        (change(["schema_version"], 2), "schema version 2 is newer than this maskft reads.*upgrade"),
        (change(["kind"], "comparison"), "kind is 'comparison': input should be 'evaluation'"),
        (change(["name"], ...), "name is missing"),
        (change(["name"], ""), "name is '': string should have at least 1 character"),
        (change(["name"], 3), "name is 3: input should be a valid string"),
        (change(["model", "seed"], ...), "model.seed is missing"),
        (change(["model", "name_or_path"], None), "model.name_or_path is None: input should be a valid string"),
        (change(["tasks"], {}), "tasks is {}: dictionary should have at least 1 item"),
        (change(["tasks", "sums"], 1), "tasks.sums is 1: input should be a valid dictionary"),
        (change(["tasks", "sums", "items_fingerprint"], ...), "tasks.sums.items_fingerprint is missing"),
        (change(["tasks", "sums", "items"], []), "tasks.sums.items is .*at least 1 item"),
        (change(["tasks", "sums", "items", 1, "id"], ...), "tasks.sums: item 1 has id None"),
        (change(["tasks", "sums", "items", 1, "id"], "p0"), "tasks.sums: two items have the id 'p0'"),
        (change(["tasks", "sums", "items", 1, "nll"], ...), "item 'p1' has nll None, not a number"),
        (change(["tasks", "sums", "items", 1, "nll"], "1.0"), "item 'p1' has nll '1.0', not a number"),
        (change(["tasks", "sums", "items", 1, "num_tokens"], ...), "item 'p1' has num_tokens None"),
        (change([*NLL, "unit"], ...), "tasks.sums.metrics.nll.unit is missing"),
        (change(["tasks", "sums", "items", 1, "nll"], 10**400), "tasks.sums: item 'p1' has a nll of more than 2e.308"),
        (change(["tasks", "sums", "items", 1, "nll"], 1e308 * 10), "item 'p1' has a nll of more than 2e.308"),
        (change(["tasks", "a\nb"], 1), r"tasks\.a\\nb"),
        (change([*NLL, "unit"], "fraction"), "item 'p1' has nll 3.0, and a fraction is in .0, 1., not percent"),
        (change([*NLL, "num_items"], 3), "nll has num_items 3 for 2 items"),
        (change([*NLL, "value"], 2.0), "nll has value 2.0, its items give 2.5"),
        (change([*NLL, "value"], None), "nll has value None, its items give 2.5"),
        (change([*NLL, "stderr"], -0.75), "nll has stderr -0.75: an error is not below 0"),
        (change([*NLL, "stderr"], math.inf), "nll has stderr inf: give a number, or null"),
        (change(WIN_RATE, SUMMARY | {"value": 46.8}), "win_rate has value 46.8, and a fraction is in .0, 1., not perc"),
        (change(WIN_RATE, SUMMARY | {"value": math.inf}), "win_rate has value inf: give a number, or null"),
        (change(["environment"], {}), "environment.packages is missing"),
        (change(["environment", "packages"], "torch"), "environment.packages is 'torch': input should be a valid dict"),
        (change(["training"], 3), "training is 3: input should be a valid dictionary"),
        (change(["training"], {"num_epochs": "2"}), "training.num_epochs is '2': input should be a valid number"),
        (change(["training"], {"domain": "maths"}), "training.domain is 'maths': .*'math', 'coding' or 'instruction'"),
        (change(["training"], {"checkpoint": "end"}), "training.checkpoint is 'end': .*'best' or 'last'"),
    ],
)
def test_damaged_results_are_refused_in_one_line(result, tmp_path, damage, message):
    damage(result)
    (tmp_path / "result.json").write_text(json.dumps(result).replace("Infinity", "1e400"))
    with pytest.raises(UserError, match=message) as caught:
        read_result(tmp_path)
    assert "result.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        write_result(tmp_path / "copy.json", result)
    assert not (tmp_path / "copy.json").exists()


def test_a_metric_of_the_task_alone_is_allowed(result):
    result["tasks"]["sums"]["metrics"]["win_rate"] = SUMMARY
    assert check_result(result) is result


def test_training_block(result, tmp_path):
    training = {"base": "m", "domain": "math", "mixed": False, "num_epochs": 2.4, "num_train_tokens": 590}
    built = build_result("mask", result["model"], {}, result["tasks"], training)
    write_result(tmp_path / "result.json", built)
    assert read_result(tmp_path)["training"] == training
    assert "training" not in result
