import json

import pandas
import pytest

import benchmark_files
from maskft_common.errors import UserError
from maskft_lab.evaluation.benchmarks import BENCHMARKS, Benchmark, load_docs
from maskft_lab.evaluation.tasks import load_tasks, run_task


@pytest.fixture
def folder(tmp_path):
    return benchmark_files.write(tmp_path / "data")


@pytest.mark.parametrize("task", BENCHMARKS)
def test_published_files_are_found_in_any_folder(task, folder):
    assert len(load_docs(task, folder)) == {"gsm8k": 4}.get(task, 2)


@pytest.mark.parametrize("row", [{"question": "q"}, {"question": "q", "answer": 3}, []])
def test_another_format_names_file_row_and_fields(row, tmp_path):
    lines = [json.dumps(benchmark_files.GSM8K[0]), json.dumps(row)]
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"gsm8k_test.jsonl: line 2 is not an item of gsm8k, .* question \(str\), ans"):
        load_docs("gsm8k", tmp_path)


def test_half_a_surrogate_pair_in_an_item_is_one_line(tmp_path):
    lines = [json.dumps(benchmark_files.GSM8K[0]), json.dumps({"question": "\ud83d", "answer": "#### 1"})]
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"gsm8k_test.jsonl: line 2: '\\ud83d' is half a surrogate pair; remove it"):
        load_docs("gsm8k", tmp_path)


def test_no_file_several_files_no_rows(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="holds no test file of gsm8k"):
            load_docs("gsm8k", folder)
    (tmp_path / "gsm8k_test.jsonl").write_text("")
    with pytest.raises(UserError, match=r"gsm8k_test.jsonl has no rows"):
        load_docs("gsm8k", tmp_path)
    (tmp_path / "gsm8k-main-test.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"several test files of gsm8k \(gsm8k-main-test.jsonl, gsm8k_test.jsonl\)"):
        load_docs("gsm8k", tmp_path)


def test_the_message_names_every_ending_that_is_read(tmp_path):
    with pytest.raises(UserError, match="its name must match") as caught:
        load_docs("gsm8k", tmp_path)
    text = str(caught.value)
    endings = text[text.rindex("(") + 1 : text.rindex(")")].split(", ")
    assert endings == [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"]
    for ending in endings:
        file = tmp_path / f"gsm8k_test{ending}"
        table = pandas.DataFrame(benchmark_files.GSM8K)
        if ending == ".parquet":
            table.to_parquet(file)
        else:
            table.to_json(file, orient="records", lines=ending.startswith(".jsonl"))
        assert len(load_docs("gsm8k", tmp_path)) == 4
        file.unlink()


def test_no_network_is_one_line_with_the_way_out():
    with pytest.raises(UserError, match=r"the hub did not give 'google/IFEval'.*--data_dir"):
        load_docs("ifeval", None)


def test_other_columns_need_not_fit_into_a_table(tmp_path):
    rows = [{"question": "a", "answer": "#### 1", "more": more} for more in (1, "two", {"three": [3]})]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    docs = load_docs("gsm8k", tmp_path)
    assert docs.column_names == ["question", "answer"] and len(docs) == 3


def test_a_toy_benchmark_by_the_documented_step(tmp_path, monkeypatch):
    """One entry, for a task that lm-eval has: it is asked by name, read from a file, scored, and named in results."""
    arithmetic = Benchmark(
        config="asdiv/asdiv-cot-llama.yaml",
        lm_eval_task="asdiv_cot_llama",
        metrics={"exact_match,flexible-extract": "accuracy"},
        files=r"asdiv.*test.*",
        fields={"body": str, "question": str, "answer": str},
        hub="EleutherAI/asdiv",
        split="validation",
    )
    monkeypatch.setitem(BENCHMARKS, "arithmetic", arithmetic)
    rows = [
        {"body": "Tom has 3 pens.", "question": f"He buys {n}. How many has he?", "answer": f"{3 + n}"} for n in (1, 2)
    ]
    (tmp_path / "asdiv_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm = benchmark_files.ScriptedLM({"buys 1": "The final answer is 4", "buys 2": "The final answer is 7"})
    record = run_task(lm, "arithmetic", load_tasks(["arithmetic"], tmp_path)["arithmetic"])
    assert [item["accuracy"] for item in record["items"]] == [1, 0] and next(iter(record["metrics"])) == "accuracy"
    assert record["lm_eval_task"] == "asdiv_cot_llama" and "Tom has 3 pens." in lm.prompts[0]
    with pytest.raises(UserError, match="the hub did not give 'EleutherAI/asdiv'"):
        load_docs("arithmetic", None)
