"""Memory runs out in earnest: under a bound on address space, and what is then advised runs under the same bound."""

import json
import re
import resource
import sys

import psutil
import pytest
import torch

import tiny
from maskft.cli.main import main
from maskft.estimate.out_of_memory import is_out_of_memory
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


@pytest.fixture
def call(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    model = tiny.tiny_llama(vocab_size=len(tokenizer), num_layers=4, hidden_size=128, intermediate_size=2048)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{n}+1=", "completion": "12" * 120} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def call(name, words=(), **changes):
        paths = {"model_name_or_path": tmp_path / "base", "dataset_name": tmp_path / "rows.jsonl"}
        options = {**paths, "output_dir": tmp_path / name, **SETTINGS, **changes}
        pairs = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
        status = main(["train", *pairs, *words])  # of an option given twice, the last counts
        return status, " ".join(capsys.readouterr().err.split())

    return call


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the bound is one of Linux")
def test_a_run_that_needs_too_much_says_what_would_fit(call, tmp_path):
    assert call("first", per_device_train_batch_size=1)[0] == 0  # what is imported on the way takes address space too
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 700_000_000, before[1]))
    try:
        status, err = call("second")
        line = err[err.index("maskft: error") :]
        assert status == 2 and "Traceback" not in err
        told = re.search(
            r"out of memory \(tried to allocate [\d.]+ \w+\): the run needs about ([\d.]+) GB at its peak, most of it "
            r"\w+ \([\d.]+ GB\), and ([\d.]+) GB are there; these would fit: (.+ GB\); .+ GB\); .+ GB\))",
            line,
        )
        assert told, line
        need, there, settings = told.groups()
        sizes = [float(size) for size in re.findall(r"\(([\d.]+) GB\)", settings)]
        assert len(sizes) == 3 and max(sizes) <= float(there) < float(need)
        assert not (tmp_path / "second").exists()
        words = settings.partition(" (")[0].split()
        assert call("third", words)[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(OSError("out of memory"))
