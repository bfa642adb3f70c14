"""Figures: drawn from the arrays' own numbers, written in three formats, the same each time."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from maskft_base import files
from maskft_lab.cli.main import main
from maskft_lab.report.catalogue import PAPER_FIGURES, charts_of, select_charts
from maskft_lab.report.charts import FORMATS, PAGE_HEIGHT, Chart, Panel, draw_pages, files_of, to_svg
from maskft_lab.report.evidence import gather
from maskft_lab.report.fig_verdict import interval
from maskft_lab.results.text import Table


@pytest.fixture(scope="module")
def evidence(finished):
    return gather(finished)


@pytest.fixture(scope="module")
def charts(evidence):
    return {chart.key: chart for each in charts_of(evidence).values() for chart in each}


def axes_of(panel):
    figure = Figure()
    axes = figure.add_subplot()
    panel.draw(axes)
    return axes


def test_every_figure_of_the_paper_is_drawn_or_says_what_makes_it(charts):
    assert {number for chart in charts.values() for number in chart.numbers} == set(PAPER_FIGURES)
    assert {key for key, chart in charts.items() if not isinstance(chart, Chart)} == {
        "fig03_08_mask_layers_to_transform",
        "fig07_11_max_train_samples",
    }


def test_files_for_a_paper(finished, charts, tmp_path, capsys):
    assert main(["report", str(finished), "--figures", str(tmp_path / "a")]) == 0
    assert main(["report", str(finished), "--figures", str(tmp_path / "b"), "--only", "13, masks_effects"]) == 0
    drawn = {key for key, chart in charts.items() if isinstance(chart, Chart)}
    assert {file.name for file in (tmp_path / "a").iterdir()} == {f"{key}.{f}" for key in drawn for f in FORMATS}
    assert "left out fig07_11_max_train_samples: no two evaluated masks" in capsys.readouterr().err
    assert {file.stem for file in (tmp_path / "b").iterdir()} == {"fig13_heads", "masks_effects"}
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()
        assert file.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")
    assert "mask, seed 1" in (tmp_path / "b" / "fig13_heads.svg").read_text()  # text stays text


def test_a_figure_fits_a_paper(charts):
    for chart in charts.values():
        if isinstance(chart, Chart):
            for page in draw_pages(chart):
                width, height = page.get_size_inches()
                assert width <= 7 and height <= 9.5, chart.key


def test_heads_are_those_of_the_array(finished, charts):
    array = json.loads((finished / files.ANALYSIS / "masks.json").read_text())
    (shown, *_), wanted = axes_of(charts["fig13_heads"].panels[0]).images, array["masks"]["mask-s0"]["by_head"]
    np.testing.assert_array_equal(shown.get_array(), [shares["qkv"] for shares in wanted.values()])
    lines = [line for panel in charts["fig14_heads_mean"].panels for line in axes_of(panel).lines]
    assert len(lines) == 4 and len(charts["fig14_heads_mean"].legend) == 4
    np.testing.assert_allclose(lines[0].get_ydata(), np.mean(shown.get_array(), axis=0))


def test_agreement_is_a_multiple_of_chance_and_seeds_of_one_method_stand_first(finished, charts):
    array, chart = json.loads((finished / files.ANALYSIS / "masks.json").read_text()), charts["masks_agreement"]
    axes = axes_of(chart.panels[0])
    assert [text.get_text() for text in axes.get_yticklabels()][:4] == [
        "mask (1)", "mask 20 % (1)", "random (1)", "mask / mask 20 % (4)",
    ]  # fmt: skip
    pair = next(p for p in array["agreement"] if (p["first"], p["second"]) == ("mask-s0", "mask-s1"))
    assert axes.lines[0].get_xdata()[0] == pytest.approx(pair["num_common"] / pair["expected"])
    assert len(chart.table.rows) == len(array["agreement"])


def test_lines_and_plane_of_the_landscape_are_those_of_the_array(finished, charts):
    array = json.loads((finished / files.ANALYSIS / "landscape.json").read_text())
    panels = {panel.title: panel for panel in charts["fig05_12_landscape"].panels}
    lines = axes_of(panels["Straight lines, held-out rows"]).lines
    np.testing.assert_array_equal(lines[1].get_ydata(), array["lines"]["heldout"][1])
    points = axes_of(panels["Plane through three models, training rows"]).lines
    assert [line.get_xydata()[0].tolist() for line in points] == array["plane"]["points"]
    assert len(panels) == 2 + 2 + 6


def test_the_ablation_is_the_mean_over_seeds(evidence, charts):
    chart = charts["fig06_10_mask_sparsity"]
    accuracy = next(panel for panel in chart.panels if panel.title.startswith("accuracy"))
    line = axes_of(accuracy).containers[0][0]  # of points with bars
    wanted = [
        np.mean([r["tasks"]["sums"]["metrics"]["accuracy"]["value"] for r in evidence.results_of(name)])
        for name in ("mask", "mask 20 %")
    ]
    np.testing.assert_allclose(line.get_ydata(orig=False), np.multiply(100, wanted))
    assert [row[1] for row in chart.table.rows] == ["0.1", "0.2"] * 2


def test_intervals_of_verdicts_are_drawn_in_points(evidence, charts):
    row = next(r for r in evidence.comparison.differences if (r.method, r.metric) == ("mask", "accuracy"))
    panel = next(panel for panel in charts["verdicts"].panels if panel.title.startswith("accuracy"))
    ends = [list(line.get_xdata()) for line in axes_of(panel).lines]
    assert [100 * end for end in interval(row)] in ends


def test_gain_and_forgetting_of_published_results():
    """What the models could do before, as a loss: where it falls less is forgotten, so that is to the right."""
    evidence = gather(Path(__file__).parents[2] / "results" / "smollm2-sums")
    (chart,) = select_charts(evidence, ["forgetting"])
    rows = {(r.method, r.task, r.metric): r for r in evidence.comparison.differences}
    gain = rows["mask, 10 %", "heldout", "accuracy"]
    kept = rows["mask, 10 %", "before: instructions", "nll"]
    axes = axes_of(chart.panels[0])
    points = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "^"]
    assert [kept.difference, 100 * gain.difference] in points
    assert axes.xaxis_inverted() and not axes.yaxis_inverted()
    named = {text.get_text(): text.xy for text in axes.texts}
    place = [name for name, row in zip(named, named.values(), strict=True) if row == (kept.difference, 12.7)]
    assert [entry.name for entry in chart.legend if entry.name.split("  ")[0] in place] == [f"{place[0]}  mask, 10 %"]
    assert len(chart.table.rows) == 9 and chart.table.rows[2][:2] == ("mask, 10 %", "12.7 points")


def test_a_study_without_earlier_abilities_has_no_such_chart(charts):
    assert "forgetting" not in charts


def test_numbers_in_a_page_are_not_cut():
    panel = Panel("p", lambda axes: axes.text(0.123456, 0.2, "0.0016 of 4.40901 <b> $x$ a_1".replace("$", r"\$")))
    assert "0.0016 of 4.40901 &lt;b&gt; $x$ a_1" in to_svg(panel, "p")


def test_figures_are_chosen_by_number_or_name(evidence):
    assert [chart.key for chart in select_charts(evidence, ["5", "12", "fig14_heads_mean"])] == [
        "fig05_12_landscape",
        "fig14_heads_mean",
    ]


def test_names_of_points_lie_apart_and_inside_of_the_axes(charts):
    for panel in charts["scores_tokens"].panels:
        axes = axes_of(panel)
        places = sorted(axes.transAxes.inverted().transform(axes.transData.transform((0, text.get_position()[1])))[1]
                        for text in axes.texts)  # fmt: skip
        assert len(places) == 5 and places[0] >= 0 and places[-1] <= 1
        assert min(np.diff(places)) >= 1 / 14 - 1e-9


def test_what_is_higher_than_a_page_becomes_several():
    panels = [Panel(f"{'a long title of ' * 3}{n}", lambda axes: axes.plot([0, 1])) for n in range(20)]
    files_ = files_of(Chart("many", "Many", "", panels, Table(("a",), [])))
    assert {name for name in files_ if name.endswith("png")} == {"many.png", "many_2.png"}
    pages = draw_pages(Chart("many", "Many", "", panels, Table(("a",), [])))
    assert [len(page.axes) for page in pages] == [12, 8]
    assert all(page.get_size_inches()[1] <= PAGE_HEIGHT for page in pages)
    assert "\n" in pages[0].axes[0].get_title(loc="left")
