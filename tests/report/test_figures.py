"""Figures: drawn from the arrays' own numbers, written in every format, the same each time."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from maskft_common import layout
from maskft_lab.cli.main import main
from maskft_lab.report import catalogue
from maskft_lab.report.catalogue import FIGURES, draw_figures, select_figures
from maskft_lab.report.charts import COLOURS, DARK, FORMATS, Chart, Panel, draw_panel, to_svg
from maskft_lab.report.evidence import NotComputed, gather
from maskft_lab.report.fig_forest import forest_chart
from maskft_lab.report.fig_masks import _by_sparsity, heads_chart, mean_heads_chart
from maskft_lab.report.methods import entries_of, number
from maskft_lab.results.comparison import NOT_DISTINGUISHABLE
from maskft_lab.results.tables import Table
from maskft_lab.results.words import difference_text

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def evidence(finished):
    return gather(finished)


@pytest.fixture(scope="module")
def drawn(evidence):
    return draw_figures(evidence, FIGURES)


@pytest.fixture(scope="module")
def charts(drawn):
    return {figure.key: chart for figure, chart in drawn[0]}


def axes_of(panel):
    axes = Figure().add_subplot()
    panel.draw(axes)
    return axes


def test_every_figure_of_the_paper_is_drawn_or_says_what_makes_it(drawn):
    assert {number for each in FIGURES for number in each.numbers} == {1, *range(3, 15)}  # 2 is a drawing of the method
    missing = {each.figure.key: each for each in drawn[1]}
    unequal = ("fig03_08_layers", "fig07_11_rows", "ablations_other", "gain_forgetting")
    assert set(missing) == set(unequal)
    assert "mask_layers_to_transform: [[0, 1], [2, 3]]" in missing["fig03_08_layers"].command


@pytest.mark.slow
def test_files_for_a_paper(finished, charts, tmp_path, capsys):
    assert main(["report", str(finished), "--figures", str(tmp_path / "a")]) == 0
    names = {f"{key}.md" for key, chart in charts.items() if not chart.panels}
    for key, chart in charts.items():
        numbered = [f"{key}_{index + 1}" if index else key for index in range(len(chart.panels))]
        names |= {f"{name}.{form}" for name in numbered for form in FORMATS}
    assert {file.name for file in (tmp_path / "a").iterdir()} == names
    assert "left out fig07_11_rows: no two evaluated masks" in capsys.readouterr().err


def test_files_of_some_figures(finished, tmp_path):
    for folder in ("a", "b"):
        assert (
            main(["report", str(finished), "--figures", str(tmp_path / folder), "--only", "13, fig14_heads_mean"]) == 0
        )
    drawn = {file.name.split(".")[0] for file in (tmp_path / "b").iterdir()}
    assert {"fig13_heads", "fig13_heads_2", "fig14_heads_mean"} <= drawn
    assert all(name.startswith(("fig13_", "fig14_")) for name in drawn)
    # Drawn again, the same bytes.
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")
    light, dark = ((tmp_path / "b" / f"fig14_heads_mean.{form}").read_text() for form in ("svg", "dark.svg"))
    assert "10 % removed" in light  # text stays text
    assert COLOURS["ink"] in light and COLOURS["ink"] not in dark and DARK["ink"] in dark


def test_starts_of_one_method_and_small_shares_are_told_apart():
    looks = [(entry.dash, entry.marker) for entry in entries_of(dict.fromkeys("abcd", ("full", True))).values()]
    assert len(set(looks)) == 4 and looks[0] == ("-", "o")
    assert list(_by_sparsity({n: {"num_removed": n, "num_weights": 1000} for n in (2, 4)})) == ["0.2", "0.4"]


def test_a_figure_fits_a_paper(charts):
    for key, chart in charts.items():
        for panel in chart.panels:
            width, height = draw_panel(panel, chart.legend).get_size_inches()
            assert width <= 7 and height <= 9.5, key


def test_analyses_of_masks_that_the_study_no_longer_has_are_not_shown(study):
    """As after a change of the recipe: the study is run again with other masks, and the analyses are the old ones."""
    for name, setting in (("bound", "adapter"), ("curvature", "mask"), ("landscape", "models")):
        file = study / layout.ANALYSIS / f"{name}.json"
        record = json.loads(file.read_text())
        old = record["settings"][setting]
        record["settings"][setting] = [*old[:-1], "another"] if name == "landscape" else "another"
        file.write_text(json.dumps(record))
        with pytest.raises(NotComputed, match=f"analysis/{name}.json is of a mask that is not among this study's runs"):
            gather(study).record(name)

    file = study / layout.ANALYSIS / "masks.json"
    record = json.loads(file.read_text())
    record["masks"] = {f"{run}-before": found for run, found in record["masks"].items()}
    file.write_text(json.dumps(record))
    for draw in (heads_chart, mean_heads_chart):
        with pytest.raises(NotComputed, match="the masks that were analysed are not among this study's runs"):
            draw(gather(study))


def test_heads_are_those_of_the_array_and_stand_beside_chance(finished, charts):
    array = json.loads((finished / layout.ANALYSIS / "masks.json").read_text())
    (shown, *_), wanted = axes_of(charts["fig13_heads"].panels[0]).images, array["masks"]["mask-s0"]["by_head"]
    np.testing.assert_array_equal(shown.get_array(), [found["shares"] for found in wanted.values()])
    panels = [axes_of(panel) for panel in charts["fig14_heads_mean"].panels]
    assert sum(len(axes.lines) for axes in panels) == 4 and len(charts["fig14_heads_mean"].legend) == 5
    np.testing.assert_allclose(panels[0].lines[0].get_ydata(), np.mean(shown.get_array(), axis=0))
    for axes in panels:  # random masks: the band of chance holds nearly all heads, and is a third of the height or more
        box = axes.patches[0].get_window_extent().transformed(axes.transData.inverted())
        low, high = box.y0, box.y1
        heads = np.concatenate([line.get_ydata() for line in axes.lines])
        assert np.mean((heads >= low) & (heads <= high)) >= 0.75
        assert (high - low) / np.ptp(axes.get_ylim()) > 1 / 3


def test_the_plane_of_the_landscape_is_that_of_the_array(finished, charts):
    array = json.loads((finished / layout.ANALYSIS / "landscape.json").read_text())["plane"]
    panels = {panel.title: axes_of(panel) for panel in charts["fig05_12_landscape"].panels}
    axes = panels["Loss on training rows"]
    assert [line.get_xydata()[0].tolist() for line in axes.lines] == array["points"]
    np.testing.assert_allclose(axes.images[0].get_array(), np.transpose(array["train"]))
    assert set(panels) == {"Loss on held-out rows", "Loss on training rows"}


def test_the_forest_plot_shows_every_difference_with_its_interval(evidence, charts):
    """A study without probes of earlier abilities had no picture of its result."""
    rows = [row for row in evidence.comparison.differences if row.metric == "accuracy"]
    panel = charts["forest"].panels[0]
    axes = axes_of(panel)
    assert panel.title == "accuracy on sums: difference from full (best)"
    shown = {tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2}
    for row in rows:
        ends = (100 * row.ci_low, 100 * row.ci_high)
        assert ends in shown or "no interval" in difference_text(row)
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names[: len(rows)] == [row.method for row in sorted(rows, key=lambda row: -row.difference)]
    table = charts["forest"].table.rows
    assert [row[-2:] for row in table] == [(difference_text(r), r.verdict) for r in evidence.comparison.differences]


def _forest_of(evidence, changes):
    """The axes of the first panel, with the first differences of its metric replaced."""
    comparison = evidence.comparison
    rows = [row for row in comparison.differences if row.metric == "accuracy"]
    changed = [replace(row, **change) for row, change in zip(rows, changes, strict=False)]
    others = [row for row in comparison.differences if row.metric != "accuracy"]
    comparison = replace(comparison, differences=[*changed, *others], verdicts=[])
    chart = forest_chart(replace(evidence, comparison=comparison))
    (panel,) = (panel for panel in chart.panels if panel.title.startswith("accuracy"))
    return axes_of(panel)


def test_where_nothing_is_distinguishable_most_intervals_are_shown_whole(evidence):
    """They were all cut off at twice the span of the values, so none could be read."""
    wide = {"ci_low": -0.07, "ci_high": 0.05, "verdict": NOT_DISTINGUISHABLE}
    widest = {"ci_low": -0.9, "ci_high": 0.9, "verdict": NOT_DISTINGUISHABLE}
    axes = _forest_of(
        evidence, [{"difference": -0.01} | wide, {"difference": 0.0} | wide, {"difference": 0.01} | widest]
    )
    left, right = axes.get_xlim()
    assert -12 < left < -7 and 5 < right < 12  # points; an interval far beyond the others does not squash them
    arrows = [line for line in axes.lines if line.get_marker() in "<>"]
    assert len(arrows) == 2


def test_two_models_that_agree_on_every_item_have_no_interval_in_the_picture(evidence):
    """As in the table, which says so in words."""
    alike = {"difference": 0.0, "ci_low": -0.05, "ci_high": 0.05, "verdict": NOT_DISTINGUISHABLE}
    (row, *_) = (row for row in evidence.comparison.differences if row.metric == "accuracy")
    alike["num_identical"] = row.num_items
    axes = _forest_of(evidence, [alike])
    assert not [line for line in axes.lines if tuple(line.get_xdata()) == (-5, 5)]


def test_the_forest_plot_has_the_mask_minus_its_strongest_control():
    evidence = gather(RESULTS / "small-products-adapters")
    (chart,) = (chart for _, chart in draw_figures(evidence, select_figures(["forest"]))[0])
    axes = axes_of(chart.panels[0])
    names = [text.get_text().replace("\n", " ") for text in axes.get_yticklabels()]
    assert names[-1] == "mask, 30 % - warm restart of full"
    left, right = axes.get_xlim()
    assert right - left < 60  # two of the others lose 53 and 74 points
    assert {"← -53", "← -74.1"} <= {text.get_text() for text in axes.texts}


def test_a_number_of_a_table_has_no_exponent_where_rounding_adds_a_digit():
    shown = [number(value, 3) for value in (999.4, 999.7, 1234.5, 0.00123, None, 5)]
    assert shown == ["999", "1,000", "1,234", "0.00123", "–", "5"]


def test_masks_without_heads_take_no_place_from_those_that_have_them(study):
    """A study with many masks of the MLP's matrices had no figure of heads for those of attention behind them."""
    file = study / layout.ANALYSIS / "masks.json"
    record = json.loads(file.read_text())
    learned = [run for run in gather(study).runs if run.method == "mask"]
    # Seven masks of the MLP alone stand before those of the study.
    evidence = gather(study)
    others = [replace(learned[0], id=f"mlp-s{n}", name="mask", seed=n + 10) for n in range(7)]
    for run in others:
        record["masks"][run.id] = record["masks"][learned[0].id] | {"by_head": {}}
    file.write_text(json.dumps(record))
    evidence.runs[:0] = others
    assert len(heads_chart(evidence).panels) == len(heads_chart(gather(study)).panels) > 0


def test_costs_that_are_nearly_equal_are_a_sentence():
    evidence = gather(RESULTS / "small-products-adapters")
    (chart,) = (chart for _, chart in draw_figures(evidence, select_figures(["fig04_09_cost"]))[0])
    assert [panel.title.partition(" ")[0] for panel in chart.panels] == ["tokens", "training"]
    assert chart.text.startswith("Peak memory of one process: 0.557 to 0.586 GB, nearly equal.")


def test_two_points_a_line_are_no_curve():
    evidence = gather(RESULTS / "smollm2-curve-banking77-kl-seeds")
    (chart,) = (chart for _, chart in draw_figures(evidence, select_figures(["1"]))[0])
    assert not chart.panels and not chart.legend and len(chart.table.rows) == 6


def test_no_picture_calls_the_test_set_held_out():
    """Held-out rows choose checkpoints; a study's test was called so in titles. A percent sign alone is no label."""
    for name in ("demo-small", "smollm2-curve-banking77", "smollm2-curve-sums-rivals-seeds"):
        for figure, chart in draw_figures(gather(RESULTS / name), FIGURES)[0]:
            for panel in chart.panels:
                axes = axes_of(panel)
                assert "heldout" not in panel.title + axes.get_xlabel() + axes.get_ylabel(), (name, figure.key)
                assert axes.get_ylabel() != "%"


def test_ticks_of_bars_do_not_collide(charts):
    for panel in charts["fig04_09_cost"].panels:
        figure = draw_panel(panel, [])
        FigureCanvasAgg(figure).draw()
        (axes,) = figure.axes
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        boxes = [box for box in boxes if axes.bbox.x0 - 1 <= (box.x0 + box.x1) / 2 <= axes.bbox.x1 + 1]
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes)), panel.title


def test_a_vacuous_bound_is_a_table_and_no_picture(charts):
    chart = charts["table07_bound"]
    assert not chart.panels and len(chart.table.rows) == 4
    assert {row[-1] for row in chart.table.rows} == {"vacuous"} and "4 are vacuous" in chart.text


def test_the_ablation_is_the_mean_over_seeds(evidence, charts):
    chart = charts["fig06_10_sparsity"]
    accuracy = next(panel for panel in chart.panels if panel.title.startswith("accuracy"))
    line = axes_of(accuracy).containers[0][0]  # of points with bars
    wanted = [
        np.mean([r["tasks"]["sums"]["metrics"]["accuracy"]["value"] for r in evidence.results if r["name"] == name])
        for name in ("mask", "mask 20 %")
    ]
    np.testing.assert_allclose(line.get_ydata(orig=False), np.multiply(100, wanted))
    assert [row[1] for row in chart.table.rows] == ["share removed: 0.1", "share removed: 0.2"] * 2


def test_numbers_in_a_page_are_not_cut():
    panel = Panel("p", lambda axes: axes.text(0.123456, 0.2, "0.0016 of 4.40901 <b> $x$ a_1".replace("$", r"\$")))
    assert "0.0016 of 4.40901 &lt;b&gt; $x$ a_1" in to_svg(panel, "p")


def test_a_figure_is_added_by_one_function_and_one_entry(finished, evidence, tmp_path, monkeypatch):
    """The steps of the docs, to the letter."""

    # 1. A function that makes a chart from the evidence, and raises NotComputed where its data is not there.
    def toy_chart(evidence):
        if len(evidence.runs) < 2:
            raise NotComputed("there is one run only")
        names = sorted({run.name for run in evidence.runs})
        counts = [sum(run.name == name for run in evidence.runs) for name in names]
        panel = Panel("runs of each method", lambda axes: axes.bar(range(len(names)), counts))
        return Chart("How many.", [panel], Table(("method", "runs"), list(zip(names, map(str, counts), strict=True))))

    # 2. One entry in the table of figures.
    entry = catalogue.Figure("toy", "cost", "Runs of each method", toy_chart, "maskft study RECIPE.yaml")
    monkeypatch.setattr("maskft_lab.report.page.FIGURES", (*FIGURES, entry))  # which imports the table as it is
    monkeypatch.setattr(catalogue, "FIGURES", (*FIGURES, entry))

    assert main(["report", str(finished), "--figures", str(tmp_path), "--only", "toy"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {f"toy.{form}" for form in FORMATS}
    assert main(["report", str(finished), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert '<section class="chart" id="toy"' in page and "Numbers of “Runs of each method”" in page
    alone = type(evidence)(finished, "x", "tiny", evidence.runs[:1], [])
    (missing,) = draw_figures(alone, [entry])[1]
    assert (missing.reason, missing.command) == ("there is one run only", "maskft study RECIPE.yaml")
