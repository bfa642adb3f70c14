"""The page as text: what it says is what the files hold, it loads nothing, and foreign text stays text."""

import json
import re
import shutil
from pathlib import Path

import pytest

from finished_study import HOSTILE, Page
from maskft_base import files
from maskft_lab.cli.main import main
from maskft_lab.results.comparison import Difference
from maskft_lab.results.schema import read_result
from maskft_lab.results.text import difference_text, sentence

RESULTS = Path(__file__).parents[2] / "results"
MAX_BYTES = 2_000_000


def comparison(study):
    summary = json.loads((study / files.SUMMARY.format("tiny-study")).read_text())
    return summary["models"]["tiny"]["comparison"]


def assert_loads_nothing(page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert re.match(r"#|data:image/png;base64,", attributes.get(name, "#") or "#"), (tag, attributes)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "iframe", "object", "embed", "base", "form"}
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_sections_in_the_order_of_a_readers_questions(parsed):
    sections = [a["id"] for tag, a in parsed.tags if tag == "section" and a.get("class") != "chart"]
    wanted = ["verdict", "table", "curves", "ablations", "items", "masks", "landscape", "cost", "recipe"]
    assert sections == wanted
    assert [a["href"] for tag, a in parsed.tags if tag == "a"] == ["#main", *(f"#{section}" for section in wanted)]
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_it_loads_nothing_and_is_small(page, parsed):
    assert_loads_nothing(parsed)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(", page)
    assert len(page.encode()) < MAX_BYTES


def test_verdicts_are_those_of_the_comparison(finished, parsed):
    differences = [Difference(**row) for row in comparison(finished)["differences"]]
    texts = " ".join(parsed.texts)
    for row in differences:
        assert sentence(row) in parsed.texts
        assert difference_text(row) in parsed.texts
    assert "of 2 learned masks" in texts
    # The page claims nothing of its own: the words of verdicts are as many as there are differences shown.
    words = ("better", "worse", "not distinguishable")
    chips = [text for text in parsed.texts if text[:1] in "▲▼≈" and text[2:] in words]
    masks = [row for row in differences if row.method.startswith("mask")]
    assert sorted(chip[2:] for chip in chips) == sorted(row.verdict for row in [*differences, *masks])


def test_the_tables_numbers_are_those_of_the_files(finished, parsed):
    scores = comparison(finished)["scores"]
    sorts = [float(a["data-sort"]) for _, a in parsed.tags if "data-sort" in a]
    assert sorts == [score["value"] for score in scores]
    assert parsed.data["comparison"] == comparison(finished)


def test_items_won_and_lost_with_their_texts(finished, parsed):
    record = next(each for each in parsed.data["items"] if each["method"] == "mask")
    row = next(r for r in comparison(finished)["differences"] if (r["method"], r["metric"]) == ("mask", "accuracy"))
    assert {key: record[key] for key in ("won", "lost", "tied")} == {key: row[key] for key in ("won", "lost", "tied")}
    ours, theirs = (
        read_result(finished / files.RESULTS / f"{run}-s0-best")["tasks"]["sums"]["items"] for run in ("mask", "full")
    )
    assert len(record["rows"]) == row["won"] + row["lost"]
    for shown in record["rows"]:
        mine, other = (next(i for i in items if i["id"] == shown["id"]) for items in (ours, theirs))
        assert shown["texts"]["answer"] == mine["answer"]
        assert shown["texts"]["output_method"] == mine["output"].strip()
        assert shown["texts"]["output_baseline"] == other["output"].strip()
        assert shown["gain"] == pytest.approx(shown["method"] - shown["baseline"])


def test_foreign_text_stays_text(page, parsed):
    assert any(HOSTILE.strip() in row["texts"]["output_method"] for r in parsed.data["items"] for row in r["rows"])
    assert "alert('x')</script>" not in page and page.count("</script>") == 2
    assert "b" not in {tag for tag, _ in parsed.tags}


def test_every_chart_has_its_numbers_as_a_table(parsed):
    charts = [a["id"] for tag, a in parsed.tags if tag == "section" and a.get("class") == "chart"]
    assert charts[0] == "verdicts" and {"fig01_curves", "fig13_heads", "fig14_heads_mean"} <= set(charts)
    assert {"fig05_12_landscape", "fig06_10_mask_sparsity", "eq16_18_curvature", "table07_bound"} <= set(charts)
    drawn = [tag for tag, a in parsed.tags if a.get("class") == "how"]
    summaries = [text for text in parsed.texts if text.startswith("Numbers of “")]
    missing = parsed.texts.count("Not here.")
    assert len(summaries) == len(charts) - missing and len(drawn) >= len(summaries)
    assert missing == 2  # figures 3 and 8, 7 and 11: no such grid in this study


def test_what_is_missing_names_the_command(study):
    shutil.rmtree(study / files.ANALYSIS)
    assert main(["report", str(study), "-o", str(study / "out.html")]) == 0
    text = (study / "out.html").read_text()
    for what in ("masks", "landscape", "curvature", "bound"):
        assert f"maskft analyze study --what {what}" in text
    assert "mask.max_train_samples: [500, 1000, 2000]" in text
    assert 'id="map"' in text  # adapters are there


def test_a_study_that_has_written_no_comparison_yet(study):
    (study / files.SUMMARY.format("tiny-study")).unlink()
    assert main(["report", str(study), "-o", str(study / "out.html")]) == 0
    text = (study / "out.html").read_text()
    assert "the study has written no comparison yet" in text
    assert "Against full (best), nll on sums: of 2 learned masks" in text


@pytest.mark.parametrize("name", ["small-products", "smollm2-math", "demo", "gsm8k"])
def test_published_results_by_one_command(name, tmp_path):
    file = tmp_path / "report.html"
    assert main(["report", str(RESULTS / name), "-o", str(file)]) == 0
    page = Page(file.read_text(encoding="utf-8"))
    assert_loads_nothing(page)
    assert file.stat().st_size < MAX_BYTES
    summary = RESULTS / name / "summary.json"
    if summary.is_file():
        (record,) = json.loads(summary.read_text())["models"].values()
        # Published before intervals held all at once: what it has is the same.
        for kind in ("differences", "scores"):
            for shown, wanted in zip(page.data["comparison"][kind], record["comparison"][kind], strict=True):
                assert {key: shown[key] for key in wanted} == wanted
        sorts = [float(a["data-sort"]) for _, a in page.tags if "data-sort" in a]
        assert sorts == [score["value"] for score in record["comparison"]["scores"]]


def test_the_same_files_give_the_same_page(finished, page, tmp_path):
    assert main(["report", str(finished), "-o", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page
