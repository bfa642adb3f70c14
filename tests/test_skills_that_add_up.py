"""recipes/smollm2/skills_that_add_up.py on a tiny model: every combination is measured, nothing is trained twice."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBES = ("instructions", "wikipedia")


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("skills", ROOT / "recipes" / "smollm2" / "skills_that_add_up.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up.
    sys.modules["skills"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["skills"]


def write(file, rows):
    with gzip.open(file, "wt") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    signs = {"sums": "+", "products": "*", "powers": "-"}
    for task, sign in signs.items():
        rows = [{"prompt": f"{a}{sign}{b}=", "completion": f"{a}"} for a in range(6) for b in range(6)]
        write(folder / f"{task}_train.jsonl.gz", rows)
        write(folder / f"{task}_test.jsonl.gz", rows[::5])
    for probe in PROBES:
        write(folder / f"{probe}_report.jsonl.gz", [{"text": "one two"}, {"text": "three four five"}])
    return folder


def test_skills_that_add_up(script, data, base, tmp_path, monkeypatch, capsys):
    tasks = ["sums", "products", "powers"]
    sizes = ["--steps", "3", "--num_heldout", "4", "--num_test", "6", "--num_probe", "2"]
    words = ["skills", str(data), str(tmp_path / "out"), "--model", str(base), "--tasks", *tasks, *sizes]
    monkeypatch.setattr(sys, "argv", words)
    script.main()

    result = json.loads((tmp_path / "out" / "result.json").read_text())
    combined = {"sums+products", "sums+powers", "products+powers", "sums+products+powers"}
    assert result["methods"]["mask"]["measured"].keys() == {"base", *tasks, *combined}
    assert result["methods"]["lora"]["measured"].keys() == {*tasks, *combined}
    pair = result["methods"]["lora"]["measured"]["sums+powers"]
    assert {task: len(hits) for task, hits in pair["hits"].items()} == {"sums": 6, "powers": 6}
    assert len(pair["heldout_accuracy_of_ways"]) == len(script.WAYS)
    assert pair["way"] in script.WAYS
    printed = capsys.readouterr().out
    assert printed.count("| union |") == printed.count("| LoRA r 16 |") - len(tasks) == len(combined)

    files = sorted((tmp_path / "out" / "adapters").rglob("*.safetensors"))
    written = [file.stat().st_mtime_ns for file in files]
    script.main()
    assert [file.stat().st_mtime_ns for file in files] == written
    assert json.loads((tmp_path / "out" / "result.json").read_text())["methods"] == result["methods"]


def test_the_retained_share_by_hand(script):
    alone = {"a": [1, 1, 1, 1], "b": [1, 1, 0, 0]}
    combined = {"a": [1, 1, 0, 0], "b": [1, 1, 0, 0]}
    share, low, high = script.retained(alone, combined)
    assert share == 0.75  # half of one task and all of the other
    assert low < share < high


def test_accuracy_counts_rows_that_are_right_in_all_tokens(script, base):
    from maskft.data.tokenizing import tokenize_example
    from maskft.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(base))
    model = load_model(str(base))
    measure = script.Measure(tokenizer, {})
    rows = [tokenize_example({"prompt": f"{a}+1=", "completion": "2"}, tokenizer) for a in range(4)]
    assert measure.hits(model, rows) == [0, 0, 0, 0]
    for row in rows:  # the model's own answer is right
        row["labels"] = [script.IGNORED] * len(row["labels"])
        ids, attention = script.pad([row["input_ids"]], 0, model.device)
        with script.torch.autocast("cpu", script.torch.bfloat16), script.torch.no_grad():
            answer = int(model(input_ids=ids, attention_mask=attention).logits[0, -2].argmax())
        row["input_ids"][-1] = answer
        row["labels"][-1] = answer
    assert measure.hits(model, rows) == [1, 1, 1, 1]
