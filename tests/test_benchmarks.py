"""The benchmarks run from end to end on tiny shapes. Their numbers mean nothing there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(tmp_path, *names):
    command = [sys.executable, "-m", "benchmarks", *names, "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "benchmarks.json").read_text())
    assert record["environment"]["packages"]["torch"] and record["settings"]["threads"] == 2
    assert {row["benchmark"] for row in record["rows"]} == set(names)
    return record["rows"], done.stdout


def test_ratios_of_both_sides_are_written(tmp_path):
    rows, printed = run(tmp_path, "refresh", "file", "step", "published", "prefix")
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
def test_memory_and_scaling(tmp_path):
    rows, _ = run(tmp_path, "memory", "scaling")
    assert len(rows) == 7


def test_an_unknown_benchmark_is_named(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "speed", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no benchmark 'speed'" in done.stderr
