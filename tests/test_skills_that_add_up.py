"""recipes/smollm2/skills_that_add_up.py on a tiny model: every combination is measured, nothing is trained twice."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBES = ("instructions", "wikipedia")


def script_of(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / "smollm2" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up, and skills_in_sequence imports the other.
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch):
    return script_of("skills_that_add_up", monkeypatch)


@pytest.fixture
def sequence(script, monkeypatch):
    return script_of("skills_in_sequence", monkeypatch)


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
    picture = (tmp_path / "out" / "retained.svg").read_text()
    assert "sums + products + powers" in picture
    assert (tmp_path / "out" / "retained.dark.svg").is_file()
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


def test_skills_in_sequence(script, sequence, data, base, tmp_path, monkeypatch, capsys):
    tasks = ["sums", "products", "powers"]
    sizes = ["--steps", "3", "--num_heldout", "4", "--num_test", "6", "--num_probe", "2"]
    words = ["skills", str(data), str(tmp_path / "out"), "--model", str(base), "--tasks", *tasks, *sizes]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    sequence.main()

    result = json.loads((tmp_path / "out" / "sequence.json").read_text())
    names = {"mask a task", "lora a task", "union of masks", *sequence.SEQUENTIAL}
    assert result.keys() == {"settings", "base", *names}
    for name in names:
        after = result[name]["after"]
        assert [list(hits) for hits in after] == [tasks[:1], tasks[:2], tasks]
    # A task that has an adapter to itself loses nothing.
    for name in ("mask a task", "lora a task"):
        assert result[name]["after"][0]["sums"] == result[name]["after"][2]["sums"]
    # The union is the mask alone after the first task.
    assert result["union of masks"]["after"][0] == result["mask a task"]["after"][0]
    text = (tmp_path / "out" / "sequence.md").read_text()
    assert all(f"| {name} |" in text for name in names)


def test_replay_replaces_six_percent_of_the_rows(script, sequence):
    first = script.Task("first", [{"input_ids": [1, place]} for place in range(100)], [], [])
    second = script.Task("second", [{"input_ids": [2, place]} for place in range(100)], [], [])
    rows = sequence.with_replay(second, [first], seed=0)
    assert [row["input_ids"][0] for row in rows] == [2] * 94 + [1] * 6
    assert sequence.with_replay(first, [], seed=0) == first.train
