"""Everything runs offline, on the CPU, with two threads at most."""

import gc
import os
import re
import shutil
import sys
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    TRL_EXPERIMENTAL_SILENCE="1",
)
# Only tests that are asked for by the marker gpu see one: maskft train would take it, and refuse several. A worker of
# xdist has the environment of the process that started it.
if "PYTEST_XDIST_WORKER" not in os.environ and not any(re.search(r"(?<!not )\bgpu\b", word) for word in sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parent))

import json

import pytest
import torch

import tiny
from tiny_tokenizer import tiny_tokenizer

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1)))


def pytest_collection_modifyitems(items):
    """Begin with the long files: a worker takes whole files, and one that starts a long file last keeps the other
    waiting.
    """
    items.sort(key=lambda item: item.path.parent.name not in ("training", "study"))


def pytest_collection_finish():
    """Take what was imported out of the garbage collector's sight: it would look through half a million objects in
    vain, which takes a third of a second each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny.tiny_llama(vocab_size=len(tokenizer), num_layers=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"prompt": f"{a}+{b}=", "completion": f"{a + b}", "answer": f"{a + b}", "answer_type": "number"}
        for a in range(8)
        for b in range(8)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert chromium, "no Chromium is installed; make test-browser installs Debian's"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()
