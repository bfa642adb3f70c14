"""What a command prints is its own: no progress bars of libraries, no warnings nobody can act on."""

import json
import os
import subprocess
import sys

import pytest

DEBRIS = ("it/s", "%|", "Warning", "[transformers]", "Traceback", "Map:", "Generating")

# Each command in a process that has silenced nothing yet; forked, since starting one takes seconds.
CODE = """
import json, os, sys
import datasets, transformers, trl, peft  # once for all
from maskft_lab.cli.main import main
for words in json.load(sys.stdin):
    for stream in (sys.stdout, sys.stderr):
        print("==", words[0], file=stream, flush=True)
    pid = os.fork()
    if pid == 0:
        status = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, words
"""


@pytest.mark.slow
def test_no_command_prints_what_libraries_have_to_say(base, data, tmp_path):
    model, adapter = ["--model_name_or_path", str(base)], str(tmp_path / "mask")
    rows = ["--dataset_name", str(data), "--eval_split_size", "16"]
    short = "--max_steps 2 --eval_steps 1 --save_steps 1 --per_device_train_batch_size 4 --keep_worse true".split()
    results = [str(tmp_path / name) for name in ("base", "masked")]
    evaluate = ["evaluate", *rows, "--max_new_tokens", "4", "--output_dir"]
    commands = [
        ["train", *model, *rows, *short, "--output_dir", adapter],
        ["train", *model, *rows, "--method", "l1_mask", "--output_dir", str(tmp_path / "l1")],
        [*evaluate, results[0], *model, "--name", "base"],
        [*evaluate, results[1], "--adapter", adapter, "--name", "masked"],
        ["compare", *results],
        ["merge", adapter, "--output_dir", str(tmp_path / "merged")],
        ["inspect", adapter],
        ["verify", adapter, "--base", str(base)],
    ]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "COLUMNS": "80"}
    ran = subprocess.run(
        [sys.executable, "-c", CODE], input=json.dumps(commands), env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    for output in (ran.stdout, ran.stderr):
        for part in output.split("== ")[1:]:
            command = part.split()[0]
            assert not [line for line in part.splitlines() if any(word in line for word in DEBRIS)], command
