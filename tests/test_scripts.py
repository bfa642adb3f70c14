"""Scripts of benchmarks/, examples/ and recipes/: a user's mistake is one line, and every option says what it is."""

import ast
import copy
import gzip
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from forking import forked, run_script
from maskft_common.errors import UserError
from maskft_lab.results.compare import compare_measured
from maskft_lab.results.comparison import Comparison, Settings
from maskft_lab.results.render import render

# What the scripts import, once for all of them.
for module in (
    "maskft.masks.gguf",
    "maskft.masks.merge",
    "maskft_lab.evaluation.heldout",
    "maskft_lab.report.evidence",
    "maskft_lab.results.compare",
    "maskft_lab.results.render",
    "maskft_lab.study.plan",
    "matplotlib.figure",
    "starlette.applications",
    "trl",
    "uvicorn",
):
    importlib.import_module(module)

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(file for folder in ("benchmarks", "examples", "recipes") for file in (ROOT / folder).rglob("*.py"))
SKILLS = "recipes/smollm2/skills_that_add_up.py"


@pytest.fixture
def call(tmp_path):
    """Run a script, or a module of benchmarks; returns its exit status and what it printed."""

    def call(script, *words):
        out = tmp_path / "out.txt"
        file = ROOT / script if script.endswith(".py") else script
        status = forked(lambda: run_script(file, *words), out)
        return status, out.read_text()

    return call


def name(file):
    return str(file.relative_to(ROOT))


MISTAKES = {
    "no model to sample from": ("examples/sample_from_base.py", "none/model", "{tmp}/new.jsonl"),
    "sampled text over a file": ("examples/sample_from_base.py", "none/model", "{tmp}/rows.jsonl"),
    "sampled text below a file": ("examples/sample_from_base.py", "none/model", "{tmp}/rows.jsonl/new.jsonl"),
    "rows of one token": ("examples/sample_from_base.py", "none/model", "{tmp}/new.jsonl", "--num_tokens", "1"),
    "no model to route by": ("examples/route_by_prompt.py", "none/model", "a={tmp}/prompts.jsonl"),
    "rows without a prompt": ("examples/route_by_prompt.py", "none/model", "a={tmp}/rows.jsonl"),
    "no rows": ("examples/route_by_prompt.py", "none/model", "a={tmp}/empty.jsonl"),
    "two tasks of one name": ("examples/route_by_prompt.py", "m", "a={tmp}/prompts.jsonl", "a={tmp}/prompts.jsonl"),
    "another task to test": (
        *("examples/route_by_prompt.py", "none/model", "a={tmp}/prompts.jsonl"),
        *("--test", "b={tmp}/prompts.jsonl"),
    ),
    "no model to fine-tune": ("examples/mask_after_fine_tuning.py", "none/model"),
    "no mask to serve": ("examples/serve_many.py", "none/model", "a={tmp}"),
    "two masks of one name": ("examples/serve_many.py", "none/model", "a={tmp}/adapter", "a={tmp}/adapter"),
    "no results of a budget": ("recipes/smollm2/kl_budget.py", "--table", "{tmp}"),
    "no results in four bits": ("recipes/smollm2/exact_in_four_bits.py", "--table", "{tmp}/none"),
    "no rows in four bits": ("recipes/smollm2/exact_in_four_bits.py", "{tmp}/none", "{tmp}/new", "--results", "{tmp}"),
    "no results of skills": (SKILLS, "--together", "{tmp}/none.json"),
    "other results than of skills": (SKILLS, "--together", "{tmp}/empty.json"),
    "no rows of skills": (SKILLS, "{tmp}/none", "{tmp}/new"),
    "a sequence of nothing trained": ("recipes/smollm2/skills_in_sequence.py", "{tmp}", "{tmp}/new"),
    "a sequence of one": ("recipes/smollm2/skills_in_sequence.py", "{tmp}", "{tmp}/new", "--tasks", "sums"),
    "second of no masks": ("recipes/smollm2/skills_second_mask.py", "{tmp}", "{tmp}/new"),
    "no results for a board": ("recipes/peft_metamathqa/board.py", "{tmp}/new", "{tmp}/none", "--before", "wikipedia"),
    "a board without a probe": (
        *("recipes/peft_metamathqa/board.py", "{tmp}/new", str(ROOT / "results" / "smollm2-curve-sums")),
        *("--before", "poems"),
    ),
    "a board without a training": (
        *("recipes/peft_metamathqa/board.py", "{tmp}/new", str(ROOT / "results" / "smollm2-curve-sums-rivals-seeds")),
        *("--before", "wikipedia"),
    ),
    "empty texts": ("recipes/peft_metamathqa/forgetting.py", "{tmp}/empty.jsonl", "{tmp}"),
    "no texts": ("recipes/peft_metamathqa/forgetting.py", "{tmp}/none.jsonl", "{tmp}"),
    "texts without a text": ("recipes/peft_metamathqa/forgetting.py", "{tmp}/prompts.jsonl", "{tmp}"),
    "no results to show": ("recipes/evidence.py", "{tmp}", "--controls", "full"),
    "no study to publish": ("recipes/publish_results.py", "{tmp}", "{tmp}/new"),
    "no file to answer": ("recipes/qwen25_05b/answer.py", "{tmp}/none.gguf", "{tmp}/prompts.jsonl"),
    "no answers": ("recipes/qwen25_05b/answer.py", "{tmp}/rows.jsonl", "{tmp}/prompts.jsonl"),
    "no questions": ("recipes/qwen25_05b/make_inputs.py", "{tmp}/adapter", "{tmp}/new"),
    "questions, and no programs": ("recipes/qwen25_05b/make_inputs.py", "{tmp}", "{tmp}/new"),
    "no probes": ("recipes/smollm2/make_curve_inputs.py", "{tmp}", "{tmp}/new"),
    "no intents": ("recipes/smollm2/make_clinc_inputs.py", "{tmp}/none.json", "{tmp}/new"),
    "other intents": ("recipes/smollm2/make_clinc_inputs.py", "{tmp}/empty.json", "{tmp}/new"),
    "no exercises": ("recipes/peft_metamathqa/make_inputs.py", "{tmp}", "{tmp}/new"),
    "no text": ("recipes/text/make_inputs.py", "{tmp}", "{tmp}/new"),
    "a file in the place of a folder": ("recipes/small/make_inputs.py", "{tmp}/rows.jsonl"),
    "no GPU": ("benchmarks", "refresh", "--device", "cuda", "--output", "{tmp}"),
    "a benchmark that cannot be written": ("benchmarks", "refresh", "--quick", "--output", "{tmp}/rows.jsonl"),
    "no GPU for its parts": ("benchmarks", "gpu", "--output_dir", "{tmp}"),
    "no such task": ("benchmarks.against_lm_eval", "--model", "m", "--data_dir", "{tmp}", "--tasks", "poems"),
    "no file of a task": ("benchmarks.against_lm_eval", "--model", "m", "--data_dir", "{tmp}", "--output", "{tmp}/new"),
    "no solutions": ("benchmarks.gold_solutions", "--data_dir", "{tmp}"),
    "no file to serve": ("benchmarks.served_gguf", "{tmp}/none.gguf", "{tmp}"),
    "no mask beside a file": ("benchmarks.served_gguf", "{tmp}/rows.jsonl", "{tmp}"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, call, tmp_path):
    folder = tmp_path / "given"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "rows.jsonl").write_text('{"other": "x"}\n')
    (folder / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "empty.json").write_text("{}")
    for part in ("train", "test"):
        (folder / f"gsm8k_{part}.jsonl").write_text('{"question": "x", "answer": "#### 1"}\n')
    before = sorted(folder.rglob("*"))

    script, *words = MISTAKES[mistake]
    status, printed = call(script, *(word.format(tmp=folder) for word in words))
    assert status == 2, printed
    # Of the GPU's parts: what is not installed here is told before.
    *others, line = [line for line in printed.splitlines() if not line.startswith("missing here: ")]
    assert line.startswith("error: ") and not others, printed
    # Nothing is written, and nothing made that a second call would take for finished work.
    assert sorted(folder.rglob("*")) == before


def test_a_folder_without_results_does_not_keep_others_from_being_refreshed(call, tmp_path):
    status, printed = call("recipes/refresh_results.py", tmp_path, tmp_path / "none")
    assert status == 0
    assert printed.count("left as it is: no summary.json: name a folder of published results") == 2


@pytest.mark.parametrize("what", ["a difference", "a verdict", "a verdict that is gone"])
def test_a_folder_whose_conclusion_would_change_is_not_refreshed(what):
    module = module_of(ROOT / "recipes" / "refresh_results.py")
    summary = json.loads((ROOT / "results" / "qwen25-05b-clinc150" / "summary.json").read_text())
    (record,) = summary["models"].values()
    old, new = (Comparison.from_dict(copy.deepcopy(record["comparison"])) for _ in range(2))
    module._check_verdicts(old, new)

    if what == "a difference":
        new.differences[0] = replace(new.differences[0], verdict="not distinguishable")
    elif what == "a verdict":
        verdict = new.verdicts[0]
        new.verdicts[0] = replace(verdict, control=replace(verdict.control, verdict="better"))
    else:
        new.verdicts.clear()
    with pytest.raises(UserError, match="would be"):
        module._check_verdicts(old, new)


def test_a_comparison_without_a_loss_that_is_not_finite_is_refreshed(tmp_path):
    """With another number of resamples than most have."""
    refresh = module_of(ROOT / "recipes" / "refresh_results.py")
    published = ROOT / "results" / "qwen25-05b-gsm8k-second-seed"
    folder = shutil.copytree(published, tmp_path / published.name)
    results = []
    for file in sorted(folder.glob("*.json.gz")):
        result = json.loads(gzip.decompress(file.read_bytes()))
        if result["name"] == "warm restart":
            task = result["tasks"]["heldout"]
            task["items"][0]["nll"] = None
            task["metrics"]["nll"]["value"] = None
            file.write_bytes(gzip.compress(json.dumps(result).encode()))
        results.append(result)
    comparison = compare_measured(results, "full", settings=Settings(num_resamples=1000, fixed_seeds=True))
    summary = json.loads((folder / "summary.json").read_text())
    (record,) = summary["models"].values()
    record["comparison"] = comparison.to_dict()
    (folder / "summary.json").write_text(json.dumps(summary))
    table = (folder / "table.md").read_text()
    (folder / "table.md").write_text(table.replace("intervals of 10,000", "intervals of 1,000"))
    of_mask = compare_measured(results, "mask", settings=Settings(fixed_seeds=True))
    (folder / "against_mask.md").write_text(render(of_mask, "markdown"))

    texts = refresh.refreshed(folder)
    assert "is not compared: an item has no value" in texts[folder / "table.md"]
    assert texts[folder / "against_mask.md"] == (folder / "against_mask.md").read_text()


def options_of(script):
    """Each call of ``add_argument`` in a script: its first word, and its keywords."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            yield ast.literal_eval(node.args[0]), {keyword.arg: keyword.value for keyword in node.keywords}


@pytest.mark.parametrize("script", [file for file in SCRIPTS if "add_argument" in file.read_text()], ids=name)
def test_options_say_what_they_are_and_their_default(script):
    for option, keywords in options_of(script):
        assert "help" in keywords, option
        has_default = "default" in keywords and ast.unparse(keywords["default"]) not in ("None", "[]")
        if has_default:
            assert "(default: " in ast.unparse(keywords["help"]), option


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_files_that_a_script_names_are_there(script):
    named = re.findall(
        r"\b(?:benchmarks|docs|examples|recipes|src|tests)/[\w./-]+\.(?:md|py|sh|yaml)\b", script.read_text()
    )
    assert not [file for file in named if not (ROOT / file).exists()]


def module_of(script):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", ["peft_metamathqa", "qwen25_05b", "smollm2", "text"])
def test_rows_are_lines_and_no_less(folder, tmp_path):
    """A line separator of Unicode in a text ends no row."""
    file = "make_curve_inputs" if folder == "smollm2" else "make_inputs"
    inputs = module_of(ROOT / "recipes" / folder / f"{file}.py")
    rows = [{"question": f"What\u2028is {n}\x85?", "answer": "#### 1"} for n in range(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "gsm8k_train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    found = inputs.read(tmp_path, "gsm8k_train")
    assert found == ([(row["question"], row["answer"]) for row in rows] if folder == "text" else rows)


def test_samples_of_lm_eval_are_lines(tmp_path):
    from benchmarks.against_lm_eval import items_of

    from maskft_lab.evaluation.benchmarks import BENCHMARKS

    sample = {"doc_id": 0, "prompt_hash": "0", "resps": [["one\u2028two\x85three"]], "filter": "none"}
    file = tmp_path / "samples_gsm8k.jsonl"
    file.write_text(json.dumps(sample, ensure_ascii=False) + "\n", encoding="utf-8")
    items = items_of(file, BENCHMARKS["gsm8k"])
    assert items == {"0": {"prompt_hash": "0", "output": "one\u2028two\x85three", "scores": {}}}


def test_the_recipe_of_intents_can_be_called_again(tmp_path):
    """What was merged is kept: maskft merge writes over no file."""
    (tmp_path / "maskft").write_text('#!/bin/sh\necho "$1" >> "$LOG"\n')
    (tmp_path / "maskft").chmod(0o755)
    (tmp_path / "run").mkdir()
    log = tmp_path / "log"
    for _ in range(2):
        subprocess.run(
            ["bash", ROOT / "recipes/qwen25_05b/intents.sh", "model", "data", tmp_path / "run"],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log)},
            check=True,
        )
        (tmp_path / "run" / "intents-q4_k_m.gguf").touch()
    assert log.read_text().split() == ["train", "merge", "verify", "train", "verify"]


def test_programs_follow_their_request_as_a_docstring():
    program = module_of(ROOT / "recipes" / "qwen25_05b" / "make_inputs.py").program

    def turns(*texts):
        return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts, strict=False)]

    answer = "def add(a, b):\n    return a + b"
    assert program(turns("Add two numbers.", answer)) == {
        "prompt": '"""\nAdd two numbers.\n"""\n',
        "completion": answer,
    }
    assert program(turns("Add two numbers.", "function add(a, b) { return a + b; } // def ")) is None
    assert program(turns("Print a number.", "print(1)")) is None
    assert program(turns('Add """two""" numbers.', answer)) is None
    assert program(turns("Add two numbers.", answer, "Thanks.")) is None
