"""lm-eval's --log_samples files: written by lm-eval itself, compared item by item, refused where they do not fit."""

import json
import re
import shutil

import numpy as np
import pytest

from maskft_common.errors import UserError
from maskft_lab.cli.main import main
from maskft_lab.results.compare import compare
from maskft_lab.results.comparison import Settings
from maskft_lab.results.reading import read_all

NUM_ROWS = 24
TASK = {
    "task": "sums",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["1", "2"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    "metadata": {"version": 3},
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Folders of two models, as lm-eval writes them: its dummy model answers at random."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("lm_eval")
    rows = [{"question": f"{n} of {NUM_ROWS}?", "answer": n % 2} for n in range(NUM_ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    (folder / "sums.yaml").write_text(json.dumps(task))  # which YAML contains
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    for seed, name in enumerate(("base", "tuned")):
        tracker = EvaluationTracker(output_path=str(folder / "out"))
        found = simple_evaluate(
            "dummy",
            model_args=f"pretrained={name}",
            tasks=["sums"],
            task_manager=tasks,
            log_samples=True,
            evaluation_tracker=tracker,
            bootstrap_iters=0,
            random_seed=seed,
        )
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        tracker.save_results_samples("sums", samples["sums"])
    return folder / "out"


@pytest.fixture
def folders(logs, tmp_path):
    """Copies that a test may change."""
    copy = shutil.copytree(logs, tmp_path / "logs")
    return sorted(copy.iterdir())


def samples_of(folder):
    (file,) = folder.glob("samples_sums_*.jsonl")
    return file


def rows_of(folder):
    return [json.loads(line) for line in samples_of(folder).read_text().splitlines()]


def write_rows(folder, rows):
    samples_of(folder).write_text("".join(json.dumps(row) + "\n" for row in rows))


def refuse(paths, match):
    with pytest.raises(UserError, match=match) as caught:
        compare(read_all(map(str, paths)), settings=Settings(200))
    assert "\n" not in str(caught.value)


def test_samples_are_a_result_and_are_compared_item_by_item(folders):
    base, tuned = read_all(map(str, folders))
    assert (base["name"], tuned["name"]) == ("base", "tuned")
    task = base["tasks"]["sums"]
    assert (task["version"], task["num_fewshot"], len(task["items"])) == (3, 0, NUM_ROWS)
    assert list(task["metrics"]) == ["acc", "acc_norm"]
    (summary,) = folders[0].glob("results_*.json")
    reported = json.loads(summary.read_text())["results"]["sums"]
    assert task["metrics"]["acc"]["value"] == pytest.approx(reported["acc,none"])
    assert base["environment"]["packages"]["lm_eval"].startswith("0.4.")

    row = compare([base, tuned], settings=Settings(200)).differences[0]
    ours, theirs = ([row["acc"] for row in rows_of(folder)] for folder in reversed(folders))
    assert (row.num_items, row.test) == (NUM_ROWS, "McNemar")
    assert row.difference == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert row.won == sum(a > b for a, b in zip(ours, theirs, strict=True))


def test_the_folder_of_several_models_can_be_named(folders):
    assert [each["name"] for each in read_all([str(folders[0].parent)])] == ["base", "tuned"]


def test_samples_of_two_models_in_one_folder_are_not_one_model(folders):
    """As lm-eval writes them with an --output_path that names a file."""
    samples = samples_of(folders[1])
    (summary,) = folders[1].glob("results_*.json")
    shutil.move(samples, folders[0] / samples.name.replace("sums", "words"))
    shutil.move(summary, folders[0])
    refuse(folders[:1], "holds samples of several models, 'base' and 'tuned': name single files")


def test_a_single_file_can_be_named(folders):
    (result,) = read_all([f"before={samples_of(folders[0])}"])
    assert result["name"] == "before"


def test_other_prompts_are_refused(folders):
    rows = rows_of(folders[1])
    rows[3]["prompt_hash"] = "0" * 64
    write_rows(folders[1], rows)
    refuse(folders, "different prompts or references of the same items")


def test_a_metric_that_is_no_mean_of_items_is_left_out(folders):
    for folder in folders:
        (file,) = folder.glob("results_*.json")
        summary = json.loads(file.read_text())
        summary["results"]["sums"]["acc,none"] = 0.123  # of the whole corpus
        file.write_text(json.dumps(summary))
    with pytest.warns(UserWarning, match="acc is left out: not a mean over the documents"):
        results = read_all(map(str, folders))
    assert [row.metric for row in compare(results, settings=Settings(200)).differences] == ["acc_norm"]


def test_a_metric_without_a_number_on_one_document_is_left_out_and_named(folders):
    rows = rows_of(folders[0])
    rows[3]["acc"] = None
    write_rows(folders[0], rows)
    with pytest.warns(UserWarning, match="acc is left out: a number on 23 of 24 documents"):
        (result,) = read_all([str(folders[0])])
    assert list(result["tasks"]["sums"]["metrics"]) == ["acc_norm"]

    (file,) = folders[0].glob("results_*.json")
    summary = json.loads(file.read_text())
    summary["higher_is_better"] = {}
    file.write_text(json.dumps(summary))
    without = "acc_norm: without a direction in higher_is_better"
    refuse([folders[0]], rf"no metric can be compared \(acc: a number on 23 of 24 documents; {without}\)")


def test_results_may_be_named_by_the_user(folders, capsys):
    """--output_path scores.json makes scores_DATE.json."""
    for folder in folders:
        (file,) = folder.glob("results_*.json")
        file.rename(file.with_name(file.name.replace("results_", "scores_")))
    assert len(read_all(map(str, folders))) == 2
    (file,) = folders[0].glob("scores_*.json")
    shutil.copy(file, file.with_name(file.name.replace("scores_", "more_")))
    refuse([folders[0]], "found 2 results files of lm-eval for it; keep results_.*json beside it")


def test_metrics_with_a_filter_can_be_named(folders, capsys):
    """Their names have a comma, as the separator of names."""
    for folder in folders:
        rows = []
        for row in rows_of(folder):
            rows += [row | {"filter": name} for name in ("strict-match", "flexible-extract")]
        write_rows(folder, rows)
    wanted = "acc,flexible-extract,acc_norm,strict-match"
    assert (
        main(["compare", *map(str, folders), "--metrics", wanted, "--num_resamples", "1000", "--format", "json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    metrics = {row["metric"] for row in found["differences"]}
    assert metrics == {"acc,flexible-extract", "acc_norm,strict-match"}


def test_damage_ends_in_one_line(folders):
    file = samples_of(folders[0])
    whole = file.read_text()
    for text, match in (
        (whole[:-9], "line 24: not JSON"),
        ("".join(whole.splitlines(True)[:9]), "9 of the 24 documents that were evaluated: is the file complete?"),
        ("[1]\n", "line 1: not a sample of lm-eval"),
        ("", "no samples in it"),
        (json.dumps({"doc_id": 1}) + "\n", "no samples of lm-eval 0.4.5 or later, 'filter' is missing"),
        (whole.replace('"metrics": [', '"metrics": 3, "x": ['), "not a complete samples file of lm-eval"),
        (whole + whole, "document 0 has two samples under filter 'none', as of two logs in one"),
        (
            re.sub(r'"acc": [01.]+', '"acc": 1.7e308', whole),
            "not a complete samples file of lm-eval .intermediate over",
        ),
    ):
        file.write_text(text)
        refuse([folders[0]], match)
    file.write_text(whole)
    (summary,) = folders[0].glob("results_*.json")
    content = json.loads(summary.read_text())
    summary.write_text(json.dumps(content | {"config": "dummy"}))
    refuse([folders[0]], "results_.*not a results file of lm-eval")
    summary.unlink()
    refuse([folders[0]], "found 0 results files of lm-eval for it; keep results_.*json beside it")
