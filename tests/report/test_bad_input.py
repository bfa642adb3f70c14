"""Bad input ends in one line, and nothing is written."""

import json
import re

import pytest

from finished_study import write_summary
from maskft_common import layout
from maskft_lab.cli.main import main
from maskft_lab.results.schema import read_result, write_result


@pytest.fixture
def error(capsys):
    """Run ``maskft report`` with words, which must fail; its one line."""

    def run(*words):
        assert main(["report", *map(str, words)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.mark.parametrize("name", ["masks", "landscape", "curvature", "bound"])
def test_nan_in_an_array(name, study, error):
    file, page = study / layout.ANALYSIS / f"{name}.json", study / "page.html"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"more": [1.0, float("nan")]}))
    assert re.search(rf"{name}\.json is not as .* \(it holds NaN\): delete it", error(study, "-o", page))
    assert not page.exists()


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"study": "tiny-study", "models": {"tiny": {}}}', "[[1]]"])
@pytest.mark.parametrize("name", [layout.SUMMARY.format("tiny-study"), f"{layout.RUNS}/mask-s0/{layout.RUN}"])
def test_a_record_that_is_not_what_a_study_writes(name, content, study, error, capsys):
    (study / name).write_text(content)
    line = error(study, "-o", study / "page.html")
    assert re.search(rf"{re.escape(name)} is not as maskft study writes it .*; run the study again", line)
    assert main(["analyze", str(study)]) == 2
    assert capsys.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize("key", ["comparison", "runs", "tuning"])
def test_a_part_of_a_summary_that_is_not_what_a_study_writes(key, study, error):
    file = study / layout.SUMMARY.format("tiny-study")
    summary = json.loads(file.read_text())
    summary["models"]["tiny"][key] = [5]
    file.write_text(json.dumps(summary))
    assert "is not as maskft study writes it" in error(study, "-o", study / "page.html")


def test_a_history_that_is_none(study, error):
    (study / layout.RUNS / "mask-s0" / layout.TRAINING).write_text('{"summary": [1]}')
    assert "training.json is not as maskft study writes it" in error(study, "-o", study / "page.html")


def test_an_array_that_is_not_what_analyze_writes(study, error):
    file = study / layout.ANALYSIS / "landscape.json"
    file.write_text(json.dumps({"plane": {"models": ["a", "b", "c"], "heldout": [], "x": [0.0]}}))
    line = error(study, "--figures", study / "f", "--only", "5")
    assert "fig05_12_landscape: its data is not valid" in line
    assert line.endswith("To compute it again: maskft analyze study --what landscape")
    file.write_text("{}")
    assert "its data is not valid (KeyError: 'plane')" in error(study, "-o", study / "page.html")
    file.write_text("[1")
    assert "landscape.json is not as maskft analyze writes it" in error(study, "-o", study / "page.html")
    assert not (study / "f").exists() and not (study / "page.html").exists()


def test_other_base_models_in_one_comparison(study, error):
    file = study / layout.RUNS / "mask-s0" / layout.RUN
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": "another"}))
    assert re.search("different base models.*another.*--base", error(study, "-o", study / "page.html"))


def test_a_run_without_results_item_by_item(study):
    results = [read_result(file) for file in sorted(study.glob(f"{layout.RESULTS}/*/{layout.RESULT}"))]
    for result in results:
        if result["name"] == "mask":
            for metric in result["tasks"]["sums"]["metrics"]:
                for item in result["tasks"]["sums"]["items"]:
                    del item[metric]
            folder = f"{result['study']['run']}-{result['study']['role']}"
            write_result(study / layout.RESULTS / folder / layout.RESULT, result)
    write_summary(study, results)
    assert main(["report", str(study), "-o", str(study / "page.html")]) == 0
    text = (study / "page.html").read_text()
    assert "<li>nll on sums leaves out &#39;mask&#39;, without it" in text


def test_a_figure_whose_run_is_missing(study, error):
    assert "masks of this study differ in max_train_samples alone" in error(
        study, "--figures", study / "f", "--only", "7"
    )
    (study / layout.ANALYSIS / "curvature.json").unlink()
    line = error(study, "--figures", study / "f", "--only", "eq16_18_curvature")
    assert line.endswith("there is no analysis/curvature.json; maskft analyze study --what curvature")
    assert re.search("no figure '2'; there are 1, 3, 4", error(study, "--figures", study / "f", "--only", "2"))
    assert not (study / "f").exists()


def test_places_that_cannot_be_read_or_written(study, error):
    assert "is not a folder" in error(study / "nowhere", "-o", "x")
    assert "no output: give -o report.html" in error(study)
    assert "is a folder" in error(study, "-o", study)
    assert "--only chooses figures" in error(study, "-o", "x", "--only", "1")
    (study / "a-file").write_text("")
    assert "is a file; name a folder" in error(study, "--figures", study / "a-file")
    assert "a file and no folder" in error(study, "-o", study / "a-file" / "page.html", "--figures", study / "figures")
    assert not (study / "figures").exists()
    (study / "other.json").write_text("{}")
    assert "exists and is no HTML page" in error(study, "-o", study / "other.json")
    (study / "empty").mkdir()
    assert "holds neither finished runs" in error(study / "empty", "-o", "x")
    assert "no study in" in error(study, "--study_name", "tinystudy", "-o", "x")


def test_a_recipe_that_is_no_text(study, error):
    (study / layout.STUDY_RECIPE.format("tiny-study")).write_bytes(b"\x87\xff")
    page = study / "page.html"
    assert "is not UTF-8 text: replace it by the study's recipe" in error(study, "-o", page)
    assert not page.exists()
