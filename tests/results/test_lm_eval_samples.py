"""lm-eval's samples: read, compared, and refused where they were not measured alike."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from maskft_base.errors import UserError
from maskft_lab.cli import compare as command
from maskft_lab.results.compare import compare
from maskft_lab.results.comparison import Settings
from maskft_lab.results.reading import read_all

# Written by lm-eval 0.4.13 with two tiny random models (``tests/results/make_lm_eval_samples.py``).
LM_EVAL = Path(__file__).parent / "lm_eval"


def rows_of(folder, task):
    (file,) = folder.glob(f"samples_{task}_*.jsonl")
    return file, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folders(tmp_path):
    """Copies of both models' folders, free to be changed."""
    return [Path(shutil.copytree(LM_EVAL / name, tmp_path / name)) for name in ("tiny-base", "tiny-tuned")]


def refuse(paths, match):
    with pytest.raises(UserError, match=match) as caught:
        compare(read_all(map(str, paths)), settings=Settings(200))
    assert "\n" not in str(caught.value)


def test_real_samples_are_read_with_what_stands_beside_them():
    base, tuned = read_all([str(LM_EVAL / "tiny-base"), str(LM_EVAL / "tiny-tuned")])
    assert (base["name"], tuned["name"]) == ("tiny-base", "tiny-tuned")
    sums = base["tasks"]["tiny_sums"]
    assert (sums["version"], sums["num_fewshot"]) == (1.0, 0)
    assert list(sums["metrics"]) == ["acc", "acc_norm"]
    summary = json.loads(next((LM_EVAL / "tiny-base").glob("results_*.json")).read_text(encoding="utf-8"))
    assert sums["metrics"]["acc"]["value"] == pytest.approx(summary["results"]["tiny_sums"]["acc,none"])
    assert sums["metrics"]["acc"]["higher_is_better"] and sums["metrics"]["acc"]["unit"] == "fraction"
    assert base["environment"]["packages"]["lm_eval"].startswith("0.4.")
    words = base["tasks"]["tiny_words"]
    assert list(words["metrics"]) == ["exact_match,first"] and words["num_samples"] == 2


def test_real_samples_are_compared():
    comparison = compare(read_all([str(LM_EVAL / "tiny-base"), str(LM_EVAL / "tiny-tuned")]), settings=Settings(500))
    row = next(row for row in comparison.differences if row.metric == "acc")
    _, ours = rows_of(LM_EVAL / "tiny-tuned", "tiny_sums")
    _, theirs = rows_of(LM_EVAL / "tiny-base", "tiny_sums")
    assert row.difference == pytest.approx(np.mean([r["acc"] for r in ours]) - np.mean([r["acc"] for r in theirs]))
    assert (row.num_items, row.test) == (40, "McNemar")


def test_single_files_are_named(folders):
    files = [next(folder.glob("samples_tiny_sums_*.jsonl")) for folder in folders]
    base, tuned = read_all([f"before={files[0]}", str(files[1])])
    assert (base["name"], tuned["name"], list(base["tasks"])) == ("before", "tiny-tuned", ["tiny_sums"])
    assert compare([base, tuned], settings=Settings(500)).differences


def test_a_metric_without_a_direction_and_one_that_is_no_mean_are_left_out(folders):
    for folder in folders:
        file = next(folder.glob("results_*.json"))
        record = json.loads(file.read_text(encoding="utf-8"))
        del record["higher_is_better"]["tiny_sums"]["acc"]
        record["results"]["tiny_words"]["exact_match,first"] = 0.7  # of the whole corpus
        file.write_text(json.dumps(record), encoding="utf-8")
    refuse(folders, "tiny_words_.*no metric is a number per item")
    (result,) = read_all([str(next(folders[0].glob("samples_tiny_sums_*.jsonl")))])
    assert list(result["tasks"]["tiny_sums"]["metrics"]) == ["acc_norm"]


def test_documents_name_clusters(folders):
    for folder in folders:
        file, rows = rows_of(folder, "tiny_sums")
        write_rows(file, [row | {"doc": row["doc"] | {"cluster_id": row["doc"]["passage"]}} for row in rows])
    comparison = compare(read_all(map(str, folders)), tasks=["tiny_sums"], settings=Settings(500))
    assert [row.num_clusters for row in comparison.differences] == [7, 7]


def test_other_shots_and_versions_are_refused_in_one_line(folders):
    fewshot = LM_EVAL / "tiny-fewshot"
    refuse([folders[0], fewshot], r"tiny_sums: different num_fewshot \(shots\), 0 and 2")
    summary = next(folders[1].glob("results_*.json"))
    record = json.loads(summary.read_text(encoding="utf-8"))
    record["versions"]["tiny_sums"] = 2.0
    summary.write_text(json.dumps(record), encoding="utf-8")
    refuse(folders, "tiny_sums: different task version, 1.0 and 2.0")
    summary.unlink()
    refuse(folders, "results_.*cannot be read .*: keep it beside its samples")


def test_other_numbers_of_samples_are_refused(folders):
    file, rows = rows_of(folders[1], "tiny_words")
    for row in rows:
        row["resps"] = [[*row["resps"][0], "4", "4"]]
    write_rows(file, rows)
    refuse(folders, "tiny_words: different numbers of samples per item, 2 and 4")


def test_bad_samples_are_refused(folders, tmp_path):
    file, rows = rows_of(folders[0], "tiny_sums")
    write_rows(file, [{key: value for key, value in row.items() if key != "filter"} for row in rows])
    refuse(folders, "no samples file of lm-eval 0.4.5 or later, 'filter' is missing")
    file.write_text('{"doc_id": 1', encoding="utf-8")
    refuse(folders, "samples_tiny_sums_.*line 1: not JSON")
    file.write_text("", encoding="utf-8")
    refuse(folders, "no samples in it")
    write_rows(file, rows)
    shutil.copy(file, file.with_name("samples_tiny_sums_2020-01-01T00-00-00.0.jsonl"))
    shutil.copy(next(file.parent.glob("results_*.json")), file.with_name("results_2020-01-01T00-00-00.0.json"))
    refuse(folders, "a second log of task tiny_sums in this folder")


def test_nested_json_is_refused_in_one_line(folders):
    """Deeper than Python's stack: in samples, and in what stands beside them."""
    deep = "[" * 200_000
    next(folders[1].glob("samples_tiny_sums_*.jsonl")).write_text(deep)
    refuse(folders[1:], "samples_tiny_sums.*not JSON")
    next(folders[0].glob("results_*.json")).write_text(deep)
    refuse(folders, "results_.*cannot be read|results_.*not JSON")


def test_logs_of_one_name_are_seeds(folders):
    """As of several runs of one model, in the order given."""
    both = read_all([f"{name}={folder}" for name, folder in zip(("base", "base"), folders, strict=True)])
    assert [(result["name"], result["model"]["seed"]) for result in both] == [("base", 0), ("base", 1)]
    assert set(both[1]["tasks"]) == {"tiny_sums", "tiny_words"}
    # One result beside seeds may be a pre-trained model's or not; which is not known here.
    (one,) = read_all([str(folders[0])])
    comparison = compare([one, *both], settings=Settings(500))
    assert "is one result beside 2 seeds, which is right for a model that no seed has shaped" in comparison.notes[0]


@pytest.mark.parametrize("line", ["[1]", "7", '{"doc_id": 1}', "null", '{"resps": 7}'])
def test_strange_samples_are_refused_in_one_line(folders, line):
    file, rows = rows_of(folders[0], "tiny_sums")
    file.write_text(json.dumps(rows[0] | json.loads(line)) if line[0] == "{" and "resps" in line else line)
    refuse(folders, "samples_tiny_sums")


def test_the_command_reads_folders_and_refuses_to_write_over_them(folders, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    run = [str(folders[0]), f"after={folders[1]}", "--num_resamples", "300", "--format", "markdown"]
    command.run(parser.parse_args(run))
    assert "after vs tiny-base, acc on tiny_sums: " in capsys.readouterr().out
    file = next(folders[0].glob("samples_tiny_sums_*.jsonl"))
    with pytest.raises(UserError, match="is one of the results"):
        command.run(parser.parse_args([*run, "--output", str(file)]))
