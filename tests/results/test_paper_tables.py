"""The paper's tables: its figures, and results of our own making in their places."""

import copy
from pathlib import Path

import pytest

from maskft_common.errors import UserError
from maskft_lab.cli.main import main
from maskft_lab.results.paper_tables import paper, paper_tables
from maskft_lab.results.reading import read_all
from maskft_lab.results.schema import build_result, build_task, items_fingerprint, metric_from_items, write_result

RESULTS = Path(__file__).parents[2] / "results"
LLAMA2, LLAMA31, SMOL = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "SmolLM2-135M"


def result(name, scores, method=None, seed=0, training=None, study=None):
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
    built = build_result(name, {"name_or_path": "x", "method": method, "seed": seed}, {}, tasks, training)
    return built | ({"study": {"study": study}} if study else {})


def rows_of(results, number):
    """The rows of a table: (block, label) -> cells; and the names of the results that are in it."""
    tables, left_over = paper_tables(results)
    (table,) = (table for caption, table in tables if caption.startswith(f"Table {number} "))
    found, block = {}, ""
    for label, *cells in table.rows:
        block = block if any(cells) else label
        found[block, label.strip()] = cells
    return found, left_over


def test_figures_and_differences_of_the_paper():
    tables, left_over = paper_tables([])
    assert [caption.split(" ")[1] for caption, _ in tables] == list(paper()["tables"]) == ["1", "2", "4", "5", "6"]
    assert all("ours, no results" in caption for caption, _ in tables) and left_over == []
    figures = [[cell for row in table.rows for cell in row[1:] if cell[:1].isdigit()] for _, table in tables]
    assert list(map(len, figures)) == [90, 90, 96, 96, 16]
    assert all(each.endswith(" / –") for table in figures for each in table)
    first, _ = rows_of([], "1")
    assert first["Specific Domain", "MFT w/ Best FFT"][4] == "44.1 ± 0.72 / –"
    assert rows_of([], "2")[0]["Multi Domain", "Best LoRA"][2].startswith("63.1 ")
    assert rows_of([], "6")[0]["LLaMA2-7B", "Global MFT w/ Best FFT"][0].startswith("49.0 ")
    deltas = [[cell.split(" / ")[0] for cell in row[1:]] for row in tables[0][1].rows if "against" in row[0]]
    assert deltas[1] == ["+0.5", "+0.8", "+2.4", "+2.8", "+2.9", "+1.1"]  # as printed
    for table in paper()["tables"].values():
        for row in table["rows"]:
            assert len(row["cells"]) == len(table["columns"])
            assert row["method"] == "pretrained" or isinstance(row["mixed"], bool)


@pytest.mark.parametrize(
    ("method", "training", "row"),
    [
        ("pretrained", {}, ("", "Pre-Trained Model")),
        (None, {"num_train_tokens": 0}, ("", "Pre-Trained Model")),
        ("full", {}, ("Specific Domain", "Best FFT")),
        ("full", {"checkpoint": "last"}, ("Specific Domain", "Continued FFT")),
        ("random_mask", {"domain": "math"}, ("Specific Domain", "Random Mask w/ Best FFT")),
        ("lora", {"mixed": True, "checkpoint": "last"}, ("Mixed Domain", "Continued LoRA")),
        ("mask", {"num_train_tokens": 0}, ("Specific Domain", "MFT w/ Best FFT")),
        ("mask", {"domain": "coding"}, None),
        ("mask", {"selection": "threshold"}, None),
        ("full", {"variant": "warm restart"}, None),
        (None, {}, None),  # a name tells nothing
    ],
)
def test_a_result_stands_where_its_method_and_training_say(method, training, row):
    given = result("full mask, last [coding]", {"gsm8k": {"accuracy": 5}}, method, training=training)
    rows, _ = rows_of([given], "1")
    assert [key for key, cells in rows.items() if cells[0].endswith(" / 25.0")] == ([row] if row else [])


def test_scores_stand_in_their_rows():
    math = {"base": SMOL, "domain": "math"}
    results = [
        result("base", {"gsm8k": {"accuracy": 2}}, "pretrained", training={"base": SMOL}),
        result(
            "base", {"gsm8k": {"accuracy": 2}}, "pretrained", seed=1, training={"base": SMOL}
        ),  # as good as the same
        result("full", {"gsm8k": {"accuracy": 10}}, "full", training=math),
        *(result("mask", {"gsm8k": {"accuracy": n}}, "mask", seed, math) for seed, n in enumerate((11, 13))),
        result("code", {"humaneval": {"pass_at_1": 7}}, "mask", training={"base": SMOL, "domain": "coding"}),
        result("mask", {"own_task": {"accuracy": 9}}, "mask", training=math),  # whatever others are called
    ]
    rows, left_over = rows_of(results, "1")
    assert left_over == ["base", "mask"]
    assert rows["", "Pre-Trained Model"][0] == "15.2 / 10.0"
    # 55 % and 65 %: mean 60, standard deviation 5 * sqrt(2).
    assert rows["Specific Domain", "MFT w/ Best FFT"][0] == "47.3 ± 0.19 / 60.0 ± 7.07"
    assert rows["Specific Domain", "MFT w/ Best FFT"][2] == "31.8 ± 0.31 / 35.0"
    assert rows["Specific Domain", "against Best FFT"][:2] == ["+0.5 / +10.0", "+0.8 / –"]
    # A score of a part of a benchmark is not taken for one of all its items.
    assert paper_tables(results)[0][0][0].endswith(
        f"The paper's figure, LLaMA2-7B / ours, {SMOL}. Test items of ours: GSM8K 20, HumanEval 20"
    )


def test_mixed_and_cross_domain_rows_and_base_models():
    mixed = {"base": LLAMA2, "mixed": True}
    results = [
        result("fft", {"gsm8k": {"accuracy": 8}, "humaneval": {"pass_at_1": 6}}, "full", training=mixed),
        result("mask", {"gsm8k": {"accuracy": 9}}, "mask", training=mixed | {"domain": "math"}),
        result("mask if", {"gsm8k": {"accuracy": 4}}, "mask", training={"base": LLAMA2, "domain": "instruction"}),
        *(result("b", {"gsm8k": {"accuracy": 2}}, "pretrained", training={"base": base}) for base in (LLAMA31, SMOL)),
    ]
    first, _ = rows_of(results, "1")
    assert first["Mixed Domain", "Best FFT"][2].endswith(" / 30.0")
    assert first["Mixed Domain", "MFT w/ Best FFT"][0].endswith(" / 45.0")
    assert rows_of(results, "4")[0]["", "Best FFT + Mask [IF]"][0].endswith(" / 20.0")
    # A LLaMA2 result is in no table of LLaMA3.1, nor one of another model where there is one of the paper's.
    assert first["", "Pre-Trained Model"][0].endswith(" / –")
    assert rows_of(results, "6")[0]["LLaMA3.1-8B", "Pre-Trained Model"][0].endswith(" / 10.0")


@pytest.mark.parametrize(("file", "cell"), [("gsm8k_test.jsonl.gz", " / 45.0"), ("my_gsm8k.jsonl", " / –")])
def test_rows_of_a_file_named_after_a_benchmark_measure_it(file, cell):
    given = result("full", {"heldout": {"accuracy": 9}}, "full")
    given["tasks"]["heldout"]["data_file"] = file
    assert rows_of([given], "1")[0]["Specific Domain", "Best FFT"][0].endswith(cell)
    # The benchmark itself goes first.
    both = result("full", {"gsm8k": {"accuracy": 5}, "heldout": {"accuracy": 9}}, "full")
    both["tasks"]["heldout"]["data_file"] = file
    assert rows_of([both], "1")[0]["Specific Domain", "Best FFT"][0].endswith(" / 25.0")


def test_a_study_that_is_given_twice_counts_once():
    math = {"base": LLAMA2, "domain": "math"}
    masks = [result("mask", {"gsm8k": {"accuracy": n}}, "mask", n, math, "math") for n in (0, 4)]
    for mask in masks:
        mask["study"] |= {"run": f"mask-s{mask['model']['seed']}-1a2b", "role": "best"}
    once, _ = rows_of(masks, "1")
    twice, left_over = rows_of([*masks, *masks], "1")
    copies, _ = rows_of([*masks, *copy.deepcopy(masks)], "1")
    assert once == twice == copies and left_over == []
    # Once under the name that the method had earlier: by their hash they are the same runs.
    masks = [mask | {"study": mask["study"] | {"run": f"mask-s{n}-0123456789"}} for n, mask in enumerate(masks)]
    renamed = [mask | {"study": mask["study"] | {"run": f"old-s{n}-0123456789"}} for n, mask in enumerate(masks)]
    assert rows_of([*masks, *renamed], "1")[0] == once


def test_a_cell_is_of_one_study():
    """Recipes of a model share a folder, and the same model may stand in it twice: the first study counts."""
    math = {"base": LLAMA2, "domain": "math"}
    masks = [result("mask", {"gsm8k": {"accuracy": n}}, "mask", n, math, "math") for n in (0, 1)]
    full = result("full", {"gsm8k": {"accuracy": 5}}, "full", 0, math, "math")
    again = result("full", {"gsm8k": {"accuracy": 9}}, "full", 0, math, "cross")
    rows, left_over = rows_of([*masks, full, again], "1")
    assert rows["Specific Domain", "Best FFT"][0].endswith(" / 25.0") and left_over == ["full of cross"]
    assert rows["Specific Domain", "against Best FFT"][0] == "+0.5 / -22.5"
    rows, _ = rows_of([*masks, again], "1")  # a difference is of one study's two figures
    assert rows["Specific Domain", "against Best FFT"][0] == "+0.5 / –"


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (
            [result(name, {"gsm8k": {"accuracy": 1}}, "mask") for name in ("mask a", "mask b")],
            r"'mask a' and 'mask b' are of one seed and both belong to MFT w/ Best FFT",
        ),
        (
            [result("base", {"gsm8k": {"accuracy": 1}}, "pretrained", training={"base": f"m{n}"}) for n in range(2)],
            r"several base models, m0, m1: give those of one",
        ),
    ],
)
def test_mistakes_are_one_line(results, message):
    with pytest.raises(UserError, match=message) as caught:
        paper_tables(results)
    assert "\n" not in str(caught.value)


def test_the_results_of_this_repository():
    found = read_all(str(folder) for folder in sorted(RESULTS.glob("smollm2-*smoke")))
    (_, table), *_ = paper_tables(found)[0]
    (pretrained,) = [each for each in found if each["model"]["method"] == "pretrained" and "humaneval" in each["tasks"]]
    value = pretrained["tasks"]["humaneval"]["metrics"]["pass_at_1"]["value"]
    assert table.rows[0][3].endswith(f" / {100 * value:.1f}")


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write_result(tmp_path / "runs" / "a" / "result.json", result("full", {"gsm8k": {"accuracy": 9}}, "full"))
    write_result(tmp_path / "named" / "mask--a.json", result("mask", {"gsm8k": {"accuracy": 10}}, "mask"))
    places, output = [str(tmp_path / "runs"), str(tmp_path / "named")], tmp_path / "tables.md"
    assert main(["report", "tables", *places]) == 0
    terminal = capsys.readouterr().out
    assert "Table 1 (Sec. 3.2)" in terminal and "46.8 ± 0.22 / 45.0" in terminal and "Table 6" in terminal
    assert main(["report", "tables", *places, "--format", "markdown", "--output", str(output)]) == 0
    assert "| MFT w/ Best FFT | 47.3 ± 0.19 / 50.0 | 7.4 ± 0.24 / – |" in output.read_text()
    capsys.readouterr()
    assert main(["report", "tables", *places, "--format", "latex"]) == 0
    latex = capsys.readouterr().out
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 5 and "% Table 1 " in latex
    capsys.readouterr()
    for words, message in (
        (["report"], "the following arguments are required: STUDY"),
        (["report", "tables", "--formt", "markdown"], "unknown option --formt (did you mean '--format'?)"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
