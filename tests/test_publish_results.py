"""recipes/publish_results.py: what it writes of a study is what was published of it."""

import gzip
import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskft_common import layout
from maskft_common.errors import UserError

ROOT = Path(__file__).parents[1]
NAME = "smollm2-curve-banking77-long"
PUBLISHED = ROOT / "results" / NAME
MASK = "deletion mask with KL to base"
FULL = "full with KL to base"
BASE = "pre_trained-9413b25ca5"
TRIED = "full_with_kl_to_base-s0-5594b442fc"


@pytest.fixture(scope="module")
def publish():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "recipes" / "publish_results.py")))


@pytest.fixture
def study(tmp_path):
    """A study's folder, put together from the published files; one run has a path of two points."""
    folder = tmp_path / "study"
    by_name = {}
    for file in PUBLISHED.glob("*.json.gz"):
        text = gzip.decompress(file.read_bytes()).decode()
        by_name[json.loads(text)["name"]] = text
    summary = json.loads((PUBLISHED / "summary.json").read_text())
    (record,) = summary["models"].values()
    for row in record["runs"]:
        write(folder / layout.RESULTS / row["result"] / layout.RESULT, by_name[row["name"]])

    shutil.copy(PUBLISHED / "summary.json", folder / layout.SUMMARY.format(NAME))
    for curve in PUBLISHED.glob("curve-*.json"):
        shutil.copy(curve, folder)
    table = (PUBLISHED / "table.md").read_text()
    write(folder / layout.STUDY_TABLE.format(NAME), f"# {NAME}\n\n" + table[table.index("\n## ") + 1 :])
    write(folder / layout.STUDY_RECIPE.format(NAME), "# What: intents\n# First: inputs\n\nversion: 1\n")
    for run, training in json.loads((PUBLISHED / "training.json").read_text()).items():
        write(folder / layout.RUNS / run / layout.TRAINING, json.dumps({"summary": training}))
        write(folder / layout.RUNS / run / layout.RUN, json.dumps({"study": NAME, "name": "x", "seed": 0}))
    # Of another study in the folder, and of an earlier recipe of this one: this one shows neither, and tried neither.
    for run, of_study in (("other-s0-0000000000", "another"), ("full-s0-1111111111", NAME)):
        write(folder / layout.RUNS / run / layout.TRAINING, "not read")
        write(folder / layout.RUNS / run / layout.RUN, json.dumps({"study": of_study}))

    for run, rate, points in ((BASE, None, {"0-0": 0}), (TRIED, 1e-4, {"0.5-1": 0.25, "1-1": 0.5})):
        of_run = {"study": NAME, "seed": 0}
        settings = {"seed": 0} if rate is None else {"seed": 0, "learning_rate": rate, "max_steps": 240}
        write(folder / layout.RUNS / run / layout.RUN, json.dumps({**of_run, "name": run, "settings": settings}))
        for point, gain in points.items():
            for rows, metrics in {
                "heldout": {"nll": 7 - gain, "accuracy": gain},
                "wiki": {"nll": 3 + gain / 5},
                "kl": {"kl": gain},
            }.items():
                result = {"tasks": {"heldout": {"metrics": {name: {"value": v} for name, v in metrics.items()}}}}
                write(folder / layout.RUNS / run / "path" / f"{rows}-abc" / point / layout.RESULT, json.dumps(result))
    return folder


def points_of(publish, study):
    return publish.points_table(publish.runs_of(study, NAME), NAME, publish.names_of_runs(study, NAME))


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_study_is_published_as_it_was(publish, study, tmp_path):
    target = tmp_path / "results" / NAME
    target.mkdir(parents=True)
    shutil.copy(PUBLISHED / "table.md", target)
    publish.main(study, target, None, MASK)
    names = {file.name for file in target.iterdir()}
    assert names == {file.name for file in PUBLISHED.iterdir()}
    for file in PUBLISHED.glob("*.json.gz"):
        assert gzip.decompress((target / file.name).read_bytes()) == gzip.decompress(file.read_bytes())
    for name in ("summary.json", "table.md", "against_mask.md"):
        assert (target / name).read_text() == (PUBLISHED / name).read_text()
    assert json.loads((target / "training.json").read_text()) == json.loads((PUBLISHED / "training.json").read_text())


def test_every_point_is_a_row(publish, study):
    lines = points_of(publish, study).splitlines()
    columns = lines[4].strip("| ").split(" | ")
    assert columns[:7] == ["method", "seed", "setting", "of training", "of the change", "accuracy", "nll"]
    rows = [dict(zip(columns, line.strip("| ").split(" | "), strict=True)) for line in lines[6:]]
    assert [row["of training"] for row in rows] == ["0.5", "1"]
    # Under the name in the study's table: the run's record has that of the study that made it.
    assert {row["method"] for row in rows} == {"full with KL to base"}
    assert rows[1]["accuracy"] == "50.0" and rows[1]["nll"] == "6.5000"
    assert rows[1]["wiki"] == "+0.1000" and rows[1]["kl"] == "0.5000"


def test_a_point_without_a_loss_is_a_dash(publish, study):
    file = study / layout.RUNS / TRIED / "path" / "wiki-abc" / "1-1" / layout.RESULT
    file.write_text(file.read_text().replace("3.1", "null"))
    *_, row = points_of(publish, study).splitlines()
    assert row.count("| – |") == 1


def test_points_on_rows_of_an_earlier_recipe_are_no_points_of_this_one(publish, study):
    folder = study / layout.RUNS / TRIED / "path"
    shutil.copytree(folder / "wiki-abc", folder / "wiki-abd")
    with pytest.raises(UserError, match=r"wiki-abc and .*wiki-abd are of two sets of rows called wiki: delete"):
        points_of(publish, study)


def test_a_loss_that_is_not_finite_stops_no_comparison_with_another_baseline(publish, study, tmp_path):
    for file in study.glob(f"{layout.RESULTS}/*/{layout.RESULT}"):
        result = json.loads(file.read_text())
        if result["name"] == FULL:
            (task, *_) = result["tasks"].values()
            task["items"][0]["nll"] = None
            task["metrics"]["nll"]["value"] = None
            file.write_text(json.dumps(result))
    publish.main(study, tmp_path / "target", None, MASK)
    text = (tmp_path / "target" / "against_mask.md").read_text()
    assert text.count("is not compared: an item has no value") == 1
    assert f"| {FULL} |" in text


def test_a_result_is_published_under_the_name_of_the_table(publish, study, tmp_path):
    """A name in the recipe may change in letters alone, or the name of the last model: the result's file keeps it."""
    for file in study.glob(f"{layout.RESULTS}/*/{layout.RESULT}"):
        file.write_text(file.read_text().replace(f'"name": "{MASK}"', f'"name": "{MASK.upper()}"', 1))
    files = publish.published(study, NAME, tmp_path)
    names = {json.loads(gzip.decompress(files[file]))["name"] for file in files if file.suffix == ".gz"}
    assert MASK in names and MASK.upper() not in names


def test_two_models_do_not_share_a_file(publish, study, tmp_path):
    summary = study / layout.SUMMARY.format(NAME)
    content = json.loads(summary.read_text())
    (record,) = content["models"].values()
    record["runs"].append({**record["runs"][0], "name": record["runs"][0]["name"] + " +"})
    summary.write_text(json.dumps(content))
    with pytest.raises(UserError, match="would be of two models"):
        publish.published(study, NAME, tmp_path)


def test_a_run_of_the_table_that_is_gone_is_named(publish, study, tmp_path):
    """Else its training would be missing among the published ones, without a word."""
    summary = json.loads((study / layout.SUMMARY.format(NAME)).read_text())
    (record,) = summary["models"].values()
    run = next(row["run"] for row in record["runs"] if row["name"] == MASK)
    shutil.rmtree(study / layout.RUNS / run)
    with pytest.raises(UserError, match=f"no finished run {run}, which its table shows"):
        publish.published(study, NAME, tmp_path)


def test_curves_of_a_study_whose_name_begins_alike_are_not_published(publish, study, tmp_path):
    write(study / layout.CURVE.format(f"{NAME}-again", "wiki"), json.dumps({"probe": "wiki"}))
    curves = {file.name for file in publish.published(study, NAME, tmp_path) if file.name.startswith("curve-")}
    assert curves == {file.name for file in PUBLISHED.glob("curve-*.json")}


def test_a_target_with_results_of_another_study_is_refused(publish, study, tmp_path):
    target = tmp_path / "target"
    write(target / "a_method_that_was_renamed-s0.json.gz", "")
    with pytest.raises(UserError, match="is of no model or probe of this study: delete it"):
        publish.main(study, target, None, None)
    assert len(list(target.iterdir())) == 1
    (target / "a_method_that_was_renamed-s0.json.gz").unlink()
    with pytest.raises(UserError, match="unknown baseline 'mask'"):
        publish.main(study, target, None, "mask")
    assert not list(target.iterdir())


def test_a_table_without_results_is_one_line(publish, study, tmp_path):
    (study / layout.STUDY_TABLE.format(NAME)).write_text("# a title alone\n")
    with pytest.raises(UserError, match="has no line that begins with '## '"):
        publish.published(study, NAME, tmp_path)
    (study / layout.STUDY_TABLE.format(NAME)).unlink()
    with pytest.raises(UserError, match="does not exist: finish the study"):
        publish.published(study, NAME, tmp_path)


def test_a_folder_of_this_machine_is_not_published(publish, study, tmp_path):
    file = study / layout.RUNS / TRIED / layout.TRAINING
    file.write_text(json.dumps({"summary": {"note": str(study.resolve() / "x")}}))
    target = tmp_path / "target"
    with pytest.raises(UserError, match=r"training\.json would name .*, a folder of this machine"):
        publish.main(study, target, None, None)
    assert not target.exists()


def test_a_folder_without_a_study(publish, tmp_path):
    with pytest.raises(UserError, match="holds no finished study; name one with --study_name"):
        publish.main(tmp_path, tmp_path / "target", None, None)
