"""The picture of gain against forgetting: its points, the line that no other beats, and what lies off scale."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from maskft_common import layout
from maskft_lab.cli.main import main
from maskft_lab.report.catalogue import draw_figures, select_figures
from maskft_lab.report.charts import COLOURS, DARK, to_svg
from maskft_lab.report.evidence import gather
from maskft_lab.report.fig_forest import forest_chart
from maskft_lab.report.fig_gain import Curve, Point, chart_of, curve_of_record, curves_of, frontier
from maskft_lab.results.gains import gains_of

RESULTS = Path(__file__).parents[2] / "results"
RECORD = json.loads((Path(__file__).parent / "curve.json").read_text())


def axes_of(panel):
    axes = Figure().add_subplot()
    panel.draw(axes)
    return axes


def lines_of(axes):
    return [[tuple(each) for each in line.get_xydata()] for line in axes.lines]


@pytest.fixture
def study(tmp_path):
    """A published study with a file of paths beside its summary."""
    folder = tmp_path / "study"
    shutil.copytree(RESULTS / "smollm2-sums-deletion", folder)
    (folder / "curve-sums-instructions.json").write_text(json.dumps(RECORD))
    return folder


def test_intervals_are_called_what_they_are():
    """The first published comparisons have no simultaneous intervals."""
    curve = curve_of_record(RECORD)
    for kind, other in (("simultaneous", "unadjusted"), ("unadjusted", "simultaneous")):
        chart = chart_of([curve._replace(kind_of_interval=kind)])
        assert chart.table.columns.count(kind) == 2 and other not in chart.table.columns
        assert f"with {kind} 95 % intervals" in chart.text
    for name, kind in {"small-products": "unadjusted", "demo-small": "simultaneous"}.items():
        assert f"with {kind} 95 % intervals" in forest_chart(gather(RESULTS / name)).text


def test_no_point_on_the_line_is_beaten_and_every_other_one_is():
    points = curve_of_record(RECORD).points
    best = frontier(points)

    def place(point):
        return point.forgotten, point.gained

    def beats(a, b):
        return a.gained >= b.gained and a.forgotten <= b.forgotten and place(a) != place(b)

    for point in points:
        is_beaten = any(beats(other, point) for other in points) or point.gained <= 0
        assert (place(point) in map(place, best)) != is_beaten, point
    assert [point.gained for point in best] == sorted(point.gained for point in best)


def test_paths_are_joined_and_the_line_begins_at_the_model_before_training(study):
    (chart,) = (chart for _, chart in draw_figures(gather(study), select_figures(["gain_forgetting"]))[0])
    axes, curve = axes_of(chart.panels[0]), curve_of_record(RECORD)
    lines = lines_of(axes)
    assert [(0, 0), *((p.forgotten, p.gained) for p in frontier(curve.points))] in lines
    path = [(p.forgotten, p.gained) for p in curve.points if (p.method, p.path) == ("LoRA r 16", "rate 1e-3")]
    assert len(path) == 3 and path in lines
    assert axes.get_xlabel() == "nats forgotten (instructions)" and axes.get_ylabel() == "points gained (sums)"
    assert len(chart.table.rows) == len(curve.points)


def test_no_point_is_cut_off_without_an_arrow_and_its_number(study):
    (chart,) = (chart for _, chart in draw_figures(gather(study), select_figures(["gain_forgetting"]))[0])
    axes = axes_of(chart.panels[0])
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    beyond = [p for p in curve_of_record(RECORD).points if not left <= p.forgotten <= right]
    assert [p.forgotten for p in beyond] == [7.9] and [text.get_text() for text in axes.texts] == ["7.9 →"]
    assert all(left <= x <= right and bottom <= y <= top for line in lines_of(axes) for x, y in line if len(line) == 1)


def test_numbers_of_points_off_scale_do_not_cover_each_other():
    points = [Point("a", "a", "", 50.0, 0.1), *(Point(f"m{n}", "m", "", 0.1 * n, 20.0 + n) for n in range(4))]
    curve = Curve("t", "p", "base", points)
    axes = axes_of(chart_of([curve]).panels[0])
    heights = sorted(text.xy[1] for text in axes.texts)
    assert len(heights) == 4 and min(np.diff(heights)) >= 0.03 * np.ptp(axes.get_ylim())
    axes = axes_of(chart_of([curve._replace(points=points + points[1:])]).panels[0])
    assert [text.get_text() for text in axes.texts] == ["8 more points off scale"]


def test_numbers_that_lie_close_are_in_order():
    points = [Point("a", "a", "", 50.0, 0.1, rows="held-out")]
    points += [Point("m", f"m{n}", "", 0.1 * gained, 20.0 + n) for n, gained in enumerate((2, 0, 1))]
    axes = axes_of(chart_of([Curve("t", "p", "base", points)]).panels[0])
    from_above = sorted(axes.texts, key=lambda text: -text.xy[1])
    assert [text.get_text() for text in from_above] == ["20 →", "21 →", "22 →"]


def test_points_that_lose_everything_do_not_squash_the_others():
    points = [Point(f"m{n}", f"m{n}", "", gained, 0.1) for n, gained in enumerate((8.8, 6.3, 4.8, 0.2, -53, -74))]
    axes = axes_of(chart_of([Curve("t", "p", "base", points)]).panels[0])
    bottom, top = axes.get_ylim()
    assert -16 < bottom < 0 and 8.8 < top < 16
    assert {text.get_text() for text in axes.texts} == {"-53 ↓", "-74 ↓"}


def test_a_budget_is_a_line_of_its_picture_and_a_word_of_its_table():
    points = [{"method": "mask", "points_gained": 5.0, "nats_forgotten": 0.08, "budget": 0.1, "rows": "held-out"}]
    points += [{"method": "full", "points_gained": 6.0, "nats_forgotten": 0.4, "rows": "held-out"}]
    chart = chart_of([curve_of_record({"task": "t", "probe": "p", "model": "base", "points": points})])
    dotted = [line for line in axes_of(chart.panels[0]).lines if line.get_linestyle() == ":"]
    assert [list(line.get_xdata()) for line in dotted] == [[0.1, 0.1]]
    assert "budget 0.1" in {row[1] for row in chart.table.rows} and chart.legend[-1].name == "budget"
    assert (
        chart_of([curve_of_record({"task": "t", "probe": "p", "model": "b", "points": points[1:]})]).legend[-1]
        != (chart.legend[-1])
    )


def test_numbers_are_read_on_a_dark_ground(tmp_path):
    """They lay on white boxes, pale green, in README's first picture too. Files have a ground, a page has its own."""
    study = RESULTS / "smollm2-curve-banking77-kl-seeds"
    assert main(["report", str(study), "--figures", str(tmp_path), "--only", "gain_forgetting"]) == 0
    light, dark = ((tmp_path / f"gain_forgetting.{form}").read_text() for form in ("svg", "dark.svg"))
    assert "ffffff" not in light + dark
    assert COLOURS["paper"] in light and COLOURS["paper"] not in dark and DARK["paper"] in dark
    ground = Image.open(tmp_path / "gain_forgetting.png").convert("RGBA").getpixel((1, 1))
    assert ground == (*(int(COLOURS["paper"][at : at + 2], 16) for at in (1, 3, 5)), 255)
    (chart,) = (chart for _, chart in draw_figures(gather(study), select_figures(["gain_forgetting"]))[0])
    page = to_svg(chart.panels[0], "p")
    assert "var(--paper)" in page and "#" not in "".join(re.findall(r'fill="([^"]*)"|fill: ([^;"]*)', page)[0])


def test_intervals_are_those_of_chosen_points(study):
    (chart,) = (chart for _, chart in draw_figures(gather(study), select_figures(["gain_forgetting"]))[0])
    lines, chosen = lines_of(axes_of(chart.panels[0])), [p for p in curve_of_record(RECORD).points if p.gained_ends]
    assert len(chosen) == 6
    for point in chosen:
        assert [(point.forgotten, end) for end in point.gained_ends] in lines
        assert [(end, point.gained) for end in point.forgotten_ends] in lines


def test_files_light_and_dark_and_the_layout_of_peft(study, tmp_path):
    assert main(["report", str(study), "--figures", str(tmp_path / "out"), "--only", "gain_forgetting"]) == 0
    names = {f"gain_forgetting.{form}" for form in ("svg", "dark.svg", "pdf", "png", "json")}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    records = json.loads((tmp_path / "out" / "gain_forgetting.json").read_text())
    assert len(records) == len(RECORD["points"])
    first = records[0]
    assert first["run_info"]["experiment_name"] == "LoRA r 16/rate 1e-3, step 24"
    assert first["train_info"]["metrics"][-1]["forgetting"] == 0.204
    assert first["train_info"]["file_size"] == 3686400 and first["meta_info"]["dataset_info"]["task"] == "sums"


def test_chosen_points_on_test_rows_stand_beside_the_paths_and_not_on_the_line():
    path = [Point("a", "a", f"step {n}", 10.0 * n, 0.1 * n, rows="held-out") for n in (1, 2, 3)]
    chosen = Point("a", "a", "step 2", 60.0, 0.05, (55.0, 65.0), (0.04, 0.06), num_seeds=5)
    curve = Curve("t", "p", "base", [*path, chosen])
    assert frontier(curve.points) == path
    lines = lines_of(axes_of(chart_of([curve]).panels[0]))
    assert [(p.forgotten, p.gained) for p in path] in lines and [(0.05, 60.0)] in lines
    assert [(0.05, 55.0), (0.05, 65.0)] in lines


def test_checkpoints_are_one_path_and_the_scales_of_each_another_but_of_one_alone():
    each = {"method": "a", "points_gained": 1.0, "nats_forgotten": 0.1}
    places = [("a", 1.0, 0.5), ("a", 1.0, 1.0), ("a", 0.5, 1.0), ("a", 1.0, 0.25), ("b", 1.0, 1.0), ("b", 1.0, 0.5)]
    points = [{**each, "path": p, "share": n, "scale": scale, "label": f"{n} {scale}"} for p, n, scale in places]
    curve = curve_of_record({"task": "t", "probe": "p", "model": "m", "unit": "nats", "points": points})
    paths = {}
    for point in curve.points:
        paths.setdefault(point.path, []).append(point.label)
    scaled = {"a, 1 of training scaled": ["1.0 0.25", "1.0 0.5"], "b": ["1.0 0.5", "1.0 1.0"]}
    assert paths == {"a": ["0.5 1.0", "1.0 1.0"]} | scaled
    assert curve.units == ("nats", "nats")


def test_a_scaled_point_without_a_share_is_of_the_end_of_training():
    each = {"method": "a", "path": "a", "points_gained": 1.0, "nats_forgotten": 0.1}
    points = [{**each, "share": 0.5}, {**each, "scale": 0.5}]
    curve = curve_of_record({"task": "t", "probe": "p", "model": "m", "points": points})
    assert [point.path for point in curve.points] == ["a", "a, 1 of training scaled"]


def test_curves_of_another_study_in_the_folder_are_not_shown(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "study")
    for name in ("tiny-study", "tiny-study-2"):
        file = folder / layout.CURVE.format(name, RECORD["probe"])
        file.write_text(json.dumps(RECORD | {"task": name}))
    assert [curve.task for curve in curves_of(gather(folder))] == ["tiny-study"]


def test_paths_are_drawn_before_there_are_results(tmp_path):
    (tmp_path / "curve-sums-instructions.json").write_text(json.dumps(RECORD))
    words = ["--figures", str(tmp_path / "out"), "--only", "gain_forgetting", "-o", str(tmp_path / "page.html")]
    assert main(["report", str(tmp_path), *words]) == 0
    assert (tmp_path / "out" / "gain_forgetting.svg").is_file()
    page = (tmp_path / "page.html").read_text()
    assert 'id="gain_forgetting"' in page and "nothing is claimed" in page


def test_a_study_without_paths_shows_its_methods_beside_the_pretrained_model():
    evidence = gather(RESULTS / "smollm2-sums-deletion")
    (curve,) = curves_of(evidence)
    rows = {(r.method, r.task, r.metric): r for r in evidence.comparison.differences}
    for point in curve.points:
        gain, kept = rows[point.method, "heldout", "accuracy"], rows[point.method, "before: instructions", "nll"]
        assert (point.gained, point.forgotten) == (100 * gain.difference, kept.difference)
    assert curve.against == "pre-trained" and curve.units == ("points", "nats")


def test_two_probes_are_told_apart_in_titles_and_table():
    points = [Point("a", "a", "step 1", 10.0, 0.1)]
    chart = chart_of([Curve("sums", probe, "base", points) for probe in ("instructions", "school")])
    assert [panel.title for panel in chart.panels] == [
        "sums and instructions, against base",
        "sums and school, against base",
    ]
    probe = chart.table.columns.index("probe")
    assert [row[probe] for row in chart.table.rows] == ["instructions", "school"]
    assert "path" not in chart.text, "all points are on test rows"


def test_models_that_agree_on_every_item_have_no_interval_as_in_tables():
    evidence = gather(RESULTS / "smollm2-sums-deletion")
    rows = []
    for row in evidence.comparison.differences:
        is_gain = row.place == ("heldout", "accuracy")
        alike = {"difference": 0.0, "num_identical": row.num_items} if is_gain else {}
        rows.append(replace(row, **alike))
    (curve,) = gains_of(rows)
    for point in curve["points"]:
        assert (point["points_gained"], point["points_gained_interval"]) == (0.0, None)
        assert point["nats_forgotten_interval"] is not None


def test_a_study_without_earlier_abilities_says_so():
    drawn, (missing,) = draw_figures(gather(RESULTS / "small-products"), select_figures(["gain_forgetting"]))
    assert not drawn and "evaluation.before" in missing.reason
