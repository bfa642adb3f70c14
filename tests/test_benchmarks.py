"""The benchmarks run from end to end on tiny shapes. Their numbers mean nothing there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.learners import LEARNERS, PLAIN

import benchmark_files
import tiny
from tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[1]


def run(tmp_path, *names, expected=None):
    command = [sys.executable, "-m", "benchmarks", *names, "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "benchmarks.json").read_text())
    assert record["environment"]["packages"]["torch"] and record["settings"]["threads"] == 2
    assert {row["benchmark"] for row in record["rows"]} == (expected or set(names))
    return record["rows"], done.stdout


def test_ratios_of_both_sides_are_written(tmp_path):
    rows, printed = run(tmp_path, "refresh", "file", "step", "published", "prefix", "saving")
    for row in rows:
        assert row["value"] > 0 and row["what"] in printed
        if "ratio_of_each_round" in row:
            assert len(row["ratio_of_each_round"]) == 2
    sides = {row["what"] for row in rows if row["benchmark"] in ("step", "published")}
    assert sides == {
        "tiny: mask / floor",
        "tiny: sorted in every forward / mask",
        "tiny: mask / full",
        "tiny: mask / lora",
    }


@pytest.mark.slow
def test_learners(tmp_path):
    rows, _ = run(tmp_path, "learners")
    others = [learner for learner in LEARNERS if learner != PLAIN]
    measured = ["step"] * 2 + ["memory"]  # a step of one micro-batch and of four
    expected = [f"tiny: {learner} / {PLAIN}, {what}" for learner in others for what in measured]
    assert sorted(row["what"] for row in rows) == sorted(expected)
    assert all(row["value"] > 0 for row in rows)


@pytest.mark.slow
def test_memory_and_scaling(tmp_path):
    rows, _ = run(tmp_path, "memory", "scaling")
    assert len(rows) == 7


def test_gold_solutions(tmp_path):
    files = benchmark_files.write(tmp_path / "files")
    command = [sys.executable, "-m", "benchmarks.gold_solutions", "--data_dir", str(files), "--busy", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 of 2 passed") == 2
    rows = [{**row, "canonical_solution": "    return 1\n"} for row in benchmark_files.HUMANEVAL]
    (files / "HumanEval.jsonl.gz").unlink()
    (files / "HumanEval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "0 of 2 passed" in done.stdout and "AssertionError" in done.stdout


@pytest.mark.slow
def test_both_command_lines_on_the_same_items(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny.tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=8192).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    files = benchmark_files.write(tmp_path / "files")
    command = [sys.executable, "-m", "benchmarks.against_lm_eval", "--model", str(tmp_path / "model")]
    command += ["--data_dir", str(files), "--limit", "2", "--batch_size", "2", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "against_lm_eval.json").read_text())["rows"]
    assert [row["task"] for row in rows] == ["gsm8k", "humaneval", "ifeval"]
    for row in rows:
        assert row["items"] == 2 and not row["prompts_differ"] + row["outputs_differ"] + row["scores_differ"]
    assert rows[0]["scores_compared"] == ["accuracy", "accuracy_strict"]


def test_an_unknown_benchmark_is_named(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "speed", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no benchmark 'speed'" in done.stderr


def test_intervals(tmp_path):
    rows, _ = run(
        tmp_path,
        "intervals",
        expected={"scores", "pairs", "clusters", "samples", "families", "seeds"},
    )
    assert all(0 <= row["value"] <= 100 for row in rows)
    exact = [row for row in rows if "by_standard_error" in row]
    assert min(row["value"] for row in exact) > 93 > min(row["by_standard_error"] for row in exact)
