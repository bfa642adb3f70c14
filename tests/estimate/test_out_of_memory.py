"""Memory runs out in earnest: under a bound on address space, and what is then advised runs under the same bound."""

import json
import re
import subprocess
import sys

import pytest
import torch

import tiny
from maskft_lab.estimate.out_of_memory import is_out_of_memory
from tiny_tokenizer import tiny_tokenizer

SETTINGS = {
    "eval_split_size": 4,
    "max_steps": 1,
    "per_device_train_batch_size": 32,
    "eval_strategy": "no",
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": 256,
    "dataloader_pin_memory": False,
}


# A process that trains once, since what is imported on the way takes address space too, then within a bound on it.
BOUNDED = """
import resource, sys, psutil
from maskft_lab.cli.main import main

first = ["--output_dir", sys.argv[-1] + "-first", "--per_device_train_batch_size", "1"]
assert main(["train", *sys.argv[1:], *first]) == 0
print("bound from here", file=sys.stderr)
bound = psutil.Process().memory_info().vms + 700_000_000
resource.setrlimit(resource.RLIMIT_AS, (bound, resource.getrlimit(resource.RLIMIT_AS)[1]))
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.fixture
def within_bound(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny.tiny_llama(vocab_size=len(tokenizer), num_layers=4, hidden_size=128, intermediate_size=2048)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{n}+1=", "completion": "12" * 120} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(name, words=()):
        """Train with the settings and then ``words``, of which the last counts; exit status and message."""
        paths = {"model_name_or_path": tmp_path / "base", "dataset_name": tmp_path / "rows.jsonl"}
        pairs = [str(word) for key, value in (paths | SETTINGS).items() for word in (f"--{key}", value)]
        command = [sys.executable, "-c", BOUNDED, *pairs, *words, "--output_dir", str(tmp_path / name)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return ended.returncode, " ".join(ended.stderr.partition("bound from here")[2].split())

    return run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the bound is one of Linux")
def test_a_run_that_needs_too_much_says_what_helps(within_bound, tmp_path):
    status, err = within_bound("second")
    assert status == 2 and "Traceback" not in err, err
    line = err[err.index("maskft: error") :]
    told = re.search(r"out of memory \(tried to allocate [\d.]+ \w+\); try, in this order, (.+)", line)
    assert told, line
    assert not (tmp_path / "second").exists()
    status, err = within_bound(
        "third", re.findall(r"--per_device_train_batch_size 1|--gradient_checkpointing true", told[1])[0].split()
    )
    assert status == 0, err


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(OSError("out of memory"))
