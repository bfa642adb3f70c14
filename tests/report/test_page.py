"""The page as text: what it says is what the files hold, it loads nothing, and foreign text stays text."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from finished_study import HOSTILE, Page, write_run, write_summary
from maskft_common import layout
from maskft_lab.analysis.runs import TrainedRun
from maskft_lab.cli.main import main
from maskft_lab.report import page as page_module
from maskft_lab.report.catalogue import FIGURES
from maskft_lab.report.evidence import Evidence, NotComputed, gather
from maskft_lab.results.comparison import Comparison, Difference, Score
from maskft_lab.results.schema import read_result, write_result
from maskft_lab.results.words import difference_text, score_text

RESULTS = Path(__file__).parents[2] / "results"
MAX_BYTES = 2_000_000


def comparison(study):
    summary = json.loads((study / layout.SUMMARY.format("tiny-study")).read_text())
    return summary["models"]["tiny"]["comparison"]


def assert_loads_nothing(page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert re.match(r"#|data:image/png;base64,", attributes.get(name, "#") or "#"), (tag, attributes)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "iframe", "object", "embed", "base", "form"}
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_the_end_of_a_training_has_its_method_under_any_name(tmp_path):
    """``last`` of a recipe: its own tests call it complete, the packaged ones continued."""
    runs = [TrainedRun("mask-s0-1", "mask", "mask", 0, "tiny", start="full-s0-1")]
    results = [
        {"name": "mask (complete)", "study": {"run": "mask-s0-1", "role": "last"}},
        {"name": "other", "study": {"run": "other-s0-2", "role": "best"}},
    ]
    methods = Evidence(tmp_path, "tiny-study", "tiny", runs, results).methods
    assert methods == {"mask": ("mask", False), "mask (complete)": ("mask", False)}


def test_runs_of_another_study_have_the_names_of_this_one(tmp_path):
    """Studies that share a folder share runs, whose records have the names of the study that made them."""
    full, mask = "full-s0-0123456789", "mask-s0-aaaaaaaaaa"
    before = write_run(tmp_path, full, "full", "full", 0)
    # Made by this study, in which the start is called otherwise, as the other study calls its mask.
    before += write_run(tmp_path, mask, "mask", "mask", 0, start="tuned_full-s0-0123456789")
    results = []
    for result, name in zip(before, ("mask", "learned"), strict=True):
        file = tmp_path / layout.RESULTS / f"{result['study']['run']}-best" / layout.RESULT
        results.append(result | {"name": name, "study": result["study"] | {"name": name}})
        write_result(file, results[-1])
    write_summary(tmp_path, results, baseline="mask")
    evidence = gather(tmp_path)
    assert evidence.methods == {"mask": ("full", True), "learned": ("mask", False)}
    assert evidence.masks == ["learned"]
    assert {run.id: run.name for run in evidence.runs} == {full: "mask", mask: "learned"}
    # A name that was changed in letters alone: the result's file keeps the former one.
    write_summary(tmp_path, [results[0], results[1] | {"name": "Learned"}], baseline="mask")
    assert gather(tmp_path).methods == {"mask": ("full", True), "Learned": ("mask", False)}


def test_sections_in_the_order_of_a_readers_questions(parsed):
    sections = [a["id"] for tag, a in parsed.tags if tag == "section" and a.get("class") != "chart"]
    wanted = ["verdict", "curves", "table", "ablations", "masks", "landscape", "theory", "cost", "recipe"]
    assert sections == wanted
    assert [a["href"] for tag, a in parsed.tags if tag == "a"] == ["#main", *(f"#{section}" for section in wanted)]
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_it_loads_nothing_and_is_small(page, parsed):
    assert_loads_nothing(parsed)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(", page)
    assert len(page.encode()) < MAX_BYTES


def test_verdicts_and_numbers_are_those_of_the_comparison(finished, parsed):
    record = comparison(finished)
    for row in (Difference(**row) for row in record["differences"]):
        assert difference_text(row) in parsed.texts
    cells = [text for text in parsed.texts if text in ("better", "worse", "not distinguishable")]
    verdicts = [row["verdict"] for row in record["differences"]]
    of_mask = [row.verdict for row in gather(finished).against_mask.differences]
    # In the table of differences, in that of the forest plot and against the mask; the page claims nothing else.
    assert sorted(cells) == sorted([*verdicts, *verdicts, *of_mask])
    assert {score_text(Score(**score)) for score in record["scores"]} <= set(parsed.texts)


def test_a_rival_without_a_loss_or_with_other_seeds_stops_no_report(finished):
    """The study compares what there is; its report ended with an error for one loss that was not finite."""
    evidence = gather(finished)
    mask = evidence.comparison.verdicts[0].parent.method
    whole = {(row.method, row.task, row.metric) for row in evidence.against_mask.differences}
    rival, task, metric = max(place for place in whole if place[0] == "random")

    results = copy.deepcopy(evidence.results)
    of_rival = [result for result in results if result["name"] == rival]
    for result in of_rival:
        record = result["tasks"][task]
        record["items"][0][metric] = None
        record["metrics"][metric]["value"] = None
    evidence = replace(gather(finished), results=results)
    left = {(row.method, row.task, row.metric) for row in evidence.against_mask.differences}
    assert whole - left == {(rival, task, metric)} and left < whole

    for result in of_rival:
        result["model"]["seed"] += 7
    evidence = replace(gather(finished), results=results)
    with pytest.raises(NotComputed, match=f"not comparable with '{mask}'"):
        _ = evidence.against_mask


def test_foreign_text_stays_text(study):
    """A result may be a stranger's, and every text of it."""
    file = study / layout.RESULTS / "mask-s0-best" / layout.RESULT
    result = read_result(file)
    result["study"]["settings"]["note"] = HOSTILE
    write_result(file, result)
    summary = study / layout.SUMMARY.format("tiny-study")
    record = json.loads(summary.read_text())
    record["models"]["tiny"]["comparison"]["notes"] = [HOSTILE]
    summary.write_text(json.dumps(record))
    assert main(["report", str(study), "-o", str(study / "out.html")]) == 0
    text = (study / "out.html").read_text()
    page = Page(text)
    assert page.texts.count(HOSTILE) == 2
    assert "alert('x')</script>" not in text and text.count("</script>") == 1
    assert "b" not in {tag for tag, _ in page.tags}


def test_control_characters_of_any_text_reach_no_page(study):
    """Of a summary that was prepared: its texts, and those of the tables that are made from it."""
    summary = study / layout.SUMMARY.format("tiny-study")
    record = json.loads(summary.read_text())
    compared = record["models"]["tiny"]["comparison"]
    compared["notes"] = ["better \u202e\x1b[2J"]
    compared["verdicts"][0]["parent"]["baseline"] = "parent\u2066"
    for score in compared["scores"]:
        score["test_set"] = "a\x07b"
    summary.write_text(json.dumps(record))
    assert main(["report", str(study), "-o", str(study / "out.html")]) == 0
    text = (study / "out.html").read_text(encoding="utf-8")
    assert r"\x1b[2J" in text and r"a\x07b" in text and r"parent\u2066" in text
    assert all(character.isprintable() or character == "\n" for character in text)


def test_the_header_counts_the_models_of_the_comparison(tmp_path):
    """Of 12 models 4 have their answers beside the summary: it said "4 models"."""
    file = tmp_path / "report.html"
    assert main(["report", str(RESULTS / "small-products-adapters"), "-o", str(file)]) == 0
    (facts,) = [text for text in Page(file.read_text(encoding="utf-8")).texts if text.startswith("base model")]
    assert "12 models (4 with their answers here)" in facts and "heldout" not in facts


def test_a_claim_about_two_trained_models_is_in_the_page_of_their_study(tmp_path):
    """README: full fine-tuning forgets 0.357 [0.115, 0.634] more than the mask; against_mask.md has it too."""
    study = RESULTS / "smollm2-curve-banking77-kl-seeds"
    file = tmp_path / "report.html"
    assert main(["report", str(study), "-o", str(file)]) == 0
    claims = ["+0.3571 [0.1146, 0.6335]", "+0.1993 [0.0787, 0.3370]"]
    texts = Page(file.read_text(encoding="utf-8")).texts
    assert set(claims) <= set(texts)
    assert all(claim in (study / "against_mask.md").read_text() for claim in claims)


def test_the_recipe_is_in_the_page_where_the_folder_has_it(study):
    (study / layout.STUDY_RECIPE.format("tiny-study")).write_text("name: tiny-study\nmethods: [mask] # <b>\n")
    assert main(["report", str(study), "-o", str(study / "out.html")]) == 0
    assert "name: tiny-study\nmethods: [mask] # <b>" in Page((study / "out.html").read_text()).texts


def test_every_chart_has_its_numbers_as_a_table_and_the_others_are_one_closed_list(parsed):
    charts = [a["id"] for tag, a in parsed.tags if tag == "section" and a.get("class") == "chart"]
    assert charts[:3] == ["forest", "against_mask", "fig01_curves"] and {"fig13_heads", "fig14_heads_mean"} <= set(
        charts
    )
    assert {"fig05_12_landscape", "fig06_10_sparsity", "eq16_18_curvature", "table07_bound"} <= set(charts)
    assert len([text for text in parsed.texts if text.startswith("Numbers of “")]) == len(charts)
    (missing,) = [a for tag, a in parsed.tags if tag == "details" and a.get("id") == "missing"]
    assert "open" not in missing and f"Not computed ({len(FIGURES) - len(charts)})" in parsed.texts


def test_sections_without_data_are_left_out_and_the_list_names_the_commands(study):
    shutil.rmtree(study / layout.ANALYSIS)
    assert main(["report", str(study), "-o", str(study / "out.html")]) == 0
    page = Page((study / "out.html").read_text())
    sections = {a["id"] for tag, a in page.tags if tag == "section"}
    assert not sections & {"masks", "landscape", "theory"} and {"verdict", "cost"} <= sections
    for what in ("masks", "landscape", "curvature", "bound"):
        assert f"maskft analyze study --what {what}" in page.texts
    assert any("mask.max_train_samples: [500, 1000, 2000]" in text for text in page.texts)


def test_a_study_that_has_written_no_comparison_yet(study):
    (study / layout.SUMMARY.format("tiny-study")).unlink()
    assert main(["report", str(study), "-o", str(study / "out.html")]) == 0
    text = (study / "out.html").read_text()
    assert "the study has written no comparison yet" in text and 'id="forest"' not in text


@pytest.mark.parametrize("name", ["small-products", "smollm2-math", "demo-small", "smollm2-curve-sums-where"])
def test_published_results_by_one_command(name, tmp_path):
    file = tmp_path / "report.html"
    assert main(["report", str(RESULTS / name), "-o", str(file)]) == 0
    page = Page(file.read_text(encoding="utf-8"))
    assert_loads_nothing(page)
    assert file.stat().st_size < MAX_BYTES
    (record,) = json.loads((RESULTS / name / "summary.json").read_text())["models"].values()
    wanted = Comparison.from_dict(record["comparison"])
    assert all(difference_text(row) in page.texts for row in wanted.differences) and "Verdict" in page.texts
    assert {score_text(score) for score in wanted.scores} <= set(page.texts)


def test_the_best_of_two_models_of_a_published_run_has_the_verdict():
    assert "math mask (best)" in gather(RESULTS / "smollm2-mixed-smoke").masks


def test_the_same_files_give_the_same_page(finished, page, tmp_path):
    assert main(["report", str(finished), "-o", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_long_table_says_that_it_scrolls(finished, monkeypatch):
    monkeypatch.setattr(page_module, "MAX_OPEN_ROWS", 3)
    text = page_module.render_report(gather(finished))
    assert text.count('class="scroll long"') == text.count(" rows: the table scrolls.") > 0


def test_settings_are_those_that_a_method_uses():
    """The study gave a learning rate and a start of the scores to all its masks, and an L1 mask has neither."""
    folder = RESULTS / "small-products-learners"
    runs = ("full", "mask_30", "mask_10", "l1_mask_of_mask_30")
    results = [read_result(folder / f"{run}-s0.json.gz") for run in runs]
    columns, rows = page_module._settings(Evidence(folder, "learners", "model", [], results))
    shown = {name: dict(zip(columns[1:], cells, strict=True)) for name, *cells in rows}
    assert shown["mask, 30 %"]["mask_init_scores"] == "normal"
    assert {shown["L1 mask of mask, 30 %"][key] for key in ("mask_init_scores", "learning_rate")} == {"–"}
    # The same for all methods that are trained.
    assert "per_device_train_batch_size" not in columns
