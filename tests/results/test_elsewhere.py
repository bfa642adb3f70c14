"""lm-eval's samples and inspect-ai's logs: read, compared, and refused where they were not measured alike."""

import argparse
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from maskft_base.errors import UserError
from maskft_lab.cli import compare as command
from maskft_lab.results.compare import compare
from maskft_lab.results.comparison import Settings
from maskft_lab.results.elsewhere import add_samples
from maskft_lab.results.reading import read_all

# Written by lm-eval 0.4.13 with two tiny random models (``tests/results/make_lm_eval_samples.py``).
LM_EVAL = Path(__file__).parent / "lm_eval"
# Written by inspect-ai 0.3.285 with its mock model (``tests/results/make_inspect_logs.py``).
INSPECT = Path(__file__).parent / "inspect"


def rows_of(folder, task):
    (file,) = folder.glob(f"samples_{task}_*.jsonl")
    return file, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folders(tmp_path):
    """Copies of both models' folders, free to be changed."""
    return [Path(shutil.copytree(LM_EVAL / name, tmp_path / name)) for name in ("tiny-base", "tiny-tuned")]


def refuse(paths, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        compare(read_all([str(path) for path in paths], **options), settings=Settings(200))
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


def test_single_files_without_the_results_beside_them(folders):
    files = [next(folder.glob("samples_tiny_sums_*.jsonl")) for folder in folders]
    for folder in folders:
        next(folder.glob("results_*.json")).unlink()
    base, tuned = read_all([f"before={files[0]}", str(files[1])])
    assert (base["name"], tuned["name"]) == ("before", "tiny-tuned")
    assert base["tasks"]["tiny_sums"]["num_fewshot"] is None
    assert compare([base, tuned], settings=Settings(500)).differences


def test_a_field_of_the_documents_names_clusters(folders):
    comparison = compare(
        read_all(list(map(str, folders)), cluster_by="passage"), tasks=["tiny_sums"], settings=Settings(500)
    )
    assert [row.num_clusters for row in comparison.differences] == [7, 7]
    refuse(folders, "chapter: not a field of the items", cluster_by="chapter")


def test_other_shots_and_versions_are_refused_in_one_line(folders):
    fewshot = LM_EVAL / "tiny-fewshot"
    refuse([folders[0], fewshot], r"tiny_sums: different num_fewshot \(shots\), 0 and 2")
    summary = next(folders[1].glob("results_*.json"))
    record = json.loads(summary.read_text(encoding="utf-8"))
    record["versions"]["tiny_sums"] = 2.0
    summary.write_text(json.dumps(record), encoding="utf-8")
    refuse(folders, "tiny_sums: different task version, 1.0 and 2.0")
    # Without lm-eval's results the prompts tell: their hashes differ.
    shutil.copytree(fewshot, folders[0].parent / "fewshot")
    alone = [next(folder.glob("samples_tiny_sums_*.jsonl")) for folder in (folders[0], folders[0].parent / "fewshot")]
    for file in alone:
        next(file.parent.glob("results_*.json")).unlink()
    refuse(alone, "different prompts or references of the same items")


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
    refuse(folders, "a second log of task tiny_sums")


def test_nested_json_is_refused_in_one_line(folders, tmp_path):
    """Deeper than Python's stack: in samples, in what stands beside them, in a log and in an archive of one."""
    deep = "[" * 200_000
    samples, log, archive = tmp_path / "samples_a_1.jsonl", tmp_path / "log.json", tmp_path / "log.eval"
    samples.write_text(deep)
    log.write_text(deep)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("header.json", deep)
    for path in (samples, log, archive):
        refuse([path], "not JSON|cannot be read as")
    next(folders[0].glob("results_*.json")).write_text(deep)
    refuse(folders, "results_.*cannot be read|results_.*not JSON")


def test_scores_of_several_samples_become_averages_and_pass_rates():
    items = [{"id": "a"}, {"id": "b"}, {"id": "c"}]
    add_samples(items, "match", [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert [item["match avg@4"] for item in items] == [0.5, 0, 1]
    assert [item["match pass@2"] for item in items] == pytest.approx([5 / 6, 0, 1])
    assert [item["match pass@4"] for item in items] == [1, 0, 1]
    add_samples(items, "grade", [[0.5, 1], [0, 0], [None, 1]])
    assert [item["grade avg@2"] for item in items] == [0.75, 0, None] and "grade pass@2" not in items[0]
    with pytest.raises(UserError, match="item 'a' has 1 samples, 'b' 2: give a whole log"):
        add_samples(items[:2], "match", [[1], [1, 0]])


def test_real_logs_of_inspect_ai_are_read_and_compared():
    logs = [str(INSPECT / f"{name}.eval") for name in ("base", "tuned")]
    base, tuned = read_all(logs)
    assert (base["name"], tuned["name"]) == ("mockllm/base", "mockllm/tuned")
    assert base["environment"]["packages"] == {"inspect_ai": "0.3.285"}
    task = base["tasks"]["sums"]
    assert (task["version"], task["num_samples"]) == (1, 2)
    assert task["generation_kwargs"] == {"max_tokens": 16, "temperature": 0.7}  # options of the run, not of the model
    assert [item["match avg@2"] for item in task["items"]] == [1, 0, 0.5, 0, 0.5]
    assert [item["match pass@2"] for item in task["items"]] == [1, 0, 1, 0, 1]
    rows = compare([base, tuned], settings=Settings(500)).differences
    assert [(row.metric, row.num_items) for row in rows] == [("match avg@2", 5), ("match pass@2", 5)]
    assert [row.difference for row in rows] == pytest.approx([0.3, 0.2])
    assert read_all([str(INSPECT)]) == [base, tuned]  # inspect-ai writes the logs of all models into one folder
    (row, _) = compare(read_all(logs, cluster_by="passage"), settings=Settings(500)).differences
    assert row.num_clusters == 3


# inspect-ai: the layout of ``inspect_ai/log/_recorders/eval.py``, written here


def log(name, scores, epochs=1, **changes):
    """A log whose item i has ``scores[i]``, one value per epoch."""
    spec = {
        "task": "arithmetic",
        "task_version": 0,
        "model": name,
        "task_args": {"fewshot": 3},
        "created": "2026-01-01",
    }
    spec |= {"packages": {"inspect_ai": "0.3.200"}, "model_generate_config": {"max_tokens": 64, "max_retries": 3}}
    samples = [
        {
            "id": index,
            "epoch": epoch + 1,
            "input": f"{index}+1?",
            "target": str(index + 1),
            "scores": {"match": {"value": score if epochs == 1 else score[epoch]}, "free_text": {"value": "a remark"}},
            "metadata": {"page": index // 4},
            "events": ["long"] * 3,
        }
        for index, score in enumerate(scores)
        for epoch in range(epochs)
    ]
    header = {"version": 2, "status": "success", "eval": spec | changes.pop("eval", {})} | changes
    return header, samples


def write_log(path, header, samples, compress=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(header | {"samples": samples}), encoding="utf-8")
        return str(path)
    members = {"_journal/start.json": header, "header.json": header}
    members |= {f"samples/{sample['id']}_epoch_{sample['epoch']}.json": sample for sample in samples}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, json.dumps(content))
    if compress:
        path.write_bytes(as_zstd(members))
    return str(path)


def as_zstd(members):
    """A zip archive with method 93, which zipfile writes from Python 3.14 on."""
    body, directory = b"", b""
    for name, content in members.items():
        plain = json.dumps(content).encode()
        packed = zstandard.ZstdCompressor().compress(plain)
        fields = (20, 0, 93, 0, 33, zipfile.crc32(plain), len(packed), len(plain), len(name))
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 20, *fields[:5], *fields[5:8], len(name), 0, 0, 0, 0, 0, len(body)
        )
        directory += name.encode()
        body += struct.pack("<4s5H3L2H", b"PK\3\4", *fields, 0) + name.encode() + packed
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + end


GRADES = ["C", "I", "P", "N"] * 10


@pytest.mark.parametrize("name", ["log.eval", "zstd.eval", "log.json"])
def test_inspect_logs_are_read(tmp_path, name):
    path = write_log(tmp_path / name, *log("openai/one", GRADES), compress=name.startswith("zstd"))
    (result,) = read_all([path])
    task = result["tasks"]["arithmetic"]
    assert result["name"] == "openai/one" and result["environment"]["packages"] == {"inspect_ai": "0.3.200"}
    assert (task["num_fewshot"], list(task["metrics"])) == (3, ["match"])
    assert task["metrics"]["match"]["value"] == pytest.approx(1.5 / 4)
    assert task["generation_kwargs"] == {"max_tokens": 64}


def test_inspect_logs_are_compared(tmp_path):
    paths = [write_log(tmp_path / "a.eval", *log("one", ["C", "I"] * 20))]
    paths.append(write_log(tmp_path / "b" / "b.json", *log("two", [True, "C"] * 20)))
    (row,) = compare(read_all(paths), settings=Settings(500)).differences
    assert (row.method, row.difference, row.verdict) == ("two", 0.5, "better")
    (row,) = compare(read_all(paths, cluster_by="page"), settings=Settings(500)).differences
    assert row.num_clusters == 10


def test_inspect_logs_of_one_task_and_model_need_names(tmp_path):
    first, second = (write_log(tmp_path / f"{name}.eval", *log("one", GRADES)) for name in "ab")
    refuse([tmp_path], "b.eval: a second log of task arithmetic and model one: give each a name, NAME=")
    assert [result["name"] for result in read_all([f"before={first}", f"after={second}"])] == ["before", "after"]
    refuse([f"all={tmp_path}", first], "b.eval: a second log of task arithmetic and model one")


def test_logs_of_one_name_are_seeds(tmp_path, folders):
    """As of several runs of one model, in the order given."""
    paths = [
        write_log(tmp_path / f"{name}.eval", *log(name, ["C"] * right + ["I"] * (40 - right)))
        for name, right in (("a", 10), ("b", 12), ("c", 30), ("d", 34))
    ]
    results = read_all([f"{name}={path}" for name, path in zip(("base", "base", "tuned", "tuned"), paths, strict=True)])
    assert [(result["name"], result["model"]["seed"]) for result in results] == [
        ("base", 0),
        ("base", 1),
        ("tuned", 0),
        ("tuned", 1),
    ]
    (row,) = compare(results, settings=Settings(500)).differences
    assert (row.num_seeds, row.difference) == (2, pytest.approx((20 / 40 + 22 / 40) / 2))
    both = read_all([f"{name}={folder}" for name, folder in zip(("base", "base"), folders, strict=True)])
    assert [result["model"]["seed"] for result in both] == [0, 1] and set(both[1]["tasks"]) == {
        "tiny_sums",
        "tiny_words",
    }
    # One result beside seeds may be a pre-trained model's or not; which is not known here.
    comparison = compare([*read_all([paths[0]]), *results[2:]], settings=Settings(500))
    assert "a is one result beside 2 seeds, which is right for a model that no seed has shaped" in comparison.notes[0]


def test_the_direction_of_a_metric_is_never_guessed_from_a_part_of_a_word(tmp_path, folders):
    """ "wer" is in "answer", "ter" in "filter" and "criteria", "loss" in "gloss"."""

    def with_score(name, scorer, values):
        header, samples = log(name, GRADES)
        for sample, value in zip(samples, values, strict=True):
            sample["scores"] = {scorer: {"value": value}}
        return write_log(tmp_path / scorer / f"{name}.eval", header, samples)

    few, many = ["C"] * 10 + ["I"] * 30, ["C"] * 30 + ["I"] * 10
    for scorer in ("answer", "criteria", "loss"):  # grades are right and wrong, whatever their name
        paths = [with_score(name, scorer, values) for name, values in (("few", few), ("many", many))]
        (row,) = compare(read_all(paths), settings=Settings(500)).differences
        assert (row.metric, row.verdict) == (scorer, "better")
    paths = [with_score(name, "wer", [value] * 39 + [0.5]) for name, value in (("low", 0.1), ("high", 0.9))]
    assert compare(read_all(paths), settings=Settings(500)).differences[0].verdict == "worse"
    paths = [with_score(name, "gloss", [value] * 39 + [0.5]) for name, value in (("one", 0.1), ("two", 0.9))]
    refuse(paths, "gloss is better is not known: say --higher_is_better gloss or --lower_is_better gloss")
    for more_is_better, verdict in ((True, "better"), (False, "worse")):
        read = read_all(paths, directions={"gloss": more_is_better})
        assert compare(read, settings=Settings(500)).differences[0].verdict == verdict
    # Of lm-eval without the results beside its samples: not by the filter's name either.
    for folder in folders:
        next(folder.glob("results_*.json")).unlink()
        file, rows = rows_of(folder, "tiny_sums")
        write_rows(file, [row | {"filter": "get-answer"} for row in rows])
    (base, _) = read_all([str(folder) for folder in folders])
    assert base["tasks"]["tiny_sums"]["metrics"]["acc,get-answer"]["higher_is_better"]


STRANGE = [
    {"samples": [{"id": 1, "scores": {"match": []}}]},
    {"samples": [{"id": 1, "scores": 7}]},
    {"samples": [7]},
    {"eval": {"task": "t", "packages": [1]}},
    {"samples": [{"id": 1, "epoch": "one", "scores": {"match": {"value": "C"}}}]},
    {"plan": [3]},
]


@pytest.mark.parametrize("changes", STRANGE)
def test_strange_logs_are_refused_in_one_line(tmp_path, changes):
    header, samples = log("one", GRADES)
    path = tmp_path / "log.json"
    path.write_text(json.dumps(header | {"samples": samples} | changes), encoding="utf-8")
    refuse([path], "log.json: ")


@pytest.mark.parametrize("line", ["[1]", "7", '{"doc_id": 1}', "null", '{"resps": 7}'])
def test_strange_samples_are_refused_in_one_line(folders, line):
    file, rows = rows_of(folders[0], "tiny_sums")
    file.write_text(json.dumps(rows[0] | json.loads(line)) if line[0] == "{" and "resps" in line else line)
    refuse(folders, "samples_tiny_sums")


def test_the_header_of_an_archive_is_within_its_bound(tmp_path):
    header, samples = log("one", GRADES)
    bomb = header | {"zeros": "0" * (70 * 2**20)}
    refuse([write_log(tmp_path / "bomb.eval", bomb, samples)], "more than 100 times its size")


def test_ids_of_messages_are_no_wording(tmp_path):
    """inspect-ai draws an id for every message of every run."""
    paths = []
    for name, text in (("one", "1+1?"), ("two", "1+1?"), ("three", "1+2?")):
        header, samples = log(name, GRADES)
        for sample in samples:
            sample["input"] = [{"id": name, "role": "user", "content": text}]
        paths.append(write_log(tmp_path / f"{name}.eval", header, samples))
    assert compare(read_all(paths[:2]), settings=Settings(500)).differences
    refuse(paths[1:], "different prompts or references of the same items")


def test_epochs_are_samples_of_an_item(tmp_path):
    one = write_log(tmp_path / "one" / "a.eval", *log("one", [["C", "I", "I", "C"]] * 20, epochs=4))
    two = write_log(tmp_path / "two" / "b.eval", *log("two", [["C", "C", "I", "C"]] * 10 + [["I"] * 4] * 10, epochs=4))
    comparison = compare(read_all([one, two]), settings=Settings(500))
    assert [row.metric for row in comparison.differences] == ["match avg@4", "match pass@2", "match pass@4"]
    assert comparison.differences[0].difference == pytest.approx(0.375 - 0.5)
    other = write_log(tmp_path / "other" / "c.eval", *log("other", [["C", "I"]] * 20, epochs=2))
    refuse([one, other], "arithmetic: different numbers of samples per item, 4 and 2")


def test_inspect_logs_measured_differently_are_refused(tmp_path):
    one = write_log(tmp_path / "one" / "a.eval", *log("one", GRADES))
    for folder, changes, message in (
        ("v", {"task_version": 2}, "different task version, 0 and 2"),
        ("f", {"task_args": {"fewshot": 5}}, r"different num_fewshot \(shots\), 3 and 5"),
        ("t", {"task_args": {"fewshot": 3, "level": 2}}, "different task_args"),
        ("g", {"model_generate_config": {"max_tokens": 9}}, "different generation_kwargs"),
        ("d", {"model_generate_config": {}}, "different generation_kwargs, {'max_tokens': 64} and {}"),
    ):
        refuse([one, write_log(tmp_path / folder / "b.eval", *log("two", GRADES, eval=changes))], message)
    run = {"config": {"max_tokens": 9, "temperature": None}}  # over the model's own
    other = write_log(tmp_path / "p" / "b.eval", *log("two", GRADES, plan=run))
    refuse([one, other], "different generation_kwargs, {'max_tokens': 64} and {'max_tokens': 9}")
    refuse(
        [one, write_log(tmp_path / "s" / "b.eval", *log("two", GRADES, status="error"))], "ended with status 'error'"
    )
    (tmp_path / "cut.eval").write_bytes(Path(one).read_bytes()[:200])
    refuse([one, tmp_path / "cut.eval"], "cannot be read as a log .File is not a zip")
    bomb = {"id": 1, "epoch": 1, "input": "", "metadata": {"zeros": "0" * (65 * 2**20)}}
    refuse([one, write_log(tmp_path / "bomb.eval", log("two", GRADES)[0], [bomb])], "more than 100 times its size")
    with zipfile.ZipFile(tmp_path / "open.eval", "w") as archive:
        archive.writestr("_journal/start.json", "{}")
    refuse([one, tmp_path / "open.eval"], "no header.json in it: the run has not ended")
    refuse([one, write_log(tmp_path / "w" / "b.eval", *log("two", ["yes"] * 40))], "no score is a number or a grade")


def test_the_command_reads_folders_and_refuses_to_write_over_them(folders, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    run = [str(folders[0]), f"after={folders[1]}", "--num_resamples", "300", "--format", "markdown"]
    command.run(parser.parse_args(run))
    assert "after vs tiny-base, acc on tiny_sums: " in capsys.readouterr().out
    file = next(folders[0].glob("samples_tiny_sums_*.jsonl"))
    with pytest.raises(UserError, match="is one of the results"):
        command.run(parser.parse_args([*run, "--output", str(file)]))
